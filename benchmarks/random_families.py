"""Families with random weights of any size and random prompt embeddings: no file is read, nothing is downloaded.

`FULL` has the released shapes, `MEDIUM` the same networks in a size that a CPU trains in a second a step: blocks
512 wide, all kinds of blocks, text of usual length. `TINY` is for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import diffusers
import torch
from torch import Tensor, nn

from simpletuner.batch import PromptEmbeds
from simpletuner.families.registry import get_family_class, get_spec
from simpletuner.models import family as family_module
from simpletuner.models.components import ModelSource
from simpletuner.models.family import ModelFamily

FLOW = {"shift": 3.0, "use_dynamic_shifting": False}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
UNET: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
Sizes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Network:
    """A denoiser.

    Args:
        shape: arguments of the public class.
        prompt: name -> shape of what encoders would give for a prompt.
    """

    shape: Mapping[str, Any]
    prompt: Sizes


def text(length: int, width: int, pooled: int | None = None) -> Sizes:
    states: dict[str, tuple[int, ...]] = {"prompt_embeds": (length, width)}
    return states if pooled is None else states | {"pooled_prompt_embeds": (pooled,)}


FULL = {
    "sdxl": Network(
        UNET
        | {
            "sample_size": 128, "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048, "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        text(77, 2048, 1280),
    ),
    "flux": Network(
        {"num_layers": 19, "num_single_layers": 38, "joint_attention_dim": 4096, "guidance_embeds": True},
        text(512, 4096, 768),
    ),
    "z_image": Network({"dim": 3840, "n_layers": 30, "n_heads": 30, "n_kv_heads": 30}, text(128, 2560)),
    "qwen_image": Network({"num_layers": 60}, text(128, 3584)),
}  # fmt: skip

TINY = {
    "sdxl": Network(
        UNET | {
            "sample_size": 8, "block_out_channels": (8, 16, 16), "transformer_layers_per_block": (1, 1, 2),
            "attention_head_dim": (1, 2, 2), "norm_num_groups": 4, "cross_attention_dim": 32,
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64,
        },
        text(77, 32, 16),
    ),
    "flux": Network(
        {
            "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
            "joint_attention_dim": 32, "pooled_projection_dim": 8, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6),
        },
        text(32, 32, 8),
    ),
    "z_image": Network(
        {
            "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 32,
            "axes_dims": [8, 4, 4], "axes_lens": [1536, 512, 512],
        },
        text(32, 32),
    ),
    "qwen_image": Network(
        {
            "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32,
            "axes_dims_rope": (4, 6, 6),
        },
        text(32, 32),
    ),
}  # fmt: skip
JOINT = {"attention_head_dim": 64, "num_attention_heads": 8, "joint_attention_dim": 512}
MEDIUM_UNET = UNET | {
    "sample_size": 64, "block_out_channels": (128, 256, 512), "transformer_layers_per_block": (1, 1, 3),
    "attention_head_dim": (2, 4, 8), "cross_attention_dim": 512, "addition_time_embed_dim": 64,
    "projection_class_embeddings_input_dim": 640,
}  # fmt: skip
MEDIUM = {
    "sdxl": Network(MEDIUM_UNET, text(77, 512, 256)),
    "flux": Network(
        JOINT | {
            "num_layers": 2, "num_single_layers": 3, "pooled_projection_dim": 256, "guidance_embeds": True,
            "axes_dims_rope": (16, 24, 24),
        },
        text(256, 512, 256),
    ),
    "sd3": Network(
        JOINT | {
            "sample_size": 64, "num_layers": 5, "caption_projection_dim": 512, "pooled_projection_dim": 256,
            "pos_embed_max_size": 96, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm",
        },
        text(333, 512, 256),
    ),
    "z_image": Network(
        {
            "dim": 512, "n_layers": 3, "n_refiner_layers": 1, "n_heads": 8, "n_kv_heads": 8, "cap_feat_dim": 512,
            "axes_dims": [16, 24, 24], "axes_lens": [1536, 512, 512],
        },
        text(128, 512),
    ),
    "qwen_image": Network(JOINT | {"num_layers": 4, "axes_dims_rope": (16, 24, 24)}, text(128, 512)),
    "chroma": Network(
        JOINT | {
            "num_layers": 2, "num_single_layers": 3, "axes_dims_rope": (16, 24, 24), "approximator_hidden_dim": 256,
        },
        text(128, 512),
    ),
    "flux2": Network(
        JOINT | {"num_layers": 2, "num_single_layers": 3, "axes_dims_rope": (16, 16, 16, 16), "guidance_embeds": False},
        text(256, 512),
    ),
    "krea2": Network(
        {
            "num_layers": 4, "attention_head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 4,
            "intermediate_size": 1536, "text_hidden_dim": 256, "text_intermediate_size": 512,
            "text_num_attention_heads": 4, "text_num_key_value_heads": 4, "axes_dims_rope": (16, 24, 24),
            "timestep_embed_dim": 64,
        },
        {"prompt_embeds": (128, 12, 256)},
    ),
    "auraflow": Network(
        {
            "sample_size": 64, "num_mmdit_layers": 2, "num_single_dit_layers": 3, "attention_head_dim": 64,
            "num_attention_heads": 8, "joint_attention_dim": 512, "caption_projection_dim": 512,
            "pos_embed_max_size": 4096,
        },
        text(128, 512),
    ),
    "lumina2": Network(
        {
            "hidden_size": 576, "num_layers": 4, "num_refiner_layers": 1, "num_attention_heads": 6, "num_kv_heads": 2,
            "axes_dim_rope": (32, 32, 32), "cap_feat_dim": 512,
        },
        text(128, 512),
    ),
    "kolors": Network(
        MEDIUM_UNET | {
            "encoder_hid_dim": 256, "encoder_hid_dim_type": "text_proj", "projection_class_embeddings_input_dim": 640,
        },
        text(256, 256, 256),
    ),
    "sd15": Network(
        {"sample_size": 64, "block_out_channels": (64, 128, 256, 256), "cross_attention_dim": 256}, text(77, 256)
    ),
    "hunyuan_dit": Network(
        {
            "num_attention_heads": 8, "attention_head_dim": 64, "in_channels": 4, "patch_size": 2, "sample_size": 64,
            "hidden_size": 512, "num_layers": 6, "cross_attention_dim": 256, "cross_attention_dim_t5": 256,
            "pooled_projection_dim": 256,
        },
        {
            **text(77, 256), "prompt_attention_mask": (77,),
            "prompt_embeds_2": (256, 256), "prompt_attention_mask_2": (256,),
        },
    ),
    "pixart_sigma": Network(
        {
            "num_attention_heads": 8, "attention_head_dim": 64, "num_layers": 5, "out_channels": 8, "sample_size": 64,
            "cross_attention_dim": 512, "caption_channels": 512,
        },
        text(128, 512),
    ),
    "sana": Network(
        {
            "num_attention_heads": 16, "attention_head_dim": 32, "num_layers": 4, "sample_size": 16,
            "num_cross_attention_heads": 8, "cross_attention_head_dim": 64, "cross_attention_dim": 512,
            "caption_channels": 512,
        },
        text(128, 512),
    ),
}  # fmt: skip


def random_module(make: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A frozen module made on its device, all of it in one number format."""
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            module = make()
    finally:
        torch.set_default_dtype(usual)
    for tensor in (*module.parameters(), *module.buffers()):  # a few buffers are made in float32
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return module.eval().requires_grad_(False)


class RandomParts:
    """Stands before a family's own class: weights and embeddings from nowhere, all else as the family has it."""

    network: Network
    is_distilled = False

    def public(self: Any) -> nn.Module:
        """The public class with the same weights each time, frozen, as published."""
        make = getattr(diffusers, self.spec.component("denoiser").class_name.rpartition(".")[2])
        return random_module(lambda: make(**self.network.shape), self.device, self.dtype)

    def load_denoiser(self: Any) -> nn.Module:
        """As the family makes it ready for training."""
        with patch.object(family_module, "load_component", lambda *_: self.public()):
            return super().load_denoiser()  # type: ignore[misc]

    def encode_prompts(self: Any, prompts: Any, references: Any = None) -> list[PromptEmbeds]:
        torch.manual_seed(0)
        tensors = {name: _random(name, size, self.dtype) for name, size in self.network.prompt.items()}
        return [PromptEmbeds(tensors) for _ in prompts]


def _random(name: str, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.ones(size, dtype=torch.long) if "mask" in name else torch.randn(size).to(dtype)


def random_family(
    name: str, network: Network, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> ModelFamily:
    """A family around a random network, which `load_denoiser` makes on `device`."""
    spec = get_spec(name)
    kind = type(f"Random_{name}", (RandomParts, get_family_class(spec)), {"network": network})
    family: ModelFamily = kind(spec, ModelSource("none"), device, dtype)
    family.denoiser_config = dict(network.shape)
    family.scheduler_config = dict(FLOW if "prediction" not in str(spec.prediction_type) else BETAS)
    return family
