"""FLUX.1 for the shared trainer: T5 and CLIP, latents as patches, guidance as an input, a reference as further patches.

The network is given sigma (1 on noise) and predicts `noise - data`, which is the project's sign
(`pipeline_flux.py`, step 6: the scheduler's sigmas times 1000, divided by 1000). Times come from sigmoid(N(0, 1)) and
are shifted toward noise as the model's own scheduler shifts them, with the number of patches where it is dynamic:
Esser et al. (arXiv 2403.03206), section 5.3.2, trains and samples with one shift.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.batch import Conditioning, PromptEmbeds
from simpletuner.models.family import PromptReferences, have_one_shape, send
from simpletuner.models.flow import FlowFamily
from simpletuner.models.patches import pack, position_ids, unpack

# A distilled model is trained as if its image were generated at this guidance; then 3.5 still means 3.5 afterwards.
TRAINING_GUIDANCE = 1.0
CLIP_TOKENS = 77
# Without guidance (schnell) the model was distilled with shorter prompts.
TOKENS_WITHOUT_GUIDANCE = 256


class Flux(FlowFamily):
    """dev, Krea and Kontext take guidance as an input, schnell takes none: the weights' configuration says which."""

    @property
    def takes_guidance(self) -> bool:
        return bool(self.denoiser_config.get("guidance_embeds"))

    @property
    def architecture(self) -> str:
        return super().architecture if self.takes_guidance else "flux-1-schnell"

    @property
    def max_prompt_tokens(self) -> int:
        return self.prompt_length or (self.spec.max_prompt_tokens if self.takes_guidance else TOKENS_WITHOUT_GUIDANCE)

    def count_prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        return self.encoders.count("tokenizer_2", prompts)

    def encode_prompts(self, prompts: Sequence[str], references: PromptReferences | None = None) -> list[PromptEmbeds]:
        """`prompt_embeds` (T, D) of T5, padding included, and `pooled_prompt_embeds` (P,) of CLIP.

        FLUX.1 was trained on T5's states of the padding too, so all of them are kept.
        """
        self.encoders.note_cut_prompts("tokenizer_2", prompts, self.max_prompt_tokens)
        ids, _ = self.encoders.tokenize("tokenizer", prompts, CLIP_TOKENS)
        ids_2, _ = self.encoders.tokenize("tokenizer_2", prompts, self.max_prompt_tokens)
        with torch.no_grad():
            pooled = self.encoders.encoder("text_encoder")(ids).pooler_output
            states = self.encoders.encoder("text_encoder_2")(ids_2)[0]
        return [
            PromptEmbeds({"prompt_embeds": row.cpu(), "pooled_prompt_embeds": pool.cpu()})
            for row, pool in zip(states, pooled, strict=True)
        ]

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        if not have_one_shape(conditioning.references):
            return self.predict_each(denoiser, noisy_latents, sigmas, conditioning)
        latents = noisy_latents.to(self.dtype)
        references = [torch.stack(each) for each in zip(*conditioning.references, strict=True)]
        tokens = [pack(each) for each in (latents, *references)]
        prompt_embeds = conditioning["prompt_embeds"].to(self.dtype)
        num_text_tokens = prompt_embeds.shape[1]
        image_ids = [position_ids(latents), *(position_ids(each, index=1) for each in references)]
        ids = send(torch.cat([torch.zeros(num_text_tokens, 3, dtype=self.dtype), *image_ids]), self.device)
        output = denoiser(
            hidden_states=torch.cat(tokens, dim=1) if references else tokens[0],
            timestep=sigmas,
            guidance=torch.full_like(sigmas, TRAINING_GUIDANCE, dtype=self.dtype) if self.takes_guidance else None,
            pooled_projections=conditioning["pooled_prompt_embeds"].to(self.dtype),
            encoder_hidden_states=prompt_embeds,
            txt_ids=ids[:num_text_tokens],
            img_ids=ids[num_text_tokens:],
            return_dict=False,
        )[0]
        return unpack(output[:, : tokens[0].shape[1]], *latents.shape[-2:])

    def unpack_latents(self, latents: Tensor, height: int, width: int) -> Tensor:
        return unpack(latents, height // self.spec.vae_factor, width // self.spec.vae_factor)

    def pipeline(self, denoiser: nn.Module, vae: nn.Module | None = None) -> Any:
        from simpletuner.models.flux.pipeline import build_pipeline

        return build_pipeline(self, denoiser, vae)
