"""Tiny random models in the real folder formats, for tests that need a model but not its images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
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


def tiny_preview_decoder(seed: int = 0) -> AutoencoderTiny:
    """A stock tiny autoencoder of four latent channels with random weights."""
    torch.manual_seed(seed)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
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


def tiny_clip_folder(path: Path, seed: int = 0) -> Path:
    """Write a CLIP model that scores images (32 px, letters for tokens) into `path`; returns it."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    text = {**size, "vocab_size": len(tokens), "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 24}
    vision = {**size, "image_size": 32, "patch_size": 8}
    torch.manual_seed(seed)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(path)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=24).save_pretrained(path)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(path)
    return path
