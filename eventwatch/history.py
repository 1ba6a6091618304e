"""The last changes of each node, kept in the database, so that "why was it stopped at 3 a.m." has an answer.

A capped collection beside the documents: bounded in size, oldest first to go, read by `explain` and, when a
watcher starts, for the status page. Written in
the background once a second, so never in the way of a change; while the database is away the newest changes
wait, up to a bound. Not promised: completeness. A process that is killed takes up to a second of history along,
and nothing depends on it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from loguru import logger

from eventwatch.clock import Clock
from eventwatch.errors import StoreError
from eventwatch.reconciler import Written
from eventwatch.store import Store

#: Changes that wait for the database, and seconds between two writes.
WAITING: Final = 10_000
INTERVAL: Final = 1.0


class History:
    """Remembers changes; `remember` is a listener of the reconciler."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._waiting: deque[dict[str, Any]] = deque(maxlen=WAITING)
        self._has_waiting = asyncio.Event()
        self._complained = False

    def remember(self, written: Written) -> None:
        """Take one acknowledged change."""
        self._waiting.append(as_row(written))
        self._has_waiting.set()

    async def run(self) -> None:
        """Write what is remembered, once a second. Never ends."""
        while True:
            await self._has_waiting.wait()
            await self._clock.sleep(INTERVAL)
            await self.flush()

    async def recall(self, tell: Callable[[list[dict[str, Any]]], object], *, limit: int) -> None:
        """Tell of the last changes, newest first, in the words of `Written`; no matter if it cannot be read."""
        try:
            tell([as_change(row) for row in await self._store.read_history(limit=limit)])
        except StoreError as error:
            logger.warning("History is not read: {}", error)

    async def flush(self) -> None:
        """Write now what is remembered. A database that refuses is logged once, and tried again."""
        rows = list(self._waiting)
        try:
            if rows:
                await self._store.append_history(rows)
        except StoreError as error:
            if not self._complained:
                logger.warning("History is not written: {}", error)
            self._complained = True
            return
        self._complained = False
        for _ in rows[: len(self._waiting)]:
            self._waiting.popleft()
        if not self._waiting:
            self._has_waiting.clear()


def as_row(written: Written) -> dict[str, Any]:
    """What the history keeps of a change."""
    return {
        "node_id": written.node_id,
        "short_id": written.short_id,
        "at": datetime.fromtimestamp(written.at_ns / 1e9, UTC),
        "cause": str(written.cause),
        "deleted": written.deleted,
        "old": dict(written.old),
        "new": dict(written.new),
        "latency": written.latency,
    }


def as_change(row: Mapping[str, Any]) -> dict[str, Any]:
    """The change that `as_row` was made of; its time is in milliseconds, as the database keeps it."""
    kept = {name: value for name, value in row.items() if name != "at"}
    return {**kept, "at_ns": round(row["at"].timestamp() * 1e3) * 1_000_000}
