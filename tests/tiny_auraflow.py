"""A tiny random AuraFlow in diffusers layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler
from transformers import UMT5Config, UMT5EncoderModel

from tests.tiny import GOLDEN, tiny_vae

TEXT_SIZE = 16


def tiny_auraflow_transformer(seed: int = 0) -> AuraFlowTransformer2DModel:
    """One block of each kind."""
    torch.manual_seed(seed)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=TEXT_SIZE,
        caption_projection_dim=32,
        pos_embed_max_size=256,
    ).eval()
    # Gates of random weights would let next to nothing through.
    for name, parameter in transformer.named_parameters():
        if ".norm1" in name:
            parameter.data.mul_(8)
    return transformer


def tiny_auraflow_folder(path: Path) -> Path:
    """Write transformer, VAE, encoder, tokenizer, scheduler and `model_index.json` into `path`; returns it."""
    tiny_auraflow_transformer().save_pretrained(path / "transformer")
    config = UMT5Config(vocab_size=1024, d_model=TEXT_SIZE, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(path / "text_encoder")
    tiny_vae().save_pretrained(path / "vae")
    FlowMatchEulerDiscreteScheduler(shift=1.73).save_pretrained(path / "scheduler")
    shutil.copytree(GOLDEN / "omnigen" / "tokenizer", path / "tokenizer")
    index = {
        "_class_name": "AuraFlowPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "AuraFlowTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path
