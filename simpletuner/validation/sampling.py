"""Generates images with a family's pipeline. Each image has its own generator, so its noise does not depend on which
other images are generated, in what order, or how many at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from simpletuner.validation.prompts import GenerationSettings, ImageRequest
from simpletuner.validation.schedulers import use_scheduler

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn

    from simpletuner.config.options.validation import ValidationOptions
    from simpletuner.models.family import ModelFamily

# Gives the `callback_on_step_end` of one call of the pipeline, for the images that it generates.
Watch = Callable[[Sequence[ImageRequest]], Callable[..., dict[str, Any]]]


@dataclass(frozen=True)
class GeneratedImage:
    """An image that was generated, and what was asked."""

    request: ImageRequest
    image: Image


def make_images(
    pipeline: Any,
    requests: Sequence[ImageRequest],
    batch_size: int = 1,
    on_progress: Callable[[int], None] | None = None,
    watch: Watch | None = None,
    noise_device: str = "cpu",
) -> list[GeneratedImage]:
    """Generate all requests, images of one size and setting and with references of one size together.

    The result is in the order of `requests`.

    Args:
        pipeline: what `ModelFamily.pipeline` returned.
        batch_size: images per call.
        on_progress: called with the number of finished images after each call.
        watch: makes the callback that sees the latents after each denoising step.
        noise_device: of the generators.
    """
    import torch

    def shared(index: int) -> tuple[int, int, tuple[tuple[int, int], ...], GenerationSettings]:
        request = requests[index]
        return request.height, request.width, tuple(each.image.size for each in request.references), request.settings

    # Sorting is stable, so images of one kind stay in the order that they were asked in.
    order = sorted(range(len(requests)), key=lambda index: (*shared(index)[:3], repr(requests[index].settings)))
    generated: dict[int, GeneratedImage] = {}
    with torch.no_grad():
        for (height, width, _, settings), group in groupby(order, key=shared):
            for chunk in _chunks(list(group), batch_size):
                asked = [requests[index] for index in chunk]
                arguments = settings.arguments()
                if any(request.references for request in asked):
                    arguments["references"] = [[each.image for each in request.references] for request in asked]
                if watch is not None:
                    arguments["callback_on_step_end"] = watch(asked)
                images = pipeline(
                    prompt=[request.prompt for request in asked],
                    height=height,
                    width=width,
                    generator=[torch.Generator(noise_device).manual_seed(request.seed) for request in asked],
                    **arguments,
                ).images
                for index, image in zip(chunk, images, strict=True):
                    generated[index] = GeneratedImage(requests[index], image.convert("RGB"))
                if on_progress:
                    on_progress(len(generated))
    return [generated[index] for index in range(len(requests))]


def pipeline_for(options: ValidationOptions, family: ModelFamily, denoiser: nn.Module, vae: nn.Module) -> Any:
    """The family's pipeline around live weights, with the scheduler that the options name."""
    pipeline = family.pipeline(denoiser, vae)
    if options.validation_noise_scheduler:
        use_scheduler(pipeline, options.validation_noise_scheduler)
    return pipeline


def noise_device(options: ValidationOptions, family: ModelFamily) -> str:
    """Where the noise of images is sampled."""
    return str(family.device) if options.validation_seed_source == "gpu" else "cpu"


def batch_size_for(requests: Sequence[ImageRequest]) -> int:
    """Images per call that together hold about a megapixel: large ones are generated singly, small ones together."""
    largest = max((request.height * request.width for request in requests), default=1)
    return min(16, max(1, 1024 * 1024 // largest))


def _chunks(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]
