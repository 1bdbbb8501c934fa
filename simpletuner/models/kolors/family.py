"""Kolors for the shared trainer: ChatGLM3 in front of the UNet of `size_conditioned_unet.py`.

Prompts are padded on the left and their positions count from the first token of the text (`pipeline_kolors.py`,
`encode_prompt`). ChatGLM's states are (L, B, D): the UNet reads those before the last layer, the padding included and
without a mask, and the last token's of the last layer is the pooled vector. An empty prompt is encoded like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from simpletuner.batch import PromptEmbeds
from simpletuner.models.family import PromptReferences
from simpletuner.models.live_pipeline import LivePipeline
from simpletuner.models.size_conditioned_unet import SizeConditionedUNet


class Kolors(SizeConditionedUNet):
    """1100 noise levels; the noise is predicted."""

    def count_prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        return self.encoders.count("tokenizer", prompts)

    def encode_prompts(self, prompts: Sequence[str], references: PromptReferences | None = None) -> list[PromptEmbeds]:
        """`prompt_embeds` (256, D), padding included, and `pooled_prompt_embeds` (D,)."""
        length = self.spec.max_prompt_tokens
        self.encoders.note_cut_prompts("tokenizer", prompts, length)
        ids, mask = self.encoders.tokenize("tokenizer", prompts, length)
        positions = (mask.cumsum(dim=-1) - 1).clamp_min(0)
        with torch.no_grad():
            states = self.encoders.encoder()(
                ids,
                position_ids=positions,
                attention_mask=mask,
                output_hidden_states=True,
                use_cache=False,
                return_dict=True,
            ).hidden_states
        rows = zip(states[-2].unbind(dim=1), states[-1][-1], strict=True)
        return [
            PromptEmbeds({"prompt_embeds": row.contiguous().cpu(), "pooled_prompt_embeds": pooled.cpu()})
            for row, pooled in rows
        ]

    def pipeline(self, denoiser: nn.Module, vae: nn.Module | None = None) -> Any:
        from diffusers.pipelines.kolors.pipeline_kolors import KolorsPipeline

        return LivePipeline.of(self, KolorsPipeline, denoiser, vae)
