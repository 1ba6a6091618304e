"""Time, injected: everything that waits asks a `Clock`, so that tests and replays decide what time it is.

`SystemClock` is the event loop's own time. `VirtualClock` stands still until it is advanced, and then runs
what became due in order: a test of a 30 s grace period takes no time, and a 90 s recording replays in a
fraction of a second with every timer firing where it would have fired.

Not promised: that deadlines of engine and database calls follow the virtual clock. They guard real sockets
and stay on real time.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Protocol


class Timer(Protocol):
    """A scheduled callback."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """What the pipeline asks of time. `monotonic` is in seconds, `time_ns` in ns since 1970 (UTC)."""

    def monotonic(self) -> float: ...
    def time_ns(self) -> int: ...
    def call_later(self, delay: float, callback: Callable[[], object]) -> Timer: ...
    async def sleep(self, delay: float) -> None: ...


class SystemClock:
    """Real time. `call_later` and `sleep` need a running event loop."""

    def monotonic(self) -> float:
        return time.monotonic()

    def time_ns(self) -> int:
        return time.time_ns()

    def call_later(self, delay: float, callback: Callable[[], object]) -> Timer:
        return asyncio.get_running_loop().call_later(delay, callback)

    async def sleep(self, delay: float) -> None:
        await asyncio.sleep(delay)


class _VirtualTimer:
    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


class VirtualClock:
    """Time that moves only when told to; starts at `time_ns` (default: 2026-01-01)."""

    def __init__(self, time_ns: int = 1_767_225_600_000_000_000) -> None:
        self._epoch_ns = time_ns
        self._elapsed = 0.0
        self._timers: list[tuple[float, int, _VirtualTimer]] = []
        self._order = itertools.count()

    def monotonic(self) -> float:
        return self._elapsed

    def time_ns(self) -> int:
        return self._epoch_ns + round(self._elapsed * 1e9)

    def call_later(self, delay: float, callback: Callable[[], object]) -> Timer:
        timer = _VirtualTimer(callback)
        heapq.heappush(self._timers, (self._elapsed + max(delay, 0.0), next(self._order), timer))
        return timer

    async def sleep(self, delay: float) -> None:
        woken = asyncio.get_running_loop().create_future()

        def wake() -> None:
            if not woken.done():
                woken.set_result(None)

        timer = self.call_later(delay, wake)
        try:
            await woken
        finally:
            timer.cancel()

    def next_due(self) -> float | None:
        """When the next timer is due, in `monotonic` seconds; None when none is set."""
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    def advance_to(self, when: float) -> None:
        """Move to `when` and run, in order, the callbacks that became due on the way."""
        while (due := self.next_due()) is not None and due <= when:
            self._elapsed = max(self._elapsed, due)
            _, _, timer = heapq.heappop(self._timers)
            if timer.callback is not None:
                timer.callback()
        self._elapsed = max(self._elapsed, when)

    def advance(self, seconds: float) -> None:
        """Move `seconds` ahead; see `advance_to`."""
        self.advance_to(self._elapsed + seconds)


@dataclass(slots=True)
class _Reading:
    """What a clock showed from `since` to `until` (monotonic, s): `offset` s ahead of our monotonic clock."""

    since: float
    until: float
    offset: float


class KindestClock:
    """`now` for idle decisions: the earliest that any clock involved says, or said within the last `memory` s.

    A node looks idle for an hour when a clock leaps an hour ahead, when ours is an hour ahead of that by which
    the manager writes, and when a clock that was an hour behind is set right: requests of a moment ago then bear
    times of an hour ago. Nobody can tell which clock is right, but the one that makes a node look the least idle
    stops none that is in use. One per process, so that no restart of a part of it forgets a leap.

    Not promised: that a node is stopped on time while a clock is wrong, or for `memory` after.
    """

    #: Slewing stays far below this; a step that matters to idling is far above it.
    TOLERANCE: Final = 0.5

    def __init__(self, clock: Clock, memory: float) -> None:
        self._clock = clock
        self._memory = memory
        self._readings: dict[str, list[_Reading]] = {}
        self._skews: dict[str, float] = {}
        self.sample()

    def sample(self) -> None:
        """Look at our own wall clock. Call it every few seconds: a leap there and back between two is missed."""
        monotonic = self._clock.monotonic()
        self._add("own", monotonic, self._clock.time_ns() / 1e9 - monotonic)

    def hear(self, whose: str, moment: datetime, *, asked: float) -> None:
        """Take in what another's wall clock showed between `asked` (monotonic, s) and now."""
        monotonic = self._clock.monotonic()
        told = moment.timestamp()
        self._add(whose, monotonic, told - monotonic)
        # Only as far as the time that the answer took leaves no doubt.
        early, late = told - self._clock.time_ns() / 1e9, told - self._clock.time_ns() / 1e9 + monotonic - asked
        self._skews[whose] = early if early > 0 else min(late, 0.0)

    def now(self) -> datetime:
        """The kindest time, aware UTC."""
        self.sample()
        monotonic = self._clock.monotonic()
        offsets = [reading.offset for readings in self._readings.values() for reading in readings]
        return datetime.fromtimestamp(monotonic + min(offsets), UTC)

    def skews(self) -> dict[str, float]:
        """How many seconds each other clock was ahead of ours when last heard of."""
        return dict(self._skews)

    def _add(self, whose: str, monotonic: float, offset: float) -> None:
        readings = self._readings.setdefault(whose, [])
        if readings and abs(readings[-1].offset - offset) < self.TOLERANCE:
            readings[-1].until = monotonic
        else:
            readings.append(_Reading(monotonic, monotonic, offset))
        readings[:-1] = [reading for reading in readings[:-1] if monotonic - reading.until < self._memory]


#: Seconds of work after which the rest of the program gets its turn.
SLICE: Final = 0.001


class Slices:
    """Cuts long work in an event loop into slices; real time, whatever clock the program lives by."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    async def turn(self) -> None:
        """Let others work, if a slice is over."""
        if time.perf_counter() - self._began > SLICE:
            await asyncio.sleep(0)
            self._began = time.perf_counter()
