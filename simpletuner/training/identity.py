"""What may change between a checkpoint and the run that resumes it.

Model, adapter and optimizer decide what the saved tensors mean: a difference is an error. Learning rate, intervals and
data may be changed on purpose: a difference is told, and the run goes on.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from simpletuner.errors import ConfigError, Problem

if TYPE_CHECKING:
    from simpletuner.training.run import Run

FIXED_OPTIONS = ("model_family", "model_type", "lora_type", "optimizer", "base_model_precision")
# Decide, with the shapes, what the weights of standard LoRA mean.
LORA_OPTIONS = ("lora_alpha", "lora_init_type")
TOLD_OPTIONS = (
    "learning_rate",
    "lr_scheduler",
    "train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "max_grad_norm",
)


def run_identity(run: Run) -> dict[str, Any]:
    """JSON-able facts that a resume is compared with."""
    options = {key: getattr(run.config, key) for key in (*FIXED_OPTIONS, *TOLD_OPTIONS)}
    return {
        "fixed": {
            **{key: options[key] for key in FIXED_OPTIONS},
            **{key: getattr(run.config, key) for key in LORA_OPTIONS if run.config.lora_type == "standard"},
            "lycoris_config": run.loaded.lycoris,
            "parameters": run.placement.shapes(),
        },
        "told": {
            **{key: options[key] for key in TOLD_OPTIONS},
            "datasets": {dataset.id: dataset.fingerprint for dataset in run.batches.datasets.values()},
            "schedules": {
                dataset.id: {"repeats": dataset.repeats, "batch_size": dataset.batch_size, **asdict(dataset.schedule)}
                for dataset in run.batches.datasets.values()
            },
            "torch": torch.__version__,
        },
    }


def compare_identity(saved: dict[str, Any], current: dict[str, Any], path: Path) -> list[str]:
    """One line for each difference that is allowed.

    Raises:
        ConfigError: a difference that is not.
    """
    problems = [
        Problem(
            f"{path.name} was trained with {_brief(saved['fixed'].get(key))}, the configuration says {_brief(value)}",
            key=key,
            fix="put the old value back, or choose another output_dir for a fresh start",
        )
        for key, value in current["fixed"].items()
        if saved["fixed"].get(key) != value
    ]
    if problems:
        raise ConfigError(problems)
    return [
        f"{key} changed since {path.name}: {_brief(saved['told'].get(key))} -> {_brief(value)}"
        for key, value in current["told"].items()
        if saved["told"].get(key) != value
    ]


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else text[:97] + "..."
