"""Whatever lies in a model's folder, loading it opens no pickle and runs nothing."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from simpletuner.commands.convert import convert, convert_folder
from simpletuner.errors import ConfigError, DataError
from simpletuner.families.registry import get_family_class, get_spec
from simpletuner.families.spec import Component
from simpletuner.models.components import ModelSource, component_config, load_component, load_preview_decoder
from simpletuner.models.safe_loading import shard_names, without_pickles
from simpletuner.models.single_file import names_in_file
from simpletuner.models.weight_files import weight_files
from simpletuner.validation.clip_score import ClipScorer
from tests.tiny import tiny_clip_folder, tiny_preview_decoder
from tests.tiny_sdxl import tiny_sdxl_folder

SPEC = get_spec("sdxl")
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def component(name: str) -> Component:
    return next(each for each in SPEC.components if each.name == name)


class Payload:
    """A pickle that makes a file when it is opened."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl_folder(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "model"))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "it ran"


def write_pickle(path: Path, marker: Path) -> None:
    with path.open("wb") as file:
        pickle.dump({"weight": Payload(marker)}, file)


def load(folder: Path, part: str) -> torch.nn.Module:
    return load_component(ModelSource(str(folder)), component(part), torch.float32)


def with_index(folder: Path, part: str, shard: str) -> Path:
    """Weights in shards, as an index names them."""
    place = folder / part
    weights = place / f"{WEIGHTS[part]}.safetensors"
    names = list(load_file(weights))
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, shard)}
    (place / f"{WEIGHTS[part]}.safetensors.index.json").write_text(json.dumps(index))
    weights.unlink()
    return place / shard


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_shard_index_that_names_a_pickle_is_refused(folder: Path, part: str, marker: Path) -> None:
    write_pickle(with_index(folder, part, "pytorch_model-00001-of-00001.bin"), marker)
    with pytest.raises(DataError) as caught:
        load(folder, part)
    assert 'names "pytorch_model-00001-of-00001.bin": only safetensors are read' in str(caught.value)
    assert "simpletuner convert FILE" in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_folder_of_pickles_alone_is_refused(folder: Path, part: str, marker: Path) -> None:
    (folder / part / f"{WEIGHTS[part]}.safetensors").unlink()
    for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin", "model.pt", "model.ckpt"):
        write_pickle(folder / part / name, marker)
    with pytest.raises(DataError, match=f"cannot load {part}"):
        load(folder, part)
    with pytest.raises(DataError, match="holds no safetensors weights"):
        weight_files(ModelSource(str(folder)), component(part))
    assert not marker.exists()


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/x.safetensors", "..\\x.safetensors"])
@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_shard_index_leads_nowhere_else(folder: Path, part: str, shard: str) -> None:
    with_index(folder, part, shard)
    with pytest.raises(DataError, match="does not lie beside it"):
        load(folder, part)
    with pytest.raises(ValueError, match="does not lie beside it"):
        shard_names(folder / part / f"{WEIGHTS[part]}.safetensors.index.json")


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a.safetensors"]}, {"weight_map": None}])
def test_a_shard_index_that_names_no_files_is_refused_by_name(tmp_path: Path, index: dict[str, object]) -> None:
    (tmp_path / "an.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"an\.index\.json has no weight_map"):
        shard_names(tmp_path / "an.index.json")


def test_an_adapter_or_kernels_beside_an_encoder_are_refused(folder: Path, marker: Path) -> None:
    config = {"base_model_name_or_path": "someone/else", "peft_type": "LORA"}
    (folder / "text_encoder/adapter_config.json").write_text(json.dumps(config))
    write_pickle(folder / "text_encoder/adapter_model.bin", marker)
    with pytest.raises(DataError, match=r"adapter_config\.json beside the weights"):
        load(folder, "text_encoder")
    (folder / "text_encoder/adapter_config.json").unlink()
    path = folder / "text_encoder/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attn_implementation": "someone/kernel"}))
    with pytest.raises(DataError, match="names a program on the hub"):
        load(folder, "text_encoder")
    assert not marker.exists()


def test_a_tokenizer_that_brings_code_does_not_run_it(folder: Path, marker: Path) -> None:
    code = f"import os\nos.mkdir({str(marker)!r})\nclass Tokens: pass\n"
    (folder / "tokenizer/evil.py").write_text(code)
    path = folder / "tokenizer/tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.Tokens", None]}}
    path.write_text(json.dumps(settings | {"tokenizer_class": "Tokens"}))
    family = get_family_class(SPEC)(SPEC, ModelSource(str(folder)), torch.device("cpu"), torch.float32)
    family.encoders.tokenizer("tokenizer")  # the class is ours; what the folder names is not looked for
    assert not marker.exists()


def test_a_scorer_and_a_preview_decoder_open_no_pickle(tmp_path: Path, folder: Path, marker: Path) -> None:
    clip = tiny_clip_folder(tmp_path / "clip")
    (clip / "model.safetensors").unlink()
    write_pickle(clip / "pytorch_model.bin", marker)
    with pytest.raises(DataError, match="cannot load the CLIP model"):
        ClipScorer(str(clip), torch.device("cpu"))._load()
    tiny_preview_decoder().save_pretrained(folder / "preview_decoder")
    (weights,) = (folder / "preview_decoder").glob("*.safetensors")
    weights.unlink()
    write_pickle(folder / "preview_decoder/diffusion_pytorch_model.bin", marker)
    with pytest.raises(DataError, match="cannot load the tiny autoencoder"):
        load_preview_decoder(ModelSource(str(folder)), SPEC)
    assert not marker.exists()


def test_a_pickle_under_the_name_of_safetensors_is_refused(tmp_path: Path, folder: Path, marker: Path) -> None:
    write_pickle(tmp_path / "model.safetensors", marker)
    with pytest.raises(DataError, match="cannot be read"):
        names_in_file(str(tmp_path / "model.safetensors"))
    write_pickle(folder / "vae/diffusion_pytorch_model.safetensors", marker)
    write_pickle(folder / "text_encoder/model.safetensors", marker)
    for part in ("vae", "text_encoder"):
        with pytest.raises(DataError, match=f"cannot load {part}"):
            load(folder, part)
    assert not marker.exists()


def test_whatever_a_library_tries_torch_load_is_closed_while_it_loads(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "a.bin")
    before = torch.load

    @without_pickles()
    def library() -> None:
        try:
            torch.load(tmp_path / "a.bin")
        except ValueError as error:
            raise OSError("as the libraries hide it") from error

    with pytest.raises(ValueError, match=r"a\.bin: only safetensors are read"):
        library()
    assert torch.load is before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is damaged"),
        (b"{", "is damaged"),
        (b"[1]", "no JSON object"),
        (b"\xff\xfe\x00", "is not UTF-16 text"),
        (b'{"a": ' * 100_000, "100 levels of nesting"),
    ],
)
def test_a_damaged_configuration_is_an_error_with_its_file(folder: Path, content: bytes, words: str) -> None:
    (folder / "vae/config.json").write_bytes(content)
    with pytest.raises(DataError) as caught:
        component_config(ModelSource(str(folder)), component("vae"))
    assert words in str(caught.value)
    assert str(folder / "vae/config.json") in str(caught.value)


# ---- convert -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"state_dict": x, "epoch": 3}])
def test_convert_writes_the_tensors_of_a_pickle(tmp_path: Path, wrap: Callable) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    tensors = {"a": shared, "b": shared.T, "half": torch.ones(2, dtype=torch.float16)}
    torch.save(wrap(tensors), tmp_path / "weights.ckpt")
    written = convert(tmp_path / "weights.ckpt", None)
    assert written == tmp_path / "weights.safetensors"
    found = load_file(written)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    with pytest.raises(ConfigError, match="already exists"):
        convert(tmp_path / "weights.ckpt", None)


def test_convert_gives_each_layer_of_a_lora_its_alpha_where_the_file_has_none(tmp_path: Path) -> None:
    pair = {f"{layer}.lora_{side}.weight": torch.ones(2, 2) for layer in ("a", "b") for side in "AB"}
    cases = {
        "lora": pair,
        "own": {**pair, "a.alpha": torch.tensor(4.0)},
        "kohya": {"a.lora_down.weight": torch.ones(2, 2)},
    }
    for name, tensors in cases.items():
        torch.save(tensors, tmp_path / f"{name}.pt")
    found = load_file(convert(tmp_path / "lora.pt", None, 8.0))
    assert found.keys() == {*pair, "a.alpha", "b.alpha"}
    assert found["a.alpha"] == found["b.alpha"] == 8
    for name, words in (("own", "has alpha already"), ("kohya", "holds no LoRA of PEFT's names")):
        with pytest.raises(ConfigError, match=words):
            convert(tmp_path / f"{name}.pt", None, 8.0)
        assert not (tmp_path / f"{name}.safetensors").exists()


def test_convert_takes_a_folder_of_files_that_are_one_tensor(tmp_path: Path, marker: Path) -> None:
    for number, name in enumerate(("0_en.pt", "deeper/1_en.pt", "done.pt")):
        path = tmp_path / "embeddings" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.full((2, 3), float(number), dtype=torch.bfloat16), path)
    save_file({"tensor": torch.ones(1)}, tmp_path / "embeddings/done.safetensors")
    assert convert_folder(tmp_path / "embeddings") == 2
    assert convert_folder(tmp_path / "embeddings") == 0
    [found] = load_file(tmp_path / "embeddings/deeper/1_en.safetensors").values()
    assert torch.equal(found, torch.full((2, 3), 1.0, dtype=torch.bfloat16))
    write_pickle(tmp_path / "embeddings/payload.pt", marker)
    with pytest.raises(DataError, match="none of it was run"):
        convert_folder(tmp_path / "embeddings")
    assert not marker.exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="contains no such file"):
        convert_folder(tmp_path / "empty")


def test_convert_runs_nothing_and_names_what_it_refuses(tmp_path: Path, marker: Path) -> None:
    write_pickle(tmp_path / "a.bin", marker)
    torch.save({"a": torch.ones(1), "b": Payload(marker)}, tmp_path / "b.pt")
    for name in ("a.bin", "b.pt"):
        with pytest.raises(DataError, match="contains more than tensors, and none of it was run"):
            convert(tmp_path / name, None)
    (tmp_path / "c.pt").write_bytes(b"no pickle")
    with pytest.raises(DataError, match=r"c\.pt"):
        convert(tmp_path / "c.pt", None)
    torch.save([1, 2], tmp_path / "d.pt")
    with pytest.raises(DataError, match="contains no named tensors"):
        convert(tmp_path / "d.pt", None)
    save_file({"a": torch.ones(1)}, tmp_path / "e.safetensors")
    with pytest.raises(ConfigError, match="a file that ends with"):
        convert(tmp_path / "e.safetensors", None)
    assert not marker.exists()
    assert not list(tmp_path.glob("[a-d].safetensors"))
