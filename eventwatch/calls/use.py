"""Marking nodes as used: the one field that is the manager's, `last_req_time`, written by `$set` and nothing else.

`save()` and `replace()` write every field, and so put an old status back over a newer one of the watcher; `touch`
and `in_use` cannot. Contract of `in_use`: while a request runs, its node's `last_req_time` is never older than
`every` and a second, however many requests share the node, and however many use others: all marks go through one
writer, one write at a time, which takes along whatever is due by then. A node costs one write per `every`, and at
most one a second besides. A write that fails or is slow never fails a request, nor holds it up for more than a
second: it is logged, and tried again while the request runs, several times within the node's idle time.

Not promised: that the idle times of settings and containers' labels are known where no `watch()` runs in this
process; `every` is for that. Those of the documents (`idle_timeout`) are read with each mark.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final
from weakref import WeakKeyDictionary

import pymongo
from loguru import logger

from eventwatch.calls.follower import UNREADABLE, reason_of
from eventwatch.calls.here import get_here
from eventwatch.core.durations import parse_duration
from eventwatch.core.errors import NodeGoneError, StoreError
from eventwatch.core.facts import is_container_id
from eventwatch.core.policy import idle_timeout_of
from eventwatch.store.documents import node_collection, tolerant

#: Seconds between two marks of a node that stays in use, at most, and the fewest that can be asked for.
EVERY: Final = 60.0
SHORTEST: Final = 0.05
#: Of an idle time, the part after which a node in use is marked again; of that, the parts that a write may take
#: and that one which failed waits: a third, a sixth and a 24th leave time for several attempts.
SHARE: Final = 3
WRITE_SHARE: Final = 2
RETRY_SHARE: Final = 8
#: Seconds for which a mark is fresh enough for another request.
FRESH: Final = 1.0
#: Seconds for a write, the shortest included, and between attempts after one that failed, at most.
DEADLINE: Final = 5.0
SHORTEST_DEADLINE: Final = 0.5
RETRY: Final = 5.0
#: Seconds that a request waits for its mark.
PATIENCE: Final = 1.0


async def touch(node_id: str) -> None:
    """Set a node's `last_req_time` to now.

    Raises NodeGoneError when it has no document, StoreError when the database does not take it, ValueError for
    what is no full container id.
    """
    if node_id not in await _mark([_checked(node_id)]):
        raise _gone(node_id)


@asynccontextmanager
async def in_use(node_id: str, *, every: float | timedelta | None = None) -> AsyncIterator[None]:
    """Keep a node's `last_req_time` fresh while the block runs, so that it is never stopped as idle meanwhile.

    Writes at the start, at the end, and every `every` seconds: a minute, or a third of the node's idle time where
    that is shorter, as far as this process knows it. A database that is away is logged and fails nothing.
    Raises NodeGoneError when the node has no document, StoreError when Beanie is not initialised, ValueError for
    what is no full container id, or no time.
    """
    _checked(node_id)
    pace = EVERY if every is None else parse_duration(every)
    if pace <= 0:
        raise ValueError("every must be more than 0")
    node_collection()
    loop = asyncio.get_running_loop()
    users = _users.get(loop)
    if users is None:
        users = _users[loop] = _Users(loop)
    await users.enter(node_id, pace)
    try:
        yield
    finally:
        await users.leave(node_id)


@dataclass(slots=True)
class _Use:
    """What requests make of one node. `own` is the idle time that its document has, `due` its next mark's time."""

    every: float
    requests: int = 0
    own: float = math.inf
    due: float = math.inf


class _Users:
    """The nodes that requests of this event loop use, and the one task that writes their marks."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._time = loop.time
        self._new_future = loop.create_future
        self._uses: dict[str, _Use] = {}
        #: When nodes were marked within the last `FRESH` seconds, the oldest first, and their own idle times.
        self._marked: dict[str, tuple[float, float]] = {}
        #: Marks that somebody waits for, to be written next, and being written: whether there is a document.
        self._wanted: dict[str, asyncio.Future[bool]] = {}
        self._under_way: dict[str, asyncio.Future[bool]] = {}
        self._next = math.inf
        self._wake = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        self._failing = False

    async def enter(self, node_id: str, every: float) -> None:
        use = self._uses.setdefault(node_id, _Use(every, own=self._last_mark(node_id)[1]))
        use.requests += 1
        use.every = min(use.every, every)
        self._plan(use, min(use.due, self._time() + self._pace(node_id)))
        there = False
        try:
            there = await self._refresh(node_id)
        finally:
            if not there:
                self._forget(node_id)
        if not there:
            raise _gone(node_id)

    async def leave(self, node_id: str) -> None:
        self._forget(node_id)
        await self._refresh(node_id)

    def _forget(self, node_id: str) -> None:
        use = self._uses[node_id]
        use.requests -= 1
        if not use.requests:
            del self._uses[node_id]
        self._wake.set()

    async def _refresh(self, node_id: str) -> bool:
        """Have it marked, and wait for that, but not for long; False: it has no document."""
        if self._time() - self._last_mark(node_id)[0] < min(FRESH, self._pace(node_id) / 2):
            return True
        mark = self._under_way.get(node_id) or self._wanted.get(node_id)
        if mark is None:
            mark = self._wanted[node_id] = self._new_future()
            self._wake.set()
        if self._writer is None or self._writer.done():
            # Of no caller's context: its deadlines (`pymongo.timeout`) are not those of the others.
            self._writer = asyncio.create_task(self._write(), name="node-marks", context=contextvars.Context())
        await asyncio.wait({mark}, timeout=PATIENCE)
        return mark.result() if mark.done() else True

    def _last_mark(self, node_id: str) -> tuple[float, float]:
        return self._marked.get(node_id, (-math.inf, math.inf))

    def _pace(self, node_id: str) -> float:
        """Seconds between two marks of a node."""
        use, here = self._uses.get(node_id), get_here()
        times = [here.idle_timeout(node_id) if here else 0.0, use.own if use else 0.0]
        shortest = min((each for each in times if each > 0), default=math.inf)
        return max(SHORTEST, min(EVERY, use.every if use else EVERY, shortest / SHARE))

    def _plan(self, use: _Use, due: float) -> None:
        use.due = due
        if due < self._next:
            self._next = due
            self._wake.set()

    async def _write(self) -> None:
        while self._uses or self._wanted:
            now = self._time()
            due: set[str] = set()
            if now >= self._next:  # all that are soon due, too, so that they go together from then on
                due = {i for i, use in self._uses.items() if now >= use.due - self._pace(i) / 2}
                self._next = min((use.due for i, use in self._uses.items() if i not in due), default=math.inf)
            self._under_way, self._wanted = self._wanted, {}
            if chosen := due | self._under_way.keys():
                await self._mark(chosen, now)
                continue
            self._wake.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._next - now if self._next < math.inf else None):
                    await self._wake.wait()

    async def _mark(self, node_ids: Collection[str], began: float) -> None:
        found: dict[str, float] | None = None
        shortest = min(self._pace(node_id) for node_id in node_ids)
        try:
            found = await _mark(node_ids, seconds=min(DEADLINE, max(SHORTEST_DEADLINE, shortest / WRITE_SHARE)))
        except StoreError as error:
            level = "DEBUG" if self._failing else "WARNING"
            logger.log(level, "Nodes in use cannot be marked, trying again: {}", error)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one mark, the next ones must come
            logger.opt(exception=error).error("Nodes in use cannot be marked, trying again: {!r}", error)
        else:
            if self._failing:
                logger.info("Nodes in use are marked again")
        finally:
            marks, self._under_way = self._under_way, {}
            for node_id, mark in marks.items():
                mark.set_result(found is None or node_id in found)
        self._failing = found is None
        self._note(node_ids, found, began)

    def _note(self, node_ids: Collection[str], found: dict[str, float] | None, began: float) -> None:
        """Remember what was marked when, and plan the next marks of what is in use."""
        now = self._time()
        for node_id, own in (found or {}).items():
            self._marked.pop(node_id, None)
            self._marked[node_id] = began, own
        while self._marked and now - self._marked[oldest := next(iter(self._marked))][0] >= FRESH:
            del self._marked[oldest]
        for node_id in node_ids:
            if use := self._uses.get(node_id):
                if found is None:
                    self._plan(use, now + min(RETRY, self._pace(node_id) / RETRY_SHARE))
                else:
                    use.own = found.get(node_id, use.own)
                    self._plan(use, began + self._pace(node_id))


async def _mark(node_ids: Collection[str], *, seconds: float = DEADLINE) -> dict[str, float]:
    """Write the time; which of these have a document, and its own idle time (s; infinite: none).

    Raises StoreError.
    """
    collection = tolerant(node_collection())
    chosen = {"_id": {"$in": list(node_ids)}}
    now = datetime.now(UTC).replace(tzinfo=None)  # as managers write it
    try:
        with pymongo.timeout(seconds):
            await collection.update_many(chosen, {"$set": {"last_req_time": now}})
            rows = await collection.find(chosen, {"idle_timeout": 1}).to_list()
    except UNREADABLE as error:
        raise StoreError(f"last_req_time cannot be written: {reason_of(error)}") from None
    return {row["_id"]: _own_time(row.get("idle_timeout")) for row in rows}


def _own_time(written: object) -> float:
    """Seconds of a document's own idle time; infinite: it has none, or none that can be read."""
    return idle_timeout_of(written, {}, math.inf).seconds if isinstance(written, (str, int, float)) else math.inf


def _checked(node_id: str) -> str:
    if not is_container_id(node_id):
        raise ValueError(f"{node_id!r:.80} is no full container id")
    return node_id


def _gone(node_id: str) -> NodeGoneError:
    return NodeGoneError(f"Node {node_id[:12]} has no document")


_users: WeakKeyDictionary[asyncio.AbstractEventLoop, _Users] = WeakKeyDictionary()
