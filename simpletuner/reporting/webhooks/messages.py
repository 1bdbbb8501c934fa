"""Words events as messages: what a service gets of each, independent of which service it is.

The types and fields are those of `documentation/webhook_events.schema.json`; a change of meaning raises
`SCHEMA_VERSION`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any, NamedTuple

from simpletuner.config.webhooks import Severity
from simpletuner.errors import EXITS_OF_SIGNALS
from simpletuner.reporting.events import (
    CheckpointSaved,
    EvalDone,
    Event,
    ImagesMade,
    ImagesScored,
    LossBySigma,
    Notice,
    PhaseDone,
    PhaseProgress,
    PhaseStarted,
    PreviewMade,
    RunFailed,
    RunFinished,
    RunStarted,
    SavedImage,
    StepDone,
    to_record,
)
from simpletuner.reporting.progress import duration_text

SCHEMA_VERSION = 1
# Discord takes ten files in a message; more images travel in several messages.
IMAGES_PER_MESSAGE = 10


@dataclass(frozen=True)
class Message:
    """What a service gets.

    Args:
        id: unique; a message that is sent again, because its answer was lost, has the same.
        type: `training.status`, `validation.image`, ...: the schema lists them.
        text: one or more lines for people.
        data: facts for programs, as JSON holds them.
        images: files that go along, in the order of `data["pictures"]`.
        run_id: the same at each start of a run; empty before it has begun.
        created: seconds since 1970.
        must_arrive: kept on the disk until the service has it.
    """

    type: str
    severity: Severity
    title: str
    text: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[str, ...] = ()
    run_name: str = ""
    run_id: str = ""
    must_arrive: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: float = field(default_factory=time.time)


class CurvePoint(NamedTuple):
    """One step of the loss curve."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float | None
    seconds: float
    is_regularisation: bool = False

    @classmethod
    def of(cls, event: StepDone) -> CurvePoint:
        return cls(event.step, event.loss, event.learning_rate, event.grad_norm, event.seconds, event.is_regularisation)


def words_for(event: Event, run_name: str, run_id: str = "") -> list[Message]:
    """The messages of an event; none for progress, which `progress_message` words when its time has come."""
    make = _MAKERS.get(type(event))
    return [_named(message, run_name, run_id) for message in make(event)] if make else []


def progress_message(
    event: StepDone | PhaseProgress, run_name: str, curve: Sequence[CurvePoint], run_id: str = ""
) -> Message:
    """Where the run stands now.

    Args:
        curve: the steps since the last report; may be thinned.
    """
    if isinstance(event, PhaseProgress):
        stage = {"key": event.name, "label": event.name, "status": "running", "progress": {"current": event.done}}
        message = Message("lifecycle.stage", "info", event.name, str(event.done), {"stage": stage})
        return _named(message, run_name, run_id)
    recent = [point.seconds for point in curve[-20:]] or [event.seconds]
    left = (event.total_steps - event.step) * sum(recent) / len(recent)
    record = to_record(event)
    data = {
        "status": "running",
        "percent": round(100 * event.step / max(event.total_steps, 1), 2),
        "eta_seconds": round(left, 1),
        "curve": [_curve_row(point) for point in curve],
        "regularisation_steps": [point.step for point in curve if point.is_regularisation],
        **{key: record[key] for key in record if key != "event"},
    }
    text = f"loss {event.loss:.4g}, {event.seconds:.3g} s per step, {duration_text(left)} left"
    title = f"step {event.step} of {event.total_steps}"
    return _named(Message("training.status", "info", title, text, data), run_name, run_id)


def _curve_row(point: CurvePoint) -> list[Any]:
    """[step, loss, learning rate, gradient norm] as JSON holds them."""
    record = to_record(StepDone(point.step, 0, point.loss, point.learning_rate, point.grad_norm, 0.0, 0, 0))
    return [record[key] for key in ("step", "loss", "learning_rate", "grad_norm")]


def _named(message: Message, run_name: str, run_id: str) -> Message:
    # A file name that is not UTF-8 becomes half-characters in a text, which neither JSON nor Discord can carry.
    text = message.text.encode("utf-8", "replace").decode()
    return replace(message, text=text, run_name=run_name, run_id=run_id)


def _started(event: RunStarted) -> list[Message]:
    record = to_record(event)
    data = {key: record[key] for key in ("output_dir", "total_steps", "start_step", "details")}
    title = f"resumes after step {event.start_step}" if event.start_step else "training starts"
    lines = [f"{event.total_steps} steps", *(f"{name}: {text}" for name, text in event.details.items())]
    data = {"status": "running", "step": event.start_step, **data}
    return [Message("training.status", "info", title, "\n".join(lines), data)]


def _stage(name: str, status: str, progress: Mapping[str, Any], text: str = "") -> list[Message]:
    stage = {"key": name, "label": name, "status": status, "progress": dict(progress)}
    return [Message("lifecycle.stage", "info", name, text, {"stage": stage})]


def _phase_started(event: PhaseStarted) -> list[Message]:
    return _stage(event.name, "running", {"current": 0, "total": event.total})


def _phase_done(event: PhaseDone) -> list[Message]:
    return _stage(event.name, "completed", {"seconds": event.seconds}, event.summary)


def _evaluated(event: EvalDone) -> list[Message]:
    data = {key: value for key, value in to_record(event).items() if key != "event"}
    return [Message("training.evaluation", "info", f"eval loss at step {event.step}", f"{event.pooled:.5f}", data)]


def _sorted_by_noise(event: LossBySigma) -> list[Message]:
    data = {key: value for key, value in to_record(event).items() if key != "event"}
    title = f"loss by noise level, steps {event.first_step} to {event.step}"
    return [Message("training.loss_by_sigma", "info", title, "", data)]


def _saved(event: CheckpointSaved) -> list[Message]:
    checkpoint: dict[str, Any] = {"path": str(event.path), "label": PurePath(event.path).name, "step": event.step}
    title = f"checkpoint at step {event.step}"
    if event.eval_loss is not None:
        checkpoint["eval_loss"] = event.eval_loss
        title = f"best checkpoint so far at step {event.step}, eval loss {event.eval_loss:.4f}"
    data = {"step": event.step, "checkpoint": checkpoint}
    return [Message("training.checkpoint", "info", title, str(event.path), data, must_arrive=True)]


def _facts(image: SavedImage) -> dict[str, Any]:
    resolution = f"{image.width}x{image.height}"
    kept = ("shortname", "prompt", "width", "height", "seed", "kind", "index")
    return {**{key: getattr(image, key) for key in kept}, "resolution": resolution, "file": image.path.name}


def _generated(event: ImagesMade) -> list[Message]:
    messages = []
    for first in range(0, len(event.images), IMAGES_PER_MESSAGE):
        images = event.images[first : first + IMAGES_PER_MESSAGE]
        prompts = dict.fromkeys(image.prompt for image in images if image.prompt)
        data = {"step": event.step, "pictures": [_facts(image) for image in images]}
        paths = tuple(str(image.path) for image in images)
        title, text = f"images at step {event.step}", "\n".join(prompts)
        messages.append(Message("validation.image", "info", title, text, data, paths, must_arrive=True))
    return messages


def _previewed(event: PreviewMade) -> list[Message]:
    label = f"{event.sampling_step}/{event.num_sampling_steps}"
    data = {
        "step": event.step,
        "step_label": label,
        "sampling_step": event.sampling_step,
        "num_sampling_steps": event.num_sampling_steps,
        "sigma": event.sigma,
        "timestep": round(1000 * event.sigma, 3),
        "prompt": event.image.prompt,
        "resolution": f"{event.image.width}x{event.image.height}",
        "pictures": [_facts(event.image)],
    }
    title = f"{event.image.shortname} at step {event.step}, generating {label}"
    return [Message("validation.preview", "info", title, event.image.prompt, data, (str(event.image.path),))]


def _scored(event: ImagesScored) -> list[Message]:
    data = {key: value for key, value in to_record(event).items() if key != "event"}
    return [Message("validation.score", "info", f"{event.metric} at step {event.step}", f"{event.mean:.4f}", data)]


def _noticed(event: Notice) -> list[Message]:
    return [Message("notification", event.severity, event.severity, event.text, {"severity": event.severity})]


def _finished(event: RunFinished) -> list[Message]:
    data = {"status": "completed", **{key: value for key, value in to_record(event).items() if key != "event"}}
    text = f"{event.step} steps in {duration_text(event.seconds)}"
    return [Message("training.status", "info", "training is done", text, data, must_arrive=True)]


def _failed(event: RunFailed) -> list[Message]:
    is_stop = event.exit_code in EXITS_OF_SIGNALS
    status = "interrupted" if is_stop else "failed"
    data = {"status": status, "step": event.step, "exit_code": event.exit_code}
    title = f"training was {status} at step {event.step}" if is_stop else f"training failed at step {event.step}"
    kind, severity = ("training.status", "warning") if is_stop else ("error", "critical")
    return [Message(kind, severity, title, event.message, data, must_arrive=True)]  # type: ignore[arg-type]


# What has no line here is not sent: progress has `progress_message`. A test lists every event.
_MAKERS: Mapping[type[Event], Callable[[Any], list[Message]]] = {
    RunStarted: _started,
    PhaseStarted: _phase_started,
    PhaseDone: _phase_done,
    EvalDone: _evaluated,
    LossBySigma: _sorted_by_noise,
    CheckpointSaved: _saved,
    ImagesMade: _generated,
    PreviewMade: _previewed,
    ImagesScored: _scored,
    Notice: _noticed,
    RunFinished: _finished,
    RunFailed: _failed,
}
