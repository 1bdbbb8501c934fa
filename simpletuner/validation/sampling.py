"""Draws pictures with a family's pipeline. Each picture has its own generator, so its noise does not depend on which
other pictures are drawn, in what order, or how many at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from simpletuner.validation.prompts import DrawSettings, PictureRequest

if TYPE_CHECKING:
    from PIL.Image import Image

# Gives the `callback_on_step_end` of one call of the pipeline, for the pictures that it draws.
Watch = Callable[[Sequence[PictureRequest]], Callable[..., dict[str, Any]]]


@dataclass(frozen=True)
class Picture:
    """A picture that was drawn, and what was asked."""

    request: PictureRequest
    image: Image


def make_pictures(
    pipeline: Any,
    requests: Sequence[PictureRequest],
    batch_size: int = 1,
    on_progress: Callable[[int], None] | None = None,
    watch: Watch | None = None,
    noise_device: str = "cpu",
) -> list[Picture]:
    """Draw all requests, pictures of one size and setting and with references of one size together.

    The result is in the order of `requests`.

    Args:
        pipeline: what `ModelFamily.pipeline` returned.
        batch_size: pictures per call.
        on_progress: told the number of finished pictures after each call.
        watch: makes the callback that sees the latents after each denoising step.
        noise_device: of the generators.
    """
    import torch

    def shared(index: int) -> tuple[int, int, tuple[tuple[int, int], ...], DrawSettings]:
        request = requests[index]
        return request.height, request.width, tuple(each.image.size for each in request.references), request.settings

    # Sorting is stable, so pictures of one kind stay in the order that they were asked in.
    order = sorted(range(len(requests)), key=lambda index: (*shared(index)[:3], repr(requests[index].settings)))
    drawn: dict[int, Picture] = {}
    with torch.no_grad():
        for (height, width, _, settings), group in groupby(order, key=shared):
            for chunk in _chunks(list(group), max(1, batch_size)):
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
