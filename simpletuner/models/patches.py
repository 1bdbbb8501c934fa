"""Latents as FLUX.1 and its kin see them: a sequence of 2 x 2 patches, each with the coordinates of its place.

Source: black-forest-labs/flux, `flux/sampling.py` (`prepare`, `prepare_kontext`).
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h/2 * w/2, 4 C): rows of patches from the top, channels outermost within a patch."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // 2 * (width // 2), 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack` for latents of `height` by `width`."""
    batch, _, size = tokens.shape
    patches = tokens.reshape(batch, height // 2, width // 2, size // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, size // 4, height, width)


def flatten(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h w, C): a token per place, rows from the top."""
    return latents.flatten(2).mT


def position_ids(latents: Tensor, index: int = 0) -> Tensor:
    """(h/2 * w/2, 3) index, row and column of each patch, on the CPU: one copy costs a device less than six kernels.

    Args:
        index: 0 for the image that is generated, 1 for a reference.
    """
    height, width = latents.shape[-2] // 2, latents.shape[-1] // 2
    rows = torch.arange(height).repeat_interleave(width)
    columns = torch.arange(width).repeat(height)
    return torch.stack([torch.full_like(rows, index), rows, columns], dim=-1).to(latents.dtype)
