"""Where a sweep is asked for, by whoever finds that only one can find or decide something.

Made before everything else, so that each part may be given it: there may be no sweeper yet, or another one later.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Final

from eventwatch.core.clock import Clock

#: Seconds by which a sweep after a return of the database is put off at most: watchers that lost it together are
#: not to ask it together.
RETURN_JITTER: Final = 0.5


class SweepRequests:
    """The mailbox of a sweeper."""

    def __init__(self, clock: Clock, rng: Callable[[], float] = random.random) -> None:
        self._clock = clock
        self._rng = rng
        self._asked = asyncio.Event()
        self._resumed = asyncio.Event()
        self._after_connect = False
        #: Whether somebody asked since the last pass began, besides its timer.
        self._is_urgent = False
        #: When the last pass began (monotonic, s).
        self._taken_at = float("-inf")

    def ask(self, *, after_connect: bool = False) -> None:
        """Ask for a pass as soon as possible. `after_connect`: for documents, too, that are still to come."""
        self._after_connect |= after_connect
        self._is_urgent = True
        self._asked.set()

    def database_returned(self) -> None:
        """Ask for a pass as the database is back, but not at the very moment at which all its watchers do."""
        returned_at = self._clock.monotonic()
        self._clock.call_later(self._rng() * RETURN_JITTER, lambda: self._resume(returned_at))

    def _resume(self, returned_at: float) -> None:
        self._resumed.set()
        if self._taken_at <= returned_at:  # a pass that began since does: if it fails, it is repeated
            self.ask()

    async def wait(self, seconds: float) -> bool:
        """Wait until a pass is asked for, and take that as answered; so many seconds at most, then it is False."""
        timer = self._clock.call_later(seconds, self._asked.set)
        await self._asked.wait()
        timer.cancel()
        self._asked.clear()
        self._taken_at = self._clock.monotonic()
        asked, self._is_urgent = self._is_urgent, False
        return asked

    async def pause(self, seconds: float) -> None:
        """Wait so long, or until the database has come back."""
        self._resumed.clear()
        timer = self._clock.call_later(seconds, self._resumed.set)
        await self._resumed.wait()
        timer.cancel()

    def take_after_connect(self) -> bool:
        """Whether a pass was asked for `after_connect` since this was last asked."""
        asked, self._after_connect = self._after_connect, False
        return asked
