"""Two small queues keyed by node: which nodes need an inspection, and which facts wait to be written.

Both hold at most one entry per key, so a burst of events costs one inspection and one write per node, and
memory is bounded by the number of nodes, never by the number of events.

`WorkQueue` is fair (first come, first served; urgent keys before others), never gives one key to two workers
at once, and gives a key that was added while being worked on once more when the worker is done (the dirty
flag). It does not say how often a key was added, nor by whom.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class WorkQueue(Generic[K]):
    """Keys to be worked on, deduplicated and bounded to `maxsize` waiting keys."""

    def __init__(self, maxsize: int = 100_000) -> None:
        self._maxsize = maxsize
        self._waiting: OrderedDict[K, bool] = OrderedDict()
        self._urgent: OrderedDict[K, bool] = OrderedDict()
        self._processing: set[K] = set()
        self._dirty: dict[K, bool] = {}
        self._available = asyncio.Semaphore(0)
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._urgent) + len(self._dirty)

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is being worked on."""
        return not (self._waiting or self._urgent or self._processing)

    def add(self, key: K, *, urgent: bool = False) -> bool:
        """Ask for `key` to be worked on. False when the queue is full: the caller must arrange a sweep."""
        if key in self._processing:
            self._dirty[key] = self._dirty.get(key, False) or urgent
            return True
        if key in self._urgent:
            return True
        if key in self._waiting:
            if urgent:
                del self._waiting[key]
                self._urgent[key] = True
            return True
        if len(self) >= self._maxsize:
            return False
        (self._urgent if urgent else self._waiting)[key] = urgent
        self._available.release()
        self._idle.clear()
        return True

    async def wait_idle(self) -> None:
        """Wait until nothing waits and nothing is being worked on."""
        await self._idle.wait()

    async def get(self) -> tuple[K, bool]:
        """Take the next key, and whether it is urgent. Call `done(key)` afterwards, whatever happens."""
        await self._available.acquire()
        key, urgent = (self._urgent or self._waiting).popitem(last=False)
        self._processing.add(key)
        return key, urgent

    def done(self, key: K) -> None:
        """End the work on `key`; it is queued again if it was added meanwhile."""
        self._processing.discard(key)
        if key in self._dirty:
            self.add(key, urgent=self._dirty.pop(key))
        if self.idle:
            self._idle.set()
