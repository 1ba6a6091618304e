"""The changes that the watcher of this process writes, for the host application that it runs in.

Contract: a change is passed on once the database has acknowledged it, in the order of the writes. Nothing that a
callback or a slow reader does harms the watcher or another reader; a reader that nobody holds any more, as after a
`break` out of its loop, is forgotten. Not promised: changes that somebody else wrote, and those of other watchers;
`/api/changes` and the documents themselves tell of these.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Final, Self
from weakref import WeakSet

from loguru import logger

from eventwatch.core.errors import ChangesLostError
from eventwatch.core.facts import Change

#: Changes that may wait for a reader.
MOST_WAITING: Final = 10_000


class Changes:
    """Where changes are published, and who gets them."""

    def __init__(self) -> None:
        self._callbacks: dict[object, Callable[[Change], object]] = {}
        self._readers: WeakSet[ChangeReader] = WeakSet()
        #: Those that wait for a change: what they wait in may be all that refers to them.
        self._waiting: set[ChangeReader] = set()
        self._closed = False

    def on(self, callback: Callable[[Change], object]) -> Callable[[], None]:
        """Call `callback` with each change, in the event loop: it must not block. Returns what ends that.

        What it raises is logged. Raises TypeError for a coroutine function: read `changes()` in a task instead.
        """
        if inspect.iscoroutinefunction(callback):
            raise TypeError("a coroutine function would never be awaited: use `async for ... in changes()`")
        key = object()
        self._callbacks[key] = callback

        def end() -> None:
            self._callbacks.pop(key, None)

        return end

    def read(self) -> ChangeReader:
        """Every change from now on, as an asynchronous iterator."""
        reader = ChangeReader(self._readers.discard, self._waiting)
        if self._closed:
            reader.end()
        else:
            self._readers.add(reader)
        return reader

    def publish(self, change: Change) -> None:
        """Pass a change on to everybody."""
        for callback in list(self._callbacks.values()):
            try:
                callback(change)
            # A host's mistake must not keep a document from its node. A cancellation is no one's who waits for us:
            # nothing here is awaited, so the callback made it up.
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001
                logger.opt(exception=error).error("A callback for changes failed: {!r}", error)
        for reader in list(self._readers):
            reader.put(change)

    def close(self) -> None:
        """End every reader: there is no watcher any more."""
        self._closed = True
        for reader in list(self._readers):
            reader.end()


class ChangeReader(AsyncIterator[Change]):
    """Changes in order. Ends with the watcher; ChangesLostError when more than `MOST_WAITING` were not read."""

    def __init__(self, leave: Callable[[ChangeReader], object], waiting: set[ChangeReader]) -> None:
        self._leave = leave
        self._all_waiting = waiting
        self._waiting: deque[Change] = deque()
        self._news = asyncio.Event()
        self._lost = self._ended = False

    def put(self, change: Change) -> None:
        """Have a change read, or lose it, and say so, if too many wait."""
        if len(self._waiting) < MOST_WAITING:
            self._waiting.append(change)
        else:
            self._lost = True
            self._leave(self)
        self._news.set()

    def end(self) -> None:
        """Let what waits be read; nothing comes after it."""
        self._ended = True
        self._leave(self)
        self._news.set()

    def __aiter__(self) -> Self:
        """Itself."""
        return self

    async def __anext__(self) -> Change:
        """Wait for the next change."""
        while not self._waiting:
            if self._lost:
                raise ChangesLostError(
                    f"more than {MOST_WAITING} changes were not read in time: read the documents anew"
                )
            if self._ended:
                raise StopAsyncIteration
            self._news.clear()
            self._all_waiting.add(self)
            try:
                await self._news.wait()
            finally:
                self._all_waiting.discard(self)
        return self._waiting.popleft()

    async def aclose(self) -> None:
        """Read no more."""
        self._waiting.clear()
        self.end()
