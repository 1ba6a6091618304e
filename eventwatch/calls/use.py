"""Marking nodes as used: the one field that is the manager's, `last_req_time`, written by `$set` and nothing else.

`save()` and `replace()` write every field, and so put an old status back over a newer one of the watcher; `touch`
and `in_use` cannot. Contract of `in_use`: while a request runs, its node's `last_req_time` is never older than
`every` and a second, however many requests share the node, at one write per `every` for all nodes together and at
most one a second per node besides. A write that fails or is slow never fails a request, nor holds it up for more
than a second: it is logged, and tried again while the request runs.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Final
from weakref import WeakKeyDictionary

import pymongo
from loguru import logger
from pymongo.errors import PyMongoError

from eventwatch.calls.follower import reason_of
from eventwatch.calls.here import get_here
from eventwatch.documents import node_collection
from eventwatch.errors import StoreError
from eventwatch.model import is_container_id

#: Seconds between two marks of a node that stays in use, at most; fewer where the idle time is short.
EVERY: Final = 60.0
#: Of an idle time, the part after which a node in use is marked again.
SHARE: Final = 3
#: Seconds for which a mark is fresh enough for another request.
FRESH: Final = 1.0
#: Seconds for a write, and between attempts after one that failed.
DEADLINE: Final = 5.0
RETRY: Final = 5.0
#: Seconds that a request waits for its mark.
PATIENCE: Final = 1.0


async def touch(node_id: str) -> bool:
    """Set a node's `last_req_time` to now; False if it has no document.

    Raises StoreError when the database does not take it, ValueError for what is no full container id.
    """
    if not is_container_id(node_id):
        raise ValueError(f"{node_id!r:.80} is no full container id")
    return await _mark([node_id]) == 1


@asynccontextmanager
async def in_use(node_id: str, *, every: float | None = None) -> AsyncIterator[None]:
    """Keep a node's `last_req_time` fresh while the block runs, so that it is never stopped as idle meanwhile.

    Writes at the start, at the end, and every `every` seconds (a minute, or a third of the idle timeout of the
    `watch()` in this process if that is shorter). A database that is away is logged and fails nothing.
    Raises StoreError when Beanie is not initialised, ValueError for what is no full container id.
    """
    if not is_container_id(node_id):
        raise ValueError(f"{node_id!r:.80} is no full container id")
    node_collection()
    loop = asyncio.get_running_loop()
    users = _users.get(loop)
    if users is None:
        users = _users[loop] = _Users()
    await users.enter(node_id, EVERY if every is None else every)
    try:
        yield
    finally:
        await users.leave(node_id)


class _Users:
    """The nodes that requests of this event loop use, and the task that keeps them fresh."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._marked: dict[str, float] = {}
        self._every = EVERY
        self._keeper: asyncio.Task[None] | None = None
        self._sooner = asyncio.Event()
        self._writes: set[asyncio.Task[bool]] = set()

    async def enter(self, node_id: str, every: float) -> None:
        self._counts[node_id] += 1
        self._every = min(self._every, every, _share_of_idle_timeout())
        self._sooner.set()
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep(), name="nodes-in-use")
        try:
            await self._refresh_soon(node_id)
        except BaseException:
            self._forget(node_id)
            raise

    async def leave(self, node_id: str) -> None:
        try:
            await self._refresh_soon(node_id)
        finally:
            self._forget(node_id)

    async def _refresh_soon(self, node_id: str) -> None:
        """Mark it, and wait for that, but not for long; it goes on even if the request is cancelled."""
        write = asyncio.create_task(self._refresh([node_id], fresh=FRESH), name="node-mark")
        self._writes.add(write)
        write.add_done_callback(self._writes.discard)
        await asyncio.wait({write}, timeout=PATIENCE)

    def _forget(self, node_id: str) -> None:
        self._counts[node_id] -= 1
        if self._counts[node_id] <= 0:
            del self._counts[node_id]
            self._marked.pop(node_id, None)
        if not self._counts and self._keeper:
            self._keeper.cancel()
            self._keeper, self._every = None, EVERY

    async def _keep(self) -> None:
        delay = self._every
        while True:
            try:
                async with asyncio.timeout(delay):
                    await self._sooner.wait()
            except TimeoutError:
                delay = (
                    self._every if await self._refresh(list(self._counts), fresh=0) else min(RETRY, self._every)
                )
            else:
                self._sooner.clear()
                delay = min(delay, self._every)

    async def _refresh(self, node_ids: Iterable[str], *, fresh: float) -> bool:
        """Mark those whose last mark is older than `fresh` (s); whether that worked."""
        now = asyncio.get_running_loop().time()
        stale = [node_id for node_id in node_ids if now - self._marked.get(node_id, -fresh) >= fresh]
        if not stale:
            return True
        self._marked.update(dict.fromkeys(stale, now))
        try:
            await _mark(stale)
        except StoreError as error:
            for node_id in stale:
                self._marked.pop(node_id, None)
            logger.warning("Nodes in use cannot be marked, trying again: {}", error)
            return False
        return True


def _share_of_idle_timeout() -> float:
    here = get_here()
    return here.settings.idle_timeout / SHARE if here and here.settings.idle_timeout else EVERY


async def _mark(node_ids: list[str]) -> int:
    """Write the time; how many of these have a document. Raises StoreError."""
    now = datetime.now(UTC).replace(tzinfo=None)  # as managers write it
    try:
        with pymongo.timeout(DEADLINE):
            result = await node_collection().update_many(
                {"_id": {"$in": node_ids}}, {"$set": {"last_req_time": now}}
            )
    except PyMongoError as error:
        raise StoreError(f"last_req_time cannot be written: {reason_of(error)}") from None
    return int(result.matched_count)


_users: WeakKeyDictionary[asyncio.AbstractEventLoop, _Users] = WeakKeyDictionary()
