"""AuraFlow for the shared trainer.

AuraFlow's network is given t in [0, 1], 1 on noise, and answers `noise - data` (`pipeline_aura_flow.py`, step 6, with a
scheduler that is not inverted): t is sigma, and the sign is the project's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from simpletuner.batch import Batch, Conditioning, PromptEmbeds
from simpletuner.models.components import component_config
from simpletuner.models.family import ModelFamily, PromptReferences
from simpletuner.models.live_pipeline import LivePipeline


class AuraFlow(ModelFamily):
    """A text encoder, and a transformer that has no attention mask: every prompt is padded to the same length."""

    def encode_prompts(self, prompts: Sequence[str], references: PromptReferences | None = None) -> list[PromptEmbeds]:
        """`prompt_embeds` (L, D) per prompt."""
        self.encoders.note_cut_prompts("tokenizer", prompts, self.spec.max_prompt_tokens)
        ids, mask = self.encoders.tokenize("tokenizer", prompts, self.spec.max_prompt_tokens)
        with torch.no_grad():
            states = self.encoders.encoder()(ids, attention_mask=mask).last_hidden_state
        return [PromptEmbeds({"prompt_embeds": row[kept.bool()].cpu()}) for row, kept in zip(states, mask, strict=True)]

    def collate(self, batch: Batch) -> Conditioning:
        """(B, max_prompt_tokens, D): zeros behind each prompt, which is what the pipeline makes of its padding."""
        return Conditioning({"prompt_embeds": self.pad_prompts(batch.prompt_embeds)})

    def pad_prompts(self, embeds: Sequence[PromptEmbeds]) -> Tensor:
        rows, length = [each.tensors["prompt_embeds"] for each in embeds], self.spec.max_prompt_tokens
        return torch.stack([pad(row, (0, 0, 0, length - len(row))) for row in rows]).to(self.device, self.dtype)

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        output = denoiser(
            noisy_latents.to(self.dtype),
            encoder_hidden_states=conditioning["prompt_embeds"],
            timestep=sigmas,
            return_dict=False,
        )
        return output[0]

    def pipeline(self, denoiser: nn.Module, vae: nn.Module | None = None) -> Any:
        from diffusers import AuraFlowPipeline, FlowMatchEulerDiscreteScheduler

        config = component_config(self.source, self.spec.component("scheduler"))
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        return AuraFlowLivePipeline(self, AuraFlowPipeline(None, None, None, denoiser, scheduler), vae)


class AuraFlowLivePipeline(LivePipeline):
    """diffusers' pipeline with embeddings in place of texts."""

    def prompt_arguments(
        self, prompts: Sequence[str], negative_prompts: Sequence[str] | None, guidance_scale: float
    ) -> dict[str, Any]:
        family = self.family
        negatives = negative_prompts or [family.spec.dropped_caption] * len(prompts)
        arguments: dict[str, Any] = {"guidance_scale": guidance_scale}
        for prefix, texts in (("", prompts), ("negative_", negatives)):
            embeds = family.pad_prompts(family.prompts.embeds(texts))
            arguments[f"{prefix}prompt_embeds"] = embeds
            arguments[f"{prefix}prompt_attention_mask"] = embeds.new_ones(embeds.shape[:2])  # padded already
        return arguments
