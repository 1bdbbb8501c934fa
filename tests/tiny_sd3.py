"""A tiny random SD3 in diffusers layout, with a second attention in its first block as in 3.5-medium."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

from tests.tiny_flux import tiny_flux_vae
from tests.tiny_text import tiny_clip, tiny_t5, write_clip_tokenizer, write_t5_tokenizer

CLIP_SIZES, T5_SIZE = (8, 8), 32


def tiny_sd3_transformer(seed: int = 0) -> SD3Transformer2DModel:
    """A stock transformer with two blocks."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=T5_SIZE,
        caption_projection_dim=32,
        pooled_projection_dim=sum(CLIP_SIZES),
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()
    # Random weights would hear a prompt of ten tokens too faintly among 333.
    for block in transformer.transformer_blocks:
        block.attn.add_v_proj.weight.data.mul_(10)
    return transformer


def tiny_sd3_folder(path: Path) -> Path:
    """Write transformer, VAE, encoders, tokenizers, scheduler and `model_index.json` into `path`; returns it."""
    tiny_sd3_transformer().save_pretrained(path / "transformer")
    tiny_flux_vae().save_pretrained(path / "vae")
    for number, size in enumerate(CLIP_SIZES, start=1):
        suffix = "" if number == 1 else f"_{number}"
        tiny_clip(size, size, with_projection=True, seed=number).save_pretrained(path / f"text_encoder{suffix}")
        write_clip_tokenizer(path / f"tokenizer{suffix}", pad_token="!" if number == 2 else "<|endoftext|>")
    tiny_t5(T5_SIZE, seed=3).save_pretrained(path / "text_encoder_3")
    write_t5_tokenizer(path / "tokenizer_3")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(path / "scheduler")
    index = {
        "_class_name": "StableDiffusion3Pipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path
