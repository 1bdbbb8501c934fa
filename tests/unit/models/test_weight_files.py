"""Single tensors out of a component's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from simpletuner.errors import DataError, Problem
from simpletuner.families.spec import Component
from simpletuner.models import weight_files as weight_files_module
from simpletuner.models.components import ModelSource
from simpletuner.models.weight_files import read_tensors, weight_files

VAE = Component("vae", "diffusers.AutoencoderKLFlux2", "vae")
STEM = "diffusion_pytorch_model"


def write_sharded(folder: Path) -> None:
    shards = {f"{STEM}-00001-of-00002": {"bn.mean": torch.arange(3.0)}, f"{STEM}-00002-of-00002": {"w": torch.ones(1)}}
    folder.mkdir(parents=True)
    for name, tensors in shards.items():
        save_file(tensors, folder / f"{name}.safetensors")
    weight_map = {key: f"{name}.safetensors" for name, tensors in shards.items() for key in tensors}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text("{}")


def test_a_tensor_is_found_in_whichever_shard_it_lies(tmp_path: Path) -> None:
    write_sharded(tmp_path / "vae")
    found = read_tensors(ModelSource(str(tmp_path)), VAE, ["bn.mean", "w"])
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"bn.mean": [0.0, 1.0, 2.0], "w": [1.0]}


def test_a_tensor_of_another_vae_is_taken_where_one_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path / "vae")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    save_file({"bn.mean": torch.full((3,), 7.0)}, tmp_path / "other" / f"{STEM}.safetensors")
    source = ModelSource(str(tmp_path), vae=str(tmp_path / "other"))
    assert read_tensors(source, VAE, ["bn.mean"])["bn.mean"].tolist() == [7.0, 7.0, 7.0]


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path / "vae")
    with pytest.raises(DataError, match=r"the weights of vae have no bn\.var"):
        read_tensors(ModelSource(str(tmp_path)), VAE, ["bn.mean", "bn.var"])


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    (tmp_path / "vae" / f"{STEM}.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(DataError, match=f"{STEM}.safetensors cannot be read"):
        read_tensors(ModelSource(str(tmp_path)), VAE, ["bn.mean"])


@pytest.mark.parametrize(
    ("role", "variant", "name"),
    [
        ("text_encoder", None, "model.safetensors"),
        ("text_encoder", "fp16", "model.fp16.safetensors"),
        ("vae", None, f"{STEM}.safetensors"),
        ("denoiser", "bf16", f"{STEM}.bf16.safetensors"),
    ],
)
def test_the_whole_file_of_the_part_and_variant_is_taken(role: Any, variant: str, name: str, tmp_path: Path) -> None:
    part = Component("part", "a.B", role)
    folder = tmp_path / "part"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for each in ("model", "model.fp16", STEM, f"{STEM}.bf16", "other"):
        save_file({"w": torch.ones(1)}, folder / f"{each}.safetensors")
    source = ModelSource(str(tmp_path), variant=variant)
    assert weight_files(source, part) == [folder / name]
    (folder / name).unlink()  # without it, all that is there
    assert weight_files(source, part) == sorted(folder.glob("*.safetensors"))
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(DataError, match=r"pretrained_model_name_or_path: .*part holds no safetensors weights"):
        weight_files(source, part)


def test_weights_of_the_hub_are_one_file_or_those_of_its_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variant stands behind `index` in the name of an index, and before `safetensors` in that of a file."""
    there: set[str] = set()
    asked: list[str] = []
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}}))

    def component_file(source: ModelSource, component: Component, name: str) -> Path:
        asked.append(name)
        if name not in there:
            raise DataError(Problem("not there"))
        return index if name.endswith(".json") else Path(name)

    monkeypatch.setattr(weight_files_module, "component_file", component_file)
    source = ModelSource("someone/model", variant="fp16")
    there |= {f"{STEM}.safetensors.index.fp16.json", "1.safetensors", "2.safetensors"}
    assert weight_files(source, VAE) == [Path("1.safetensors"), Path("2.safetensors")]
    assert asked[:2] == [f"{STEM}.fp16.safetensors", f"{STEM}.safetensors.index.fp16.json"]
    there.add(f"{STEM}.fp16.safetensors")
    assert weight_files(source, VAE) == [Path(f"{STEM}.fp16.safetensors")]
    asked.clear()
    with pytest.raises(DataError, match="not there"):
        weight_files(ModelSource("someone/model"), VAE)
    assert asked == [f"{STEM}.safetensors", f"{STEM}.safetensors.index.json"]
