"""A short run with everything on, what it must leave behind, and what a fault in it may cost.

The run has two steps. Each saves, evaluates, keeps the best and makes images; the second rotates the first away, and
the end writes final weights, curves and the report.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simpletuner import storage
from simpletuner.errors import EXIT_DATA
from simpletuner.reporting.sinks.jsonl import read_records
from simpletuner.tempnames import parse_name
from tests.faults import forks
from tests.runs import dataset, write_images, write_run

OPTIONS = {
    "max_train_steps": 2,
    "use_ema": True,
    "checkpoint_step_interval": 1,
    "checkpoints_total_limit": 1,
    "checkpoint_keep_best": True,
    "eval_steps_interval": 1,
    "eval_timesteps": 2,
    "validation_disable": False,
    "validation_prompt": "a star",
    "validation_resolution": "32",
    "validation_step_interval": 1,
    "validation_num_inference_steps": 1,
    "validation_guidance": 1.0,
    "train_batch_size": 2,
    "report_to": "tensorboard",
}
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS)
# What a refusal of the disk may cost where it is met: a chart or a sheet of the run, never weights, records or images.
CHARTS = re.compile(r"loss\.png|validation_images/step_\d+_sheet\.png|before_after\.png")
ENDINGS = {0, EXIT_DATA}  # what a command may end with that met a refusal of the disk


def write(folder: Path, model: Path, **options: Any) -> Path:
    """The run in `folder`, its images beside it; nothing is cached yet."""
    names = {"images": 3, "held_out": 1}
    for seed, (name, count) in enumerate(names.items()):
        if not (folder.parent / name).exists():
            write_images(folder.parent / name, count, seed)
    data = [
        dataset("images", instance_data_dir=str(folder.parent / "images")),
        dataset("held_out", instance_data_dir=str(folder.parent / "held_out"), dataset_type="eval"),
    ]
    return write_run(folder, model, data, **OPTIONS | options)


@dataclass(frozen=True)
class Result:
    """What a finished run has left.

    Args:
        bits: file -> sha256, of all that must be equal: weights, optimizer state, averages, images.
        losses: (step, loss) in the order of the record.
        evaluations: step -> eval loss, of the history.
        names: all files, without those that carry a time in their name.
    """

    bits: dict[str, str]
    losses: list[tuple[int, float]]
    evaluations: dict[str, float]
    names: frozenset[str]


def result_of(folder: Path) -> Result:
    """Read what a run has left in `folder`."""
    output = folder / "output"
    # A run that dies before its first checkpoint starts again, and what it had left goes to `earlier-runs`.
    files = [path for path in sorted(output.rglob("*")) if path.is_file() and "earlier-runs" not in path.parts]
    names = [str(path.relative_to(output)) for path in files]
    exact = [path for path in files if path.suffix in (".safetensors", ".png") and path.name != "loss.png"]
    steps = [record for record in read_records(output / "metrics.jsonl") if record["event"] == "step_done"]
    return Result(
        {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in exact},
        [(record["step"], record["loss"]) for record in steps],
        json.loads((output / "eval_losses.json").read_text())["losses"],
        frozenset(name for name in names if not re.match(r"metrics\.\d+\.jsonl|.*tfevents", name)),
    )


def differences(folder: Path, expected: Result, is_record_whole: bool = True) -> Iterator[str]:
    """Where a run differs from one that nothing happened to; one sentence each.

    Args:
        is_record_whole: no line of `metrics.jsonl` may be missing.
    """
    found = result_of(folder)
    for name in sorted(expected.bits.keys() | found.bits.keys()):
        if found.bits.get(name) != expected.bits.get(name):
            yield f"{name} {'differs' if name in found.bits and name in expected.bits else 'is in one of them only'}"
    if found.evaluations != expected.evaluations:
        yield f"the history of evaluations is {found.evaluations}"
    lost = set(expected.losses) - set(found.losses)
    if len(set(found.losses)) != len(found.losses) or set(found.losses) - set(expected.losses):
        yield f"the record has other losses: {found.losses}"
    if lost and is_record_whole:
        yield f"the record lacks {sorted(lost)}"
    for name in sorted(expected.names - found.names - expected.bits.keys()):
        yield f"{name} is missing"
    for name in sorted(found.names - expected.names - found.bits.keys()):
        yield f"{name} is left over"
    for path in (folder / "output").glob("checkpoint-*"):
        yield from storage.verify_dir(path)
    yield from stale_files(folder)


def stale_files(folder: Path) -> Iterator[str]:
    """Temporary names that are still there."""
    for path in sorted(folder.rglob("*")):
        if parse_name(path.name):
            yield f"{path.relative_to(folder)} is left over"


class Scene:
    """A run, what it does to files and what it leaves, and the state that each fault starts from.

    Args:
        folder: everything is in it.
        is_cached: whether the caches are complete at the start.
        options: of the run, other than `OPTIONS`.
    """

    def __init__(self, folder: Path, model: Path, is_cached: bool, **options: Any):
        self.run = folder / "run"
        self.start = folder / "start"
        write(self.run, model, **options)
        if is_cached:
            self._train()
            shutil.rmtree(self.run / "output")
        self.run.rename(self.start)
        shutil.copytree(self.start, self.run)  # the recorded run begins as each run with a fault does
        self._train(record=folder / "operations")
        self.operations = forks.operations(folder / "operations")
        self.expected = result_of(self.run)
        assert not list(differences(self.run, self.expected))
        shutil.rmtree(self.run)

    def _train(self, record: Path | None = None) -> None:
        code = forks.run(self.run, record=record)
        assert code == 0, forks.terminal(self.run)

    def sites(self) -> list[forks.Operation]:
        """One operation on the output folder for each distinct call site and kind of file."""
        first = {each.site: each for each in reversed(self.operations) if each.path.startswith("output")}
        return list(first.values())[::-1]

    def check(self, operation: forks.Operation, error: int = 0, persists: bool = False) -> list[str]:
        """Let the run meet a fault at an operation, start it again, and say what is wrong then.

        Args:
            error: errno; 0 kills the process.
        """
        with tempfile.TemporaryDirectory(dir=self.start.parent) as folder:
            run = shutil.copytree(self.start, Path(folder) / "run")
            wrong = list(self._meet(run, forks.Fault(operation, error, persists)))
        kind = f"{errno.errorcode[error]}{' from here on' if persists else ''}" if error else "killed"
        where = f"{kind} at {operation.number}, {operation.call} {operation.site[1]} ({', '.join(operation.where[:3])})"
        return [f"{where}: {line}" for line in wrong]

    def _meet(self, run: Path, fault: forks.Fault) -> Iterator[str]:
        code = forks.run(run, fault)
        if not forks.was_met(run):
            yield "this operation did not come"
        if fault.error and code not in ENDINGS:
            yield f"ended with {code}: {last_lines(run)}"
        again = forks.run(run)
        if again != 0:
            yield f"the next start ended with {again}: {last_lines(run)}"
            return
        if fault.error:
            yield from self._after_refusal(run)
        else:
            yield from differences(run, self.expected)

    def _after_refusal(self, run: Path) -> Iterator[str]:
        """As `differences`, but for charts, and for an old checkpoint that could not be removed, if it is whole."""
        charts = {name for name in self.expected.names if CHARTS.fullmatch(name)}
        present = result_of(run)
        for path in (run / "output").glob("checkpoint-*"):
            is_expected = f"{path.name}/{storage.MANIFEST}" in self.expected.names
            if not is_expected and not storage.verify_dir(path):
                shutil.rmtree(path)
        lost = charts - present.names
        bits = {name: value for name, value in self.expected.bits.items() if name not in lost}
        expected = replace(self.expected, bits=bits, names=self.expected.names - lost)
        yield from differences(run, expected, is_record_whole=False)


def last_lines(place: Path) -> str:
    return " | ".join(forks.terminal(place).splitlines()[-3:])
