"""Draws pictures with a family's pipeline. Each picture has its own generator, so its noise does not depend on which
other pictures are drawn, in what order, or how many at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from simpletuner.validation.prompts import PictureRequest

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Picture:
    """A picture that was drawn, and what was asked."""

    request: PictureRequest
    image: Image


def make_pictures(
    pipeline: Any,
    requests: Sequence[PictureRequest],
    steps: int,
    guidance: float,
    negative_prompt: str | None = None,
    batch_size: int = 1,
    on_progress: Callable[[int], None] | None = None,
) -> list[Picture]:
    """Draw all requests, pictures of one size together; the result is in the order of `requests`.

    Args:
        pipeline: what `ModelFamily.pipeline` returned.
        steps: number of inference steps.
        guidance: classifier-free guidance scale.
        negative_prompt: None leaves the pipeline's own default.
        batch_size: pictures per call.
        on_progress: told the number of finished pictures after each call.
    """
    import torch

    # Sorting is stable, so pictures of one size stay in the order that they were asked in.
    order = sorted(range(len(requests)), key=lambda index: (requests[index].height, requests[index].width))
    drawn: dict[int, Picture] = {}
    with torch.no_grad():
        for (height, width), group in groupby(order, key=lambda index: (requests[index].height, requests[index].width)):
            for chunk in _chunks(list(group), max(1, batch_size)):
                images = pipeline(
                    prompt=[requests[index].prompt for index in chunk],
                    negative_prompt=negative_prompt,
                    height=height,
                    width=width,
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    generator=[torch.Generator().manual_seed(requests[index].seed) for index in chunk],
                ).images
                for index, image in zip(chunk, images, strict=True):
                    drawn[index] = Picture(requests[index], image.convert("RGB"))
                if on_progress:
                    on_progress(len(drawn))
    return [drawn[index] for index in range(len(requests))]


def batch_size_for(requests: Sequence[PictureRequest]) -> int:
    """Pictures per call that together hold about a megapixel: large ones are drawn singly, small ones together."""
    largest = max((request.height * request.width for request in requests), default=1)
    return min(16, max(1, 1024 * 1024 // largest))


def _chunks(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]
