"""Reads the documents that somebody waits for, as soon as they may have changed, and each only once for all.

Three things say that a document may have changed: the watcher of this process, where it keeps the node true; a
change stream of the database, for the other nodes, where the server has such streams (a replica set); and time, as
neither tells of everything. None of them is believed: the document is read.

Contract: after a write it is read within milliseconds, of the watcher here or, on a replica set, of anybody; else
after a tenth of the time for which somebody has waited for the node, and `POLL` at the latest. Each node has its
pace: who comes or waits long changes nothing for those who wait for others. However many documents are followed,
one query at a time reads what may have changed. While the database is away the follower goes on trying. It runs in
no caller's context, and so by nobody's deadline.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from heapq import heappop, heappush
from typing import Any, Final
from weakref import WeakKeyDictionary

import pymongo
from bson.errors import BSONError
from loguru import logger
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import OperationFailure, PyMongoError

from eventwatch.calls.here import Here, get_here
from eventwatch.core.backoff import Pace
from eventwatch.core.facts import Change
from eventwatch.core.text import printable
from eventwatch.store.documents import node_collection, tolerant

#: Seconds between two looks at a node that is followed: just after somebody came, and the longest; between them,
#: this part of the time since then. Looks that are due within `SHORT_POLL` go together.
SHORT_POLL: Final = 0.02
POLL: Final = 0.5
PART: Final = 0.1
#: The longest while a change stream is open, or the watcher here keeps the node true, and the part then.
TOLD_POLL: Final = 1.0
TOLD_PART: Final = 0.3
#: Those who wait and are told at once, before others have a turn.
SLICE: Final = 32
#: Documents in one query, and seconds for it.
AT_ONCE: Final = 500
DEADLINE: Final = 5.0
RETRY: Final = Pace(base=0.05, cap=0.5)
#: Seconds that the server keeps a question for changes before it answers that there are none.
STREAM_WAIT: Final = 1.0
#: Seconds between attempts to end a task: pymongo on Python 3.11 loses a cancellation now and then.
INSIST: Final = 1.0
#: What a read raises when the server does not answer, or answers what cannot be decoded.
UNREADABLE: Final = (PyMongoError, BSONError, UnicodeError, OverflowError)
PIPELINE: Final = [{"$project": {"documentKey": 1, "operationType": 1}}]


class Followed:
    """One document that is followed. `changed` is set each time that it was read and differs."""

    def __init__(self, node_id: str) -> None:
        self.node_id = node_id
        self.document: Mapping[str, Any] | None = None
        self.was_read = False
        self.changed = asyncio.Event()

    def take(self, document: Mapping[str, Any] | None) -> None:
        """The document as it is now; None: there is none."""
        if not self.was_read or document != self.document:
            self.document, self.was_read = document, True
            self.changed.set()


class Follower:
    """Follows documents of one collection for as long as somebody wants any."""

    def __init__(self, collection: AsyncCollection[dict[str, Any]]) -> None:
        #: Why the documents cannot be read right now; nothing when they can.
        self.trouble = ""
        self.source = collection
        self._collection = tolerant(collection)
        self._followed: dict[str, set[Followed]] = {}
        #: When somebody last began to follow a node, and when each is looked at next, by the loop's time (s).
        self._since: dict[str, float] = {}
        self._due: dict[str, float] = {}
        self._looks: list[tuple[float, str]] = []
        self._unread: dict[str, None] = {}
        self._has_unread = asyncio.Event()
        self._sooner = asyncio.Event()
        self._wants_stream = asyncio.Event()
        self._streaming = self._ending = False
        self._listens_to: Here | None = None
        self._stop_listening: Callable[[], None] = _nothing
        self._tasks: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def following(self, node_id: str) -> AsyncIterator[Followed]:
        """Follow one document for the duration of the block."""
        followed = Followed(node_id)
        self._followed.setdefault(node_id, set()).add(followed)
        if not self._tasks:
            self._start()
        self._listen()
        self._is_kept(node_id)
        self._look_often(node_id)
        self._mark(node_id)
        try:
            yield followed
        finally:
            others = self._followed[node_id]
            others.discard(followed)
            if not others:
                del self._followed[node_id], self._since[node_id], self._due[node_id]
            if not self._followed:
                await self._stop()

    def _start(self) -> None:
        self._ending = False
        runs = {"reader": self._read(), "poller": self._poll(), "stream": self._stream()}
        self._tasks = [
            asyncio.create_task(run, name=f"document-{name}", context=contextvars.Context())
            for name, run in runs.items()
        ]

    async def _stop(self) -> None:
        tasks, self._tasks, self._ending = self._tasks, [], True
        self._stop_listening()
        self._listens_to = None
        self._looks.clear()
        self._wants_stream.clear()
        while tasks:
            for task in tasks:
                task.cancel()
            _, left = await asyncio.wait(tasks, timeout=INSIST)
            tasks = list(left)

    def _listen(self) -> None:
        """Hear of the changes of the watcher here; once, however many nodes are followed."""
        here = get_here()
        if here is not self._listens_to:
            self._stop_listening()
            self._listens_to = here
            self._stop_listening = here.changes.on(self._note) if here else _nothing

    def _note(self, change: Change) -> None:
        if change.node_id in self._followed:
            self._mark(change.node_id)

    def _mark(self, *node_ids: str) -> None:
        self._unread.update(dict.fromkeys(node_ids))
        self._has_unread.set()

    async def _read(self) -> None:
        backoff = RETRY.start()
        while not self._ending:
            await self._has_unread.wait()
            taken = list(self._unread)[:AT_ONCE]
            for node_id in taken:
                del self._unread[node_id]
            chosen = [node_id for node_id in taken if node_id in self._followed]
            if not self._unread:
                self._has_unread.clear()
            try:
                found = await self._find(chosen)
            except Exception as error:  # noqa: BLE001 - whatever it is, those who wait need the next attempt
                self.trouble = reason_of(error)
                self._mark(*chosen)
                await asyncio.sleep(backoff.next_delay())
                continue
            self.trouble = ""
            backoff.succeeded_for(0)
            for number, followed in enumerate([each for i in chosen for each in self._followed.get(i, ())], 1):
                followed.take(found.get(followed.node_id))
                if number % SLICE == 0:
                    await asyncio.sleep(0)  # what those do now must not hold up the rest of the program

    async def _find(self, node_ids: list[str]) -> dict[str, dict[str, Any]]:
        if not node_ids:
            return {}
        with pymongo.timeout(DEADLINE):
            return {row["_id"]: row async for row in self._collection.find({"_id": {"$in": node_ids}})}

    def _look_often(self, node_id: str) -> None:
        """Somebody came for this node."""
        now = self._since[node_id] = asyncio.get_running_loop().time()
        if self._due.get(node_id, math.inf) > now + SHORT_POLL:
            self._look_at(node_id, now + SHORT_POLL)

    def _look_at(self, node_id: str, due: float) -> None:
        self._due[node_id] = due  # what was planned for it before is passed over
        heappush(self._looks, (due, node_id))
        if self._looks[0][1] == node_id:
            self._sooner.set()

    async def _poll(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._ending:
            self._sooner.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(self._looks[0][0] if self._looks else None):
                    await self._sooner.wait()
            now = loop.time()
            while self._looks and self._looks[0][0] <= now + SHORT_POLL / 2:
                due, node_id = heappop(self._looks)
                if self._due.get(node_id) == due:
                    self._mark(node_id)
                    self._look_at(node_id, now + self._pause(node_id, now))

    def _pause(self, node_id: str, now: float) -> float:
        """Seconds until a node is looked at again."""
        is_told = self._is_kept(node_id) or self._streaming
        part, longest = (TOLD_PART, TOLD_POLL) if is_told else (PART, POLL)
        return min(longest, max(SHORT_POLL, (now - self._since[node_id]) * part))

    def _is_kept(self, node_id: str) -> bool:
        """Whether the watcher here keeps a node true now; a change stream has to tell of the others."""
        here = get_here()
        is_kept = here is not None and here.keeps(node_id)
        if not is_kept:
            self._wants_stream.set()
        return is_kept

    async def _stream(self) -> None:
        backoff = RETRY.start()
        while not self._ending:
            await self._wants_stream.wait()
            try:
                await self._follow_stream()
            except OperationFailure as error:
                if not error.has_error_label("ResumableChangeStreamError"):  # no replica set, or no right to it
                    logger.debug("No change stream, so documents are looked at again and again: {}", error)
                    return
            except Exception as error:  # noqa: BLE001 - such as what cannot be decoded: it is opened anew
                logger.debug("The change stream broke: {!r}", error)
            await asyncio.sleep(backoff.next_delay())

    async def _follow_stream(self) -> None:
        wait = round(STREAM_WAIT * 1000)
        async with await self._collection.watch(PIPELINE, max_await_time_ms=wait) as stream:
            self._streaming = True
            self._mark(*self._followed)  # for what came before it was open
            try:
                while stream.alive and not self._ending:
                    change = await stream.try_next()
                    if change is None:
                        continue
                    node_id = (change.get("documentKey") or {}).get("_id")
                    if node_id is None:  # the collection was dropped or renamed
                        self._mark(*self._followed)
                    elif node_id in self._followed:
                        self._mark(node_id)
            finally:
                self._streaming = False


def _nothing() -> None:
    """Nobody is listened to."""


_followers: WeakKeyDictionary[asyncio.AbstractEventLoop, Follower] = WeakKeyDictionary()


def reason_of(error: Exception) -> str:
    """What the driver says went wrong, without its account of the whole deployment."""
    return printable(str(error).partition(", Timeout:")[0], 200)


def get_follower() -> Follower:
    """The follower of this event loop and of the database that Beanie is initialised for. Raises StoreError."""
    collection, loop = node_collection(), asyncio.get_running_loop()
    follower = _followers.get(loop)
    if follower is None or follower.source is not collection:
        follower = _followers[loop] = Follower(collection)
    return follower
