"""Capped, jittered exponential backoff that forgets its failures only after a stable period."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Pace:
    """How attempts are spaced, in seconds: `base`, doubled each time up to `cap`, each times 0.5 to 1."""

    base: float
    cap: float
    stable: float = 0.0

    def start(self, jitter: Callable[[], float] = random.random) -> Backoff:
        """Begin to count failures."""
        return Backoff(self, jitter)


#: Seconds between attempts where a query was taken and not answered in time: whoever did not answer has too much
#: to do.
TIMED_OUT: Final = Pace(base=2.0, cap=60.0)
#: Seconds between attempts to write while the database is away.
WRITES: Final = Pace(base=0.05, cap=0.5)


class Backoff:
    """The delays of one series of attempts.

    `succeeded_for(seconds)` resets once the last success held for `pace.stable` seconds, so that a connection
    that opens and breaks at once keeps backing off instead of becoming a hot loop.
    """

    def __init__(self, pace: Pace, jitter: Callable[[], float]) -> None:
        self._pace = pace
        self._jitter = jitter
        self.failures = 0

    def next_delay(self, took: float = 0.0) -> float:
        """Count one more failure and say how long to wait before the next attempt.

        `took` (s): for how long the attempt that failed had waited; it need not be waited for again.
        """
        delay = min(self._pace.cap, self._pace.base * 2.0 ** min(self.failures, 30))
        self.failures += 1
        return max(0.0, delay * (0.5 + self._jitter() / 2) - took)

    def succeeded_for(self, seconds: float) -> None:
        """Tell how long the attempt that just ended had been good."""
        if seconds >= self._pace.stable:
            self.failures = 0
