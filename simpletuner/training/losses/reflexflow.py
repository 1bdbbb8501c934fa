"""Loss on latents that the model itself has led astray: anti-drift rectification and frequency compensation.

After Lyu et al., "ReflexFlow" (arXiv 2512.04904): a flow model that is trained on its own rollouts is to learn the way
back to the data from where it stands, and the low frequencies that it misses early on are to weigh more. What stands
here is this project's own version of these two parts, with the paper's weights as defaults:

- anti-drift: the squared distance between the directions (unit vectors) of prediction and target, where the target
  points from the drifted latents to the data;
- frequency compensation: the error of each element weighs `1 + alpha |d| / mean |d|`, where d is the low-frequency
  part of the drift, that is of the difference between the latents that were rolled out and those of training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simpletuner.diffusion.loss import sample_means

# Frequencies up to this share of the highest one count as low.
LOW_FREQUENCIES = 0.5
_EPS = 1e-8


@dataclass(frozen=True)
class ReflexFlow:
    """Weights of the loss.

    Args:
        alpha: of the frequency compensation, within the error.
        direction: of the anti-drift term (beta 1).
        error: of the error (beta 2).
    """

    alpha: float = 1.0
    direction: float = 10.0
    error: float = 1.0

    def losses(
        self, errors: Tensor, model_pred: Tensor, target: Tensor, masks: Tensor | None, *, drift: Tensor
    ) -> Tensor:
        """(B,) losses: errors that weigh by drift, and the direction of the prediction.

        Args:
            errors: (B, C, h, w) of each element.
            masks: (B, 1, h, w) where the loss counts, or None.
            drift: (B, C, h, w) rolled-out latents minus those that training would have used.
        """
        error = sample_means(errors * compensation_weights(drift, self.alpha), masks)
        if masks is not None:
            model_pred, target = model_pred * masks, target * masks
        return self.error * error + self.direction * direction_loss(model_pred, target)


def low_frequencies(values: Tensor) -> Tensor:
    """(B, C, h, w) without its high spatial frequencies."""
    spectrum = torch.fft.rfft2(values.float())
    height, width = values.shape[-2:]
    limit = 0.5 * LOW_FREQUENCIES
    rows = torch.fft.fftfreq(height, device=values.device).abs() <= limit
    columns = torch.fft.rfftfreq(width, device=values.device) <= limit
    return torch.fft.irfft2(spectrum * (rows[:, None] & columns[None]), s=(height, width))


def compensation_weights(drift: Tensor, alpha: float) -> Tensor:
    """(B, C, h, w) what the error of each element counts; on average `1 + alpha`, or 1 where there is no drift.

    Args:
        drift: (B, C, h, w) rolled-out latents minus those that training would have used.
    """
    bias = low_frequencies(drift).abs()
    mean = bias.flatten(1).mean(dim=1)[:, None, None, None]
    return 1 + alpha * torch.where(mean > _EPS, bias / mean.clamp_min(_EPS), torch.zeros_like(bias))


def direction_loss(model_pred: Tensor, target: Tensor) -> Tensor:
    """(B,) squared distance of the unit vectors along prediction and target: `2 - 2 cos`, from 0 to 4."""
    prediction, wanted = model_pred.float().flatten(1), target.float().flatten(1)
    return 2 - 2 * torch.nn.functional.cosine_similarity(prediction, wanted, dim=1, eps=_EPS)
