"""A tiny random SDXL in diffusers layout: the blocks of the real one, in numbers and names, with few channels."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

from tests.tiny import tiny_vae
from tests.tiny_text import tiny_clip, write_clip_tokenizer

# Hidden sizes of the two encoders; the UNet reads both side by side.
CLIP_SIZES = (8, 16)
POOLED_SIZE = 16


def tiny_unet(seed: int = 0, pooled_size: int = POOLED_SIZE, **changes: object) -> UNet2DConditionModel:
    """A stock UNet with three levels, transformers on the two lower ones."""
    torch.manual_seed(seed)
    time_size = 8
    config: dict[str, object] = dict(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 2, 2),
        norm_num_groups=4,
        cross_attention_dim=sum(CLIP_SIZES),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_size,
        projection_class_embeddings_input_dim=pooled_size + 6 * time_size,
    )
    return UNet2DConditionModel(**(config | changes)).eval()


def sdxl_scheduler(**changes: object) -> EulerDiscreteScheduler:
    """The scheduler of the released model."""
    config = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "prediction_type": "epsilon",
        "interpolation_type": "linear",
        "use_karras_sigmas": False,
    }
    return EulerDiscreteScheduler(**(config | changes))


def tiny_sdxl_folder(path: Path, **scheduler: object) -> Path:
    """Write unet, VAE, encoders, tokenizers, scheduler and `model_index.json` into `path`; returns it."""
    tiny_unet().save_pretrained(path / "unet")
    tiny_vae().save_pretrained(path / "vae")
    tiny_clip(CLIP_SIZES[0], POOLED_SIZE, with_projection=False, seed=1).save_pretrained(path / "text_encoder")
    tiny_clip(CLIP_SIZES[1], POOLED_SIZE, with_projection=True, seed=2).save_pretrained(path / "text_encoder_2")
    write_clip_tokenizer(path / "tokenizer")
    write_clip_tokenizer(path / "tokenizer_2", pad_token="!")
    sdxl_scheduler(**scheduler).save_pretrained(path / "scheduler")
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path
