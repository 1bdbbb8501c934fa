"""Prior preservation: on regularization data the target is what the base model predicts without the adapter."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import nn

from simpletuner.models.family import ModelFamily
from simpletuner.training.losses.base import Example


def aim_at_base(
    example: Example,
    family: ModelFamily,
    denoiser: nn.Module,
    without_adapter: Callable[[], AbstractContextManager[None]],
) -> Example:
    """The example with the base model's own prediction as target.

    Args:
        without_adapter: context in which the denoiser is the untouched base.
    """
    with without_adapter(), torch.no_grad():
        target = family.predict(denoiser, example.noisy_latents, example.sigmas, example.conditioning)
    return replace(example, target=target)
