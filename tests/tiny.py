"""Tiny random models in the real folder formats, for tests that need a model but not its pictures."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_omnigen import OmniGenTransformer2DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

GOLDEN = Path(__file__).parent / "golden"
HEAD_SIZE = 8


def tiny_omnigen_transformer(
    hidden_size: int = 32,
    num_layers: int = 2,
    original_max_position_embeddings: int = 4096,
    seed: int = 0,
    pos_embed_max_size: int = 16,
) -> OmniGenTransformer2DModel:
    """A stock transformer with random weights, its short and long rotary factors far apart."""
    torch.manual_seed(seed)
    half = HEAD_SIZE // 2
    return OmniGenTransformer2DModel(
        hidden_size=hidden_size,
        num_attention_heads=hidden_size // HEAD_SIZE,
        num_key_value_heads=hidden_size // HEAD_SIZE,
        intermediate_size=2 * hidden_size,
        num_layers=num_layers,
        pad_token_id=2,
        vocab_size=512,
        max_position_embeddings=131072,
        original_max_position_embeddings=original_max_position_embeddings,
        rope_scaling={"type": "su", "short_factor": [1.0 + 0.1 * i for i in range(half)], "long_factor": [3.0] * half},
        pos_embed_max_size=pos_embed_max_size,
        time_step_dim=32,
    ).eval()


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    """A stock f8 VAE with four channels and random weights, scaled as SDXL's is."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.13025,
        force_upcast=False,
    ).eval()


def omnigen_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of the released model: time from 0 on noise to 1 on data."""
    return FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1)


def tiny_omnigen_folder(path: Path, hidden_size: int = 32, num_layers: int = 2, pos_embed_max_size: int = 16) -> Path:
    """Write an OmniGen in diffusers layout (transformer, vae, scheduler, tokenizer) into `path`; returns it."""
    transformer = tiny_omnigen_transformer(hidden_size, num_layers, pos_embed_max_size=pos_embed_max_size)
    transformer.save_pretrained(path / "transformer")
    tiny_vae().save_pretrained(path / "vae")
    omnigen_scheduler().save_pretrained(path / "scheduler")
    shutil.copytree(GOLDEN / "omnigen" / "tokenizer", path / "tokenizer")
    return path
