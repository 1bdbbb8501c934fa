"""Adapter files of any format, read into `AdapterWeights`: every tensor finds its layer, or the file is refused.

The format is reported by the keys themselves; a file may come from any program that writes one of the forms in
`formats.py`, from PEFT (`base_model.model.` or no prefix), or from older diffusers (`.lora.down.weight`).
"""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.adapters.formats import LYCORIS_PREFIX, Format
from simpletuner.adapters.layers import is_layer, num_rows
from simpletuner.adapters.metadata import is_of_first_version
from simpletuner.adapters.peft_settings import CONFIG_FILE, config_beside, scale_of_layer, settings_in
from simpletuner.adapters.weights import (
    ALPHA,
    DORA,
    DOWN,
    TENSOR_NAMES,
    UP,
    AdapterWeights,
    Module,
    alpha_tensor,
    rank_of,
    row_norms,
    split_lora,
    swap_halves,
)
from simpletuner.config.paths import adapter_file_in
from simpletuner.errors import DataError, Problem
from simpletuner.families.keys import OriginalModule
from simpletuner.families.spec import FamilySpec
from simpletuner.text import read_json_text

LYCORIS_CONFIG = "lycoris_config"  # metadata entry with the configuration, as JSON

# How other programs call a tensor of a module, the longest first.
_SYNONYMS = {
    "lora_magnitude_vector.weight": DORA,
    "lora_magnitude_vector": DORA,
    "lora.down.weight": DOWN,
    "lora.up.weight": UP,
    "lora_A.weight": DOWN,
    "lora_B.weight": UP,
    "lora_A.default.weight": DOWN,
    "lora_B.default.weight": UP,
} | {name: name for name in TENSOR_NAMES}
_ENDINGS = sorted(_SYNONYMS, key=len, reverse=True)


_PEFT_PREFIX = "base_model.model."
_PREFIXES: Mapping[str, Format] = {
    f"{LYCORIS_PREFIX}_": "lycoris",
    "lora_unet_": "kohya",
    "diffusion_model.": "comfyui",
}


def read_adapter(path: Path, spec: FamilySpec, denoiser: nn.Module) -> AdapterWeights:
    """Read a file, or the one in a folder of PEFT or of diffusers.

    Args:
        denoiser: of the family, without an adapter; its layers give the names and sizes.

    Raises:
        DataError: unreadable, or a tensor belongs to no layer of the denoiser.
    """
    tensors, metadata = read_adapter_file(path)
    return adapter_from_tensors(tensors, metadata, spec, denoiser, str(path))


def read_adapter_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, with PEFT's settings where they lie beside it.

    Args:
        path: a file, or a folder with a file of one of the names that PEFT and diffusers give.

    Raises:
        DataError: no such file, or not a safetensors file.
    """
    path = adapter_file_in(path)
    if not path.is_file():
        raise DataError(Problem("there is no adapter file here", file=str(path)))
    tensors, metadata = read_tensor_file(path)
    beside = config_beside(path) if any(key.startswith(_PEFT_PREFIX) for key in tensors) else {}
    return tensors, metadata | beside


def read_tensor_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        DataError: not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise DataError(Problem(f"is not a readable safetensors file: {error}", file=str(path))) from error


def adapter_from_tensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], spec: FamilySpec, denoiser: nn.Module, file: str
) -> AdapterWeights:
    """Tensors by a file's keys -> weights by layer.

    Raises:
        DataError: a tensor belongs to no layer of the denoiser, or a module is not complete.
    """
    names = module_names(spec, denoiser, swaps_last_block=not is_of_first_version(metadata, spec))
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    targets: dict[str, OriginalModule] = {}
    unmatched = []
    for key, tensor in tensors.items():
        module_key, tensor_name = split_key(key)
        target = names.get(without_prefix(module_key, spec))
        if target is None or not tensor_name:
            unmatched.append(key)
            continue
        # PEFT's magnitudes belong to rows, whatever their shape: (out), or (1, out, 1, 1) of a convolution.
        found[module_key][tensor_name] = tensor.flatten() if ".lora_magnitude_vector" in key else tensor
        targets[module_key] = target
    if unmatched or not tensors:
        raise DataError(_unmatched_problem(unmatched, len(tensors), denoiser, file))
    layers = dict(denoiser.named_modules())
    settings = settings_in(metadata, spec.component("denoiser").name, file)
    modules: dict[str, Module] = {}
    for module_key, module in found.items():
        complete = _shaped(_completed(module, module_key, without_prefix(module_key, spec), settings, file))
        for path, part in _in_denoiser(complete, targets[module_key], layers, file).items():
            modules[path] = part
    notices = _unknown_scale(tensors, settings) + _without_effect(modules, spec)
    return AdapterWeights(modules, metadata, lycoris_config_in(metadata, file), notices)


def format_of(tensors: Mapping[str, Tensor]) -> Format:
    """The format that a file's keys show; PEFT's own form, which has other prefixes, counts as diffusers'."""
    key = next(iter(tensors), "")
    for prefix, found in _PREFIXES.items():
        if key.startswith(prefix):
            return found
    return "diffusers"


def split_key(key: str) -> tuple[str, str]:
    """A key's module and the name of its tensor; the name is empty where it is none that we know."""
    for ending in _ENDINGS:
        if key.endswith(f".{ending}"):
            return key[: -len(ending) - 1], _SYNONYMS[ending]
    return key, ""


def without_prefix(module_key: str, spec: FamilySpec) -> str:
    """A module key without what its format puts in front."""
    component = spec.component("denoiser").name
    prefixes = (f"{LYCORIS_PREFIX}_", "lora_unet_", "lora_transformer_", "diffusion_model.", f"{component}.")
    for prefix in (*prefixes, _PEFT_PREFIX, "transformer.", "unet.", "model.diffusion_model."):
        if module_key.startswith(prefix):
            return module_key.removeprefix(prefix)
    return module_key


def module_names(spec: FamilySpec, denoiser: nn.Module, swaps_last_block: bool = True) -> dict[str, OriginalModule]:
    """What a layer may be called in a file, without the format's prefix -> the layer or layers that are meant.

    Names of the denoiser stand for themselves, and win over original names that happen to be equal.

    Args:
        swaps_last_block: see `KeyTable.in_model`.
    """
    found: dict[str, OriginalModule] = {}
    # No containers: where one is called as a layer is elsewhere (`to_out`), the layer in it is meant.
    paths = [path for path, module in denoiser.named_modules() if path and is_layer(module)]
    own = [OriginalModule(path, (path,)) for path in paths]
    own += [OriginalModule(path.removesuffix(".0"), (path,)) for path in paths if path.endswith("to_out.0")]
    tables = [spec.keys.in_model(paths, swaps_last_block), *([spec.diffsynth] if spec.diffsynth else [])]
    for original in [*own, *(keys.original(path) for keys in tables for path in paths)]:
        for name in (original.name, original.name.replace(".", "_")):
            found.setdefault(name, original)
    return found


def lycoris_config_in(metadata: Mapping[str, str], file: str) -> dict[str, Any]:
    """The LyCORIS configuration that a file was trained with; empty where it carries none."""
    if LYCORIS_CONFIG not in metadata:
        return {}
    try:
        config = read_json_text(metadata[LYCORIS_CONFIG])
    except ValueError as error:
        raise DataError(Problem(f"its {LYCORIS_CONFIG} metadata is not JSON: {error}", file=file)) from error
    if not isinstance(config, dict):
        raise DataError(Problem(f"its {LYCORIS_CONFIG} metadata is not a JSON object", file=file))
    return config


def _unmatched_problem(unmatched: list[str], count: int, denoiser: nn.Module, file: str) -> Problem:
    if not count:
        return Problem("holds no tensors", file=file)
    text = any("text_encoder" in key or key.startswith("lora_te") for key in unmatched)
    return Problem(
        f"{len(unmatched)} of {count} tensors belong to no module of {type(denoiser).__name__}: "
        f"{', '.join(unmatched[:5])}",
        file=file,
        fix="it also changes the text encoder, which is not trained here"
        if text
        else "use the model that the adapter was trained on",
    )


def _completed(module: dict[str, Tensor], key: str, path: str, settings: Mapping[str, Any] | None, file: str) -> Module:
    """With its alpha: PEFT keeps that in its settings, and where nobody says it the scale is 1."""
    if (DOWN in module) != (UP in module):
        raise DataError(Problem(f"{key} has only one half of a LoRA", file=file))
    if DOWN in module and ALPHA not in module:
        rank = rank_of(module)
        scale = scale_of_layer(settings, path, rank) if settings is not None else 1.0
        return module | {ALPHA: alpha_tensor(scale * rank)}
    return module


def _without_effect(modules: dict[str, Module], spec: FamilySpec) -> tuple[str, ...]:
    """Drop layers on which no adapter may sit, and which other programs adapt all the same; a line says so."""
    idle = [path for path in modules if any(fnmatch.fnmatchcase(path, pattern) for pattern in spec.unadaptable)]
    for path in idle:
        del modules[path]
    return (f"dropped, because an adapter there changes nothing: {', '.join(idle)}",) if idle else ()


def _unknown_scale(tensors: Mapping[str, Tensor], settings: Mapping[str, Any] | None) -> tuple[str, ...]:
    """A line where weights come from PEFT without their settings: its other files have alpha in them."""
    is_of_peft = any(key.startswith(_PEFT_PREFIX) or ".lora_A.default." in key for key in tensors)
    if settings is not None or not is_of_peft or any(key.endswith(f".{ALPHA}") for key in tensors):
        return ()
    text = f"there is no {CONFIG_FILE} beside these PEFT weights, so alpha is taken to be the rank (scale 1)"
    is_of_diffsynth = not any(key.startswith(_PEFT_PREFIX) for key in tensors)
    return (f"{text}; `simpletuner convert FILE --alpha N` writes another one" if is_of_diffsynth else text,)


def _in_denoiser(
    module: Module, target: OriginalModule, layers: Mapping[str, nn.Module], file: str
) -> dict[str, Module]:
    """A module under the paths of the denoiser, taken apart where it stands for several layers."""
    if len(target.parts) == 1 and not target.swaps_halves:
        return {target.parts[0]: module}
    if UP not in module:
        raise DataError(
            Problem(
                f"{target.name} is {len(target.parts)} layers in this model, and only a plain LoRA can be taken apart",
                file=file,
                fix="use a file in the lycoris format",
            )
        )
    if target.swaps_halves:
        return {target.parts[0]: swap_halves(module)}
    rows = [num_rows(layers[part]) for part in target.parts]
    if sum(rows) != module[UP].shape[0]:
        message = f"{target.name} has {module[UP].shape[0]} rows, and the model's layers {sum(rows)}"
        raise DataError(Problem(message, file=file, fix="use the model that the adapter was trained on"))
    parts = dict(zip(target.parts, split_lora(module, rows), strict=True))
    return {path: part for path, part in parts.items() if _changes(part, layers[path])}


def _changes(part: Module, layer: Any) -> bool:
    """Whether a part of a matrix changes its layer: one that only fills up the matrix does not."""
    if bool(part[UP].any()):
        return True
    return DORA in part and not torch.allclose(part[DORA].float(), row_norms(layer.weight), rtol=1e-5, atol=0)


def _shaped(module: Module) -> Module:
    """Magnitudes of weight decomposition have as many dimensions in LyCORIS as the weight."""
    if DORA not in module or UP not in module or module[DORA].dim() > 1:
        return module
    return {**module, DORA: torch.reshape(module[DORA], (-1, *[1] * (module[UP].dim() - 1)))}
