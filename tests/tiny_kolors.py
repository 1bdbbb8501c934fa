"""A tiny random Kolors in diffusers layout: SDXL's tiny UNet over a tiny ChatGLM."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel

from tests.tiny import GOLDEN, tiny_vae
from tests.tiny_sdxl import sdxl_scheduler, tiny_unet

TEXT_SIZE = 16


def tiny_kolors_unet(seed: int = 0, **changes: object) -> UNet2DConditionModel:
    """A stock UNet that projects the text states itself, with the blocks of the real one."""
    text = {"encoder_hid_dim": TEXT_SIZE, "encoder_hid_dim_type": "text_proj", "cross_attention_dim": 24}
    return tiny_unet(seed, pooled_size=TEXT_SIZE, **(text | changes))


# Two levels in place of three, with one transformer each: SDXL's tiny folder has them all.
FEW_BLOCKS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1),
    "attention_head_dim": (1, 2),
}


def tiny_chatglm(seed: int = 0) -> ChatGLMModel:
    """A stock ChatGLM over the 448 tokens of the golden tokenizer."""
    torch.manual_seed(seed)
    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=448,
        hidden_size=TEXT_SIZE,
        ffn_hidden_size=24,
        kv_channels=8,
        num_attention_heads=2,
        seq_length=512,
        add_qkv_bias=True,
        multi_query_attention=True,
        multi_query_group_num=1,
        original_rope=True,
        vocab_size=448,
    )
    model = ChatGLMModel(config)
    with torch.no_grad():  # the class itself leaves its weights as the memory was
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.0 if "word_embeddings" in name else parameter.shape[1] ** -0.5)
            else:
                parameter.fill_(0.1 if name.endswith("bias") else 1.0)
    return model.eval()


def tiny_kolors_folder(path: Path) -> Path:
    """Write unet, VAE, encoder, tokenizer, scheduler and `model_index.json` into `path`; returns it."""
    tiny_kolors_unet(**FEW_BLOCKS).save_pretrained(path / "unet")
    tiny_vae().save_pretrained(path / "vae")
    tiny_chatglm(seed=1).save_pretrained(path / "text_encoder")
    shutil.copytree(GOLDEN / "kolors" / "model" / "tokenizer", path / "tokenizer")
    sdxl_scheduler(beta_end=0.014, num_train_timesteps=1100).save_pretrained(path / "scheduler")
    index = {
        "_class_name": "KolorsPipeline",
        "force_zeros_for_empty_prompt": False,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["kolors", "ChatGLMModel"],
        "tokenizer": ["kolors", "ChatGLMTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (path / "model_index.json").write_text(json.dumps(index))
    return path
