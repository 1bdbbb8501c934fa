"""A tiny random FLUX.1 in diffusers layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from tests.tiny_text import tiny_clip, tiny_t5, write_clip_tokenizer, write_t5_tokenizer

POOLED_SIZE, T5_SIZE = 8, 16


def tiny_flux_transformer(guidance: bool = True, seed: int = 0) -> FluxTransformer2DModel:
    """A stock transformer with one block of each kind."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_SIZE,
        pooled_projection_dim=POOLED_SIZE,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    # Random weights would hear a prompt of ten tokens too faintly among 512.
    transformer.transformer_blocks[0].attn.add_v_proj.weight.data.mul_(10)
    return transformer


def tiny_flux_vae(seed: int = 0) -> AutoencoderKL:
    """A stock f8 VAE with sixteen channels, scaled and shifted as FLUX.1's is."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    ).eval()


def tiny_flux_folder(path: Path, flavour: str = "dev") -> Path:
    """Write transformer, VAE, encoders, tokenizers, scheduler and `model_index.json` into `path`; returns it."""
    is_schnell = flavour == "schnell"
    tiny_flux_transformer(guidance=not is_schnell).save_pretrained(path / "transformer")
    tiny_flux_vae().save_pretrained(path / "vae")
    tiny_clip(POOLED_SIZE, POOLED_SIZE, with_projection=False, seed=1).save_pretrained(path / "text_encoder")
    tiny_t5(T5_SIZE, seed=2).save_pretrained(path / "text_encoder_2")
    write_clip_tokenizer(path / "tokenizer")
    write_t5_tokenizer(path / "tokenizer_2")
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=1.0 if is_schnell else 3.0, use_dynamic_shifting=not is_schnell, max_shift=1.15, base_shift=0.5
    )
    scheduler.save_pretrained(path / "scheduler")
    index = {
        "_class_name": "FluxKontextPipeline" if flavour == "kontext" else "FluxPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path
