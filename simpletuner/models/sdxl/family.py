"""Stable Diffusion XL for the shared trainer: two CLIP encoders, sizes as conditioning, and discrete noise levels.

The UNet is given the level t = 0 ... 999 and answers the noise (or v, where its scheduler says so); the project's sigma
is (t + 1) / 1000 (`diffusion/ddpm.py`), and the answer is the target as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.batch import Batch, Conditioning, PromptEmbeds, Sample
from simpletuner.diffusion.ddpm import NoiseSchedule
from simpletuner.families.spec import PredictionType
from simpletuner.models.components import model_index
from simpletuner.models.family import ModelFamily, ReferenceSizes, send
from simpletuner.models.live_pipeline import LivePipeline

ENCODERS = (("tokenizer", "text_encoder"), ("tokenizer_2", "text_encoder_2"))


class SDXL(ModelFamily):
    """The base model; embeddings are the states before the last layer of both encoders, side by side."""

    @cached_property
    def schedule(self) -> NoiseSchedule:
        return NoiseSchedule.from_config(self.scheduler_config)

    @cached_property
    def zeroes_empty_prompts(self) -> bool:
        """SDXL was trained with zeros where a caption was dropped, and its pipeline guides away from zeros."""
        return bool(model_index(self.source).get("force_zeros_for_empty_prompt", True))

    def prompt_facts(self) -> Mapping[str, Any]:
        return {**super().prompt_facts(), "zeroes_empty_prompts": self.zeroes_empty_prompts}

    def count_prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        return self.encoders.count("tokenizer", prompts)

    def encode_prompts(self, prompts: Sequence[str], references: ReferenceSizes | None = None) -> list[PromptEmbeds]:
        """`prompt_embeds` (77, D) and `pooled_prompt_embeds` (P,) of the second encoder; zeros for an empty prompt."""
        length = self.spec.max_prompt_tokens
        self.encoders.note_cut_prompts("tokenizer", prompts, length)
        states, pooled = [], torch.empty(0)
        with torch.no_grad():
            for tokenizer, encoder in ENCODERS:
                ids, _ = self.encoders.tokenize(tokenizer, prompts, length)
                output = self.encoders.encoder(encoder)(ids, output_hidden_states=True)
                states.append(output.hidden_states[-2])
                pooled = output[0]
        kept = [0.0 if self.zeroes_empty_prompts and not prompt else 1.0 for prompt in prompts]
        return [
            PromptEmbeds({"prompt_embeds": (row * factor).cpu(), "pooled_prompt_embeds": (pool * factor).cpu()})
            for row, pool, factor in zip(torch.cat(states, dim=-1), pooled, kept, strict=True)
        ]

    def collate(self, batch: Batch) -> Conditioning:
        """Also `time_ids` (B, 6): original size, upper left corner of the crop, size of the crop, in pixels."""
        size = tuple(side * self.spec.vae_factor for side in batch.latents.shape[-2:])
        rows = [time_ids(sample) for sample in batch.samples] or [(*size, 0, 0, *size)] * len(batch)
        ids = send(torch.tensor(rows, dtype=torch.float32), self.device)
        return super().collate(batch).with_tensors(time_ids=ids)

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        added = {
            "text_embeds": conditioning["pooled_prompt_embeds"].to(self.dtype),
            "time_ids": conditioning["time_ids"],
        }
        return denoiser(
            noisy_latents.to(self.dtype),
            self.schedule.timesteps(sigmas),
            encoder_hidden_states=conditioning["prompt_embeds"].to(self.dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    def sigmas_at(self, quantiles: Tensor, latents: Tensor) -> Tensor:
        return self.schedule.sigmas_at(quantiles)

    def make_noisy(self, latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        return self.schedule.make_noisy(latents, noise, sigmas)

    def make_target(self, latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        if self.prediction_type == "v_prediction":
            return self.schedule.v_target(latents, noise, sigmas)
        return noise

    @property
    def prediction_type(self) -> PredictionType:
        return self.scheduler_config.get("prediction_type", self.spec.prediction_type)

    def signal_and_noise(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        return self.schedule.signal_and_noise(sigmas)

    def estimate_data(self, noisy_latents: Tensor, model_pred: Tensor, sigmas: Tensor) -> Tensor:
        return self.schedule.estimate_data(noisy_latents, model_pred, sigmas, self.prediction_type == "v_prediction")

    def pipeline(self, denoiser: nn.Module, vae: nn.Module | None = None) -> Any:
        import diffusers

        scheduler_class = getattr(diffusers, self.scheduler_config["_class_name"])
        pipeline = diffusers.StableDiffusionXLPipeline(
            **dict.fromkeys(("vae", *sum(ENCODERS, ()))),
            unet=denoiser,
            scheduler=scheduler_class.from_config(self.scheduler_config),
            force_zeros_for_empty_prompt=self.zeroes_empty_prompts,
            add_watermarker=False,
        )
        return LivePipeline(self, pipeline, vae)


def time_ids(sample: Sample) -> tuple[int, ...]:
    """Original height and width, top and left of the crop in the resized image, height and width of the crop.

    Source: arXiv 2307.01952, section 2.2. An image that is mirrored after the cut is one whose mirror image was cut at
    the mirrored place.
    """
    crop = sample.crop
    left = crop.intermediate_width - crop.left - crop.width if sample.is_flipped else crop.left
    return sample.height, sample.width, crop.top, left, crop.height, crop.width
