"""Keyed randomness: every draw is a pure function of what it is for.

Noise, timesteps and caption dropout are keyed by (seed, optimizer step, index in the global batch); draws from the VAE
posterior by (seed, content). Nothing depends on how many draws came before, so accumulation and ranks can be re-split,
a resume needs no generator state, and validation, prefetching or evaluation cannot disturb training.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def keyed_seed(*key: int | str) -> int:
    """A 63-bit seed from the parts of a key; `(1, "2")` and `("1", 2)` give different seeds."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by `key`. Draws are made on the CPU so that they are the same on every device."""
    import torch

    return torch.Generator().manual_seed(keyed_seed(*key))


def keyed_uniform(*key: int | str) -> float:
    """One uniform number in [0, 1) from `key`, without a generator."""
    return keyed_seed(*key) / 2**63


def reseed_global(*key: int | str) -> None:
    """Seed torch's global generators by `key`: what adapter dropout inside the denoiser samples from.

    Those of the CPU and of the accelerator in use. `torch.manual_seed` would note for each kind of accelerator
    that is not there the stack of its caller, which takes a millisecond at every step.
    """
    import torch

    seed = keyed_seed(*key)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)
    elif torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
