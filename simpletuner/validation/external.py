"""`validation_method: external-script`: a program of the user generates, beside training.

The command line is split into words and never given to a shell. It is started in a session of its own, and nobody waits
for it: a program that hangs or fails costs its images, not the run. While one works, the next validation is skipped.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from simpletuner.distributed.launcher import environment_outside
from simpletuner.reporting.bus import EventBus
from simpletuner.reporting.events import Notice

LOG_FILE = "validation_external.log"


class ExternalScript:
    """Starts the program of `validation_external_script`.

    Args:
        command: with `{local_checkpoint_path}`, `{global_step}` and the names of `facts` in braces.
        facts: what else is filled in.
        newest_checkpoint: the folder to generate with, None while there is none.
        output_dir: what the program prints goes to a log there.
    """

    def __init__(
        self,
        command: str,
        facts: Mapping[str, str],
        newest_checkpoint: Callable[[], Path | None],
        output_dir: Path,
        bus: EventBus,
    ):
        self.command = command
        self.facts = facts
        self.newest_checkpoint = newest_checkpoint
        self.log = output_dir / LOG_FILE
        self.bus = bus
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, denoiser: Any, adapter: Any, ema: Any, step: int) -> None:
        """As `Validator.run`; the program reads a checkpoint, and there is none before the first step."""
        if step > 0:
            self.start(step)

    def has_generated(self, step: int, ema: Any = None) -> bool:
        """As of `Validator`; what the program has made nobody here can know, so it is not asked again."""
        return True

    def write_summaries(self, step: int) -> dict[str, Path]:
        """As of `Validator`; sheets are the program's own business."""
        return {}

    def start(self, step: int) -> list[str]:
        """Start the program for `step`; returns its words, none where it was not started."""
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                self._report(f"step {step}: validation_external_script still works on an earlier step; not started")
                return []
            if code:
                self._report(f"validation_external_script ended with exit code {code}; see {self.log}")
            self._process = None
        checkpoint = self.newest_checkpoint()
        if checkpoint is None and "{local_checkpoint_path}" in self.command:
            self._report(f"step {step}: there is no checkpoint yet; validation_external_script was not started")
            return []
        words = self._words(step, checkpoint)
        try:
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    words,
                    env=environment_outside(os.environ),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        except OSError as error:
            self._report(f"validation_external_script cannot be started: {error}")
            return []
        return words

    def _words(self, step: int, checkpoint: Path | None) -> list[str]:
        """The words of the command with the facts filled in, whatever blanks or quotes those have."""
        facts = {**self.facts, "global_step": str(step), "local_checkpoint_path": str(checkpoint)}
        words = shlex.split(self.command)
        for name, value in facts.items():
            words = [word.replace(f"{{{name}}}", value) for word in words]
        return words

    def _report(self, text: str) -> None:
        self.bus.emit(Notice("warning", text))
