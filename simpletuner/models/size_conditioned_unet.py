"""SDXL's UNet: text states, a pooled vector, and the sizes of image and crop as conditioning (arXiv 2307.01952)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from simpletuner.batch import Batch, Conditioning, Sample
from simpletuner.models.discrete import DiscreteFamily
from simpletuner.models.family import send


class SizeConditionedUNet(DiscreteFamily):
    """A family around that UNet; its prompts are `prompt_embeds` (L, D) and `pooled_prompt_embeds` (P,)."""

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


def time_ids(sample: Sample) -> tuple[int, ...]:
    """Original height and width, top and left of the crop in the resized image, height and width of the crop.

    Source: arXiv 2307.01952, section 2.2. An image that is mirrored after the cut is one whose mirror image was cut at
    the mirrored place.
    """
    crop = sample.crop
    left = crop.intermediate_width - crop.left - crop.width if sample.is_flipped else crop.left
    return sample.height, sample.width, crop.top, left, crop.height, crop.width
