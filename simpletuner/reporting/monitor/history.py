"""What the monitor knows of each run, so that a page that is opened late sees everything.

Events go in, patches come out: a patch is what changes on a page. A snapshot is the patch that makes a whole page.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from simpletuner.reporting.charts import Points

Patch = dict[str, Any]

MAX_RUNS = 12
MAX_POINTS = 20_000
MAX_LOG_LINES = 2000
MAX_IMAGES = 3000
# Larger numbers, and NaN, are no point of a curve.
MAX_LOSS = 1e300
MAX_IMAGE_BYTES = 256 << 20
_MAX_IDS = 20_000
_SHOWN_ELSEWHERE = ("validation.image", "validation.preview", "training.loss_by_sigma")
_STATUS_KEYS = (
    *("status", "step", "total_steps", "start_step", "percent", "eta_seconds", "loss", "learning_rate", "grad_norm"),
    *("seconds", "epoch", "memory_gb", "details", "output_dir", "outputs", "commands", "extra"),
)


@dataclass(frozen=True)
class Image:
    """An image's bytes and kind."""

    media_type: str
    data: bytes


class ImageStore:
    """Images by the digest of their content, together at most `max_bytes`; the oldest previews give way first.

    Browsers keep images by their address: a number would mean another image once a monitor was started again.
    """

    def __init__(self, max_bytes: int = MAX_IMAGE_BYTES):
        self._max_bytes = max_bytes
        self._images: OrderedDict[str, tuple[Image, bool]] = OrderedDict()
        self._bytes = 0

    def add(self, image: Image, is_preview: bool) -> str:
        digest = hashlib.sha256(image.data).hexdigest()[:32]
        known = self._images.pop(digest, None)
        self._bytes += 0 if known else len(image.data)
        self._images[digest] = (image, is_preview and (known is None or known[1]))
        while self._bytes > self._max_bytes:
            oldest = next((key for key, (_, preview) in self._images.items() if preview), next(iter(self._images)))
            self._bytes -= len(self._images.pop(oldest)[0].data)
        return digest

    def get(self, digest: str) -> Image | None:
        found = self._images.get(digest)
        return found[0] if found else None


@dataclass
class RunHistory:
    """One run."""

    name: str
    status: Patch = field(default_factory=dict)
    stage: Patch | None = None
    curve: list[Sequence[Any]] = field(default_factory=list)  # step, loss, rate, gradient norm, is regularization
    evals: list[Sequence[Any]] = field(default_factory=list)
    scores: list[Patch] = field(default_factory=list)
    images: deque[Patch] = field(default_factory=lambda: deque(maxlen=MAX_IMAGES))
    log: deque[Patch] = field(default_factory=lambda: deque(maxlen=MAX_LOG_LINES))

    def snapshot(self) -> Patch:
        return {
            "run": self.name,
            "reset": True,
            "status": dict(self.status),
            "stage": self.stage,
            "curve": list(self.curve),
            "evals": list(self.evals),
            "scores": list(self.scores),
            "pictures": list(self.images),
            "log": list(self.log),
        }

    def apply(self, event: Mapping[str, Any], digests: Sequence[str | None]) -> Patch:
        """What changes with an event.

        Args:
            digests: for each of its images, its name in the store; None where it was not sent.
        """
        kind, data = event["type"], event["data"]
        patch: Patch = {"run": self.name, "log": [self._line(event)]}
        if kind == "training.status" and "start_step" in data:
            return self._begin(data, patch)
        if kind in ("training.status", "error"):
            self._add_status(data, patch)
        elif kind == "lifecycle.stage":
            self.stage = patch["stage"] = self._stage(data.get("stage") or {})
        elif kind == "training.evaluation":
            patch["evals"] = [[data.get("step"), data.get("pooled"), data.get("reference")]]
            self.evals += patch["evals"]
        elif kind == "validation.score":
            patch["scores"] = [{key: data.get(key) for key in ("step", "metric", "mean")}]
            self.scores += patch["scores"]
        elif kind in ("validation.image", "validation.preview"):
            self._add_images(event, digests, patch)
        if _is_line(event):
            self.log += patch["log"]
        else:
            del patch["log"]
        return patch

    def _begin(self, data: Mapping[str, Any], patch: Patch) -> Patch:
        """A start, or a start again: what comes after its first step is removed."""
        start = data["start_step"] or 0
        self.curve = [row for row in self.curve if row[0] <= start]
        self.evals = [row for row in self.evals if row[0] <= start]
        if not start:
            self.scores = []
            self.images.clear()
        self.status = {key: data[key] for key in _STATUS_KEYS if key in data}
        self.log += patch["log"]
        return self.snapshot()

    def _stage(self, stage: Mapping[str, Any]) -> Patch | None:
        """A stage that runs; how much there is to do stands in its first event only."""
        if stage.get("status") != "running":
            return None
        progress = stage.get("progress") or {}
        if self.stage and self.stage.get("key") == stage.get("key") and "total" not in progress:
            progress = {"total": self.stage["progress"].get("total"), **progress}
        return {**stage, "progress": progress}

    def _add_status(self, data: Mapping[str, Any], patch: Patch) -> None:
        changes = {key: data[key] for key in _STATUS_KEYS if key in data}
        if data.get("status") != "running":
            changes.pop("seconds", None)
            self.stage = patch["stage"] = None
        self.status |= changes
        patch["status"] = changes
        regularisation = set(data.get("regularisation_steps", ()))
        rows = [
            [*row[:4], row[0] in regularisation]
            for row in data.get("curve", ())
            if not self.curve or row[0] > self.curve[-1][0]
        ]
        if rows:
            patch["curve"] = rows
            self.curve += rows
            if len(self.curve) > MAX_POINTS:
                self.curve = self.curve[::2]

    def _add_images(self, event: Mapping[str, Any], digests: Sequence[str | None], patch: Patch) -> None:
        data = event["data"]
        facts = ("step", "step_label", "sampling_step", "num_sampling_steps", "sigma")
        common = {key: data[key] for key in facts if key in data}
        patch["pictures"] = [
            {**image, **common, "image": digest}
            for image, digest in zip(data.get("pictures", ()), digests, strict=True)
            if digest is not None
        ]
        self.images += patch["pictures"]

    @staticmethod
    def _line(event: Mapping[str, Any]) -> Patch:
        return {key: event.get(key, "") for key in ("timestamp", "severity", "title", "message", "type")}


def _is_line(event: Mapping[str, Any]) -> bool:
    """Whether an event stands in the log; progress and images would fill it with what the page shows anyway."""
    data = event["data"]
    if event["type"] == "lifecycle.stage":
        return data.get("stage", {}).get("status") == "completed"
    return "curve" not in data and event["type"] not in _SHOWN_ELSEWHERE


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MAX_LOSS


class History:
    """All runs. Safe to use from many threads; every change wakes those who wait."""

    def __init__(self, max_image_bytes: int = MAX_IMAGE_BYTES):
        self._condition = threading.Condition()
        self._runs: OrderedDict[str, RunHistory] = OrderedDict()
        self._ids: OrderedDict[str, None] = OrderedDict()
        self._images = ImageStore(max_image_bytes)
        self._patches: deque[tuple[int, Patch]] = deque(maxlen=1000)
        self._count = 0

    def add(self, event: Mapping[str, Any], images: Sequence[Image]) -> bool:
        """Take an event in; False where it was there before, under the same id."""
        with self._condition:
            if event["id"] in self._ids:
                return False
            self._ids[event["id"]] = None
            while len(self._ids) > _MAX_IDS:
                self._ids.popitem(last=False)
            run = self._run(str(event.get("run_name") or "run"))
            is_preview = event["type"] == "validation.preview"
            kept = [self._images.add(image, is_preview) for image in images]
            indices = [each.get("image") for each in event["data"].get("pictures", ())]
            digests = [kept[index] if isinstance(index, int) and 0 <= index < len(kept) else None for index in indices]
            self._report(run.apply(event, digests))
        return True

    def forget(self, name: str) -> None:
        """Clear the history of a run."""
        with self._condition:
            self._runs[name] = RunHistory(name)
            self._report(self._runs[name].snapshot())

    def image(self, digest: str) -> Image | None:
        with self._condition:
            return self._images.get(digest)

    def losses(self, name: str) -> tuple[Points, Points, Points, float | None, float]:
        """What `loss_series` takes, of a run; no points where there is no such run."""
        with self._condition:
            run = self._runs.get(name, RunHistory(name))
            rows = [row for row in run.curve if _is_number(row[1])]
            evals = [row for row in run.evals if _is_number(row[1])]
        train = [(float(row[0]), float(row[1])) for row in rows if not row[4]]
        prior = [(float(row[0]), float(row[1])) for row in rows if row[4]]
        base = [float(row[2]) for row in evals if _is_number(row[2])]
        last_step = max([float(row[0]) for row in (*rows[-1:], *evals[-1:])], default=0.0)
        evaluation = [(float(row[0]), float(row[1])) for row in evals]
        return train, prior, evaluation, base[-1] if base else None, last_step

    def snapshots(self) -> tuple[list[Patch], int]:
        """Patches that make the whole page, the run that spoke last at the end; and the position to go on from."""
        with self._condition:
            return [run.snapshot() for run in self._runs.values()], self._count

    def wait(self, position: int, seconds: float) -> tuple[list[Patch], int] | None:
        """Patches after `position`, waiting for the first; None where so many came that some are gone."""
        with self._condition:
            if self._count == position:
                self._condition.wait(seconds)
            if self._patches and self._patches[0][0] > position + 1:
                return None
            return [patch for number, patch in self._patches if number > position], self._count

    def _run(self, name: str) -> RunHistory:
        run = self._runs.setdefault(name, RunHistory(name))
        self._runs.move_to_end(name)
        while len(self._runs) > MAX_RUNS:
            self._runs.popitem(last=False)
        return run

    def _report(self, patch: Patch) -> None:
        self._count += 1
        self._patches.append((self._count, patch))
        self._condition.notify_all()
