"""What an encoder is, as a digest: part of every cache key, so that another encoder can never meet its entries."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.data.digests import DigestMemo
from simpletuner.errors import DataError, Problem
from simpletuner.models.components import ModelSource, component_config, component_file
from simpletuner.models.spec import Component, FamilySpec

if TYPE_CHECKING:
    import torch

# Applied when latents are used, not when they are made.
_NOT_ENCODING = frozenset(("scaling_factor", "shift_factor", "latents_mean", "latents_std"))


def vae_fingerprint(
    source: ModelSource, spec: FamilySpec, memo: DigestMemo, device: torch.device, dtype: torch.dtype
) -> str:
    """sha256 in hex over a VAE's weights and configuration, and over what else decides the bits of its results.

    On the CPU that is the number of threads: sums are split among them.

    Args:
        dtype: that the VAE encodes in.

    Raises:
        DataError: the VAE has no safetensors weights, or they cannot be fetched.
    """
    import torch

    component = spec.component("vae")
    config = component_config(source, component)
    parts = {
        "weights": [memo.digest(path) for path in weight_files(source, component)],
        "config": {name: value for name, value in config.items() if _decides_encoding(name)},
        "dtype": str(dtype),
        "device": device.type,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _decides_encoding(name: str) -> bool:
    """Keys with an underscore are notes (`_name_or_path`, `_diffusers_version`), all but the class."""
    return name == "_class_name" or not (name in _NOT_ENCODING or name.startswith("_"))


def weight_files(source: ModelSource, component: Component) -> list[Path]:
    """The safetensors files that a component is loaded from.

    Raises:
        DataError: there are none.
    """
    variant = f".{source.variant}" if source.variant else ""
    whole = component_file(source, component, f"diffusion_pytorch_model{variant}.safetensors")
    files = [whole] if whole.is_file() else sorted(whole.parent.glob("*.safetensors"))
    if not files:
        raise DataError(
            Problem(
                f"{whole.parent} holds no safetensors weights",
                key="pretrained_vae_model_name_or_path" if source.vae else "pretrained_model_name_or_path",
                allowed="a component folder with *.safetensors",
                fix="complete the folder, or name another model",
            )
        )
    return files
