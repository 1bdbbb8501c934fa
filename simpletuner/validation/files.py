"""Where validation images are kept and how their sheets are put together.

Names are those that SimpleTuner's users know: `validation_images/step_<step>_<shortname>_<index>_<W>x<H>.png` and
`benchmarks/base_model/<shortname>_<W>x<H>.png`; previews are in `validation_images/previews/`. The benchmark carries a
note of what it was generated with, so that one of another model, prompt or seed is made again and not compared with.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from simpletuner.disk import DiskError, disk_errors
from simpletuner.errors import DataError
from simpletuner.reporting.events import SavedImage
from simpletuner.reporting.progress import number_text
from simpletuner.storage import read_json, write_bytes, write_json
from simpletuner.validation.grids import SheetRow, comparison_sheet
from simpletuner.validation.prompts import ImageRequest
from simpletuner.validation.sampling import GeneratedImage

Kind = Literal["base", "live", "ema"]

MOST_COLUMNS = 6
# The sheet of all steps shows small images, so that an evening's run still fits a screen.
MOST_STEPS, SMALL_CELL = 24, 128
RETRY_SECONDS = 1.0


class ImageFiles:
    """The image files of one run.

    Args:
        output_dir: of the run.
        requests: what one validation generates.
        settings: everything else that decides how a base image looks (model, sampler, ...).
    """

    def __init__(self, output_dir: Path, requests: Sequence[ImageRequest], settings: Mapping[str, Any]):
        self.output_dir = output_dir
        self.images_dir = output_dir / "validation_images"
        self.previews_dir = self.images_dir / "previews"
        self.benchmark_dir = output_dir / "benchmarks" / "base_model"
        self.requests = requests
        note = {
            "settings": dict(settings),
            "pictures": [
                [r.shortname, r.prompt, r.width, r.height, r.index, r.seed, asdict(r.settings)]
                + [each.digest for each in r.references]
                for r in requests
            ],
        }
        self._note = json.loads(json.dumps(note))  # as it is read again: a tuple is a list there

    def path(self, request: ImageRequest, step: int, kind: Literal["live", "ema"]) -> Path:
        suffix = "_ema" if kind == "ema" else ""
        name = f"step_{step}_{request.file_stem}_{request.index}_{request.size_text}{suffix}.png"
        return self.images_dir / name

    def benchmark_path(self, request: ImageRequest) -> Path:
        number = f"_{request.index}" if request.index else ""
        return self.benchmark_dir / f"{request.file_stem}{number}_{request.size_text}.png"

    def save_preview(
        self, image: Image.Image, request: ImageRequest, step: int, kind: Kind, sampling_step: int
    ) -> SavedImage:
        """An image on its way: `step_<step>_<shortname>_<index>_<W>x<H>[_base|_ema]_at_<sampling step>.png`."""
        suffix = "" if kind == "live" else f"_{kind}"
        name = f"step_{step}_{request.file_stem}_{request.index}_{request.size_text}{suffix}_at_{sampling_step}.png"
        path = self.previews_dir / name
        write_png(path, image)
        return SavedImage(path, request.shortname, request.prompt, *image.size, request.seed, kind, request.index)

    def has_benchmark(self) -> bool:
        """Whether all base images are there and were generated with today's settings."""
        note = self.benchmark_dir / "benchmark.json"
        if not note.is_file() or not all(self.benchmark_path(request).is_file() for request in self.requests):
            return False
        try:
            return read_json(note) == self._note
        except DataError:
            return False

    def save_benchmark(self, images: Sequence[GeneratedImage]) -> list[SavedImage]:
        saved = [self._save(image, self.benchmark_path(image.request), "base") for image in images]
        _twice(lambda: write_json(self.benchmark_dir / "benchmark.json", self._note))
        return saved

    def save(self, images: Sequence[GeneratedImage], step: int, kind: Literal["live", "ema"]) -> list[SavedImage]:
        return [self._save(image, self.path(image.request, step, kind), kind) for image in images]

    def save_sheet(self, step: int) -> SavedImage:
        """base | step | EMA, a row per request, as `step_<step>_sheet.png`."""
        path, sheet = self._sheet_path(step), self._sheet([step], f"step {step}")
        _twice(lambda: write_png(path, sheet))
        return SavedImage(path, "sheet", "", 0, 0, None, "grid")

    def has_step(self, step: int, kinds: Sequence[Literal["live", "ema"]]) -> bool:
        """Whether all images of a step that show these weights are there, and their sheet, which is written last."""
        paths = [self.path(request, step, kind) for request in self.requests for kind in kinds]
        return all(path.is_file() for path in [*paths, self._sheet_path(step)])

    def _sheet_path(self, step: int) -> Path:
        return self.images_dir / f"step_{step}_sheet.png"

    def write_before_after(self, step: int) -> Path | None:
        """base | some steps between | `step` | EMA, as `before_after.png`; None where `step` has no images."""
        steps = [known for known in self.steps_with_images() if known <= step]
        if step not in steps:
            return None
        path = self.output_dir / "before_after.png"
        write_png(path, self._sheet(spread(steps, MOST_COLUMNS - 2), "before and after"))
        return path

    def write_all_steps(self, step: int) -> Path | None:
        """All steps up to `step`, small, as `all_steps.png`; None where `before_after.png` shows them all already."""
        steps = [known for known in self.steps_with_images() if known <= step]
        if len(steps) <= MOST_COLUMNS - 2:
            return None
        path = self.output_dir / "all_steps.png"
        write_png(path, self._sheet(spread(steps, MOST_STEPS), "all steps", SMALL_CELL))
        return path

    def steps_with_images(self) -> list[int]:
        """Steps, ascending, at which every request has its image (live or EMA)."""
        steps = {int(path.name.split("_")[1]) for path in self.images_dir.glob("step_*_*.png")}
        complete = [
            step
            for step in steps
            if all(self.path(r, step, "live").is_file() or self.path(r, step, "ema").is_file() for r in self.requests)
        ]
        return sorted(complete)

    def _save(self, image: GeneratedImage, path: Path, kind: Kind) -> SavedImage:
        _twice(lambda: write_png(path, image.image))
        request = image.request
        size = (request.width, request.height)
        return SavedImage(path, request.shortname, request.prompt, *size, request.seed, kind, request.index)

    def _sheet(self, steps: Sequence[int], title: str, cell: int | None = None) -> Image.Image:
        sources: list[tuple[str, Callable[[ImageRequest], Path]]]
        sources = [("base model", self.benchmark_path)] if self.has_benchmark() else []
        sources += [(f"step {step}", partial(self.path, step=step, kind="live")) for step in steps]
        sources += [(f"step {steps[-1]}, EMA", partial(self.path, step=steps[-1], kind="ema"))]
        kept = [(title, find) for title, find in sources if any(find(request).is_file() for request in self.requests)]
        rows = [
            SheetRow(
                f"{request.shortname} ({request.size_text}{number_text(request.index)}): {request.prompt}",
                [_read(find(request)) for _, find in kept],
            )
            for request in self.requests
        ]
        return comparison_sheet([heading for heading, _ in kept], rows, title, cell)


def spread(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of the steps, evenly over the run, the last always among them."""
    if len(steps) <= count:
        return list(steps)
    places = (
        [round(index * (len(steps) - 1) / (count - 1)) for index in range(count)] if count > 1 else [len(steps) - 1]
    )
    return [steps[place] for place in dict.fromkeys(places)]


def write_png(path: Path, image: Image.Image) -> None:
    """Write an image whole or not at all.

    Raises:
        DiskError: the disk is full or cannot be written.
    """
    data = io.BytesIO()
    image.save(data, format="PNG")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data.getvalue())


def _twice(write: Callable[[], None]) -> None:
    """Write, and once more where the disk refuses it: the weights behind an image are gone a step later, so an image
    that a passing fault has cost could not be made again.

    Raises:
        DiskError: the disk refuses it twice.
    """
    try:
        write()
    except DiskError:
        time.sleep(RETRY_SECONDS)
        write()


def _read(path: Path) -> Image.Image | None:
    if not path.is_file():
        return None
    with Image.open(path) as image:
        return image.convert("RGB")
