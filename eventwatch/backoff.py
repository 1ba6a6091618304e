"""Capped, jittered exponential backoff that forgets its failures only after a stable period."""

from __future__ import annotations

import random
from collections.abc import Callable


class Backoff:
    """Delays between attempts, in seconds: `base`, doubled each time up to `cap`, each times 0.5 to 1.

    `succeeded_for(seconds)` resets once the last success held for `stable` seconds, so that a connection that
    opens and breaks at once keeps backing off instead of becoming a hot loop.
    """

    def __init__(
        self,
        *,
        base: float,
        cap: float,
        stable: float = 0.0,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._base = base
        self._cap = cap
        self._stable = stable
        self._jitter = jitter
        self.failures = 0

    def next_delay(self) -> float:
        """Count one more failure and say how long to wait before the next attempt."""
        delay = min(self._cap, self._base * 2.0 ** min(self.failures, 30))
        self.failures += 1
        return delay * (0.5 + self._jitter() / 2)

    def succeeded_for(self, seconds: float) -> None:
        """Tell how long the attempt that just ended had been good."""
        if seconds >= self._stable:
            self.failures = 0
