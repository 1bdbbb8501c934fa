"""Numbers of a run as people read them: durations, pace, time left, one line per step."""

from __future__ import annotations

from collections import deque
from statistics import median

from simpletuner.reporting.events import StepDone


class Pace:
    """Seconds per step: the median of the last steps, which one slow step (the first, a checkpoint) does not move.

    What lies between steps (validation, evaluation, checkpoints) is measured by the same clock and shared out evenly.
    """

    def __init__(self, window: int = 50):
        self._seconds: deque[float] = deque(maxlen=window)
        self._last: float | None = None
        self._between = 0.0
        self._gaps = 0

    def add(self, seconds: float, now: float) -> None:
        """One step more, which ended at `now` and took `seconds`."""
        if self._last is not None:
            self._between += max(now - self._last - seconds, 0.0)
            self._gaps += 1
        self._last = now
        self._seconds.append(seconds)

    def seconds_left(self, steps: int) -> float:
        """What so many steps will take, with what lies between them."""
        return steps * (self.seconds_per_step + (self._between / self._gaps if self._gaps else 0.0))

    @property
    def seconds_per_step(self) -> float:
        return median(self._seconds) if self._seconds else 0.0


def step_facts(event: StepDone, pace: Pace, is_short: bool = False) -> str:
    """Loss, rate, pace, time left and memory of a step, without its number.

    Args:
        is_short: only loss, pace and time left.
    """
    left = pace.seconds_left(event.total_steps - event.step)
    if is_short:
        return f"loss {event.loss:.4f}  {pace.seconds_per_step:.3g} s/step  {duration_text(left)} left"
    parts = [f"loss {event.loss:.4f}", f"lr {event.learning_rate:.2e}"]
    if event.grad_norm is not None:
        parts.append(f"grad {event.grad_norm:.3g}")
    parts += [f"{pace.seconds_per_step:.3g} s/step", f"{duration_text(left)} left"]
    if event.memory_gb is not None:
        parts.append(f"{event.memory_gb:.1f} GB")
    return "  ".join(parts)


def step_line(event: StepDone, pace: Pace) -> str:
    """One line of steady width, so that a log reads as a table."""
    digits = len(str(event.total_steps))
    return f"step {event.step:>{digits}}/{event.total_steps}  {step_facts(event, pace)}"


def duration_text(seconds: float) -> str:
    """`0.4 s`, `42 s`, `3 min 12 s`, `2 h 05 min`, `2 d 4 h`."""
    if round(seconds) < 60:
        return f"{seconds:.1f} s" if round(seconds, 1) < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def number_text(index: int) -> str:
    """What distinguishes a further image of one prompt and size from the first: `, no. 2`."""
    return f", no. {index + 1}" if index else ""


def clock_text(seconds: float) -> str:
    """Time since the start as `H:MM:SS`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
