"""The denoisers of two families at full size with random weights: as this project computes them, and as published.

Both sides have the same inputs and the same targets for an adapter. Published means diffusers' own classes, forward
passes and gradient checkpointing, with PEFT's LoRA or LoKr.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_rows import FULL, PROMPT, RandomOmniGen
from random_families import random_module
from torch import Tensor, nn

from simpletuner.activation_memory.modules import reduce_activation_memory
from simpletuner.adapters.lora import LoraSettings, attach_lora
from simpletuner.adapters.lycoris import attach_lycoris
from simpletuner.batch import PromptEmbeds
from simpletuner.families.registry import get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.flux.family import Flux
from simpletuner.training.gradient_checkpointing import GradientCheckpointing
from simpletuner.training.planning.shapes import empty_batch
from simpletuner.training.step import compute_losses, sample_noise

REPOSITORY = Path(__file__).resolve().parent.parent
RANK, FACTOR = 16, 16
TEXT_TOKENS = 512
# Layers of attention and MLP by the ends of their paths, the same on both sides.
TARGETS = {
    "omnigen": ("to_q", "to_k", "to_v", "to_out.0", "gate_up_proj", "down_proj"),
    "flux": ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff.net.2"),
}
FLUX: dict[str, Any] = {
    "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
}  # fmt: skip
FLUX_TINY = FLUX | {
    "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 32, "pooled_projection_dim": 8, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip


class RandomFlux(Flux):
    """FLUX.1 dev of any shape with random weights, and prompts of random states."""

    def __init__(self, shape: dict[str, Any], device: torch.device):
        super().__init__(get_spec("flux"), ModelSource("none"), device, torch.bfloat16)
        self.shape = shape
        self.denoiser_config = {"guidance_embeds": True}
        self.scheduler_config = {"shift": 3.0, "use_dynamic_shifting": False}

    def encode_prompts(self, prompts: Any, references: Any = None) -> list[PromptEmbeds]:
        states = torch.zeros(TEXT_TOKENS, self.shape["joint_attention_dim"], dtype=self.dtype)
        pooled = torch.zeros(self.shape["pooled_projection_dim"], dtype=self.dtype)
        return [PromptEmbeds({"prompt_embeds": states, "pooled_prompt_embeds": pooled}) for _ in prompts]

    def public(self) -> nn.Module:
        from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

        return random_module(lambda: FluxTransformer2DModel(**self.shape), self.device, self.dtype)

    def load_denoiser(self) -> nn.Module:
        return reduce_activation_memory(self.public(), self.spec.block_classes)


def family_of(name: str, shape: dict[str, Any] | None, device: torch.device) -> RandomOmniGen | RandomFlux:
    return RandomOmniGen(shape or FULL, device) if name == "omnigen" else RandomFlux(shape or FLUX, device)


@dataclass(frozen=True)
class Side:
    """One of the two.

    Args:
        losses: () the loss of one forward pass.
        parameters: that train.
        denoiser: with its adapter.
    """

    losses: Callable[[], Tensor]
    parameters: list[nn.Parameter]
    denoiser: nn.Module


def ours(name: str, adapter: str, recomputes: bool, device: torch.device, pixels: int, shape: Any = None) -> Side:
    """As a run computes it, but for what the trainer adds to a step."""
    family = family_of(name, shape, device)
    denoiser: Any = family.load_denoiser()
    patterns = tuple(f"*{end}" for end in TARGETS[name])
    if adapter == "lora":
        attach_lora(denoiser, LoraSettings(rank=RANK, targets=patterns), family.spec, torch.bfloat16, seed=0)
    else:
        lycoris = {
            "algo": "lokr",
            "linear_dim": 10000,
            "factor": FACTOR,
            "apply_preset": {"target_name": list(patterns)},
        }
        lycoris["apply_preset"] |= {"use_fnmatch": True}  # type: ignore[operator]
        attach_lycoris(denoiser, lycoris, family.spec, torch.bfloat16, seed=0)
    if recomputes:
        denoiser.enable_gradient_checkpointing(GradientCheckpointing(device))
    denoiser.train()
    batch = empty_batch(family, pixels, pixels, family.encode_prompts([PROMPT]))
    noise, quantiles = sample_noise(batch, 0, 0), torch.full((1,), 0.5, dtype=torch.float64)
    if device.type == "meta":
        noise = torch.zeros_like(batch.latents)  # type: ignore[arg-type]
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    return Side(lambda: compute_losses(family, denoiser, batch, noise, quantiles).weighted_sum, trained, denoiser)


def published(name: str, adapter: str, recomputes: bool, device: torch.device, pixels: int, shape: Any = None) -> Side:
    """diffusers' class as it is, PEFT's adapter in it, and the shortest loss."""
    from diffusers import FluxPipeline
    from peft import LoKrConfig, LoraConfig, inject_adapter_in_model

    family = family_of(name, shape, device)
    denoiser: Any = family.public()
    denoiser.requires_grad_(False)
    modules = [path for path, layer in denoiser.named_modules() if isinstance(layer, nn.Linear)]
    names = [path for path in modules if path.endswith(TARGETS[name])]
    settings: dict[str, Any] = {"r": RANK, "target_modules": names}
    lokr = {"r": 100000, "decompose_factor": FACTOR, "target_modules": names}
    with torch.device(device):
        inject_adapter_in_model(LoraConfig(**settings) if adapter == "lora" else LoKrConfig(**lokr), denoiser)
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.to(device, torch.bfloat16)
    if recomputes:
        denoiser.enable_gradient_checkpointing()
    denoiser.train()
    side = pixels // 8

    def make(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(sizes, device=device, dtype=dtype)

    channels = family.spec.latent_channels
    latents, noise = make(1, channels, side, side), make(1, channels, side, side)
    if name == "omnigen":
        ids = family.encode_prompts([PROMPT])[0].tensors["input_ids"][None].to(device)
        length = ids.shape[1] + 1 + (side // 2) ** 2
        # As its pipeline makes it: text and time causal, the image open.
        mask = make(1, length, length).tril()
        mask[:, ids.shape[1] + 1 :] = 1
        inputs = {
            "input_ids": ids, "input_img_latents": [], "input_image_sizes": {}, "attention_mask": mask,
            "position_ids": torch.arange(length, device=device)[None],
        }  # fmt: skip
    else:
        inputs = {
            "guidance": make(1), "pooled_projections": make(1, family.shape["pooled_projection_dim"]),
            "encoder_hidden_states": make(1, TEXT_TOKENS, family.shape["joint_attention_dim"]),
            "txt_ids": make(TEXT_TOKENS, 3),
        }  # fmt: skip

    def loss() -> Tensor:
        """Noise, prediction, error: as diffusers' training scripts have it."""
        sigmas = torch.sigmoid(make(1, dtype=torch.float32))
        wide = sigmas[:, None, None, None]
        noisy = ((1 - wide) * latents + wide * noise).to(torch.bfloat16)
        if name == "omnigen":
            output = denoiser(noisy, 1 - sigmas, **inputs, return_dict=False)[0]
            return (output.float() - (latents - noise).float()).square().mean()
        packed = FluxPipeline._pack_latents(noisy, 1, 16, side, side)
        image_ids = FluxPipeline._prepare_latent_image_ids(1, side // 2, side // 2, device, torch.bfloat16)
        output = denoiser(packed, timestep=sigmas, img_ids=image_ids, **inputs, return_dict=False)[0]
        output = FluxPipeline._unpack_latents(output, 8 * side, 8 * side, 8)
        return (output.float() - (noise - latents).float()).square().mean()

    return Side(loss, trained, denoiser)
