"""AuraFlow for the shared trainer.

AuraFlow's network is given t in [0, 1], 1 on noise, and answers `noise - data` (`pipeline_aura_flow.py`, step 6, with a
scheduler that is not inverted): t is sigma, and the sign is the project's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from simpletuner.batch import Batch, PromptEmbeds
from simpletuner.diffusion.loss import Latents
from simpletuner.models.components import component_file, load_component
from simpletuner.models.family import Conditioning, ModelFamily


class AuraFlow(ModelFamily):
    """A text encoder, and a transformer that has no attention mask: every prompt is padded to the same length."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._encoders: tuple[Any, nn.Module] | None = None

    def encode_prompts(
        self, prompts: Sequence[str], references: Sequence[Sequence[tuple[int, int]]] | None = None
    ) -> list[PromptEmbeds]:
        """`prompt_embeds` (L, D) float32 per prompt."""
        tokenizer, text_encoder = self._load_encoders()
        length = self.spec.max_prompt_tokens
        tokens = tokenizer(
            list(prompts), truncation=True, max_length=length, padding="max_length", return_tensors="pt"
        ).to(self.device)
        with torch.no_grad():
            states = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        return [
            PromptEmbeds({"prompt_embeds": row[mask.bool()].float().cpu()})
            for row, mask in zip(states, tokens.attention_mask, strict=True)
        ]

    def free_prompt_encoders(self) -> None:
        self._encoders = None

    def collate(self, batch: Batch) -> Conditioning:
        """(B, max_prompt_tokens, D): zeros behind each prompt, which is what the pipeline makes of its padding."""
        rows = [embeds.tensors["prompt_embeds"] for embeds in batch.prompt_embeds]
        length = self.spec.max_prompt_tokens
        return {"prompt_embeds": torch.stack([pad(row, (0, 0, 0, length - len(row))) for row in rows]).to(self.device)}

    def predict(
        self, denoiser: nn.Module, noisy_latents: Latents, sigmas: Tensor, conditioning: Conditioning
    ) -> Latents:
        assert isinstance(noisy_latents, Tensor)
        output = denoiser(
            noisy_latents.to(self.dtype),
            encoder_hidden_states=conditioning["prompt_embeds"].to(self.dtype),
            timestep=sigmas,
            return_dict=False,
        )
        return output[0]

    def pipeline(self, denoiser: nn.Module, vae: nn.Module | None = None) -> Any:
        from diffusers import AuraFlowPipeline, FlowMatchEulerDiscreteScheduler

        component = self.spec.component("scheduler")
        path = component_file(self.source, component, component.config_file)
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(json.loads(path.read_text()))
        pipeline = AuraFlowPipeline(*self._load_encoders(), vae, denoiser, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _load_encoders(self) -> tuple[Any, nn.Module]:
        if self._encoders is None:
            from transformers import AutoTokenizer

            component = self.spec.component("tokenizer")
            folder = component_file(self.source, component, component.config_file).parent
            text_encoder = load_component(self.source, self.spec.component("text_encoder"), self.dtype)
            self._encoders = AutoTokenizer.from_pretrained(folder), text_encoder.eval().to(self.device)
        return self._encoders
