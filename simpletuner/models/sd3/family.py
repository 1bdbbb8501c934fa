"""Stable Diffusion 3 for the shared trainer: two CLIP encoders and T5, and a flow whose times are shifted.

The network is given 1000 sigma (1000 on noise) and predicts `noise - data`, which is the project's sign
(`pipeline_stable_diffusion_3.py`, step 6). Times are sampled from sigmoid(N(0, 1)) and shifted as the model's own
scheduler shifts them (arXiv 2403.03206, sections 3.1 and 5.3.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.batch import Conditioning, PromptEmbeds
from simpletuner.models.family import PromptReferences
from simpletuner.models.flow import FlowFamily
from simpletuner.models.live_pipeline import LivePipeline

CLIP_TOKENS = 77
CLIPS = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))


class SD3(FlowFamily):
    """The states of both CLIP encoders side by side, filled up with zeros to T5's width, then those of T5."""

    @property
    def architecture(self) -> str:
        """3.5 norms queries and keys; only its medium size has blocks with two attentions."""
        if self.denoiser_config.get("dual_attention_layers"):
            return "stable-diffusion-3.5-medium"
        return "stable-diffusion-3.5-large" if self.denoiser_config.get("qk_norm") else "stable-diffusion-3-medium"

    def largest_side(self) -> int | None:
        """The position table has `pos_embed_max_size` rows of patches."""
        return self.denoiser_config["pos_embed_max_size"] * self.spec.size_multiple

    @property
    def lacks_t5(self) -> bool:
        return self.source.lacks("text_encoder_3")

    @property
    def max_prompt_tokens(self) -> int:
        return CLIP_TOKENS if self.lacks_t5 else super().max_prompt_tokens

    def prompt_facts(self) -> Mapping[str, Any]:
        rows_of_zeros = {"rows_of_zeros": super().max_prompt_tokens} if self.lacks_t5 else {}
        return {**super().prompt_facts(), **rows_of_zeros}

    def count_prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        return self.encoders.count(self._longest_tokenizer, prompts)

    @property
    def _longest_tokenizer(self) -> str:
        return "tokenizer" if self.lacks_t5 else "tokenizer_3"

    def encode_prompts(self, prompts: Sequence[str], references: PromptReferences | None = None) -> list[PromptEmbeds]:
        """`prompt_embeds` (77 + T, D), padding included, and `pooled_prompt_embeds` (P,) of both CLIP encoders."""
        self.encoders.note_cut_prompts(self._longest_tokenizer, prompts, self.max_prompt_tokens)
        clip_states, pooled = [], []
        with torch.no_grad():
            for tokenizer, encoder in CLIPS:
                ids, _ = self.encoders.tokenize(tokenizer, prompts, CLIP_TOKENS)
                output = self.encoders.encoder(encoder)(ids, output_hidden_states=True)
                clip_states.append(output.hidden_states[-2])
                pooled.append(output[0])
            clip = torch.cat(clip_states, dim=-1)
            t5_states = self._t5_states(prompts, clip)
        clip = nn.functional.pad(clip, (0, t5_states.shape[-1] - clip.shape[-1]))
        rows, pools = torch.cat([clip, t5_states], dim=1), torch.cat(pooled, dim=-1)
        return [
            PromptEmbeds({"prompt_embeds": row.cpu(), "pooled_prompt_embeds": pool.cpu()})
            for row, pool in zip(rows, pools, strict=True)
        ]

    def _t5_states(self, prompts: Sequence[str], clip: Tensor) -> Tensor:
        """(B, T, D); without T5 as many rows of zeros as it has tokens, as in diffusers' pipeline."""
        length = super().max_prompt_tokens
        if self.lacks_t5:
            return clip.new_zeros(len(clip), length, self.denoiser_config["joint_attention_dim"])
        ids, _ = self.encoders.tokenize("tokenizer_3", prompts, length)
        return self.encoders.encoder("text_encoder_3")(ids)[0]

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        return denoiser(
            hidden_states=noisy_latents.to(self.dtype),
            timestep=1000 * sigmas,
            encoder_hidden_states=conditioning["prompt_embeds"].to(self.dtype),
            pooled_projections=conditioning["pooled_prompt_embeds"].to(self.dtype),
            return_dict=False,
        )[0]

    def pipeline(self, denoiser: nn.Module, vae: nn.Module | None = None) -> Any:
        from diffusers import StableDiffusion3Pipeline

        return LivePipeline.of(self, StableDiffusion3Pipeline, denoiser, vae)
