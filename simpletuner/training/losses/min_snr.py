"""Min-SNR weights: noise levels with little noise count less.

Source: Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy" (arXiv 2303.09556).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def min_snr_weights(snr: Tensor, gamma: float, predicts: Literal["epsilon", "v_prediction", "flow"]) -> Tensor:
    """(B,) what each sample's loss is multiplied by, so that the error of the data counts `min(snr, gamma)` times.

    The squared error of the data is that of the noise over the snr, and that of v over `snr + 1`: `min(snr, gamma) /
    snr` and `min(snr, gamma) / (snr + 1)` (section 3.4). On a straight path the data is `noisy - sigma * velocity`, and
    `sigma` is `1 / (1 + sqrt(snr))`: the same principle applied to a velocity.

    Args:
        snr: (B,) signal-to-noise ratio; infinite without noise.
    """
    if predicts == "flow":
        return snr.clamp_max(gamma) / (1 + snr.sqrt()).square()
    if predicts == "v_prediction":
        return snr.clamp_max(gamma) / (snr + 1)
    return torch.where(snr > gamma, gamma / snr, torch.ones_like(snr))
