"""What an encoder is, as a digest: part of every cache key, so that another encoder can never meet its entries."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from simpletuner.data.digests import DigestMemo
from simpletuner.families.spec import Component, FamilySpec
from simpletuner.models.components import ModelSource, component_config, component_folder
from simpletuner.models.weight_files import weight_files

if TYPE_CHECKING:
    import torch

    from simpletuner.models.family import ModelFamily

# Applied when latents are used, not when they are made.
_NOT_ENCODING = frozenset(("scaling_factor", "shift_factor", "latents_mean", "latents_std"))


def vae_fingerprint(
    source: ModelSource,
    spec: FamilySpec,
    memo: DigestMemo,
    device: torch.device,
    dtype: torch.dtype,
    modes: tuple[str, ...] = (),
) -> str:
    """sha256 in hex over a VAE's weights and configuration, and over what else decides the bits of its results.

    On the CPU that is the number of threads: sums are split among them.

    Args:
        dtype: that the VAE encodes in.
        modes: tiles and slices give other bits.

    Raises:
        DataError: the VAE has no safetensors weights, or they cannot be fetched.
    """
    component = spec.component("vae")
    config = component_config(source, component)
    parts = {
        "weights": [memo.digest(path) for path in weight_files(source, component)],
        "config": {name: value for name, value in config.items() if _decides_encoding(name)},
        **({"modes": modes} if modes else {}),
        **_arithmetic(device, dtype),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def prompt_fingerprint(family: ModelFamily, memo: DigestMemo) -> str:
    """sha256 in hex over all text encoders and tokenizers of a family, and over how it uses them.

    Raises:
        DataError: an encoder has no safetensors weights, or they cannot be fetched.
    """
    source, spec = family.source, family.spec
    encoders = [part for part in source.parts(spec) if part.role == "text_encoder"]
    tokenizers = [part for part in source.parts(spec) if part.role in ("tokenizer", "processor")]
    configs = {part.name: component_config(source, part) for part in encoders}
    parts = {
        "weights": {part.name: [memo.digest(path) for path in weight_files(source, part)] for part in encoders},
        "config": {
            name: {key: value for key, value in config.items() if not key.startswith("_")}
            for name, config in configs.items()
        },
        "tokenizers": {part.name: _tokenizer_digests(source, part, memo) for part in tokenizers},
        "facts": dict(family.prompt_facts()),
        "precision": {part.name: family.encoders.precision(part.name) for part in encoders},
        **_attention(encoders),
        **_arithmetic(family.device, family.dtype),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _attention(encoders: Sequence[Component]) -> dict[str, Any]:
    """The implementation of attention, of encoders whose states depend on it; nothing where none does."""
    named = {part.name: part.attention for part in encoders if part.attention}
    return {"attention": named} if named else {}


def _arithmetic(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What decides the last bits of an encoder's results; on the CPU that is also the number of threads."""
    import torch

    threads = torch.get_num_threads() if device.type == "cpu" else None
    return {"dtype": str(dtype), "device": device.type, "threads": threads}


def _tokenizer_digests(source: ModelSource, component: Component, memo: DigestMemo) -> dict[str, str]:
    """Name -> digest of the files of a tokenizer."""
    folder = component_folder(source, component)
    return {path.name: memo.digest(path) for path in sorted(folder.iterdir()) if path.is_file()}


def _decides_encoding(name: str) -> bool:
    """Keys with an underscore are notes (`_name_or_path`, `_diffusers_version`), all but the class."""
    return name == "_class_name" or not (name in _NOT_ENCODING or name.startswith("_"))
