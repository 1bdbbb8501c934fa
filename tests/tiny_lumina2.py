"""A tiny random Lumina 2 in diffusers layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Transformer2DModel
from torch import nn

from tests.tiny_flux import tiny_flux_vae
from tests.tiny_text import tiny_gemma2, write_gemma_tokenizer

TEXT_SIZE = 16


def tiny_lumina2_transformer(seed: int = 0) -> Lumina2Transformer2DModel:
    """Two blocks, and one of each refiner; keys and values have half as many heads as queries."""
    torch.manual_seed(seed)
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(300, 512, 512),
        cap_feat_dim=TEXT_SIZE,
    ).eval()
    # Its embeddings of time begin at zero, and norms of ones would hide one that is left out.
    for name, parameter in transformer.named_parameters():
        if "norm" in name and parameter.dim() == 1 and not name.endswith("bias"):
            nn.init.uniform_(parameter, 0.5, 1.5)
    return transformer


def tiny_lumina2_folder(path: Path) -> Path:
    """Write transformer, VAE, encoder, tokenizer, scheduler and `model_index.json` into `path`; returns it."""
    tiny_lumina2_transformer().save_pretrained(path / "transformer")
    tiny_flux_vae().save_pretrained(path / "vae")
    write_gemma_tokenizer(path / "tokenizer")
    tiny_gemma2(TEXT_SIZE).save_pretrained(path / "text_encoder")
    FlowMatchEulerDiscreteScheduler(shift=6.0).save_pretrained(path / "scheduler")
    index = {
        "_class_name": "Lumina2Pipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Gemma2Model"],
        "tokenizer": ["transformers", "GemmaTokenizerFast"],
        "transformer": ["diffusers", "Lumina2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path
