"""The last hour, minute by minute: latency, events and writes, drawn from what the process counts anyway.

Contract: the hot path pays one append for a change that has a latency; everything else is the difference between
two looks at the metrics, one a minute. Bounded: 60 minutes, and of a busy minute's latencies an even selection.

Not promised: minutes before this process began. Prometheus keeps those.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

from eventwatch.core.clock import Clock
from eventwatch.core.facts import Change
from eventwatch.core.metrics import Metrics, quantile, totals

MINUTES: Final = 60
MINUTE: Final = 60.0
#: Latencies that are kept of one minute.
KEPT: Final = 2000


@dataclass(slots=True)
class Latencies:
    """Latencies (s) of one minute: all of the first 2000, then every second one, every fourth, and so on."""

    kept: list[float] = field(default_factory=list)
    _stride: int = 1
    _skipped: int = 0

    def add(self, latency: float) -> None:
        """Take one in, unless it is left out of the selection."""
        self._skipped += 1
        if self._skipped < self._stride:
            return
        self._skipped = 0
        self.kept.append(latency)
        if len(self.kept) >= KEPT:
            del self.kept[::2]
            self._stride *= 2


@dataclass(frozen=True, slots=True)
class Minute:
    """What happened in one minute, or in the part of it so far. `latency` is p50 and p99 (s)."""

    events: float
    seconds: float
    latency: tuple[float | None, float | None]
    writes: dict[str, float]


class Series:
    """The minutes since this process began, 60 at most. Call `tick` once a second or so."""

    def __init__(self, metrics: Metrics, clock: Clock) -> None:
        self._metrics = metrics
        self._clock = clock
        self._done: deque[Minute] = deque(maxlen=MINUTES - 1)
        self._latencies = Latencies()
        self._began = clock.monotonic()
        self._events, self._writes = self._totals()

    def publish(self, change: Change) -> None:
        """Take one acknowledged change."""
        if change.latency is not None:
            self._latencies.add(change.latency)

    def tick(self) -> None:
        """Begin a new minute if the last one is over. A process that slept for longer lacks those in between."""
        if self._clock.monotonic() - self._began >= MINUTE:
            self._done.append(self._so_far())
            self._latencies = Latencies()
            self._began = self._clock.monotonic()
            self._events, self._writes = self._totals()

    def as_json(self) -> dict[str, Any]:
        """The minutes, oldest first; the last one is not over. Latencies in s, `events` a second."""
        minutes = [*self._done, self._so_far()]
        kinds = sorted({kind for minute in minutes for kind in minute.writes})
        return {
            "now": self._clock.time_ns() / 1e9,
            "seconds": MINUTE,
            "last_seconds": minutes[-1].seconds,
            "events": [round(minute.events / max(minute.seconds, 1.0), 3) for minute in minutes],
            "latency_p50": [minute.latency[0] for minute in minutes],
            "latency_p99": [minute.latency[1] for minute in minutes],
            "writes": {kind: [minute.writes.get(kind, 0.0) for minute in minutes] for kind in kinds},
        }

    def _so_far(self) -> Minute:
        events, writes = self._totals()
        return Minute(
            events - self._events,
            self._clock.monotonic() - self._began,
            (quantile(self._latencies.kept, 0.5), quantile(self._latencies.kept, 0.99)),
            {kind: count - self._writes.get(kind, 0.0) for kind, count in writes.items()},
        )

    def _totals(self) -> tuple[float, dict[str, float]]:
        return sum(totals(self._metrics.events).values()), totals(self._metrics.writes)
