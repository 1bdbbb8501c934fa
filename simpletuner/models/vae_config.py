"""What the configuration of a VAE says of its latents: how they are scaled, and whether it takes images as videos."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def latent_statistics(
    vae_config: Mapping[str, Any], device: torch.device | None = None
) -> tuple[float | Tensor, float | Tensor]:
    """(mean, scale): scaled latents are `(raw - mean) * scale`.

    One number each (`shift_factor`, which may be null, and `scaling_factor`), or (C, 1, 1), one number per channel,
    where the configuration has `latents_mean` and `latents_std`.
    """
    if vae_config.get("latents_std") is None:
        return vae_config.get("shift_factor") or 0.0, vae_config["scaling_factor"]
    mean, std = (torch.tensor(vae_config[f"latents_{name}"], device=device).view(-1, 1, 1) for name in ("mean", "std"))
    return mean, (vae_config.get("scaling_factor") or 1.0) / std


def is_video_vae(vae_config: Mapping[str, Any]) -> bool:
    """Whether a VAE takes and gives (B, C, T, H, W): an image is a video of one frame to it."""
    return "temperal_downsample" in vae_config  # spelled so in the published configurations
