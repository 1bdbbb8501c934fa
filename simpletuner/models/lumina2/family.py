"""Lumina 2 for the shared trainer: Gemma 2's states of a system prompt with the caption behind it.

Lumina counts time from noise (t = 0) to data (t = 1) and predicts `data - noise` (`pipeline_lumina2.py`, step 6): t is
1 - sigma, and the output changes sign. A caption is encoded behind the system prompt of the release; an empty one and
negative prompts without it, as the pipeline does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.batch import Conditioning
from simpletuner.models.language_model_text import LanguageModelText
from simpletuner.models.live_pipeline import MaskedLivePipeline
from simpletuner.models.rotary_tables import Lumina2Tables

START = "<Prompt Start>"
SYSTEM_PROMPT = (
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    f"on textual prompts or user prompts. {START} "
)


class Lumina2(LanguageModelText):
    """The network masks the padding of prompts."""

    reads_prompts_singly = True

    def largest_side(self) -> int:
        """The rotary tables have so many rows and columns of patches."""
        return min(self.denoiser_config["axes_lens"][1:]) * self.spec.size_multiple

    def adjust_denoiser(self, denoiser: Any) -> nn.Module:
        own = denoiser.rope_embedder
        denoiser.rope_embedder = Lumina2Tables(own.theta, own.axes_dim, own.axes_lens, own.patch_size)
        return denoiser

    def encoded_text(self, prompt: str) -> str:
        """A prompt that brings its own system prompt stays as it is."""
        mark = self.spec.negative_mark
        is_whole = not prompt or prompt.startswith(mark) or START in prompt
        return prompt.removeprefix(mark) if is_whole else SYSTEM_PROMPT + prompt

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        embeds = conditioning["prompt_embeds"]
        mask: Any = conditioning.tensors.get("prompt_mask", embeds.new_ones(embeds.shape[:2], dtype=torch.bool))
        mask.num_tokens = conditioning.num_tokens  # so the device is not asked
        return -denoiser(noisy_latents.to(self.dtype), 1 - sigmas, embeds, mask, return_dict=False)[0]

    def pipeline(self, denoiser: nn.Module, vae: nn.Module | None = None) -> Any:
        from diffusers import Lumina2Pipeline

        return MaskedLivePipeline.of(self, Lumina2Pipeline, denoiser, vae)
