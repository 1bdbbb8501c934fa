"""Z-Image for the shared trainer: Qwen3's states of a chat with one question, and lists of rows in place of batches.

Z-Image counts time from noise (t = 0) to data (t = 1) and predicts `data - noise` (diffusers' `pipeline_z_image.py`,
step 6). Here sigma is 0 on data and the velocity is `noise - data`: t = 1 - sigma, and the output changes sign.
Captions must not be padded: the network fills each up to a multiple of 32 with tokens that it has learned. Times come
from sigmoid(N(0, 1)) and are shifted as the model's own scheduler shifts those of its sampling, the same at every size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.batch import Conditioning
from simpletuner.models.family import send
from simpletuner.models.language_model_text import LanguageModelText
from simpletuner.models.live_pipeline import LivePipeline
from simpletuner.models.rotary_tables import ZImageTables

# Qwen3's chat template with one message, as `enable_thinking=True` renders it.
TEMPLATE = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


class ZImage(LanguageModelText):
    """The base and Turbo differ in weights and shift alone."""

    def largest_side(self) -> int:
        """The rotary tables have so many rows and columns of patches."""
        return min(self.denoiser_config["axes_lens"][1:]) * self.spec.size_multiple

    def adjust_denoiser(self, denoiser: Any) -> nn.Module:
        own = denoiser.rope_embedder
        denoiser.rope_embedder = ZImageTables(own.theta, own.axes_dims, own.axes_lens)
        return denoiser

    def encoded_text(self, prompt: str) -> str:
        return TEMPLATE.format(prompt=prompt)

    def predict(self, denoiser: nn.Module, noisy_latents: Tensor, sigmas: Tensor, conditioning: Conditioning) -> Tensor:
        frames = noisy_latents.to(self.dtype)[:, :, None]  # a list of videos of one frame
        embeds = conditioning["prompt_embeds"].to(self.dtype)
        captions = [row[:length] for row, length in zip(embeds, conditioning.num_tokens, strict=True)]
        times = (1000 - 1000 * sigmas) / 1000  # as the pipeline rounds them
        outputs = denoiser([*frames], times, captions, return_dict=False)[0]
        return -torch.stack(outputs)[:, :, 0]

    def pipeline(self, denoiser: nn.Module, vae: nn.Module | None = None) -> Any:
        from diffusers import ZImagePipeline

        return ZImageLivePipeline.of(self, ZImagePipeline, denoiser, vae)


class ZImageLivePipeline(LivePipeline):
    """diffusers' pipeline, whose guidance adds to the prompt's prediction: 0 is none, and 1 is what others call 2."""

    def prompt_arguments(
        self, prompts: Sequence[str], negative_prompts: Sequence[str] | None, guidance_scale: float
    ) -> dict[str, Any]:
        family = self.family
        negatives = [family.spec.negative_text(text) for text in negative_prompts or repeat(None, len(prompts))]
        return {"guidance_scale": guidance_scale} | {
            name: [
                send(row.tensors["prompt_embeds"], family.device, family.dtype) for row in family.prompts.embeds(texts)
            ]
            for name, texts in (("prompt_embeds", prompts), ("negative_prompt_embeds", negatives))
        }
