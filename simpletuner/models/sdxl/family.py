"""Stable Diffusion XL for the shared trainer: two CLIP encoders in front of the UNet of `size_conditioned_unet.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn

from simpletuner.batch import PromptEmbeds
from simpletuner.models.clip_chunks import chunk_ids, join_chunks
from simpletuner.models.components import model_index
from simpletuner.models.family import PromptReferences
from simpletuner.models.live_pipeline import LivePipeline
from simpletuner.models.size_conditioned_unet import SizeConditionedUNet

ENCODERS = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))


class SDXL(SizeConditionedUNet):
    """The base model; embeddings are the states before the last layer of both encoders, side by side."""

    @cached_property
    def zeroes_empty_prompts(self) -> bool:
        """SDXL was trained with zeros where a caption was dropped, and its pipeline guides away from zeros.

        Models that were made of it often were not: the option says so, else the model itself.
        """
        if self.force_zeros_for_empty_prompt is not None:
            return self.force_zeros_for_empty_prompt
        return bool(model_index(self.source).get("force_zeros_for_empty_prompt", True))

    def prompt_facts(self) -> Mapping[str, Any]:
        return {**super().prompt_facts(), "zeroes_empty_prompts": self.zeroes_empty_prompts}

    def count_prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        return self.encoders.count("tokenizer", prompts)

    def encode_prompts(self, prompts: Sequence[str], references: PromptReferences | None = None) -> list[PromptEmbeds]:
        """`prompt_embeds` (L, D) and `pooled_prompt_embeds` (P,) of the second encoder; zeros for an empty prompt.

        L is 77, or what `tokenizer_max_length` says: prompts are read in chunks then, and pooled from the first.
        """
        length = self.max_prompt_tokens
        self.encoders.note_cut_prompts("tokenizer", prompts, length)
        states, pooled = [], torch.empty(0)
        with torch.no_grad():
            for tokenizer, encoder in ENCODERS:
                ids = chunk_ids(self.encoders.tokenizer(tokenizer), prompts, length).to(self.device)
                output = self.encoders.encoder(encoder)(ids.flatten(0, 1), output_hidden_states=True)
                states.append(join_chunks(output.hidden_states[-2], len(prompts)))
                pooled = output[0].unflatten(0, ids.shape[:2])[:, 0]
        kept = [0.0 if self.zeroes_empty_prompts and not prompt else 1.0 for prompt in prompts]
        return [
            PromptEmbeds({"prompt_embeds": (row * factor).cpu(), "pooled_prompt_embeds": (pool * factor).cpu()})
            for row, pool, factor in zip(torch.cat(states, dim=-1), pooled, kept, strict=True)
        ]

    def pipeline(self, denoiser: nn.Module, vae: nn.Module | None = None) -> Any:
        from diffusers import StableDiffusionXLPipeline

        options = {"force_zeros_for_empty_prompt": self.zeroes_empty_prompts, "add_watermarker": False}
        return LivePipeline.of(self, StableDiffusionXLPipeline, denoiser, vae, **options)
