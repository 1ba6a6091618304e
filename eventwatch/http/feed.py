"""The changes that readers follow over HTTP: the last ones and each new one, with numbers to resume from.

Contract: a reader that names the last number it has seen gets what came after it, each change once and in order,
also after a restart of eventwatch as far as the history reaches; where that is not certain, as with a number that
is none of ours, it is told that it may have missed some (`Missed`), and gets all that is kept. A reader that is
too slow is cut off, to come back.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import asdict, dataclass
from typing import Any, Final

from eventwatch.core.facts import Change
from eventwatch.http.answers import dumps

#: Changes kept for those who connect later, and those that may wait for a slow reader before it is cut off.
KEPT_CHANGES: Final = 200
SLOW_READER: Final = 1000
#: Those who may follow changes at once, and after how many silent seconds they are asked whether they still do.
MOST_READERS: Final = 64
SILENCE: Final = 15.0


@dataclass(frozen=True, slots=True)
class Numbered:
    """A change as JSON, and its number: when it was acknowledged (Unix time, ns), or a little more."""

    number: int
    data: bytes
    node_id: str = ""


@dataclass(frozen=True, slots=True)
class Missed:
    """Changes may have come that are not kept."""


class ChangeFeed:
    """The last changes, and everyone who wants to hear of the next."""

    def __init__(self) -> None:
        self.recent: deque[Numbered] = deque()  # as JSON, which is made once for all readers
        self._last = 0
        #: The changes after this number are all kept.
        self._complete_after = 0
        self._readers: set[asyncio.Queue[Numbered | None]] = set()

    def publish(self, written: Change) -> None:
        """Take one acknowledged change; a reader that is too slow is told to go."""
        if not self._last:
            self._complete_after = written.at_ns - 1
        self._last = max(self._last + 1, written.at_ns)
        change = Numbered(
            self._last, dumps({**asdict(written), "cause": str(written.cause)}).encode(), written.node_id
        )
        if len(self.recent) >= KEPT_CHANGES:
            self._complete_after = self.recent.popleft().number
        self.recent.append(change)
        for reader in list(self._readers):
            if reader.qsize() >= SLOW_READER:
                self._readers.discard(reader)
                reader.put_nowait(None)
            else:
                reader.put_nowait(change)

    def recall(self, changes: list[dict[str, Any]]) -> None:
        """Put changes, newest first, before those that are known; readers are ended, to come back for them."""
        if not changes:
            return
        first = self.recent[0].number if self.recent else changes[0]["at_ns"] + 1
        for change in changes[: KEPT_CHANGES - len(self.recent)]:
            first = min(first - 1, change["at_ns"])
            self.recent.appendleft(Numbered(first, dumps(change).encode(), change["node_id"]))
        self._last = max(self._last, self.recent[-1].number)
        self._complete_after = self._last  # the history may lack what was written last
        self.close()

    def close(self) -> None:
        """End every reader's stream."""
        for reader in self._readers:
            reader.put_nowait(None)
        self._readers.clear()

    @property
    def node_ids(self) -> set[str]:
        """The ids of the nodes that the last changes are about."""
        return {change.node_id for change in self.recent}

    @property
    def is_full(self) -> bool:
        """Whether no more readers are taken."""
        return len(self._readers) >= MOST_READERS

    async def follow(
        self, *, after: int | None = None, old: bool = True
    ) -> AsyncGenerator[Numbered | Missed | None, None]:
        """What is kept, then each new change, until `close`; None when there was none for a while.

        `after` is the number of the last change that the reader has; without one, `old` decides about those kept.
        """
        queue: asyncio.Queue[Numbered | None] = asyncio.Queue()
        kept = list(self.recent)
        self._readers.add(queue)
        try:
            if after is None:
                kept = kept if old else []
            elif not self._complete_after <= after <= self._last:
                yield Missed()
            else:
                kept = [change for change in kept if change.number > after]
            for change in kept:
                yield change
            while True:
                try:
                    async with asyncio.timeout(SILENCE):
                        new = await queue.get()
                except TimeoutError:
                    yield None
                    continue
                if new is None:
                    return
                yield new
        finally:
            self._readers.discard(queue)
