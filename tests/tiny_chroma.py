"""A tiny random Chroma in diffusers layout: the model of the golden cases."""

from __future__ import annotations

import shutil
from pathlib import Path

from diffusers import ChromaTransformer2DModel

from tests.tiny import GOLDEN

CHROMA_GOLDEN = GOLDEN / "chroma"


def tiny_chroma_transformer() -> ChromaTransformer2DModel:
    """Two blocks of each kind."""
    return ChromaTransformer2DModel.from_pretrained(CHROMA_GOLDEN / "model" / "transformer").eval()


def tiny_chroma_folder(path: Path) -> Path:
    """Write transformer, VAE, encoder, tokenizer, scheduler and `model_index.json` into `path`; returns it."""
    return shutil.copytree(CHROMA_GOLDEN / "model", path, dirs_exist_ok=True)
