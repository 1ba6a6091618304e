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
from datetime import UTC, datetime, timedelta
from typing import Protocol


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


class JumpGuard:
    """Wall-clock `now` for idle decisions, minus any forward jump of the last `memory` seconds.

    A wall clock that leaps an hour ahead makes every node look idle for an hour. Until `memory` (the idle
    timeout) has passed on the monotonic clock, the leap is taken back; a leap backwards needs nothing, as a
    `last_req_time` in the future never stops a node.
    """

    #: Slewing and a suspended process stay below this; a leap that matters to idling is far above it.
    TOLERANCE = 5.0

    def __init__(self, clock: Clock, memory: float) -> None:
        self._clock = clock
        self._memory = memory
        self._offset = self._current_offset()
        self._jumps: list[tuple[float, float]] = []

    def _current_offset(self) -> float:
        return self._clock.time_ns() / 1e9 - self._clock.monotonic()

    def now(self) -> datetime:
        """Aware UTC."""
        offset, monotonic = self._current_offset(), self._clock.monotonic()
        if abs(offset - self._offset) > self.TOLERANCE:
            self._jumps.append((monotonic, offset - self._offset))
        self._offset = offset
        self._jumps = [(at, by) for at, by in self._jumps if monotonic - at < self._memory]
        ahead = max(0.0, sum(by for _, by in self._jumps))
        return datetime.fromtimestamp(self._clock.time_ns() / 1e9, UTC) - timedelta(seconds=ahead)
