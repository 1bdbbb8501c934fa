"""Shapes of the released models: constructor arguments of their denoisers and VAEs, and what their prompts become.

Taken from the `config.json` files of the releases. `tests/unit/scripts/test_presets.py` counts the parameters that they
give against those that the specs state. What stands nowhere here is the class default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from simpletuner.batch import PromptEmbeds

BILLION = 10**9


@dataclass(frozen=True)
class Shape:
    """One released model.

    Args:
        denoiser: constructor arguments.
        embeds: name -> shape of what one prompt becomes.
        encoders: parameters of the text encoders, in the order of their folders.
        vae: constructor arguments.
        ids: names among `embeds` that are whole numbers.
    """

    denoiser: Mapping[str, Any]
    embeds: Mapping[str, tuple[int, ...]]
    encoders: tuple[int, ...]
    vae: Mapping[str, Any] = field(default_factory=dict)
    ids: tuple[str, ...] = ()


def embeds_of(shape: Shape) -> PromptEmbeds:
    """One prompt without content."""
    import torch

    return PromptEmbeds(
        {
            name: torch.zeros(size, dtype=torch.int64 if name in shape.ids else torch.bfloat16)
            for name, size in shape.embeds.items()
        }
    )


def _vae(channels: int, **other: Any) -> dict[str, Any]:
    return {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": channels,
        "sample_size": 1024,
        **other,
    }


SD_VAE = _vae(4)
WIDE_VAE = _vae(16, use_quant_conv=False, use_post_quant_conv=False)
T5_XXL, CLIP_L, CLIP_G = 4_762_310_656, 123_060_480, 694_659_840
TEXT_TOKENS = 300  # a long caption, where prompts are not padded

_SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "use_linear_projection": True,
}
_SDXL = Shape(
    _SDXL_UNET | {"projection_class_embeddings_input_dim": 2816},
    {"prompt_embeds": (77, 2048), "pooled_prompt_embeds": (1280,)},
    (CLIP_L, CLIP_G),
    SD_VAE,
)
_FLUX_PROMPT = {"prompt_embeds": (512, 4096), "pooled_prompt_embeds": (768,)}
_FLUX = Shape({"guidance_embeds": True}, _FLUX_PROMPT, (CLIP_L, T5_XXL), WIDE_VAE)
_SD3_DENOISER = {
    "sample_size": 128,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
}
_SD3_MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}


def _sd3(**denoiser: Any) -> Shape:
    embeds = {"prompt_embeds": (77 + 256, 4096), "pooled_prompt_embeds": (2048,)}
    return Shape({**_SD3_DENOISER, **denoiser}, embeds, (CLIP_L, CLIP_G, T5_XXL), WIDE_VAE)


def _text(denoiser: Mapping[str, Any], width: int, encoder: int, vae: Mapping[str, Any] | None = None) -> Shape:
    """A model whose prompts are the states of one text encoder, unpadded."""
    return Shape(denoiser, {"prompt_embeds": (TEXT_TOKENS, width)}, (encoder,), vae or {})


def _auraflow(rows: int) -> Shape:
    return Shape({"pos_embed_max_size": rows**2}, {"prompt_embeds": (256, 2048)}, (1_289_349_120,), SD_VAE)


_SD21 = Shape(
    {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    {"prompt_embeds": (77, 1024)},
    (340_387_840,),
    SD_VAE,
)
_HUNYUAN = {
    "sample_size": 128,
    "num_layers": 40,
    "num_attention_heads": 16,
    "attention_head_dim": 88,
    "hidden_size": 1408,
    "in_channels": 4,
    "patch_size": 2,
    "mlp_ratio": 4.3637,
    "activation_fn": "gelu-approximate",
    "cross_attention_dim": 1024,
    "cross_attention_dim_t5": 2048,
    "pooled_projection_dim": 1024,
    "text_len": 77,
    "text_len_t5": 256,
}
_HUNYUAN_PROMPT = {
    "prompt_embeds": (77, 1024),
    "prompt_attention_mask": (77,),
    "prompt_embeds_2": (256, 2048),
    "prompt_attention_mask_2": (256,),
}


def _hunyuan(has_meta_size: bool) -> Shape:
    denoiser = _HUNYUAN | {"use_style_cond_and_image_meta_size": has_meta_size}
    masks = ("prompt_attention_mask", "prompt_attention_mask_2")
    return Shape(denoiser, _HUNYUAN_PROMPT, (350_000_000, 1_670_000_000), SD_VAE, masks)


_HUNYUAN_DIT, _HUNYUAN_DIT_11 = _hunyuan(False), _hunyuan(True)


def _klein(double: int, single: int, heads: int, width: int, encoder: int) -> Shape:
    denoiser = {
        "num_layers": double,
        "num_single_layers": single,
        "num_attention_heads": heads,
        "joint_attention_dim": width,
        "guidance_embeds": False,
    }
    return Shape(denoiser, {"prompt_embeds": (512, width)}, (encoder,))


_QWEN_21 = Shape(
    {},
    {"prompt_embeds": (TEXT_TOKENS, 4096), "image_slots": (TEXT_TOKENS,)},
    (8_767_123_696,),
    ids=("image_slots",),
)
_KLEIN_4B, _KLEIN_9B = _klein(5, 20, 24, 7680, 4_022_468_096), _klein(8, 24, 32, 12288, 8_190_735_360)


def _pixart(num_layers: int) -> Shape:
    denoiser = {
        "num_layers": num_layers,
        "caption_channels": 4096,
        "interpolation_scale": 2,
        "use_additional_conditions": False,
    }
    return _text(denoiser, 4096, T5_XXL, SD_VAE)


_DC_BLOCKS = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
_DC_AUTOENCODER = {
    "encoder_block_types": _DC_BLOCKS,
    "decoder_block_types": _DC_BLOCKS,
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
    "scaling_factor": 0.41407,
}
_SANA_NARROW = {
    "num_attention_heads": 36,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}


_SANA_15 = {"qk_norm": "rms_norm_across_heads"}


def _sana(num_layers: int, **denoiser: object) -> Shape:
    return _text({"num_layers": num_layers, **denoiser}, 2304, 2_614_341_888, _DC_AUTOENCODER)


_SANA_16, _SANA_06 = _sana(20), _sana(28, **_SANA_NARROW)


# (family, flavor) -> shape. A flavor that is not listed has the shape of the first of its family.
SHAPES: Mapping[tuple[str, str], Shape] = {
    ("omnigen", "v1"): Shape(
        {
            "in_channels": 4,
            "patch_size": 2,
            "hidden_size": 3072,
            "num_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "intermediate_size": 8192,
            "vocab_size": 32064,
            "pos_embed_max_size": 192,
            "time_step_dim": 256,
            "rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48},
        },
        {"input_ids": (TEXT_TOKENS,)},
        (),
        SD_VAE,
        ids=("input_ids",),
    ),
    ("sdxl", "base-1.0"): _SDXL,
    ("kolors", "1.0"): Shape(
        _SDXL_UNET
        | {
            "projection_class_embeddings_input_dim": 5632,
            "encoder_hid_dim": 4096,
            "encoder_hid_dim_type": "text_proj",
        },
        {"prompt_embeds": (256, 4096), "pooled_prompt_embeds": (4096,)},
        (6_243_584_000,),
        SD_VAE,
    ),
    ("flux", "dev"): _FLUX,
    ("flux", "schnell"): Shape({}, _FLUX_PROMPT, (CLIP_L, T5_XXL), WIDE_VAE),
    ("sd3", "3.5-medium"): _sd3(
        **_SD3_MEDIUM | {"pos_embed_max_size": 384},
        dual_attention_layers=list(range(13)),
        qk_norm="rms_norm",
    ),
    ("sd3", "3.5-large"): _sd3(
        num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192, qk_norm="rms_norm"
    ),
    ("sd3", "3-medium"): _sd3(**_SD3_MEDIUM),
    ("omnigen2", "v1"): _text({}, 2048, 3_754_622_976, WIDE_VAE),
    ("chroma", "hd"): _text({}, 4096, T5_XXL, WIDE_VAE),
    ("qwen_image", "2512"): _text({}, 3584, 8_292_166_656),
    ("qwen_image_edit", "2511"): _text({"zero_cond_t": True}, 3584, 8_292_166_656),
    ("z_image", "base"): _text({"axes_lens": [1536, 512, 512]}, 2560, 4_022_468_096, _vae(16)),
    ("sd15", "1.5"): Shape(
        {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        {"prompt_embeds": (77, 768)},
        (CLIP_L,),
        SD_VAE,
    ),
    ("sd15", "2.1"): _SD21,
    ("sd15", "2.1-base"): _SD21,
    ("hunyuan_dit", "1.2"): _HUNYUAN_DIT,
    ("hunyuan_dit", "1.2-distilled"): _HUNYUAN_DIT,
    ("hunyuan_dit", "1.1"): _HUNYUAN_DIT_11,
    ("hunyuan_dit", "1.1-distilled"): _HUNYUAN_DIT_11,
    ("flux2", "klein-base-4b"): _KLEIN_4B,
    ("flux2", "klein-4b"): _KLEIN_4B,
    ("flux2", "klein-base-9b"): _KLEIN_9B,
    ("flux2", "klein-9b"): _KLEIN_9B,
    ("flux2", "dev"): Shape({}, {"prompt_embeds": (512, 15360)}, (23_572_403_200,)),
    ("qwen_image_21", "2.1"): _QWEN_21,
    ("qwen_image_21", "2.1-turbo"): _QWEN_21,
    ("pixart_sigma", "1024"): _pixart(28),
    ("pixart_sigma", "900m-0.6"): _pixart(42),
    ("sana", "1.5-1.6b"): _sana(20, **_SANA_15),
    ("sana", "1.5-4.8b"): _sana(60, **_SANA_15),
    ("sana", "1.0-1.6b"): _SANA_16,
    ("sana", "1.0-1.6b-512"): _SANA_16,
    ("sana", "1.0-0.6b"): _SANA_06,
    ("sana", "1.0-0.6b-512"): _SANA_06,
    ("auraflow", "v0.3"): _auraflow(96),
    ("auraflow", "v0.2"): _auraflow(64),
    ("auraflow", "v0.1"): _auraflow(64),
    ("lumina2", "2.0"): Shape({"cap_feat_dim": 2304}, {"prompt_embeds": (256, 2304)}, (2_614_341_888,), WIDE_VAE),
    ("krea2", "raw"): Shape({}, {"prompt_embeds": (TEXT_TOKENS, 12, 2560)}, (4_437_815_808,)),
}
