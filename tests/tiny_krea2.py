"""A tiny random Krea 2: the model that the golden cases were recorded with."""

from __future__ import annotations

import shutil
from pathlib import Path

from diffusers import Krea2Transformer2DModel

GOLDEN = Path(__file__).parent / "golden" / "krea2"


def tiny_krea2_transformer() -> Krea2Transformer2DModel:
    return Krea2Transformer2DModel.from_pretrained(GOLDEN / "model" / "transformer").eval()


def tiny_krea2_folder(path: Path) -> Path:
    """Write transformer, VAE, encoder, tokenizer, scheduler and `model_index.json` into `path`; returns it."""
    return shutil.copytree(GOLDEN / "model", path, dirs_exist_ok=True)
