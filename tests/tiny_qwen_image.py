"""A tiny random Qwen-Image in diffusers layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel

from tests.tiny_omnigen2 import TEXT_SIZE, tiny_mllm, write_qwen2_tokenizer


def tiny_qwen_image_transformer(seed: int = 0, num_layers: int = 2, **config: Any) -> QwenImageTransformer2DModel:
    """A stock transformer of two small blocks."""
    torch.manual_seed(seed)
    return QwenImageTransformer2DModel(
        num_layers=num_layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_SIZE,
        axes_dims_rope=(4, 6, 6),
        **config,
    ).eval()


def tiny_qwen_image_vae(seed: int = 0) -> AutoencoderKLQwenImage:
    """A stock VAE of videos with sixteen channels, scaled as the released one."""
    torch.manual_seed(seed)
    return AutoencoderKLQwenImage(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval()


def tiny_qwen_image_edit_folder(path: Path, pipeline_class: str = "QwenImageEditPlusPipeline", **config: Any) -> Path:
    """`tiny_qwen_image_folder` with an image processor: an edit model of the kind that `pipeline_class` says."""
    from transformers import Qwen2VLImageProcessorPil

    tiny_qwen_image_folder(path, **config)
    Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=12_845_056).save_pretrained(path / "processor")
    index = json.loads((path / "model_index.json").read_text())
    index |= {"_class_name": pipeline_class, "processor": ["transformers", "Qwen2VLProcessor"]}
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def tiny_qwen_image_folder(path: Path, **config: Any) -> Path:
    """Write transformer, VAE, language model, tokenizer, scheduler and `model_index.json` into `path`; returns it."""
    tiny_qwen_image_transformer(**config).save_pretrained(path / "transformer")
    tiny_qwen_image_vae().save_pretrained(path / "vae")
    tiny_mllm(write_qwen2_tokenizer(path / "tokenizer")).save_pretrained(path / "text_encoder")
    # The released settings.
    FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    ).save_pretrained(path / "scheduler")
    index = {
        "_class_name": "QwenImagePipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path
