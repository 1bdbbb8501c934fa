"""A tiny random PixArt-Sigma in diffusers layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

from tests.tiny import tiny_vae
from tests.tiny_text import tiny_t5, write_t5_tokenizer

TEXT_SIZE = 16


def tiny_pixart_transformer(seed: int = 0) -> PixArtTransformer2DModel:
    """A stock transformer of two blocks; like the released one it answers a variance too, and is given no sizes."""
    torch.manual_seed(seed)
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=TEXT_SIZE,
        interpolation_scale=2,
        use_additional_conditions=False,
    )
    return model.eval()


def tiny_pixart_sigma_folder(path: Path) -> Path:
    """Write transformer, VAE, encoder, tokenizer, scheduler and `model_index.json` into `path`; returns it."""
    tiny_pixart_transformer().save_pretrained(path / "transformer")
    tiny_vae().save_pretrained(path / "vae")
    tiny_t5(TEXT_SIZE, seed=1).save_pretrained(path / "text_encoder")
    write_t5_tokenizer(path / "tokenizer")
    DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02).save_pretrained(path / "scheduler")
    index = {
        "_class_name": "PixArtSigmaPipeline",
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path
