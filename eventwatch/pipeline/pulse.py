"""Asks the engine every few seconds whether it is there, as a stream that is silent does not tell.

Why: an engine that is frozen, or cut off without a word, closes nothing. The stream stays open and says no more,
which is what it also does where nothing happens; a sweep finds out only when the next one is due, and late.

Contract: `answered_at` is when the question was asked that the engine answered last. Nothing is done about one
that does not answer: the stream and the sweeps have their own deadlines.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

from eventwatch.core.clock import Clock
from eventwatch.core.errors import EngineError

#: Seconds between two questions, and after which an engine that has not answered is doubted.
INTERVAL: Final = 3.0
LATE: Final = 8.0


class Pulse:
    """Whether the engine answers what it is asked. `answered_at` is by the monotonic clock (s)."""

    def __init__(self, ask: Callable[[], Awaitable[object]], clock: Clock) -> None:
        self._ask = ask
        self._clock = clock
        self.answered_at = clock.monotonic()

    async def run(self) -> None:
        """Ask for ever."""
        while True:
            await self._clock.sleep(INTERVAL)
            asked = self._clock.monotonic()
            with suppress(EngineError):
                await self._ask()
                self.answered_at = asked

    def unready_reasons(self) -> list[str]:
        """Why the engine may not be there; empty while it answers."""
        silence = self._clock.monotonic() - self.answered_at
        return [f"engine: it has not answered for {silence:.0f} s"] if silence > LATE else []
