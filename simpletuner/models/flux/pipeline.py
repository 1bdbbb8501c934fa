"""Generating with FLUX.1: diffusers' pipeline, or the one of Kontext where an image is edited."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn

from simpletuner.models.components import model_index
from simpletuner.models.family import ModelFamily
from simpletuner.models.live_pipeline import LivePipeline
from simpletuner.models.patches import pack


def build_pipeline(family: ModelFamily, denoiser: nn.Module, vae: nn.Module | None) -> FluxLivePipeline:
    """A pipeline on live weights, of the class that the model names for itself, with the model's own scheduler."""
    from diffusers import FluxKontextPipeline, FluxPipeline

    is_kontext = model_index(family.source).get("_class_name") == "FluxKontextPipeline"
    pipeline_class: Any = FluxKontextPipeline if is_kontext else FluxPipeline
    return FluxLivePipeline.of(family, pipeline_class, denoiser, vae)


class FluxLivePipeline(LivePipeline):
    """Guidance is an input of distilled models; `true_cfg_scale` above 1 leads away from the negative prompt."""

    pack = staticmethod(pack)

    def __call__(self, *args: Any, references: Sequence[Sequence[Image.Image]] | None = None, **options: Any) -> Any:
        """As `LivePipeline`, and with `references` an edit of each prompt's image, which need not be of its size.

        Raises:
            ValueError: the prompts of one call have references of different sizes, or not one each.
        """
        from diffusers import FluxKontextPipeline

        if references is None or not any(references):
            return super().__call__(*args, **options)
        area = options["height"] * options["width"]
        latents = [self.encode_reference(image, area) for row in references for image in row]
        if any(len(row) != 1 for row in references) or len({each.shape for each in latents}) != 1:
            raise ValueError("prompts that are generated together need one reference each, all of one size")
        editing = FluxLivePipeline(self.family, FluxKontextPipeline(**self.pipeline.components), self.vae)
        # Kontext would generate a megapixel, whatever was asked, and resize references to sizes of its own.
        return super(FluxLivePipeline, editing).__call__(
            *args, image=torch.stack(latents).to(self.family.dtype), max_area=area, _auto_resize=False, **options
        )
