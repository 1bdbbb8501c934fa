"""What the files of an output folder say of its run: `metrics.jsonl`, `run.lock.json`, reports of data, images.

Files of other versions, half-written ones and missing ones are ordinary here: what cannot be read is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simpletuner import storage
from simpletuner.errors import DataError, Problem
from simpletuner.reporting.progress import number_text
from simpletuner.reporting.sinks.jsonl import METRICS_FILE, read_records

MetricsLine = Mapping[str, Any]
Points = list[tuple[float, float]]

CONTACT_DIR = "contact_sheet"


@dataclass(frozen=True)
class ShownImage:
    """An image of the run that is still on disk."""

    path: Path
    step: int
    kind: str
    row: str
    prompt: str


@dataclass
class RunRecord:
    """One run, as its files tell it.

    Args:
        start: the record of its (last) start; empty where it never came so far.
        end: the record of its end, planned or not; empty while it runs or after a kill.
        steps, evaluations, scores, by_sigma, checkpoints: records in order.
        phases: name -> seconds in all.
        warnings: texts of warnings and errors, each once.
        images: validation images.
        lock: `run.lock.json`.
        datasets: `dataset_report.json`.
        contact: images of the data as they are trained on: dataset id -> (file, caption, note).
    """

    output_dir: Path
    start: MetricsLine = field(default_factory=dict)
    end: MetricsLine = field(default_factory=dict)
    steps: list[MetricsLine] = field(default_factory=list)
    evaluations: list[MetricsLine] = field(default_factory=list)
    scores: list[MetricsLine] = field(default_factory=list)
    by_sigma: list[MetricsLine] = field(default_factory=list)
    checkpoints: list[MetricsLine] = field(default_factory=list)
    phases: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    images: list[ShownImage] = field(default_factory=list)
    lock: MetricsLine = field(default_factory=dict)
    datasets: list[MetricsLine] = field(default_factory=list)
    contact: dict[str, list[tuple[Path, str, str]]] = field(default_factory=dict)
    last_time: float | None = None

    @property
    def name(self) -> str:
        return str(self.start.get("run_name") or self.output_dir.name)

    @property
    def last_step(self) -> int:
        return int(self.steps[-1]["step"]) if self.steps else int(self.end.get("step", 0) or 0)

    @property
    def state(self) -> str:
        """`finished`, `failed`, `interrupted`, or `unfinished` (it runs, or was killed)."""
        if self.end.get("event") == "run_finished":
            return "finished"
        if self.end.get("event") == "run_failed":
            return "interrupted" if self.end.get("exit_code") in (130, 143) else "failed"
        return "unfinished"

    def curve(self, name: str) -> Points:
        """(step, value) of a field of the steps that holds numbers."""
        return numbers((record["step"], record.get(name)) for record in self.steps)

    def eval_curve(self) -> Points:
        return numbers((record["step"], record.get("pooled")) for record in self.evaluations)

    def best_evaluation(self) -> tuple[int, float] | None:
        """(step, eval loss) of the lowest eval loss after step 0."""
        after = [(loss, step) for step, loss in self.eval_curve() if step > 0]
        return (int(min(after)[1]), min(after)[0]) if after else None


def numbers(pairs: Iterable[tuple[Any, Any]]) -> Points:
    """The pairs whose second value is a number; of equal steps the last counts."""
    found = {float(x): float(y) for x, y in pairs if isinstance(y, int | float) and not isinstance(y, bool)}
    return sorted(found.items())


def read_run(output_dir: Path) -> RunRecord:
    """Read the run in `output_dir`.

    Raises:
        DataError: there is none.
    """
    records = read_records(output_dir / METRICS_FILE)
    if not records:
        raise DataError(
            Problem(
                f"there is no run in {output_dir}: {METRICS_FILE} is missing or empty",
                fix="give the output_dir of a run",
            )
        )
    run = RunRecord(output_dir)
    for record in records:
        _take(run, record)
    run.lock = _read(output_dir / "run.lock.json", dict) or {}
    run.datasets = [each for each in _read(output_dir / "dataset_report.json", list) or [] if isinstance(each, dict)]
    run.contact = read_contact(output_dir / CONTACT_DIR)
    return run


def _take(run: RunRecord, record: MetricsLine) -> None:
    kind = record.get("event")
    lists = {"eval_done": run.evaluations, "pictures_scored": run.scores, "loss_by_sigma": run.by_sigma}
    if isinstance(record.get("time"), int | float):
        run.last_time = float(record["time"])
    if kind == "run_started":
        if not (record.get("is_complete") and run.end):  # nothing was left to do: what the run's end said still holds
            run.start, run.end = record, {}
    elif kind == "step_done" and isinstance(record.get("step"), int):
        run.steps.append(record)
        run.end = {}
    elif kind == "checkpoint_saved":
        run.checkpoints.append(record)
    elif kind in lists and isinstance(record.get("step"), int):
        lists[str(kind)].append(record)
    elif kind == "pictures_made":
        run.images += _images(run, record)
    elif kind == "phase_done" and isinstance(record.get("seconds"), int | float):
        name = str(record.get("name")).split(" at step ")[0]
        run.phases[name] = run.phases.get(name, 0.0) + float(record["seconds"])
    elif kind == "notice" and record.get("severity") in ("warning", "error"):
        text = str(record.get("text", ""))
        if text not in run.warnings:
            run.warnings.append(text)
    elif kind in ("run_finished", "run_failed"):
        run.end = record


def _images(run: RunRecord, record: MetricsLine) -> list[ShownImage]:
    """The images of a validation that are still there; sheets of several are left out."""
    found = []
    for each in record.get("pictures", ()):
        if not isinstance(each, dict) or each.get("kind") == "grid":
            continue
        path = locate(run, str(each.get("path", "")))
        if path is not None:
            number = number_text(index) if isinstance(index := each.get("index"), int) else ""
            row = f"{each.get('shortname')} ({each.get('width')}x{each.get('height')}{number})"
            step = int(record.get("step", 0))
            found.append(ShownImage(path, step, str(each.get("kind")), row, str(each.get("prompt", ""))))
    return found


def locate(run: RunRecord, written: str) -> Path | None:
    """A file that the run wrote: where it said, else at the same place in the folder that it was moved to.

    Only files inside of the output folder are shown: metrics that somebody else made name no others.
    """
    path, folder = Path(written), run.output_dir.absolute()
    before = Path(str(run.start.get("output_dir", "")))
    inside = path.relative_to(before) if before.parts and path.is_relative_to(before) else path
    candidate = folder / inside
    resolved = candidate.resolve()
    return candidate if resolved.is_relative_to(folder.resolve()) and resolved.is_file() else None


def read_contact(folder: Path) -> dict[str, list[tuple[Path, str, str]]]:
    """The images of the data that the run kept, by dataset."""
    found: dict[str, list[tuple[Path, str, str]]] = {}
    for each in _read(folder / "pictures.json", list) or []:
        if isinstance(each, dict):
            path = folder / Path(str(each.get("file", ""))).name
            if path.is_file():
                shown = (path, str(each.get("caption", "")), str(each.get("note", "")))
                found.setdefault(str(each.get("dataset", "")), []).append(shown)
    return found


def _read(path: Path, kind: type) -> Any:
    try:
        return storage.read_json(path, kind)
    except DataError:
        return None
