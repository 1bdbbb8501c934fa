"""Single tensors out of a component's weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from simpletuner.errors import DataError
from simpletuner.families.spec import Component
from simpletuner.models.components import ModelSource
from simpletuner.models.weight_files import read_tensors

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
