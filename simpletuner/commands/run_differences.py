"""Where two output folders differ: the first tensor, image, loss or evaluation of each kind, with its numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.reporting.sinks.jsonl import METRICS_FILE, read_records

_STEP = re.compile(r"(?:checkpoint-|step_)(\d+)")


@dataclass(frozen=True)
class Difference:
    """How two runs differ, and what was compared.

    Args:
        lines: for people, the earliest first; empty where every bit is equal.
    """

    lines: tuple[str, ...]
    num_tensors: int
    num_images: int
    num_losses: int
    num_evaluations: int

    def counted(self) -> str:
        return (
            f"{self.num_tensors} tensors, {self.num_losses} losses, {self.num_evaluations} evaluations, "
            f"{self.num_images} images"
        )


def compare_runs(one: Path, other: Path, start_step: int = 0) -> Difference:
    """Compare every tensor and image of two output folders, and the losses and evaluations after `start_step`."""
    lines: list[str] = []
    tensor_files = _common(one, other, "*.safetensors", lines)
    num_tensors = 0
    for name in tensor_files:
        count, line = _compare_tensors(name, one / name, other / name)
        num_tensors += count
        lines += [line] if line else []
    images = _common(one, other, "validation_images/*.png", lines)
    lines += [f"{name}: other pixels" for name in images if not _are_pixels_equal(one / name, other / name)]
    num_losses = _compare_records(one, other, "step_done", "loss", start_step, lines)
    num_evaluations = _compare_records(one, other, "eval_done", "pooled", start_step, lines)
    return Difference(tuple(lines), num_tensors, len(images), num_losses, num_evaluations)


def _common(one: Path, other: Path, pattern: str, lines: list[str]) -> list[str]:
    """Files of both folders, earliest step first; what only one has goes to `lines`."""
    names = [{path.relative_to(each).as_posix() for path in each.rglob(pattern)} for each in (one, other)]
    lines += [f"{name} is only in one of them" for name in sorted(names[0] ^ names[1], key=_order)]
    return sorted(names[0] & names[1], key=_order)


def _order(name: str) -> tuple[float, str]:
    match = _STEP.search(name)
    return (int(match.group(1)) if match else float("inf"), name)


def _compare_tensors(name: str, one: Path, other: Path) -> tuple[int, str | None]:
    """(how many tensors, the first that differs): its name, how many numbers, the first of them in both."""
    from safetensors.torch import load_file

    first, second = load_file(one), load_file(other)
    if first.keys() != second.keys():
        return len(first), f"{name}: {min(first.keys() ^ second.keys())} is only in one of them"
    for key in sorted(first):
        if first[key].dtype != second[key].dtype or first[key].shape != second[key].shape:
            return len(first), f"{name}: {key} is {_kind(first[key])} and {_kind(second[key])}"
        unequal = _unequal(first[key], second[key])
        if len(unequal):
            place = tuple(unequal[0].tolist())
            numbers = f"{first[key][place].item()!r} and {second[key][place].item()!r}"
            where = f"first at {list(place)}: " if place else ""
            return len(first), f"{name}: {key}: {len(unequal)} of {first[key].numel()} numbers, {where}{numbers}"
    return len(first), None


def _unequal(one: Any, other: Any) -> Any:
    """(n, dims) places of the numbers that differ; two NaN are equal."""
    differs = one != other
    if one.is_floating_point():
        differs &= ~(one.isnan() & other.isnan())
    return differs.nonzero()


def _kind(tensor: Any) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _are_pixels_equal(one: Path, other: Path) -> bool:
    from PIL import Image

    with Image.open(one) as first, Image.open(other) as second:
        return first.size == second.size and first.tobytes() == second.tobytes()


def _compare_records(one: Path, other: Path, event: str, key: str, start_step: int, lines: list[str]) -> int:
    values: list[Mapping[int, Any]] = [
        {
            record["step"]: record[key]
            for record in read_records(run / METRICS_FILE)
            if record.get("event") == event and record["step"] > start_step
        }
        for run in (one, other)
    ]
    unequal = [step for step in sorted(values[0].keys() | values[1]) if values[0].get(step) != values[1].get(step)]
    if unequal:
        step = unequal[0]
        word = {"step_done": "loss", "eval_done": "evaluation"}[event]
        text = f"the {word} of step {step}: {' and '.join(_exact(each.get(step)) for each in values)}"
        lines.append(text + (f"; {len(unequal) - 1} later ones too" if len(unequal) > 1 else ""))
    return len(values[0])


def _exact(value: float | None) -> str:
    """A number with all of its digits."""
    return "none" if value is None else json.dumps(value)
