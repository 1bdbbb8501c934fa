"""Shows images while they are generated: every n-th sampling step is decoded by the family's tiny autoencoder.

What is shown is the image that the model foresees, not the noisy latents. Both Euler samplers (of flow and of
epsilon models) hold `latents = clean + sigma * direction` and step along the direction; two latents in a row therefore
give it, and `clean = latents - sigma * direction`, whatever the guidance or the family:

    direction = (latents - previous) / (sigma - previous_sigma)

DDIM and PNDM step likewise along the noise that they foresee, on latents scaled by the data's share of the level.
DPM-Solver++ and UniPC keep the image that they foresee themselves, for the step after.

Sources: Lipman et al., "Flow Matching for Generative Modeling" (arXiv 2210.02747), Karras et al., "Elucidating the
Design Space of Diffusion-Based Generative Models" (arXiv 2206.00364), algorithm 1 without churn, Song et al. (arXiv
2010.02502), equation 13, and Liu et al. (arXiv 2202.09778), equation 11. Other samplers keep their own history, so
their latents are shown as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from simpletuner.errors import DataError
from simpletuner.reporting.events import Notice, PreviewMade
from simpletuner.validation.files import ImageFiles
from simpletuner.validation.prompts import ImageRequest
from simpletuner.validation.sampling import Watch

if TYPE_CHECKING:
    from simpletuner.models.family import ModelFamily

EULER_SAMPLERS = ("FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler")
LEVEL_SAMPLERS = ("DDIMScheduler", "PNDMScheduler")
Callback = Callable[[Any, int, Any, dict[str, Tensor]], dict[str, Tensor]]


class Previews:
    """Writes and tells previews.

    Args:
        decoder: what `ModelFamily.load_preview_decoder` gave.
        every: sampling steps between two previews (`validation_preview_steps`).
        files: names and writes the images.
        emit: takes the events.
    """

    def __init__(
        self,
        family: ModelFamily,
        decoder: nn.Module,
        every: int,
        files: ImageFiles,
        emit: Callable[[PreviewMade | Notice], None],
    ):
        self.family = family
        self.decoder = decoder
        self.every = every
        self.files = files
        self.emit = emit

    def watch(self, step: int, kind: Literal["base", "live", "ema"]) -> Watch:
        """What `make_images` takes, for the images of one kind of weights at one optimizer step."""
        return lambda requests: self._callback(requests, step, kind)

    def _callback(self, requests: Sequence[ImageRequest], step: int, kind: Literal["base", "live", "ema"]) -> Callback:
        previous: Tensor | None = None

        def after_step(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            nonlocal previous
            latents = tensors["latents"]
            if (index + 1) % self.every == 0:
                self._show(pipeline, index, latents, previous, requests, step, kind)
            # The step after this one needs these latents if it is shown.
            previous = latents.detach().clone() if (index + 2) % self.every == 0 else None
            return tensors

        return after_step

    def _show(
        self,
        pipeline: Any,
        index: int,
        latents: Tensor,
        previous: Tensor | None,
        requests: Sequence[ImageRequest],
        step: int,
        kind: Literal["base", "live", "ema"],
    ) -> None:
        scheduler, num_steps = pipeline.scheduler, len(pipeline.scheduler.timesteps)
        sigmas = sampler_sigmas(scheduler)
        kept = _kept_by(scheduler)
        shown = latents if kept is None else kept
        if kept is None and previous is not None and sigmas is not None:
            shown = _foreseen_by(type(scheduler).__name__, latents, previous, sigmas[index + 1], sigmas[index])
        noise_share = _noise_share(sigmas, index, self.family.spec.prediction_type, num_steps)
        height, width = requests[0].height, requests[0].width
        pixels = self.family.decode_preview(self.decoder, self.family.unpack_latents(shown, height, width))
        for request, image in zip(requests, to_images(pixels), strict=True):
            try:
                saved = self.files.save_preview(image, request, step, kind, index + 1)
            except DataError as error:  # a preview that the disk refuses shall not cost the image
                self.emit(Notice("warning", f"no preview at step {step}: {error}"))
                return
            self.emit(PreviewMade(step, saved, index + 1, num_steps, noise_share))


def foreseen(latents: Tensor, previous: Tensor, sigma: float, previous_sigma: float) -> Tensor:
    """The clean latents that an Euler sampler is heading for, like `latents`.

    Args:
        latents: (B, ...) after a step, at `sigma`.
        previous: before it, at `previous_sigma`, which is larger.
    """
    direction = (latents - previous) / (sigma - previous_sigma)
    return latents - sigma * direction


def _foreseen_by(sampler: str, latents: Tensor, previous: Tensor, sigma: float, previous_sigma: float) -> Tensor:
    """What a sampler is heading for, or its latents where two of them do not tell.

    PNDM asks for its second level twice; nothing follows from two latents of one level, or of one without data.
    """
    if sigma == previous_sigma or not math.isfinite(previous_sigma):
        return latents
    if sampler in EULER_SAMPLERS:
        return foreseen(latents.float(), previous.float(), sigma, previous_sigma)
    if sampler in LEVEL_SAMPLERS:  # the data's share of a level is 1 / sqrt(1 + sigma^2)
        unscaled, unscaled_before = (
            row.float() * (1 + level**2) ** 0.5 for row, level in ((latents, sigma), (previous, previous_sigma))
        )
        return foreseen(unscaled, unscaled_before, sigma, previous_sigma)
    return latents


def _kept_by(scheduler: Any) -> Tensor | None:
    """What DPM-Solver++ (arXiv 2211.01095) or UniPC (arXiv 2302.04867) foresaw in its last step; None of others."""
    foresees = scheduler.config.get("algorithm_type") in ("dpmsolver++", "sde-dpmsolver++")
    return scheduler.model_outputs[-1] if foresees or scheduler.config.get("predict_x0") else None


def sampler_sigmas(scheduler: Any) -> list[float] | None:
    """The sampler's noise levels before each step and after the last, falling; None where it has none.

    Of DDIM and PNDM the noise of a level by its data.
    """
    if type(scheduler).__name__ in LEVEL_SAMPLERS:
        kept = [*scheduler.alphas_cumprod[scheduler.timesteps.cpu()].tolist(), float(scheduler.final_alpha_cumprod)]
        return [((1 - share) / share) ** 0.5 if share else math.inf for share in kept]
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        return None
    values = [float(sigma) for sigma in sigmas]
    # Samplers that count from noise to data (0 on noise) turn their sigmas round.
    return [1 - value for value in values] if scheduler.config.get("invert_sigmas") else values


def _noise_share(sigmas: list[float] | None, index: int, prediction_type: str, num_steps: int) -> float:
    """How much noise is left after step `index`, 1 to 0, as the project's sigmas count it."""
    if sigmas is None:
        return 1 - (index + 1) / num_steps
    sigma = sigmas[index + 1]
    if math.isinf(sigma):
        return 1.0
    # Epsilon samplers have latents = clean + sigma * noise; divided by 1 + sigma that is the flow's mixture.
    return sigma if prediction_type == "flow" else sigma / (1 + sigma)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1], clipped -> images."""
    values = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(row.permute(1, 2, 0).contiguous().cpu().numpy()) for row in values]
