"""Adapter files of every family: each format carries the adapter, key for key, by the family's table."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from simpletuner.adapters.files import check_saved_adapter
from simpletuner.adapters.formats import FORMATS, encode
from simpletuner.adapters.layers import is_adaptable
from simpletuner.adapters.lora import LoraSettings, attach_lora
from simpletuner.adapters.lycoris import attach_lycoris
from simpletuner.adapters.reading import adapter_from_tensors, read_adapter
from simpletuner.adapters.weights import ALPHA, DOWN, UP, AdapterWeights
from simpletuner.errors import ConfigError
from simpletuner.families.registry import family_names, get_family_class, get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.family import ModelFamily
from simpletuner.training.adapter_roundtrip import probe_output
from tests.tiny_folders import TINY_FOLDERS


@pytest.fixture(scope="module", params=family_names())
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelFamily:
    spec = get_spec(request.param)
    folder = TINY_FOLDERS[request.param](tmp_path_factory.mktemp(request.param))
    return get_family_class(spec)(spec, ModelSource(str(folder)), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def untouched(family: ModelFamily) -> Tensor:
    """What the family's model makes of the probe without an adapter."""
    return probe_output(family, family.load_denoiser())


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("file_format", FORMATS)
def test_a_trained_lora_gives_the_same_output_from_every_format_and_can_be_gone_on_from(
    family: ModelFamily, untouched: Tensor, file_format: str, use_dora: bool, tmp_path: Path
) -> None:
    """Also where the layers are rows of one matrix elsewhere, with others that are not trained."""
    denoiser = family.load_denoiser()
    settings = LoraSettings(rank=2, alpha=3.0, file_format=file_format, use_dora=use_dora)
    adapter = attach_lora(denoiser, settings, family.spec, torch.float32, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.trainable_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    reference = probe_output(family, denoiser.eval())
    assert (reference - untouched).abs().max() > 1e-3
    adapter.save(tmp_path / "a.safetensors", {})
    fresh = family.load_denoiser()
    check_saved_adapter(
        tmp_path / "a.safetensors", fresh, family.spec, lambda model: probe_output(family, model), reference
    )
    again = family.load_denoiser()
    start = read_adapter(tmp_path / "a.safetensors", family.spec, again)
    assert attach_lora(again, settings, family.spec, torch.float32, seed=9).start_from(start, "a") == []
    torch.testing.assert_close(probe_output(family, again.eval()), reference, rtol=0, atol=2e-5)


@pytest.mark.parametrize("file_format", FORMATS)
def test_every_layer_keeps_its_weights_through_every_format(family: ModelFamily, file_format: str) -> None:
    """Also layers that are rows of a matrix, or have their halves swapped, in the original layout."""
    denoiser = family.load_denoiser()
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for path, layer in denoiser.named_modules():
        if is_adaptable(layer) and not any(fnmatch(path, each) for each in family.spec.unadaptable):
            rows, *columns = layer.weight.shape
            kernel = [1] * (len(columns) - 1)
            down = torch.randn(2, *columns, generator=generator)
            up = torch.randn(rows, 2, *kernel, generator=generator)
            modules[path] = {DOWN: down, UP: up, ALPHA: torch.tensor(2.0)}
    tensors = encode(AdapterWeights(modules), family.spec, file_format, denoiser)
    read = adapter_from_tensors(tensors, {}, family.spec, denoiser, "file").modules
    assert read.keys() == modules.keys()
    for path, module in modules.items():
        product, again = (
            torch.einsum("or,ri->oi", m[UP].flatten(1), m[DOWN].flatten(1)) * float(m[ALPHA]) / len(m[DOWN])
            for m in (module, read[path])
        )
        torch.testing.assert_close(again, product, rtol=0, atol=1e-4, msg=path)


@pytest.mark.parametrize("algo", ["lokr", "loha"])
def test_other_algorithms_keep_their_output_in_every_format_that_can_hold_them(
    family: ModelFamily, algo: str, tmp_path: Path
) -> None:
    """In kohya's and ComfyUI's names where no layer is a part of another matrix there; else by name a refusal."""
    denoiser = family.load_denoiser()
    lycoris = {"algo": algo, "linear_dim": 2, "linear_alpha": 3, "factor": 2, "preset": "attn-mlp"}
    adapter = attach_lycoris(denoiser, lycoris, family.spec, torch.float32, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.trainable_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    reference = probe_output(family, denoiser.eval())
    adapter.save(tmp_path / "source.safetensors", {})
    weights = read_adapter(tmp_path / "source.safetensors", family.spec, family.load_denoiser())
    is_apart = all(
        len(family.spec.keys.in_model(weights.modules).original(path).parts) == 1 for path in weights.modules
    )
    for file_format in ("lycoris", "kohya", "comfyui") if is_apart else ("lycoris",):
        fresh, path = family.load_denoiser(), tmp_path / f"{file_format}.safetensors"
        save_file(encode(weights, family.spec, file_format, fresh), path)
        check_saved_adapter(path, fresh, family.spec, lambda model: probe_output(family, model), reference)
    if not is_apart:
        with pytest.raises(ConfigError, match="only a plain LoRA can be moved there"):
            encode(weights, family.spec, "kohya", denoiser)
