"""How the time of a recording passes while it is replayed: virtually, or in real time at some speed.

Virtual time is a discrete-event simulation around real database calls: the clock moves to the next timer only
when no task can run and no call is under way. So every step has its full effect before the next one, the same
recording gives the same result each time, and what nobody waits for takes no time.

Not promised: anything about tasks of the host application that wait for something else than this clock or the
store; virtual time may pass beneath them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from typing import Final, Protocol

from eventwatch.core.clock import Clock, Timer, VirtualClock

#: With a loop that hides what it is about to run: more than the links of any chain of the pipeline's tasks.
YIELDS: Final = 50


class Busy:
    """Counts the database calls under way."""

    def __init__(self) -> None:
        self.calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def __enter__(self) -> None:
        self.calls += 1
        self._idle.clear()

    def __exit__(self, *_: object) -> None:
        self.calls -= 1
        if not self.calls:
            self._idle.set()

    async def quiet(self) -> None:
        """Wait until no call is under way and no task of this loop can run."""
        yields = 0
        while True:
            if self.calls:
                await self._idle.wait()
                yields = 0
            elif may_run(yields):
                await asyncio.sleep(0)
                yields += 1
            else:
                return


def may_run(yields: int) -> bool:
    """Whether another task of this loop can run, or might after so many times of letting others run."""
    ready = ready_handles()
    return bool(ready) if ready is not None else yields < YIELDS


def ready_handles() -> Collection[object] | None:
    """What the loop is about to run, as far as it tells: CPython's own loops do."""
    return getattr(asyncio.get_running_loop(), "_ready", None)


class Timeline(Protocol):
    """A clock that shows the recording's time, and a way to let it pass."""

    #: Seconds to wait at the end for what comes late: orphans, inspections repeated after a failure.
    aftermath: float

    @property
    def clock(self) -> Clock:
        """The recording's time."""
        ...

    async def run_until(self, time_ns: int) -> None:
        """Let time pass until then, with everything that it brings done."""
        ...


class Simulation:
    """Virtual time: moves only inside `run_until`, one timer at a time, when everything else is done."""

    aftermath = 6.0

    def __init__(self, start_ns: int, busy: Busy, behind: Busy | None = None) -> None:
        self.clock = VirtualClock(start_ns)
        self._start_ns = start_ns
        self._busy = busy
        self._behind = behind or Busy()

    async def run_until(self, time_ns: int) -> None:
        """Run everything that is due until then, as fast as it can be done.

        What `behind` counts is waited for at the end only: time passes beneath it, as it does beneath a write.
        """
        end = (time_ns - self._start_ns) / 1e9
        while True:
            await self._busy.quiet()
            due = self.clock.next_due()
            if due is not None and due <= end:
                self.clock.advance_to(due)
            elif self._behind.calls:
                await self._behind.quiet()  # and what that leads to may be due by then, too
            else:
                self.clock.advance_to(max(end, self.clock.monotonic()))
                return


class ScaledClock:
    """Real time, `speed` times as fast, that began at `start_ns`. Needs a running event loop."""

    def __init__(self, start_ns: int, speed: float) -> None:
        self._start_ns = start_ns
        self._speed = speed
        self._began = time.monotonic()

    def monotonic(self) -> float:
        """Seconds of the recording since the start."""
        return (time.monotonic() - self._began) * self._speed

    def time_ns(self) -> int:
        """The recorder's time."""
        return self._start_ns + round(self.monotonic() * 1e9)

    def call_later(self, delay: float, callback: Callable[[], object]) -> Timer:
        """Run `callback` after `delay` seconds of the recording."""
        return asyncio.get_running_loop().call_later(delay / self._speed, callback)

    async def sleep(self, delay: float) -> None:
        """Wait `delay` seconds of the recording."""
        await asyncio.sleep(delay / self._speed)


class RealTime:
    """Real time at a given speed."""

    # Somebody waits for it; what comes later still, the final sweep finds.
    aftermath = 1.0

    def __init__(self, start_ns: int, speed: float) -> None:
        self.clock = ScaledClock(start_ns, speed)

    async def run_until(self, time_ns: int) -> None:
        """Wait until then."""
        await self.clock.sleep(max(0.0, (time_ns - self.clock.time_ns()) / 1e9))
