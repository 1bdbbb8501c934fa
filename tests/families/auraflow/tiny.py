"""A tiny random AuraFlow in diffusers layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import UMT5Config, UMT5EncoderModel

from tests.tiny import GOLDEN, tiny_vae


def tiny_auraflow_folder(path: Path) -> Path:
    """Write transformer, VAE, text encoder, tokenizer and scheduler into `path`; returns it."""
    torch.manual_seed(0)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pos_embed_max_size=256,
    )
    # Random weights would hear a prompt of ten tokens too faintly among 256.
    transformer.joint_transformer_blocks[0].attn.add_v_proj.weight.data.mul_(30)
    transformer.save_pretrained(path / "transformer")
    config = UMT5Config(vocab_size=1024, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(path / "text_encoder")
    tiny_vae().save_pretrained(path / "vae")
    FlowMatchEulerDiscreteScheduler(shift=1.73).save_pretrained(path / "scheduler")
    shutil.copytree(GOLDEN / "omnigen" / "tokenizer", path / "tokenizer")
    return path
