"""What a person at the terminal sees: a live bar in a terminal, plain timed lines into a pipe or log.

Lines into a pipe carry no color codes and come at intervals of seconds, not of steps, so that a fast run does not
flood a log and a slow one still shows that it lives.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import IO, TYPE_CHECKING

from simpletuner.program import pasteable
from simpletuner.reporting import progress
from simpletuner.reporting.events import (
    CheckpointSaved,
    EvalDone,
    Event,
    ImagesScored,
    Notice,
    PhaseDone,
    PhaseProgress,
    PhaseStarted,
    RunFailed,
    RunFinished,
    RunStarted,
    StepDone,
)
from simpletuner.text import for_terminal

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def terminal_sink(stream: IO[str] | None = None) -> PlainSink | LiveSink:
    """The live display where `stream` (stdout by default) is a terminal, plain lines elsewhere."""
    stream = stream or sys.stdout
    return LiveSink(stream) if stream.isatty() else PlainSink(stream)


# Columns from which the bar has room for everything; a terminal of 80 shows the least.
WIDE = 120
# Seconds; of a shorter phase a log tells only that it began.
SHORT_PHASE = 1.0


class PlainSink:
    """One line per event, steps at most every `interval` seconds, each with the time since the start.

    Args:
        clock: monotonic seconds; a test gives its own.
    """

    name = "the terminal"
    # A closed pipe (`simpletuner train | head`) costs the display, not the run.
    failures: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, stream: IO[str], interval: float = 10.0, clock: Callable[[], float] = time.monotonic):
        self._stream = stream
        self._interval = interval
        self._clock = clock
        self._start = clock()
        self._last_line = -interval
        self._phase: PhaseStarted | None = None
        self._pace = progress.Pace()

    def handle(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self._step(event)
        elif isinstance(event, PhaseProgress):
            self._phase_progress(event)
        else:
            if isinstance(event, PhaseStarted):
                self._phase, self._last_line = event, self._clock()
            if isinstance(event, PhaseDone) and event.seconds < SHORT_PHASE and not event.summary:
                return  # its beginning was reported a moment ago
            for line in describe(event):
                self._write(line)

    def close(self) -> None:
        self._stream.flush()

    def _step(self, event: StepDone) -> None:
        self._pace.add(event.seconds, self._clock())
        is_edge = event.step in (1, event.total_steps)
        if is_edge or self._clock() - self._last_line >= self._interval:
            self._last_line = self._clock()
            self._write(progress.step_line(event, self._pace))

    def _phase_progress(self, event: PhaseProgress) -> None:
        if self._clock() - self._last_line < self._interval:
            return
        self._last_line = self._clock()
        total = self._phase.total if self._phase and self._phase.name == event.name else None
        self._write(f"{event.name}: {event.done}" + (f" of {total}" if total else ""))

    def _write(self, line: str) -> None:
        line = for_terminal(pasteable(line))
        self._stream.write(f"[{progress.clock_text(self._clock() - self._start)}] {line}\n")
        self._stream.flush()


class LiveSink:
    """A progress bar that stays at the bottom, with the events of note scrolling above it.

    Args:
        clock: monotonic seconds; the time shown is that since the start, whatever the bar is for.
    """

    name = "the terminal"
    failures: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, stream: IO[str], clock: Callable[[], float] = time.monotonic):
        from rich.console import Console

        self._clock = clock
        self._start = clock()
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._bar = self._make_bar()
        self._task: TaskID | None = None
        self._task_name = ""
        self._total: int | None = None
        self._pace = progress.Pace()

    def _make_bar(self) -> Progress:
        from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
        from rich.text import Text

        elapsed = self.elapsed

        class RunClock(ProgressColumn):
            def render(self, task: Task) -> Text:
                return Text(elapsed())

        self._is_narrow = self._console.width < WIDE
        columns: list[ProgressColumn] = [
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[count]}", markup=False),
            TextColumn("{task.fields[facts]}", markup=False),
        ]
        if not self._is_narrow:
            columns.append(RunClock())
        return Progress(*columns, console=self._console, refresh_per_second=4, transient=True, expand=True)

    def elapsed(self) -> str:
        """Time since the start of the run, as the bar shows it."""
        return progress.clock_text(self._clock() - self._start)

    def handle(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self._pace.add(event.seconds, self._clock())
            self._show(
                "training", event.step, event.total_steps, progress.step_facts(event, self._pace, self._is_narrow)
            )
        elif isinstance(event, PhaseStarted):
            self._show(event.name, 0, event.total, "")
        elif isinstance(event, PhaseProgress):
            self._show(event.name, event.done, None, "")
        else:
            if isinstance(event, PhaseDone | RunFinished | RunFailed):
                self._clear()
            style = _style_of(event)
            for line in describe(event):
                self._console.print(for_terminal(pasteable(line)), style=style, markup=False)

    def close(self) -> None:
        self._clear()

    def _show(self, name: str, done: int, total: int | None, facts: str) -> None:
        """Move the bar; a new name begins a new bar, so that there is one at a time."""
        if self._task is None or name != self._task_name:
            self._clear()
            self._bar = self._make_bar()
            self._task = self._bar.add_task(for_terminal(name), total=total, count="", facts="")
            self._task_name, self._total = name, total
            self._bar.start()
        count = f"{done}/{self._total}" if self._total else ""
        self._bar.update(self._task, completed=done, count=count, facts=facts)

    def _clear(self) -> None:
        if self._task is not None:
            self._bar.stop()
            self._task = None


def describe(event: Event) -> list[str]:
    """The lines that report an event; none for what only the bar shows, or what the end of its phase says."""
    return [for_terminal(line) for line in _lines(event)]


def _lines(event: Event) -> list[str]:
    if isinstance(event, RunStarted):
        return _describe_start(event)
    if isinstance(event, PhaseStarted):
        return [event.name + (f" ({event.total})" if event.total else "")]
    if isinstance(event, PhaseDone):
        summary = f": {event.summary}" if event.summary else ""
        return [f"{event.name} done in {progress.duration_text(event.seconds)}{summary}"]
    if isinstance(event, EvalDone):
        each = ", ".join(f"{name} {loss:.4f}" for name, loss in event.losses.items())
        notes = [each] if len(event.losses) > 1 else []
        notes += [f"base model {event.reference:.4f}"] if event.reference is not None and event.step > 0 else []
        return [f"eval loss at step {event.step}: {event.pooled:.4f}" + (f" ({'; '.join(notes)})" if notes else "")]
    if isinstance(event, ImagesScored):
        return [f"{event.metric} score at step {event.step}: {event.mean:.2f} ({len(event.scores)} images)"]
    if isinstance(event, CheckpointSaved) and event.eval_loss is not None:
        return [f"best checkpoint so far saved at step {event.step}, eval loss {event.eval_loss:.4f}: {event.path}"]
    if isinstance(event, CheckpointSaved):
        what = "saved at step" if event.is_new else "already saved at step"
        return [f"checkpoint {what} {event.step}: {event.path}"]
    if isinstance(event, Notice):
        return [event.text if event.severity == "info" else f"{event.severity}: {event.text}"]
    if isinstance(event, RunFinished):
        return _describe_finish(event)
    if isinstance(event, RunFailed):
        # The message itself goes to stderr, where the program says why it ends.
        return [f"the run ended early at step {event.step} (exit code {event.exit_code})"]
    return []


def _describe_start(event: RunStarted) -> list[str]:
    width = max((len(name) for name in event.details), default=0)
    lines = [f"run {event.run_name}: {event.total_steps} steps, output in {event.output_dir}"]
    if event.start_step:
        lines.append(f"resumes after step {event.start_step}")
    return lines + [f"  {name:<{width}}  {text}" for name, text in event.details.items()]


def _describe_finish(event: RunFinished) -> list[str]:
    width = max((len(name) for name in event.outputs), default=0)
    lines = [f"finished {event.step} steps in {progress.duration_text(event.seconds)}"]
    lines += [f"  {name:<{width}}  {path}" for name, path in event.outputs.items()]
    if event.commands:
        lines += ["to generate images with it:", *(f"  {command}" for command in event.commands)]
    return lines


def _style_of(event: Event) -> str | None:
    if isinstance(event, RunFailed) or (isinstance(event, Notice) and event.severity == "error"):
        return "red"
    if isinstance(event, Notice) and event.severity == "warning":
        return "yellow"
    if isinstance(event, RunStarted | RunFinished):
        return "bold"
    return None
