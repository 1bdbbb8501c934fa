"""How long a service that fails is left alone."""

from __future__ import annotations

import random
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Patience:
    """Seconds, but for `tries`.

    Args:
        first: pause after the first failure; each further one doubles it.
        longest: no pause is longer.
        tries: failures in a row after which a service counts as down: it is reported of, and only asked now and then.
    """

    first: float = 0.5
    longest: float = 300.0
    tries: int = 5


@dataclass
class Breaker:
    """Counts failures in a row. Pauses grow exponentially and are spread, so that many runs do not ask at once."""

    patience: Patience = field(default_factory=Patience)
    failures: int = 0
    # Its own generator: the global one belongs to nobody here. Where a pause ends decides nothing of a run.
    _random: random.Random = field(default_factory=random.Random, repr=False)

    @property
    def is_open(self) -> bool:
        """Whether the service counts as down."""
        return self.failures >= self.patience.tries

    def failed(self, retry_after: float | None = None) -> float:
        """Note a failure; returns seconds to wait, never less than the service asks for."""
        self.failures += 1
        pause = min(self.patience.first * 2.0 ** min(self.failures - 1, 30), self.patience.longest)
        return max(pause * self._random.uniform(0.5, 1.0), retry_after or 0.0)

    def worked(self) -> bool:
        """Note a success; returns whether the service had counted as down."""
        was_open, self.failures = self.is_open, 0
        return was_open
