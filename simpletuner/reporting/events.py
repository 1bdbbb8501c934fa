"""What happens in a run, as data. Training emits these and knows nothing of terminals, files or dashboards.

Every event is a frozen dataclass of plain values, so that any sink can show it and JSON can keep it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Severity = Literal["info", "warning", "error"]


@dataclass(frozen=True)
class Event:
    """Base of all events."""


@dataclass(frozen=True)
class RunStarted(Event):
    """A run begins, or goes on.

    Args:
        run_name: what trackers call the run.
        output_dir: folder of everything that the run writes.
        total_steps: optimizer steps at which the run ends.
        start_step: optimizer steps already done; 0 for a new run. Metrics after it are resampled.
        run_id: of the run, the same at each start of it; empty where nobody knows.
        branch: of the run; another one after it went back to an earlier checkpoint.
        is_complete: nothing is left to do.
        details: facts worth a line each (model, datasets, adapter, device), in the order to print.
        options: the resolved configuration, for trackers.
    """

    run_name: str
    output_dir: Path
    total_steps: int
    start_step: int = 0
    details: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    run_id: str = ""
    branch: str = ""
    is_complete: bool = False


@dataclass(frozen=True)
class PhaseStarted(Event):
    """A stretch of work before, between or after the steps ("encoding images"); `total` items, None if unknown."""

    name: str
    total: int | None = None


@dataclass(frozen=True)
class PhaseProgress(Event):
    """`done` of the phase's items are finished (a running total, not a difference)."""

    name: str
    done: int


@dataclass(frozen=True)
class PhaseDone(Event):
    """The phase `name` ended after `seconds`; `summary` is one short clause for people ("40 images, 12 reused")."""

    name: str
    seconds: float
    summary: str = ""


@dataclass(frozen=True)
class StepDone(Event):
    """One optimizer step.

    Args:
        step: optimizer steps done, counting this one.
        total_steps: optimizer steps at which the run ends.
        loss: mean over the samples of the step.
        learning_rate: that the step used.
        grad_norm: before clipping; None where it was not computed.
        seconds: wall time of the whole step.
        samples: samples seen in this step, all processes together.
        epoch: the epoch that the step belongs to.
        memory_gb: peak of the device; of the process where there is no accelerator.
        extra: further scalars by name (`ema_decay`, `regularisation_loss`).
        is_regularisation: all samples were regularization data: then the loss is the distance from the base model.
    """

    step: int
    total_steps: int
    loss: float
    learning_rate: float
    grad_norm: float | None
    seconds: float
    samples: int
    epoch: int
    memory_gb: float | None = None
    extra: Mapping[str, float] = field(default_factory=dict)
    is_regularisation: bool = False


@dataclass(frozen=True)
class EvalDone(Event):
    """Loss on held-out images, with the same noise and timesteps each time.

    Args:
        losses: dataset id -> mean loss; empty with `eval_dataset_pooling`.
        pooled: mean over all eval samples.
        per_quantile: (quantile of the family's distribution of sigmas, mean loss there).
        seconds: wall time of the evaluation.
        reference: `pooled` of the untouched base model on the same images; None where it cannot be computed.
        reference_per_quantile: `per_quantile` of the untouched base model.
    """

    step: int
    losses: Mapping[str, float]
    pooled: float
    per_quantile: Sequence[tuple[float, float]] = ()
    seconds: float = 0.0
    reference: float | None = None
    reference_per_quantile: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class LossBySigma(Event):
    """The training loss of the last steps by noise level: what a single step's loss hides.

    Args:
        step: optimizer steps done.
        first_step: the first step that is counted.
        bins: (lowest sigma, highest sigma, mean loss, samples) where there were samples.
    """

    step: int
    first_step: int
    bins: Sequence[tuple[float, float, float, float]]


@dataclass(frozen=True)
class CheckpointSaved(Event):
    """A checkpoint is complete and verified at `path`.

    Args:
        eval_loss: of `checkpoint-best`, which a better one replaces at any time; None for numbered checkpoints.
        is_new: it was written now; else the run's checkpoint of this step was there already and was kept.
    """

    step: int
    path: Path | str
    eval_loss: float | None = None
    is_new: bool = True


@dataclass(frozen=True)
class SavedImage:
    """A validation image on disk.

    Args:
        kind: which weights generated it: `base` (adapter off), `live`, `ema`; `grid` for a sheet made of several.
        index: counts the images of one prompt and size, from 0.
    """

    path: Path
    shortname: str
    prompt: str
    width: int
    height: int
    seed: int | None
    kind: Literal["base", "live", "ema", "grid"]
    index: int = 0


@dataclass(frozen=True)
class ImagesMade(Event):
    """Validation images were written."""

    step: int
    images: tuple[SavedImage, ...]


@dataclass(frozen=True)
class PreviewMade(Event):
    """A validation image was decoded and written while it was still being generated.

    Args:
        step: optimizer steps done.
        image: where it lies; its size is the decoder's, which may be smaller than the image to come.
        sampling_step: denoising steps taken, counting from 1.
        num_sampling_steps: denoising steps of the finished image.
        sigma: share of noise that is left in it, 1 to 0.
    """

    step: int
    image: SavedImage
    sampling_step: int
    num_sampling_steps: int
    sigma: float


@dataclass(frozen=True)
class ImagesScored(Event):
    """How well validation images fit their prompts.

    Args:
        metric: name of the score (`clip`).
        scores: shortname and size of the image -> score; kind of weights in front ("live", "ema", "base").
        mean: over the images of the weights in training.
    """

    step: int
    metric: str
    scores: Mapping[str, float]
    mean: float


@dataclass(frozen=True)
class Notice(Event):
    """Something worth one line that did not stop the run."""

    severity: Severity
    text: str


@dataclass(frozen=True)
class RunFinished(Event):
    """The run ended as planned.

    Args:
        step: optimizer steps done.
        seconds: wall time of this process's run.
        outputs: what was written, by what it is ("adapter" -> path), in the order to print.
        commands: shell commands worth trying now, each on a line of its own.
    """

    step: int
    seconds: float
    outputs: Mapping[str, Path] = field(default_factory=dict)
    commands: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunFailed(Event):
    """The run ended early; `exit_code` is what the process leaves with."""

    step: int
    message: str
    exit_code: int = 1


def event_name(event: Event) -> str:
    """`StepDone` -> `step_done`: how records and trackers name an event."""
    return event_name_of(type(event))


def event_name_of(kind: type[Event]) -> str:
    """The name of a kind of event in records, which keeps the words of the first version."""
    name = re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()
    return _NAMES_IN_RECORDS.get(name, name)


def to_record(event: Event) -> dict[str, Any]:
    """The event as JSON can hold it; a number that is not finite becomes its name ("nan"): JSON has no NaN."""
    return {"event": event_name(event), **_fields(event)}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _fields(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def _fields(value: Any) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(value)]
    return {_NAMES_IN_RECORDS.get(name, name): _plain(getattr(value, name)) for name in names}


def is_sound(record: Mapping[str, Any]) -> bool:
    """Whether a record's values are of the kinds that its event has: those of a damaged file may be anything.

    Fields that this version does not know, or that are missing, are no damage: another version wrote the record.
    """
    if type(record.get("step", 0)) is not int:
        return False
    name, time = record.get("event"), record.get("time", 0)
    if not isinstance(name, str) or not _is_of(time, "float") or not 0 <= float(time) < _LATEST_TIME:
        return False
    return all(_is_of(record[name], kind) for name, kind in _FIELD_KINDS.get(name, {}).items() if name in record)


def _is_of(value: Any, kind: str) -> bool:
    """`kind` is an annotation as it is written."""
    if value is None:
        return kind.endswith("| None")
    if kind.startswith("Mapping[str, float]"):
        return isinstance(value, dict) and all(_is_of(each, "float") for each in value.values())
    if kind == "Mapping[str, str]":
        return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())
    if kind == "bool":
        return isinstance(value, bool)
    if kind == "SavedImage":
        return isinstance(value, dict) and not any(isinstance(each, dict | list) for each in value.values())
    if kind.startswith("tuple[SavedImage"):
        return isinstance(value, list) and all(_is_of(each, "SavedImage") for each in value)
    if kind.startswith("Mapping"):
        return isinstance(value, dict)
    if kind.startswith(("Sequence[tuple[float", "tuple[tuple[float")):
        length = kind.split("]")[0].count("float")
        return isinstance(value, list) and all(_is_row(row, length) for row in value)
    if kind.startswith(("Sequence", "tuple")):
        return isinstance(value, list)
    if kind.startswith("int"):
        return type(value) is int
    if kind.startswith("float"):
        return (isinstance(value, int | float) and not isinstance(value, bool)) or value in ("nan", "inf", "-inf")
    return isinstance(value, str)


def _is_row(row: Any, length: int) -> bool:
    return isinstance(row, list) and len(row) == length and all(_is_of(each, "float") for each in row)


# Files that users have, and programs that read them, know these names.
_NAMES_IN_RECORDS = {
    "images_made": "pictures_made",
    "images_scored": "pictures_scored",
    "images": "pictures",
    "image": "picture",
}
NAMES_FROM_RECORDS = {kept: name for name, kept in _NAMES_IN_RECORDS.items()}
_LATEST_TIME = 1e11  # seconds since 1970; no calendar has later ones
_FIELD_KINDS = {
    event_name_of(kind): {
        _NAMES_IN_RECORDS.get(field.name, field.name): str(field.type) for field in dataclasses.fields(kind)
    }
    for kind in Event.__subclasses__()
}
