"""Stable Diffusion 1.5 and 2.1 for the shared trainer: one CLIP encoder, and discrete noise levels.

The UNet is given the level t = 0 ... 999 and predicts the noise, or v where its scheduler says so
(`models/discrete.py`). An empty prompt is encoded like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.batch import Conditioning, PromptEmbeds
from simpletuner.families.spec import FamilySpec
from simpletuner.models.clip_chunks import chunk_ids, join_chunks
from simpletuner.models.discrete import DiscreteFamily
from simpletuner.models.family import PromptReferences
from simpletuner.models.live_pipeline import LivePipeline


class SD15(DiscreteFamily):
    """1.5 projects into its transformers by convolutions, 2.1 by linear layers: the weights' configuration tells."""

    @property
    def is_second(self) -> bool:
        return bool(self.denoiser_config.get("use_linear_projection"))

    @property
    def architecture(self) -> str:
        if not self.is_second:
            return super().architecture
        return f"stable-diffusion-v2-{'768-v' if self.prediction_type == 'v_prediction' else '512'}"

    @property
    def spec_of_weights(self) -> FamilySpec:
        spec, suffix = super().spec_of_weights, "_v" if self.prediction_type == "v_prediction" else ""
        version = f"sd_v{2 if self.is_second else 1}{suffix}"
        return replace(spec, keys=replace(spec.keys, base_model_version=version))

    def prompt_facts(self) -> Mapping[str, Any]:
        return {**super().prompt_facts(), "clip_skip": self.clip_skip}

    def count_prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        return self.encoders.count("tokenizer", prompts)

    def encode_prompts(self, prompts: Sequence[str], references: PromptReferences | None = None) -> list[PromptEmbeds]:
        """`prompt_embeds` (L, D): a layer's states, `clip_skip` from the end, after the final norm.

        L is 77, or what `tokenizer_max_length` says: prompts are read in chunks then.
        """
        length = self.max_prompt_tokens
        self.encoders.note_cut_prompts("tokenizer", prompts, length)
        ids = chunk_ids(self.encoders.tokenizer(), prompts, length).to(self.device)
        encoder = self.encoders.encoder()
        with torch.no_grad():
            layers = encoder(ids.flatten(0, 1), output_hidden_states=True).hidden_states
            states = join_chunks(encoder.final_layer_norm(layers[-self.clip_skip]), len(prompts))
        return [PromptEmbeds({"prompt_embeds": row.cpu()}) for row in states]

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        return denoiser(
            noisy_latents.to(self.dtype),
            self.schedule.timesteps(sigmas),
            encoder_hidden_states=conditioning["prompt_embeds"].to(self.dtype),
            return_dict=False,
        )[0]

    def pipeline(self, denoiser: nn.Module, vae: nn.Module | None = None) -> Any:
        from diffusers import StableDiffusionPipeline

        return LivePipeline.of(self, StableDiffusionPipeline, denoiser, vae, requires_safety_checker=False)
