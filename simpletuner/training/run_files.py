"""What a run writes into its output folder: the names, and which step each file is of."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from simpletuner import storage
from simpletuner.errors import DataError
from simpletuner.hub.job import ADAPTER_FILE
from simpletuner.hub.publisher import STAGING_DIR
from simpletuner.hub.publisher import STATE_FILE as HUB_FILE
from simpletuner.reporting.report import REPORT_FILE
from simpletuner.reporting.report.record import CONTACT_DIR
from simpletuner.reporting.sinks.csv_table import CSV_FILE
from simpletuner.reporting.sinks.jsonl import METRICS_FILE, has_run
from simpletuner.reporting.trackers.wandb import RUN_FILE as WANDB_FILE
from simpletuner.reporting.webhooks.sink import SPOOL_FOLDER
from simpletuner.training.lock import LOCK_FILE
from simpletuner.validation.external import LOG_FILE

CHECKPOINT_NAME = re.compile(r"^checkpoint-(\d+)$")
BEST = "checkpoint-best"
EVAL_FILE = "eval_losses.json"
EMA_DIR = "ema"
FINAL_FILE = "final_weights.json"  # of which run and step the final weights are
PIPELINE_DIR = "pipeline"
# What a start writes about its data before anything else.
DATA_REPORTS = ("dataset_report.json", "dataset_set_aside.jsonl")
RECORDS = (METRICS_FILE, CSV_FILE, EVAL_FILE, LOCK_FILE)

_SHEETS = ("before_after.png", "all_steps.png", "loss.png", REPORT_FILE)
_FINAL = (ADAPTER_FILE, PIPELINE_DIR, EMA_DIR, FINAL_FILE)
_OTHERS = (
    *(BEST, "logs", "validation_images", "benchmarks", WANDB_FILE, "wandb", HUB_FILE, STAGING_DIR, SPOOL_FOLDER),
    *(CONTACT_DIR, LOG_FILE),
)
# What earlier versions and damage left.
_OLD_NAMES = re.compile(r"damaged-.+|earlier-checkpoint-best-\d+|metrics\.\d+\.jsonl")
_IMAGE = re.compile(r"step_(\d+)_.+")


def belongings(output_dir: Path, after_step: int | None) -> list[Path]:
    """What a run has in its folder: everything, or only what lies after a step.

    The record of a start that never came to its first step is none of a run: it stays and is continued.
    """
    if not output_dir.is_dir():
        return []
    if after_step is not None:
        return sorted(_after(output_dir, after_step))
    named = (*_SHEETS, *_FINAL, *RECORDS, *_OTHERS)
    found = [
        path
        for path in output_dir.iterdir()
        if path.name in named or CHECKPOINT_NAME.match(path.name) or _OLD_NAMES.fullmatch(path.name)
    ]
    return sorted(path for path in found if (has_run(path) if path.name == METRICS_FILE else _has_content(path)))


def final_step(output_dir: Path) -> int | None:
    """The step of the final weights in a folder; None where there are none, -1 where they do not say it."""
    steps = [step_of(output_dir / name) for name in (ADAPTER_FILE, PIPELINE_DIR) if (output_dir / name).exists()]
    return max(steps, default=None)


def read_data_reports(output_dir: Path) -> dict[str, bytes]:
    """What an earlier start wrote about its data, by name: the next one replaces it before anything is moved."""
    return {name: (output_dir / name).read_bytes() for name in DATA_REPORTS if (output_dir / name).is_file()}


def step_of(path: Path) -> int:
    """The step that a file or folder says it is of; -1 where it says nothing that can be read."""
    try:
        if path.is_dir() and (path / storage.MANIFEST).is_file():
            return int(storage.read_manifest(path).metadata["global_step"])
        if path.is_dir():
            return max(step_of(path / name) for name in (ADAPTER_FILE, PIPELINE_DIR) if (path / name).exists())
        if path.suffix == ".json":
            return int(storage.read_json(path)["step"])
        return int(storage.read_tensor_metadata(path)["global_step"])
    except (DataError, KeyError, TypeError, ValueError):
        return -1


def _has_content(path: Path) -> bool:
    return path.is_file() or any(each.is_file() for each in path.rglob("*"))


def _after(output_dir: Path, step: int) -> Iterator[Path]:
    """What lies after a step; folders of images are gone through."""
    for path in output_dir.iterdir():
        numbered = CHECKPOINT_NAME.match(path.name)
        if numbered:
            if int(numbered[1]) > step:
                yield path
        elif path.name in (*_FINAL, BEST, HUB_FILE):
            is_later = not 0 <= step_of(path) <= step
            yield from [path] if is_later else []
        elif path.name in (*_SHEETS, WANDB_FILE):  # W&B takes no step twice: the branch gets a run of its own
            yield path
    for folder in (output_dir / "validation_images", output_dir / "validation_images" / "previews"):
        for path in folder.iterdir() if folder.is_dir() else ():
            image = _IMAGE.fullmatch(path.name)
            if image and int(image[1]) > step:
                yield path
