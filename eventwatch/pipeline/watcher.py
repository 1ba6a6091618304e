"""Keeps the event stream open for ever and hands each event, once, to the reconciler.

Why not aiodocker's `subscribe()`: it hangs once a stream has ended. Here each connection is a fresh client,
opened with `since` = the newest `timeNano` seen minus one second (delivery is not in time order, and resuming
from the last event itself lost some), and duplicates are dropped. After every connect a sweep is asked for:
the engine keeps 256 events in memory, so a resumed stream proves nothing.

A stream that is silent is no proof of life either: a connection lives five to ten minutes, then a new one is
opened before the old one is dropped. At once, if a sweep saw a container that started or ended after all that
the stream told: then it is deaf, and says so until it is heard of again.

The reader does nothing but parse, drop duplicates and call `on_event`; it never waits for the database.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Final

from loguru import logger

from eventwatch.core.backoff import Backoff, Pace
from eventwatch.core.clock import Clock
from eventwatch.core.errors import EngineError
from eventwatch.core.facts import Event
from eventwatch.core.metrics import Metrics
from eventwatch.core.policy import is_older
from eventwatch.engine.protocol import Engine

#: ns. Inversions of up to 66 ms were measured; `newest - 1 s` lost no event in 443 resumptions.
OVERLAP_NS: Final = 1_000_000_000
#: Events remembered for dropping duplicates: an engine keeps 256, and two streams that overlap say others twice.
REMEMBERED_EVENTS: Final = 5_000
#: Seconds that a connection lives: random between these, so that many sidecars do not reconnect together.
LIFETIME: Final = (300.0, 600.0)
#: Seconds until a renewal that failed is tried again: the old connection may be a deaf one.
RENEWAL_RETRY: Final = 5.0
#: Seconds between attempts; documents must be right within 2 s of the engine's return.
RECONNECT: Final = Pace(base=0.05, cap=1.0, stable=10.0)
#: Seconds until a newest event that was not replayed counts as lost, and a fact that none told as unheard.
REPLAY_GRACE: Final = 1.0


class RecentEvents:
    """The identities of the last events, for dropping what a reconnect repeats."""

    def __init__(self, size: int = REMEMBERED_EVENTS) -> None:
        self._order: deque[tuple[int, str, str, str]] = deque()
        self._keys: set[tuple[int, str, str, str]] = set()
        self._size = size

    def is_new(self, event: Event) -> bool:
        """Remember the event; False when it was remembered already."""
        key = event.key
        if key in self._keys:
            return False
        self._keys.add(key)
        self._order.append(key)
        if len(self._order) > self._size:
            self._keys.discard(self._order.popleft())
        return True


class Watcher:
    """One engine's event stream. `cursor` is the engine time (ns) to resume from, `rng` spreads the load.

    `on_connect` is awaited after each connect and returns the engine's time (ns) by then, None if it tells none;
    `on_break` hears why an open stream ended: an error, or `eof`.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        on_event: Callable[[Event], None],
        on_connect: Callable[[], Awaitable[int | None]],
        clock: Clock,
        metrics: Metrics,
        tasks: asyncio.TaskGroup,
        cursor: int | None = None,
        rng: random.Random | None = None,
        on_break: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._engine = engine
        self._on_break = on_break
        self._on_event = on_event
        self._on_connect = on_connect
        self._clock = clock
        self._metrics = metrics
        self._tasks = tasks
        self._recent = RecentEvents()
        self._newest: Event | None = None
        self._since = cursor
        self._rng = rng or random.Random()  # noqa: S311 - spreads load
        self._awaited: Event | None = None
        #: Engine time (ns) since when this connection ought to tell everything.
        self._complete_since: int | None = None
        self._malformed = 0
        self._renew = asyncio.Event()
        self.connected_at: float | None = None
        self._away_since: float | None = None
        self._broke_off = ""
        #: Whether a sweep saw what the open stream ought to have told, and it has told nothing since.
        self.deaf = False

    async def run(self) -> None:
        """Watch, reconnecting for ever. Ends only by cancellation or by what `on_connect` raises."""
        try:
            await self._run()
        finally:
            self.connected_at = None  # a timer that is still set finds nothing to judge

    async def _run(self) -> None:
        backoff = RECONNECT.start(self._rng.random)
        while True:
            try:
                reason, error = await self._one_connection(backoff)
            except EngineError as failure:
                reason, error = "refused", str(failure)
            if self.connected_at is not None:
                backoff.succeeded_for(self._clock.monotonic() - self.connected_at)
            self.connected_at = None
            if self._away_since is None:
                self._away_since = self._clock.monotonic()
            self._metrics.connected.set(0)
            self._metrics.reconnects.labels(reason).inc()
            if backoff.failures == 0:
                self._broke_off = error  # a proxy that cuts quiet streams, as a rule, and mended at once
            elif backoff.failures == 1:
                logger.warning("{}. Retrying until it is back", error)
            await self._clock.sleep(backoff.next_delay())

    def unready_reasons(self) -> list[str]:
        """Why the stream cannot be trusted right now; empty when it can."""
        if self.connected_at is None:
            return ["stream: not connected to the engine"]
        return ["stream: connected but deaf, a sweep saw what no event told"] if self.deaf else []

    async def _one_connection(self, backoff: Backoff) -> tuple[str, str]:
        """Read until the stream ends, renewing the connection now and then without a break.

        Returns the reason (a label) and the error. Raises EngineError when it cannot be opened at all.
        """
        stack = AsyncExitStack()
        try:
            reader = await self._open(stack)
            if self._away_since is not None:
                away = self._clock.monotonic() - self._away_since
                if backoff.failures > 1:
                    logger.info("The engine is back after {:.1f} s, event stream open", away)
                else:
                    logger.info("Reconnecting to the engine took {:.1f} s: {}", away, self._broke_off)
                self._away_since = None
            life = self._rng.uniform(*LIFETIME)
            while True:
                wake = self._renew = asyncio.Event()
                reader.add_done_callback(partial(_wake, wake))
                timer = self._clock.call_later(life, wake.set)
                await wake.wait()
                timer.cancel()
                if reader.done():
                    error = reader.result()
                    self._on_break(error or "eof")
                    return ("broken", error) if error else ("eof", "the engine ended the event stream")
                why = "deaf" if self.deaf else "rotated"
                fresh = AsyncExitStack()
                try:
                    reader = await self._open(fresh)
                except EngineError as error:
                    await fresh.aclose()
                    logger.info("Keeping the event stream, a new one could not be opened: {}", error)
                    life = RENEWAL_RETRY
                    continue
                life = self._rng.uniform(*LIFETIME)
                old, stack = stack, fresh
                await old.aclose()
                self._metrics.reconnects.labels(why).inc()
        finally:
            await stack.aclose()

    async def _open(self, stack: AsyncExitStack) -> asyncio.Task[str]:
        newest = self._newest.time_nano if self._newest else self._since
        since = newest - OVERLAP_NS if newest is not None else None
        stream = await stack.enter_async_context(self._engine.events(since, self._skip))
        awaited = self._awaited = self._newest
        self._clock.call_later(REPLAY_GRACE, lambda: self._check_gap(awaited))
        reader = self._tasks.create_task(self._read(stream), name="event-reader")
        stack.callback(reader.cancel)
        self._complete_since = await self._on_connect()
        self.connected_at = self._clock.monotonic()
        self._metrics.connected.set(1)
        return reader

    async def _read(self, stream: AsyncIterator[Event]) -> str:
        """Return why the stream broke, or nothing after a clean end; raising would end the task group."""
        try:
            async for event in stream:
                self._take(event)
        except EngineError as error:
            return str(error)
        return ""

    def expect_events_up_to(self, fact: int) -> None:
        """Tell of a container that a sweep saw to have started or ended at `fact` (engine time, ns).

        An event tells of each; one that is still on its way has a second to come.
        """
        if self._is_unheard_of(fact):
            self._clock.call_later(REPLAY_GRACE, lambda: self._check_deafness(fact))

    def _is_unheard_of(self, fact: int) -> bool:
        if self.connected_at is None or self._complete_since is None:
            return False
        told = self._newest.time_nano if self._newest else 0
        return fact > max(told, self._complete_since)

    def _check_deafness(self, fact: int) -> None:
        if self._is_unheard_of(fact):
            if not self.deaf:
                logger.warning("The event stream is open but deaf: a sweep saw what it did not tell. Renewing it")
            self.deaf = True
            self._renew.set()

    def _take(self, event: Event) -> None:
        self.deaf = False
        if self._awaited is not None:
            if event.key == self._awaited.key:
                self._awaited = None
            elif event.time_nano > self._awaited.time_nano:
                self._check_gap(self._awaited)
        if not self._recent.is_new(event):
            return
        if self._newest is None or not is_older(event.time_nano, self._newest.time_nano):
            self._newest = event
            self._metrics.last_event.set(event.time_nano / 1e9)
        self._on_event(event)

    def _check_gap(self, awaited: Event | None) -> None:
        if awaited is None or self._awaited is not awaited:
            return
        self._awaited = None
        self._metrics.gaps.inc()
        logger.info("Events were lost while the stream was away; the sweep finds what they told")

    def _skip(self, why: str) -> None:
        self._malformed += 1
        self._metrics.events.labels("malformed").inc()
        if self._malformed & (self._malformed - 1) == 0:  # the 1st, 2nd, 4th, 8th ... time
            logger.warning("Event stream: skipped a malformed line (number {}): {}", self._malformed, why)


def _wake(wake: asyncio.Event, _: asyncio.Task[str]) -> None:
    wake.set()
