"""Models in one file, in the layout of the original release, written from models in diffusers' layout."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from simpletuner.families.keys import KeyTable

# diffusers' names of the VAE -> the original's.
_VAE = (
    (r"encoder\.down_blocks\.(\d)\.resnets\.(\d)", r"encoder.down.\1.block.\2"),
    (r"encoder\.down_blocks\.(\d)\.downsamplers\.0", r"encoder.down.\1.downsample"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
)


def _tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def original_denoiser(folder: Path, keys: KeyTable, norm_name: str = "weight") -> dict[str, Tensor]:
    """The denoiser by the names of a key table, joined where the original is; without a prefix."""
    tensors = _tensors(folder)
    keys = keys.in_model(tensors)
    original = {}
    for name in tensors:
        module, _, kind = name.rpartition(".")
        if not module:  # a tensor of the network itself
            original[name] = tensors[name]
            continue
        found = keys.original(module)
        joined = torch.cat([tensors[f"{part}.{kind}"] for part in found.parts])
        if found.swaps_halves:
            joined = torch.cat(joined.chunk(2)[::-1])
        kind = norm_name if re.search(r"(_norm|\.norms\.\d+)$", found.name) else kind
        original[f"{found.name}.{kind}"] = joined.contiguous()
    if "pos_embed.pos_embed" in original:  # SD3's table of positions is a tensor without a module
        original["pos_embed"] = original.pop("pos_embed.pos_embed")
    return original


def original_vae(folder: Path, prefix: str = "first_stage_model.") -> dict[str, Tensor]:
    original = {}
    for name, tensor in _tensors(folder).items():
        is_attention = re.search(r"attentions\.0\.to_", name) and name.endswith("weight")
        for pattern, replacement in _VAE:
            name = re.sub(pattern, replacement, name)
        # The original counts the decoder's levels from the other end.
        name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}", name)
        name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", name)
        original[f"{prefix}{name}"] = tensor[:, :, None, None].contiguous() if is_attention else tensor
    return original


def original_clips(folder: Path) -> dict[str, Tensor]:
    """The first encoder as transformers has it, the second in OpenCLIP's layout."""
    first = _clip_of_transformers(folder / "text_encoder", "conditioner.embedders.0.")
    return first | _open_clip(folder / "text_encoder_2", "conditioner.embedders.1.")


def _clip_of_transformers(folder: Path, prefix: str) -> dict[str, Tensor]:
    return {
        f"{prefix}transformer.text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in _tensors(folder).items()
    }


def _open_clip(folder: Path, prefix: str) -> dict[str, Tensor]:
    original, names = {}, {}
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in _tensors(folder).items()}
    names["embeddings.token_embedding.weight"] = "token_embedding.weight"
    names["embeddings.position_embedding.weight"] = "positional_embedding"
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)", name):
            parts = [tensors[name.replace("q_proj", f"{each}_proj")] for each in "qkv"]
            original[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"] = torch.cat(parts)
            continue
        if re.search(r"self_attn\.[kv]_proj", name):
            continue
        name = names.get(name, name)
        if name == "text_projection.weight":
            original["text_projection"] = tensor.T.contiguous()
            continue
        for ours, theirs in (
            (r"encoder\.layers\.", "transformer.resblocks."),
            (r"self_attn\.out_proj", "attn.out_proj"),
            ("layer_norm1", "ln_1"),
            ("layer_norm2", "ln_2"),
            (r"mlp\.fc1", "mlp.c_fc"),
            (r"mlp\.fc2", "mlp.c_proj"),
            ("final_layer_norm", "ln_final"),
        ):
            name = re.sub(ours, theirs, name)
        original[name] = tensor
    return {f"{prefix}model.{name}": tensor for name, tensor in original.items()}


def write_sdxl_file(folder: Path, keys: KeyTable, path: Path) -> Path:
    """A whole SDXL in one file."""
    unet = {f"model.diffusion_model.{name}": t for name, t in original_denoiser(folder / "unet", keys).items()}
    save_file(unet | original_vae(folder / "vae") | original_clips(folder), path)
    return path


def write_sd15_file(folder: Path, keys: KeyTable, path: Path, is_second: bool = False) -> Path:
    """A whole Stable Diffusion 1.5 in one file, or 2.1, whose encoder is OpenCLIP's."""
    unet = {f"model.diffusion_model.{name}": t for name, t in original_denoiser(folder / "unet", keys).items()}
    encoder = (_open_clip if is_second else _clip_of_transformers)(folder / "text_encoder", "cond_stage_model.")
    save_file(unet | original_vae(folder / "vae") | encoder, path)
    return path


def write_sd3_file(folder: Path, keys: KeyTable, path: Path, with_t5: bool = True) -> Path:
    """A whole SD3 in one file, as `sd3_medium_incl_clips` and `..._t5xxlfp16` are."""
    tensors = {f"model.diffusion_model.{n}": t for n, t in original_denoiser(folder / "transformer", keys).items()}
    encoders = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"} | ({"text_encoder_3": "t5xxl"} if with_t5 else {})
    for name, theirs in encoders.items():
        for key, tensor in _tensors(folder / name).items():
            if theirs != "clip_l" or key != "text_projection.weight":  # which is the identity there
                tensors[f"text_encoders.{theirs}.transformer.{key}"] = tensor
    save_file(tensors | original_vae(folder / "vae"), path)
    return path
