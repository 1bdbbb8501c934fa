"""PixArt-Sigma for the shared trainer: T5 with a mask, and the noise of a discrete schedule.

The network is given t = 0 ... 999 and predicts the noise in the first four of eight channels; the other four were a
variance, which nothing here trains or reads (`pipeline_pixart_sigma.py`, denoising loop). Prompts are lower-cased, as
the pipeline has them where the packages that clean captions are not installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from simpletuner.batch import Conditioning, PromptEmbeds
from simpletuner.models.discrete import DiscreteFamily
from simpletuner.models.family import PromptReferences
from simpletuner.models.live_pipeline import MaskedLivePipeline


class PixArtSigma(DiscreteFamily):
    """Prompts without their padding, which the mask hides from every token of the image."""

    def prompt_facts(self) -> Mapping[str, Any]:
        return {**super().prompt_facts(), "lower_case": True}

    def count_prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        return self.encoders.count("tokenizer", cleaned(prompts))

    def encode_prompts(self, prompts: Sequence[str], references: PromptReferences | None = None) -> list[PromptEmbeds]:
        """`prompt_embeds` (L, D), the end of the text included."""
        rows = self.encoders.masked_states(cleaned(prompts), self.max_prompt_tokens)
        return [PromptEmbeds({"prompt_embeds": row}) for row in rows]

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        output = denoiser(
            noisy_latents.to(self.dtype),
            encoder_hidden_states=conditioning["prompt_embeds"],
            timestep=self.schedule.timesteps(sigmas),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            encoder_attention_mask=conditioning.tensors.get("prompt_mask"),
            return_dict=False,
        )[0]
        return output[:, : noisy_latents.shape[1]]

    def pipeline(self, denoiser: nn.Module, vae: nn.Module | None = None) -> Any:
        from diffusers import PixArtSigmaPipeline

        return PixArtLivePipeline.of(self, PixArtSigmaPipeline, denoiser, vae)


class PixArtLivePipeline(MaskedLivePipeline):
    """diffusers' pipeline, which takes the callback of older ones, and would take the nearest of a few sizes."""

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        callback_on_step_end: Any = None,
        **options: Any,
    ) -> Any:
        def after_step(step: int, timestep: Any, latents: Tensor) -> None:
            answer = callback_on_step_end(self.pipeline, step, timestep, {"latents": latents})
            latents.copy_(answer.get("latents", latents))  # what an older callback answers is not looked at

        options |= {"callback": after_step if callback_on_step_end else None, "use_resolution_binning": False}
        return super().__call__(prompt, negative_prompt, **options)


def cleaned(prompts: Sequence[str]) -> list[str]:
    """Prompts as the pipeline tokenizes them."""
    return [prompt.lower().strip() for prompt in prompts]
