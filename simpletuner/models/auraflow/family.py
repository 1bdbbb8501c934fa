"""AuraFlow for the shared trainer.

The network is given t, 1 on noise and 0 on data, and predicts `noise - data` (`pipeline_aura_flow.py`, step 6): t is
sigma, and the sign is the project's.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad

from simpletuner.batch import Conditioning, PromptEmbeds
from simpletuner.models.family import PromptReferences
from simpletuner.models.flow import FlowFamily
from simpletuner.models.live_pipeline import MaskedLivePipeline


class AuraFlow(FlowFamily):
    """A text encoder, and a transformer that has no attention mask: it reads zeros behind every prompt."""

    def largest_side(self) -> int:
        """The table of positions is a square of so many patches."""
        return isqrt(self.denoiser_config["pos_embed_max_size"]) * self.spec.size_multiple

    def count_prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        return self.encoders.count("tokenizer", prompts)

    def encode_prompts(self, prompts: Sequence[str], references: PromptReferences | None = None) -> list[PromptEmbeds]:
        """`prompt_embeds` (L, D) per prompt."""
        rows = self.encoders.masked_states(prompts, self.spec.max_prompt_tokens)
        return [PromptEmbeds({"prompt_embeds": row}) for row in rows]

    def condition_on(self, prompts: Sequence[PromptEmbeds], references: Sequence[Sequence[Tensor]]) -> Conditioning:
        """Every prompt filled up with zeros, which the network reads as it was trained to."""
        rows = [each.tensors["prompt_embeds"] for each in prompts]
        filled = [pad(row, (0, 0, 0, self.spec.max_prompt_tokens - len(row))) for row in rows]
        return super().condition_on([PromptEmbeds({"prompt_embeds": row}) for row in filled], references)

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        return denoiser(noisy_latents.to(self.dtype), conditioning["prompt_embeds"], sigmas, return_dict=False)[0]

    def pipeline(self, denoiser: nn.Module, vae: nn.Module | None = None) -> Any:
        from diffusers import AuraFlowPipeline

        return MaskedLivePipeline.of(self, AuraFlowPipeline, denoiser, vae)
