"""When a dataset takes part in a run, and how much of it an epoch shows."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Schedule:
    """The part of a run in which a dataset is used. Epochs and steps count from 1, as reports show them.

    Args:
        probability: rounds of the dataset that one epoch takes: 1 shows each image `repeats` + 1 times, 0.5 half of
            them, the other half in the next epoch; 2 everything twice.
        start_epoch: first epoch; 0 and 1 are the beginning.
        end_epoch: last epoch, None for no end.
        start_step: first optimizer step; 0 and 1 are the beginning.
        end_step: last optimizer step, None for no end.
    """

    probability: float = 1.0
    start_epoch: int = 1
    end_epoch: int | None = None
    start_step: int = 0
    end_step: int | None = None

    def in_epoch(self, epoch: int) -> bool:
        """Whether epoch `epoch`, from 0, is one of the dataset's."""
        return self.start_epoch <= epoch + 1 and (self.end_epoch is None or epoch < self.end_epoch)

    def in_step(self, steps_taken: int) -> bool:
        """Whether the optimizer step that follows `steps_taken` is one of the dataset's."""
        return self.start_step <= steps_taken + 1 and (self.end_step is None or steps_taken < self.end_step)

    def rounds_before(self, epoch: int) -> Fraction:
        """Rounds of the dataset that the epochs before `epoch`, from 0, have taken; exact."""
        # By its decimal notation: 0.1 means a tenth, not the nearest binary number.
        return Fraction(repr(float(self.probability))) * max(epoch + 1 - max(self.start_epoch, 1), 0)
