"""Adapter files of other programs: from our weights to their keys by the family's key table, and back.

| format | a key | who reads it |
|---|---|---|
| `diffusers` | `transformer.blocks.0.attn.to_q.lora_A.weight` | diffusers, PEFT (without the prefix), most programs |
| `kohya` | `lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight` | kohya's scripts, A1111, Forge, ComfyUI |
| `comfyui` | `diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight` | ComfyUI |
| `lycoris` | `lycoris_blocks_0_attn_to_q.lokr_w1` | LyCORIS; ComfyUI for families that it knows in diffusers' names |
| `diffsynth` | `blocks.0.attn.a_to_qkv.lora_A.default.weight` | DiffSynth-Studio, for the families that it has |

Only plain LoRA is known to all of them; the other algorithms keep LyCORIS' names behind the format's module names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor, nn

from simpletuner.adapters.layers import num_rows
from simpletuner.adapters.weights import (
    ALPHA,
    DORA,
    DOWN,
    UP,
    AdapterWeights,
    Module,
    algorithm_of,
    fuse_loras,
    rank_of,
    row_norms,
    scaled,
    swap_halves,
    with_unit_scale,
)
from simpletuner.errors import ConfigError, Problem
from simpletuner.families.keys import KeyTable, OriginalModule
from simpletuner.families.readers import FORMS, Form
from simpletuner.families.spec import FamilySpec

Format = Form
FORMATS = FORMS

LYCORIS_PREFIX = "lycoris"
PEFT_NAMES = {DOWN: "lora_A.weight", UP: "lora_B.weight", DORA: "lora_magnitude_vector"}
DIFFSYNTH_NAMES = {DOWN: "lora_A.default.weight", UP: "lora_B.default.weight"}
COMFY_NAMES = {DOWN: "lora_A.weight", UP: "lora_B.weight"}
# The header entry in which diffusers keeps PEFT's settings.
PEFT_METADATA = "lora_adapter_metadata"


def encode(weights: AdapterWeights, spec: FamilySpec, file_format: Format, denoiser: nn.Module) -> dict[str, Tensor]:
    """The tensors of a file in a format; see `modules_in_file`."""
    return named(modules_in_file(weights, spec, file_format, denoiser), spec, file_format)


def modules_in_file(
    weights: AdapterWeights, spec: FamilySpec, file_format: Format, denoiser: nn.Module
) -> Mapping[str, Module]:
    """What a file holds, by the names that its format has for the layers, without the format's prefix.

    Args:
        denoiser: gives the sizes of layers that are rows of one matrix elsewhere; an adapter may sit on it.

    Raises:
        ConfigError: the format cannot hold this algorithm, or has no names for this family.
    """
    weights = with_multiplier_in_weights(weights)
    if file_format == "diffusers":
        _require_plain_lora(weights, file_format)
        return {path: _peft_module(module) for path, module in weights.modules.items()}
    if file_format == "diffsynth":
        return _diffsynth_modules(weights, spec, denoiser)
    modules = weights.modules
    if file_format != "lycoris" and file_format not in spec.keys.own_names:
        modules = original_modules(modules, spec.keys, denoiser, file_format)
    if file_format in spec.keys.without_alpha:
        return {name: _without_alpha(module) if UP in module else module for name, module in modules.items()}
    return modules


def named(modules: Mapping[str, Module], spec: FamilySpec, file_format: Format) -> dict[str, Tensor]:
    """The tensors of `modules_in_file` by the keys of a format."""
    if file_format == "lycoris":
        return _named(modules, lambda path: f"{LYCORIS_PREFIX}_{path}".replace(".", "_"), {})
    if file_format == "diffusers":
        prefix = spec.component("denoiser").name
        return _named(modules, lambda path: f"{prefix}.{path}", PEFT_NAMES)
    if file_format == "diffsynth":
        return _named(modules, str, DIFFSYNTH_NAMES)
    if file_format == "kohya":
        return _named(modules, lambda name: f"lora_unet_{name}".replace(".", "_"), {})
    return _named(modules, lambda name: f"diffusion_model.{name}", COMFY_NAMES)


def with_multiplier_in_weights(weights: AdapterWeights) -> AdapterWeights:
    """The same change without the multiplier of a LyCORIS configuration, which readers of files do not see.

    Raises:
        ConfigError: weights that are no factor of the change.
    """
    if weights.multiplier == 1:
        return weights
    modules: dict[str, Module] = {}
    for path, module in weights.modules.items():
        multiplied = scaled(module, weights.multiplier)
        if multiplied is None:
            kind = "weight decomposition" if DORA in module else algorithm_of(module)
            message = f"the multiplier {weights.multiplier:g} cannot be put into the weights of {kind} ({path})"
            fix = "merge it into the model with --merge, or convert it to a plain LoRA with --rank"
            raise ConfigError(Problem(message, key="multiplier", allowed="1", fix=fix))
        modules[path] = multiplied
    return replace(weights, modules=modules, lycoris={**weights.lycoris, "multiplier": 1.0})


def peft_metadata(weights: AdapterWeights, spec: FamilySpec) -> dict[str, str]:
    """The header entry that lets diffusers build PEFT's configuration without guessing; alpha is in the weights."""
    prefix = spec.component("denoiser").name
    ranks = {path: rank_of(module) for path, module in sorted(weights.modules.items())}
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    # Anchored, because PEFT takes a pattern for the end of a path too.
    pattern = {f"^{path}": rank for path, rank in ranks.items() if rank != common}
    settings = {
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": list(ranks),
        "use_dora": any(DORA in module for module in weights.modules.values()),
        "lora_bias": False,
    }
    return {PEFT_METADATA: json.dumps({f"{prefix}.{key}": value for key, value in settings.items()}, sort_keys=True)}


def _diffsynth_modules(weights: AdapterWeights, spec: FamilySpec, denoiser: nn.Module) -> dict[str, Module]:
    """Plain LoRA of scale 1: its readers know no alpha, and multiply by what they are called with, which is 1."""
    if spec.diffsynth is None:
        message = f"DiffSynth-Studio has no {spec.title}"
        raise ConfigError(Problem(message, key="format", allowed=", ".join(FORMS)))
    if not weights.is_plain_lora or any(DORA in module for module in weights.modules.values()):
        message = "diffsynth files hold plain LoRA without weight decomposition"
        raise ConfigError(
            Problem(message, key="format", allowed="lycoris", fix="convert it to a plain LoRA with --rank")
        )
    found = original_modules(weights.modules, spec.diffsynth, denoiser, "diffsynth")
    return {name: _peft_module(module) for name, module in found.items()}


def original_modules(
    modules: Mapping[str, Module], keys: KeyTable, denoiser: nn.Module, file_format: str
) -> dict[str, Module]:
    """The modules by their original names, those that are rows of one matrix in one piece.

    Raises:
        ConfigError: a module that is not plain LoRA would have to be taken apart or put together.
    """
    layers = dict(denoiser.named_modules())
    keys = keys.in_model(layers)
    by_original: dict[str, OriginalModule] = {}
    for path in modules:
        original = keys.original(path)
        by_original[original.name] = original
    found: dict[str, Module] = {}
    for name, original in by_original.items():
        parts = [modules.get(part) for part in original.parts]
        if len(parts) == 1 and not original.swaps_halves:
            found[name] = modules[original.parts[0]]
            continue
        if not all(part is None or {DOWN, UP} <= set(part) <= {DOWN, UP, ALPHA, DORA} for part in parts):
            raise ConfigError(_fusing_problem(name, original, file_format))
        is_decomposed = any(part is not None and DORA in part for part in parts)
        fused = fuse_loras(
            [
                (num_rows(layers[path]), part or ({DORA: row_norms(layers[path].weight)} if is_decomposed else {}))
                for path, part in zip(original.parts, parts, strict=True)
            ]
        )
        found[name] = swap_halves(fused) if original.swaps_halves else fused
    return found


def _fusing_problem(name: str, original: OriginalModule, file_format: str) -> Problem:
    return Problem(
        f"{file_format} files know {', '.join(original.parts)} as {name}, and only a plain LoRA can be moved there",
        key="format",
        allowed="lycoris",
        fix="export it as lycoris, or as a plain LoRA with --rank",
    )


def _require_plain_lora(weights: AdapterWeights, file_format: str) -> None:
    if not weights.is_plain_lora:
        raise ConfigError(
            Problem(
                f"{file_format} files hold plain LoRA, and this adapter is {', '.join(weights.algorithms)}",
                key="format",
                allowed="lycoris",
                fix="export it as lycoris, or as a plain LoRA with --rank",
            )
        )


def _without_alpha(lora: Module) -> dict[str, Tensor]:
    """A LoRA of scale 1: half of the readers would ignore its alpha, and the others apply it."""
    return {name: tensor for name, tensor in with_unit_scale(lora).items() if name != ALPHA}


def _peft_module(module: Module) -> dict[str, Tensor]:
    peft = _without_alpha(module)
    if DORA in peft:  # PEFT's shape: that of the weight's rows, in front of them a one where they have more dimensions
        kernel = peft[DORA].shape[2:]
        peft[DORA] = peft[DORA].reshape(1, -1, *kernel) if kernel else peft[DORA].flatten()
    return peft


def _named(
    modules: Mapping[str, Module], module_key: Callable[[str], str], tensor_names: Mapping[str, str]
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    # Copies: layers that were rows of one matrix share tensors, which safetensors refuses.
    for name, module in modules.items():
        for tensor_name, tensor in module.items():
            tensors[f"{module_key(name)}.{tensor_names.get(tensor_name, tensor_name)}"] = tensor.detach().cpu().clone()
    return tensors
