"""What the benchmarks of the data engine start from: a run over a folder `images`, its model never loaded whole."""

from __future__ import annotations

import json
from pathlib import Path


def write_run(folder: Path, side: int, **options: object) -> None:
    """Write `config.json` and `data.json`: captions from names, images of `side` pixels, one step."""
    config = {
        "model_family": "omnigen",
        "model_type": "full",
        "pretrained_model_name_or_path": "model",
        "output_dir": "output",
        "data_backend_config": "data.json",
        "resolution": side,
        "max_train_steps": 1,
        "num_train_epochs": 0,
        "mixed_precision": "no",
        "optimizer": "adamw",
        "validation_disable": True,
        **options,
    }
    data = [{"id": "images", "type": "local", "instance_data_dir": "images", "caption_strategy": "filename"}]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "data.json").write_text(json.dumps(data))


def write_model_folder(folder: Path) -> None:
    """The configurations of a model folder without weights; a VAE may be written over its own."""
    for name, file, content in (
        ("transformer", "config.json", {"pos_embed_max_size": 192}),
        ("vae", "config.json", {}),
        ("scheduler", "scheduler_config.json", {}),
        ("tokenizer", "tokenizer_config.json", {}),
    ):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / file).write_text(json.dumps(content))
