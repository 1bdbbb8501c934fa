"""A tiny random Stable Diffusion 1.5 in diffusers layout: the blocks of the real one, in numbers and names."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import PNDMScheduler, UNet2DConditionModel

from tests.tiny import GOLDEN, tiny_vae
from tests.tiny_text import tiny_clip, write_clip_tokenizer

SD15_GOLDEN = GOLDEN / "sd15"
CLIP_SIZE = 16


def tiny_sd15_unet(seed: int = 0, is_second: bool = False) -> UNet2DConditionModel:
    """A stock UNet with four levels, transformers on the first three.

    Args:
        is_second: as of 2.1.
    """
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(8, 8, 8, 16),
        layers_per_block=2,
        attention_head_dim=(1, 2, 2, 4) if is_second else 2,
        norm_num_groups=4,
        cross_attention_dim=CLIP_SIZE,
        use_linear_projection=is_second,
        upcast_attention=is_second,
    ).eval()


def sd15_scheduler() -> PNDMScheduler:
    """The scheduler of the released 1.5."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return PNDMScheduler(**betas, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)


def tiny_sd15_folder(path: Path, is_second: bool = False) -> Path:
    """Write unet, VAE, encoder, tokenizer, scheduler and `model_index.json` into `path`; returns it."""
    tiny_sd15_unet(is_second=is_second).save_pretrained(path / "unet")
    vae = tiny_vae()
    vae.register_to_config(scaling_factor=0.18215)
    vae.save_pretrained(path / "vae")
    tiny_clip(CLIP_SIZE, CLIP_SIZE, with_projection=False, seed=1).save_pretrained(path / "text_encoder")
    write_clip_tokenizer(path / "tokenizer", **({"pad_token": "!"} if is_second else {}))
    sd15_scheduler().save_pretrained(path / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path
