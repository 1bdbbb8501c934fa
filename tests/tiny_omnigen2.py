"""A tiny random OmniGen2 in the released layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from simpletuner.models.omnigen2.transformer import OmniGen2Transformer2DModel
from tests.tiny_flux import tiny_flux_vae

TEXT_SIZE = 24
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)


def tiny_omnigen2_transformer(seed: int = 0, in_channels: int = 16) -> OmniGen2Transformer2DModel:
    """Two blocks, and one of each refiner; gates of the size that training gives them, since zeros hide a block."""
    torch.manual_seed(seed)
    return OmniGen2Transformer2DModel(
        in_channels=in_channels,
        hidden_size=64,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 6, 6),
        axes_lens=(1024, 300, 300),
        text_feat_dim=TEXT_SIZE,
    ).eval()


def tiny_mllm(vocab_size: int, seed: int = 1) -> Qwen2_5_VLForConditionalGeneration:
    """A stock Qwen2.5-VL of one layer for the text and one for images."""
    torch.manual_seed(seed)
    text = {
        "vocab_size": vocab_size,
        "hidden_size": TEXT_SIZE,
        "intermediate_size": 2 * TEXT_SIZE,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1_000_000.0},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_SIZE}
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    special = {name: vocab_size - len(names) + number for number, name in enumerate(names)}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    # Embeddings of the released model's initial size (0.02) would make all prompts alike.
    model.model.language_model.embed_tokens.weight.data.mul_(50)
    return model


def write_qwen2_tokenizer(path: Path) -> int:
    """Qwen2's tokenizer without merges, so that words are their bytes; returns the number of its tokens."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    path.mkdir(parents=True)
    (path / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(letters)}))
    (path / "merges.txt").write_text("#version: 0.2\n")
    added = {
        str(len(letters) + number): {"content": token, "special": True, "normalized": False}
        for number, token in enumerate(SPECIAL_TOKENS)
    }
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 131072,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return len(letters) + len(SPECIAL_TOKENS)


def tiny_omnigen2_folder(path: Path) -> Path:
    """Write transformer, VAE, language model, processor, scheduler and `model_index.json` into `path`; returns it."""
    tiny_omnigen2_transformer().save_pretrained(path / "transformer")
    tiny_flux_vae().save_pretrained(path / "vae")
    tiny_mllm(write_qwen2_tokenizer(path / "processor")).save_pretrained(path / "mllm")
    (path / "scheduler").mkdir()
    scheduler = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "dynamic_time_shift": True,
    }
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {
        "_class_name": "OmniGen2Pipeline",
        "mllm": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "processor": ["transformers", "Qwen2_5_VLProcessor"],
        "scheduler": ["scheduling_flow_match_euler_discrete", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["transformer_omnigen2", "OmniGen2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path
