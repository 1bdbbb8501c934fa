"""A tiny random Z-Image in diffusers layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from transformers import Qwen3Model

from tests.tiny_flux import tiny_flux_vae
from tests.tiny_omnigen2 import write_qwen2_tokenizer
from tests.tiny_text import tiny_qwen3

TEXT_SIZE = 16
# As the template of the released model renders one message of a user.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_z_image_transformer(seed: int = 0) -> ZImageTransformer2DModel:
    """Two blocks, and one of each refiner."""
    torch.manual_seed(seed)
    transformer = ZImageTransformer2DModel(
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT_SIZE,
        axes_dims=[8, 4, 4],
        axes_lens=[1536, 512, 512],
    ).eval()
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        token.data.normal_()  # zeros, which they begin with, would hide them
    return transformer


def tiny_z_image_folder(path: Path, shift: float = 3.0) -> Path:
    """Write transformer, VAE, encoder, tokenizer, scheduler and `model_index.json` into `path`; returns it."""
    tiny_z_image_transformer().save_pretrained(path / "transformer")
    tiny_flux_vae().save_pretrained(path / "vae")
    tiny_qwen3(Qwen3Model, write_qwen2_tokenizer(path / "tokenizer"), TEXT_SIZE).save_pretrained(path / "text_encoder")
    (path / "tokenizer" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    FlowMatchEulerDiscreteScheduler(shift=shift).save_pretrained(path / "scheduler")
    index = {
        "_class_name": "ZImagePipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3Model"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path
