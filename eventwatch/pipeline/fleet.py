"""What a watcher tells of itself to the rest of its fleet, and which engines of it are gone for good.

Each renewal of the lease carries a report, so that any eventwatch can show the whole fleet, and it costs nothing
more. An engine that shows no sign of life while documents bear its id is named to operators: nobody keeps these
true, and no other engine may delete them. `eventwatch engines forget ID` does.

Not promised: a reason for the silence. The host may be gone, or its eventwatch, or its way to the database.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from loguru import logger

from eventwatch.core.clock import Clock
from eventwatch.core.errors import StoreError
from eventwatch.core.facts import Change
from eventwatch.core.metrics import STATUSES, Metrics, quantile
from eventwatch.core.text import printable
from eventwatch.store.nodes import EngineRecord, Store

#: Seconds without a sign of life after which an engine is told of, and between two looks.
SILENCE: Final = 600.0
LOOK: Final = 60.0
#: Engines that one look finds, and that are named.
MOST: Final = 200
NAMED: Final = 5
#: Events whose latency is told.
LATENCIES: Final = 1000


class LastLatencies:
    """The latencies of the last events (s); `note` listens to changes."""

    def __init__(self) -> None:
        self.kept: deque[float] = deque(maxlen=LATENCIES)

    def note(self, change: Change) -> None:
        """Take the latency of a change, if an event led to it."""
        if change.latency is not None:
            self.kept.append(change.latency)


def report(
    *,
    statuses: Iterable[str | None],
    sweep_age: float | None,
    drift: int,
    latencies: LastLatencies,
    reasons: Iterable[str],
) -> dict[str, Any]:
    """What a watcher tells of itself, as `EngineRecord` reads it; `reasons` why it is not ready."""
    return {
        # Keys of a document: not what a manager may have written.
        "nodes": dict(Counter(status if status in STATUSES else "other" for status in statuses)),
        "sweep_age": sweep_age,
        "drift": drift,
        "p50": quantile(latencies.kept, 0.5),
        "p99": quantile(latencies.kept, 0.99),
        "reasons": [printable(reason, 200) for reason in reasons][:20],
    }


def as_json(record: EngineRecord) -> dict[str, Any]:
    """An engine for programs; times in ISO 8601, durations in seconds."""
    return {
        "engine_id": record.engine_id,
        "host": record.host,
        "version": record.version,
        "state": state_of(record),
        "leader": record.leader,
        "standbys": list(record.standbys),
        "nodes": dict(record.nodes),
        "seen_at": record.seen_at.isoformat() if record.seen_at else None,
        "age": record.age,
        "sweep_age": record.sweep_age,
        "drift": record.drift,
        "latency_p50": record.p50,
        "latency_p99": record.p99,
        "reasons": list(record.reasons),
    }


def state_of(record: EngineRecord) -> str:
    """In one word: `ready`, `unready` (its reasons say why), `unwatched`, `away` for a while, or `dead`.

    `unwatched`: no watcher ever held its lease. A manager may keep its documents by the checker functions.
    """
    if record.alive:
        return "unready" if record.reasons else "ready"
    if not record.watched:
        return "unwatched"
    return "dead" if record.age is None or record.age > SILENCE else "away"


def ordered(records: Iterable[EngineRecord]) -> list[EngineRecord]:
    """Those that need somebody first, then by host."""
    rank: Mapping[str, int] = {"dead": 0, "away": 1, "unready": 2, "unwatched": 3, "ready": 4}
    return sorted(records, key=lambda record: (rank[state_of(record)], record.host, record.engine_id))


class DeadEngines:
    """Looks now and then for engines that are gone while their documents are not."""

    def __init__(
        self, store: Store, clock: Clock, metrics: Metrics, rng: Callable[[], float] = random.random
    ) -> None:
        self._store = store
        self._clock = clock
        self._metrics = metrics
        self._rng = rng
        self.notes: list[str] = []

    async def run(self) -> None:
        """Look again and again, until cancelled; each watcher at another moment."""
        while True:
            try:
                await self.look()
            except StoreError as error:
                logger.debug("Which engines are gone is not known: {}", error)
            await self._clock.sleep(LOOK * (0.5 + self._rng()))

    async def look(self) -> None:
        """Look once, and tell of those that were not told of. Raises StoreError."""
        dead = await self._store.read_dead(after=SILENCE, most=MOST)
        self._metrics.engines_dead.set(len(dead))
        notes = [note_of(dead)] if dead else []
        if notes and notes != self.notes:
            logger.warning("{}", notes[0].removeprefix("fleet: "))
        self.notes = notes


def note_of(dead: Iterable[EngineRecord]) -> str:
    """The note about engines that are gone, of which there is one at least."""
    known = ordered(dead)
    names = ", ".join(
        printable(f"{record.engine_id} (host {record.host or 'unknown'})", 120) for record in known[:NAMED]
    )
    more = ", ..." if len(known) > NAMED else ""
    count = f"{len(known)}{' or more' if len(known) >= MOST else ''} engine{'s' if len(known) > 1 else ''}"
    return (
        f"fleet: nobody keeps the documents of {count} true: {names}"
        f"{more}. Start eventwatch there, or `eventwatch engines forget ID` if the host is gone for good"
    )
