"""Who else reads adapter files: diffusers' own loaders, and the weights of the original release with its names.

The second is what kohya's scripts, A1111, Forge and ComfyUI do: a module of the file is found by its name among the
weights of the original release, and its change is added there. diffusers' converters of single files, which know
nothing of this project's tables, bring the sum back to diffusers' layout.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import (
    convert_auraflow_transformer_checkpoint_to_diffusers,
    convert_chroma_transformer_checkpoint_to_diffusers,
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_krea2_transformer_checkpoint_to_diffusers,
    convert_ldm_unet_checkpoint,
    convert_lumina2_to_diffusers,
    convert_sana_transformer_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
    convert_z_image_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import load_file
from torch import Tensor, nn

from simpletuner.adapters.layers import is_adaptable
from simpletuner.families.keys import KeyTable
from simpletuner.families.spec import FamilySpec
from tests.tiny_chroma import tiny_chroma_transformer
from tests.tiny_flux import tiny_flux_transformer
from tests.tiny_lumina2 import tiny_lumina2_transformer

Weights = dict[str, Tensor]


def read_by_diffusers(path: Path, spec: FamilySpec, denoiser: nn.Module) -> nn.Module:
    """Let the family's pipeline load a file onto a stock denoiser."""
    # Qwen-Image 2.1's pipeline has the loader of Qwen-Image's, and cannot be made without a processor.
    cls = getattr(diffusers, {"QwenImage21Pipeline": "QwenImagePipeline"}.get(spec.pipeline_class, spec.pipeline_class))
    asked = inspect.signature(cls).parameters.values()
    names = [each.name for each in asked if each.default is each.empty]
    parts = dict.fromkeys(names) | {spec.component("denoiser").name: denoiser}
    cls(**parts).load_lora_weights(path.parent, weight_name=path.name)
    return denoiser


def read_by_original_names(path: Path, spec: FamilySpec, denoiser: nn.Module) -> nn.Module:
    """Add what a file says to the weights of the original layout, and let diffusers convert the sum."""
    original = original_weights(denoiser, spec.keys)
    assert_same(converted(spec, original, denoiser), denoiser.state_dict())
    changed = patched(original, load_file(path))
    denoiser.load_state_dict(converted(spec, changed, denoiser), strict=True)
    return denoiser


def read_by_own_names(path: Path, spec: FamilySpec, denoiser: nn.Module) -> nn.Module:
    """Add what a file says to the weights of diffusers' layout, as readers of LyCORIS' names do."""
    denoiser.load_state_dict(patched(denoiser.state_dict(), load_file(path)), strict=True)
    return denoiser


def converted(spec: FamilySpec, original: Mapping[str, Tensor], denoiser: Any) -> Weights:
    """Weights of the original layout in diffusers' layout, by diffusers."""
    if spec.name in ("sdxl", "kolors", "sd15"):
        prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in original.items()}
        unet = convert_ldm_unet_checkpoint(prefixed, dict(denoiser.config))
        # Kolors' own layer, which no original release has.
        return unet | {name: tensor for name, tensor in original.items() if name.startswith("encoder_hid_proj")}
    if spec.name == "sana":  # two tensors of the release that no network has
        unused = dict.fromkeys(("pos_embed", "y_embedder.y_embedding"), torch.zeros(1))
        return convert_sana_transformer_to_diffusers({**original, **unused})
    convert: Callable[[Weights], Weights] = {
        "auraflow": convert_auraflow_transformer_checkpoint_to_diffusers,
        "lumina2": convert_lumina2_to_diffusers,
        "chroma": convert_chroma_transformer_checkpoint_to_diffusers,
        "flux": convert_flux_transformer_checkpoint_to_diffusers,
        "flux2": convert_flux2_transformer_checkpoint_to_diffusers,
        "krea2": convert_krea2_transformer_checkpoint_to_diffusers,
        "sd3": convert_sd3_transformer_checkpoint_to_diffusers,
        "qwen_image": dict,  # released in the layout of diffusers
        "qwen_image_21": dict,
        "qwen_image_edit": dict,
        "z_image": convert_z_image_transformer_checkpoint_to_diffusers,
    }[spec.name]
    return convert(dict(original))


# Norms whose weight is a scale there.
_SCALES = ("query_norm", "key_norm", "prenorm", "postnorm", "qnorm", "knorm", "txtmlp.0", "last.norm")
# Rows of a matrix that stand one after the other there.
_FLAT = ".mod.lin"
# Norms of queries and keys, which no adapter changes and no table names.
_SD3_NORMS = {"norm_q": "x_block.{}.ln_q", "norm_k": "x_block.{}.ln_k"} | {
    f"norm_added_{name}": f"context_block.{{}}.ln_{name}" for name in "qk"
}


def original_weights(denoiser: nn.Module, keys: KeyTable) -> Weights:
    """The denoiser's weights in the original layout. What is wrong here, diffusers' converter shows."""
    state = denoiser.state_dict()
    keys = keys.in_model(state)
    original = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        whole = keys.original(name).name
        if not module:  # a tensor of the network itself
            original[whole] = tensor
        elif not whole.endswith(f".{kind}"):  # a tensor that the table names, not its module
            original[whole] = tensor.flatten() if whole.endswith(_FLAT) else tensor
        elif name == "pos_embed.pos_embed":
            original["pos_embed"] = tensor
        elif last in _SD3_NORMS and "joint_blocks" in keys.original(parent).name:
            _, number, attention = parent.split(".")
            original[f"joint_blocks.{number}.{_SD3_NORMS[last].format(attention)}.{kind}"] = tensor
        else:
            found = keys.original(module)
            joined = torch.cat([state[f"{part}.{kind}"] for part in found.parts])
            if found.swaps_halves:
                joined = torch.cat(joined.chunk(2)[::-1])
            is_norm = found.name.endswith(_SCALES) or ".norms." in found.name
            original[f"{found.name}.{'scale' if is_norm else kind}"] = joined
    return original


def patched(weights: Mapping[str, Tensor], file: Mapping[str, Tensor]) -> Weights:
    """Weights plus what a file says of them; every module of the file must find its weight."""
    known = {name.removesuffix(".weight"): name for name in weights if name.endswith(".weight")}
    known |= {name.replace(".", "_"): weight for name, weight in known.items()}
    modules: dict[str, Weights] = {}
    for key, tensor in file.items():
        name = key
        for prefix in ("lora_unet_", "lycoris_", "diffusion_model."):
            name = name.removeprefix(prefix)
        module = next(part for part in _beginnings(name) if part in known)
        modules.setdefault(known[module], {})[name[len(module) + 1 :]] = tensor
    changed = dict(weights)
    for name, module in modules.items():
        weight = weights[name]
        change = weight_delta(module).reshape(weight.shape)
        changed[name] = weight + change
        if "dora_scale" in module:  # arXiv 2402.09353: the rows keep their direction and get lengths of their own
            rows = changed[name].flatten(1)
            lengths = module["dora_scale"].flatten()[:, None]
            changed[name] = (lengths * rows / rows.norm(dim=1, keepdim=True)).reshape(weight.shape)
    return changed


def _beginnings(name: str) -> list[str]:
    pieces = name.split(".")
    return [".".join(pieces[:count]) for count in range(len(pieces), 0, -1)]


def weight_delta(module: Weights) -> Tensor:
    """What a module of any of the three kinds adds to its weight (LoRA: arXiv 2106.09685; LoHa: 2108.06098; LoKr:
    2309.14859, section 3.3; convolutions in Tucker's form: `lora_mid`)."""
    down = module.get("lora_down.weight", module.get("lora_A.weight"))
    up = module.get("lora_up.weight", module.get("lora_B.weight"))
    if down is not None and up is not None:
        scale = float(module.get("alpha", torch.tensor(len(down)))) / len(down)
        if "lora_mid.weight" in module:
            mid = module["lora_mid.weight"]
            return scale * torch.einsum("or,rm...,mi->oi...", up.flatten(1), mid, down.flatten(1))
        return scale * up.flatten(1) @ down.flatten(1)
    if "hada_w1_a" in module:
        rank = module["hada_w1_b"].shape[0]
        first, second = (_hada(module, number) for number in "12")
        return float(module["alpha"]) / rank * first * second
    first, is_whole = _factor(module, "1")
    second, second_is_whole = _factor(module, "2")
    rank = next((len(module[name]) for name in ("lokr_w1_b", "lokr_w2_b") if name in module), 1)
    # Readers agree that alpha counts only where a factor is of low rank.
    scale = 1.0 if is_whole and second_is_whole else float(module["alpha"]) / rank
    while first.dim() < second.dim():
        first = first.unsqueeze(-1)
    return scale * torch.kron(first, second)


def _hada(module: Weights, number: str) -> Tensor:
    left, right = module[f"hada_w{number}_a"], module[f"hada_w{number}_b"]
    if f"hada_t{number}" in module:
        return torch.einsum("ij...,jr,ip->pr...", module[f"hada_t{number}"], right, left)
    return left @ right


def _factor(module: Weights, number: str) -> tuple[Tensor, bool]:
    if f"lokr_w{number}" in module:
        return module[f"lokr_w{number}"], True
    left, right = module[f"lokr_w{number}_a"], module[f"lokr_w{number}_b"]
    if f"lokr_t{number}" in module:
        return torch.einsum("ij...,jr,ip->pr...", module[f"lokr_t{number}"], right, left), False
    return left @ right, False


def answers(denoiser: nn.Module) -> Weights:
    """What every layer that can be adapted answers to a draw of its own."""
    found = {}
    for path, layer in stock_layers(denoiser).items():
        generator = torch.Generator().manual_seed(len(path))
        size = (3, layer.in_features) if hasattr(layer, "in_features") else (2, layer.in_channels, 5, 5)
        with torch.no_grad():
            found[path] = denoiser.get_submodule(path)(torch.randn(size, generator=generator))
    return found


def stock_layers(denoiser: nn.Module) -> dict[str, Any]:
    """Path -> the layer under an adapter, or the layer."""
    found: dict[str, Any] = {}
    for name, module in denoiser.named_modules():
        path = name.removesuffix(".base_layer")
        if is_adaptable(module) and not {"lora_A", "lora_B", "adapter"} & set(name.split(".")) and path not in found:
            found[path] = copy.copy(module)
    return found


def narrow_flux() -> nn.Module:
    return _narrow(tiny_flux_transformer())


def narrow_chroma() -> nn.Module:
    return _narrow(tiny_chroma_transformer())


def narrow_lumina2() -> nn.Module:
    """A tiny Lumina 2 whose queries, keys and values have the real one's rows, by which diffusers' converters take
    their matrix apart. Its layers can be asked, it cannot run as a whole."""
    torch.manual_seed(0)
    denoiser = tiny_lumina2_transformer()
    for path, layer in list(denoiser.named_modules()):
        parent, _, name = path.rpartition(".")
        if name in ("to_q", "to_k", "to_v"):
            rows = 2304 if name == "to_q" else 768
            setattr(denoiser.get_submodule(parent), name, nn.Linear(layer.in_features, rows, bias=False))
    return denoiser


def _narrow(denoiser: nn.Module) -> nn.Module:
    """A tiny FLUX.1 or Chroma whose linear layers have the real one's rows, on four inputs each, for diffusers'
    converters know FLUX.1 by the number 3072. Its layers can be asked, it cannot run as a whole."""
    torch.manual_seed(0)
    for path, layer in list(denoiser.named_modules()):
        if isinstance(layer, nn.Linear):
            last = path.split(".")[-1] if not path.endswith("norm.linear") else "norm.linear"
            rows = {"proj_mlp": 12288, "proj": 12288, "norm.linear": 9216}.get(last, 3072)
            rows = 18432 if path.endswith(("norm1.linear", "norm1_context.linear")) else rows
            rows = {"norm_out.linear": 6144, "proj_out": 64}.get(path, rows)
            parent, _, name = path.rpartition(".")
            setattr(denoiser.get_submodule(parent), name, nn.Linear(4, rows, bias=layer.bias is not None))
    return denoiser


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    off = differences(found, expected)
    assert max(off.values()) <= tolerance, sorted(off.items(), key=lambda item: -item[1])[:3]


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float((found[name] - tensor).abs().max()) for name, tensor in expected.items()}
