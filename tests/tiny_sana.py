"""A tiny random Sana in diffusers layout: 1.0, or 1.5 with normed queries and keys."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaTransformer2DModel

from tests.tiny_text import tiny_gemma2, write_gemma_tokenizer

TEXT_SIZE = 16


def tiny_sana_transformer(seed: int = 0, is_newer: bool = False) -> SanaTransformer2DModel:
    """A stock transformer of two blocks.

    Args:
        is_newer: 1.5.
    """
    torch.manual_seed(seed)
    model = SanaTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=TEXT_SIZE,
        sample_size=2,
        qk_norm="rms_norm_across_heads" if is_newer else None,
    )
    return model.eval()


def tiny_dc_autoencoder(seed: int = 0) -> AutoencoderDC:
    """A stock f32c32 autoencoder with the kinds of blocks of the released one, and its scale."""
    torch.manual_seed(seed)
    blocks = ["ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock", "EfficientViTBlock"]
    channels, scales = (8, 8, 8, 8, 16, 32), ((), (), (), (5,), (5,), (5,))
    return AutoencoderDC(
        attention_head_dim=8,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
        scaling_factor=0.41407,
    ).eval()


def sana_scheduler() -> DPMSolverMultistepScheduler:
    """The scheduler of the released models."""
    return DPMSolverMultistepScheduler(
        beta_start=0.0001, beta_end=0.02, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def tiny_sana_folder(path: Path, is_newer: bool = True) -> Path:
    """Write transformer, VAE, encoder, tokenizer, scheduler and `model_index.json` into `path`; returns it."""
    tiny_sana_transformer(is_newer=is_newer).save_pretrained(path / "transformer")
    tiny_dc_autoencoder().save_pretrained(path / "vae")
    tiny_gemma2(TEXT_SIZE, seed=1).save_pretrained(path / "text_encoder")
    write_gemma_tokenizer(path / "tokenizer")
    sana_scheduler().save_pretrained(path / "scheduler")
    index = {
        "_class_name": "SanaPipeline",
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "Gemma2Model"],
        "tokenizer": ["transformers", "GemmaTokenizerFast"],
        "transformer": ["diffusers", "SanaTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderDC"],
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path
