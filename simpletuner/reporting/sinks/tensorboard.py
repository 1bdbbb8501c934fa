"""TensorBoard: scalars per step, eval losses, validation images. Written under `output_dir/logs/<run name>`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.reporting.events import (
    EvalDone,
    Event,
    ImagesMade,
    ImagesScored,
    LossBySigma,
    RunStarted,
    StepDone,
)
from simpletuner.reporting.scalars import image_name, scalars

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardSink:
    """Writes event files; the writer is made when the first number arrives, which keeps the start of a run quick."""

    name = "TensorBoard"
    failures: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, output_dir: Path):
        self._log_dir = Path(output_dir) / "logs"
        self._run: RunStarted | None = None
        self._writer: SummaryWriter | None = None
        self._has_begun = False

    def handle(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self.close()
            self._run, self._has_begun = event, False
        try:
            if isinstance(event, ImagesMade):
                self._add_images(event)
            elif isinstance(event, StepDone | EvalDone | ImagesScored | LossBySigma):
                self._add_scalars(scalars(event), event.step)
                if not isinstance(event, StepDone):
                    self.writer().flush()
        except OSError:
            self._abandon()
            raise

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _abandon(self) -> None:
        """End a writer that the disk has refused something: its thread has ended, and another one goes on."""
        writer, self._writer = self._writer, None
        if writer is not None and writer.file_writer is not None:
            with contextlib.suppress(OSError):
                writer.file_writer.event_writer.close()

    def writer(self) -> SummaryWriter:
        """The open writer. What an earlier run logged after the resumed step is marked as superseded, by the first one
        of this process."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            run_name = folder_name(self._run.run_name) if self._run else "run"
            start_step = self._run.start_step if self._run else 0
            purge_step = start_step + 1 if start_step else 0
            self._writer = SummaryWriter(
                str(self._log_dir / run_name), purge_step=None if self._has_begun else purge_step
            )
            if self._has_begun:
                return self._writer
            self._has_begun = True
            if self._run and self._run.run_id:
                self._writer.add_text("run", f"{self._run.run_id}, branch {self._run.branch}", start_step)
            if self._run and self._run.options:
                text = json.dumps(dict(self._run.options), indent=2, default=str)
                self._writer.add_text("options", f"```json\n{text}\n```", start_step)
        return self._writer

    def _add_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        """One record for all of them: a record each would cost a fast step several percent."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        writer = self.writer()
        assert writer.file_writer is not None
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        writer.file_writer.add_summary(Summary(value=values), step)

    def _add_images(self, event: ImagesMade) -> None:
        import numpy
        from PIL import Image

        for saved in event.images:
            with Image.open(saved.path) as opened:
                pixels = numpy.asarray(opened.convert("RGB"))
            self.writer().add_image(image_name(saved), pixels, event.step, dataformats="HWC")
        self.writer().flush()


def folder_name(run_name: str) -> str:
    """The folder of a run within that of all runs; `a/b` groups runs as TensorBoard does, and nothing leads out."""
    parts = [part for part in run_name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return "/".join(parts) or "run"
