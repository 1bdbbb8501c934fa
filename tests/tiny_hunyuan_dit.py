"""A tiny random Hunyuan-DiT in diffusers layout: 1.1, which is given sizes and style, or 1.2."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import DDPMScheduler, HunyuanDiT2DModel

from tests.tiny import tiny_vae
from tests.tiny_text import tiny_bert, tiny_t5, write_bert_tokenizer, write_t5_tokenizer

TEXT_SIZE = 16


def tiny_hunyuan_dit_transformer(seed: int = 0, is_given_sizes: bool = True) -> HunyuanDiT2DModel:
    """A stock transformer of four blocks, the last with a skip."""
    torch.manual_seed(seed)
    model = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=4,
        mlp_ratio=2.0,
        cross_attention_dim=TEXT_SIZE,
        cross_attention_dim_t5=TEXT_SIZE,
        pooled_projection_dim=8,
        use_style_cond_and_image_meta_size=is_given_sizes,
    )
    return model.eval()


def hunyuan_dit_scheduler(beta_end: float = 0.03) -> DDPMScheduler:
    """The scheduler of the released 1.1; 1.2 ends with 0.018."""
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=beta_end,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        steps_offset=1,
        timestep_spacing="leading",
    )


def tiny_hunyuan_dit_folder(path: Path) -> Path:
    """Write transformer, VAE, encoders, tokenizers, scheduler and `model_index.json` into `path`; returns it."""
    tiny_hunyuan_dit_transformer().save_pretrained(path / "transformer")
    tiny_vae().save_pretrained(path / "vae")
    tiny_bert(TEXT_SIZE, seed=1).save_pretrained(path / "text_encoder")
    tiny_t5(TEXT_SIZE, seed=2).save_pretrained(path / "text_encoder_2")
    write_bert_tokenizer(path / "tokenizer")
    write_t5_tokenizer(path / "tokenizer_2")
    hunyuan_dit_scheduler().save_pretrained(path / "scheduler")
    index = {
        "_class_name": "HunyuanDiTPipeline",
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "BertModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "BertTokenizer"],
        "tokenizer_2": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "HunyuanDiT2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path
