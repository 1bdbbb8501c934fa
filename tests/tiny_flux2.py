"""A tiny random FLUX.2: the models that the golden cases were recorded with, klein's or dev's."""

from __future__ import annotations

import shutil
from pathlib import Path

from diffusers import Flux2Transformer2DModel

GOLDEN = Path(__file__).parent / "golden" / "flux2"


def tiny_flux2_transformer() -> Flux2Transformer2DModel:
    """dev's, which takes guidance: one double block and two single ones."""
    return Flux2Transformer2DModel.from_pretrained(GOLDEN / "dev" / "transformer").eval()


def tiny_flux2_folder(path: Path, kind: str = "klein") -> Path:
    """Write transformer, VAE, encoder, tokenizer, scheduler and `model_index.json` into `path`; returns it."""
    shutil.copytree(GOLDEN / kind, path, dirs_exist_ok=True)
    shutil.copytree(GOLDEN / "klein" / "vae", path / "vae", dirs_exist_ok=True)  # both have the same
    return path
