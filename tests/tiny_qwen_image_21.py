"""A tiny random Qwen-Image 2.1: the model that the golden cases were recorded with."""

from __future__ import annotations

import shutil
from pathlib import Path

from simpletuner.models.qwen_image_21.denoiser import QwenImage21Transformer2DModel

GOLDEN = Path(__file__).parent / "golden" / "qwen_image_21"


def tiny_qwen_image_21_transformer() -> QwenImage21Transformer2DModel:
    return QwenImage21Transformer2DModel.from_pretrained(GOLDEN / "model" / "transformer").eval()


def tiny_qwen_image_21_folder(path: Path) -> Path:
    """Write transformer, VAE, encoder, processor, scheduler and `model_index.json` into `path`; returns it."""
    return shutil.copytree(GOLDEN / "model", path, dirs_exist_ok=True)
