"""Answers that many may ask for: made once per moment, in pieces or in a thread, and at a bounded rate.

Why: the event loop that answers is the one that keeps documents true. However many clients ask, and however fast,
what they cost it must stay a small share of its time, and no single answer may hold it up.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Hashable, Iterable, Mapping
from typing import Any, Final

from eventwatch.core.clock import Slices
from eventwatch.core.text import json_text

#: Seconds for which an answer is given again as it is.
MOMENT: Final = 0.5
#: Different answers that are kept for a moment.
KEPT_ANSWERS: Final = 32
#: Bytes from which on compression is worth its while.
WORTH_PACKING: Final = 1024


class Answer:
    """The body of an answer, and its gzip form once somebody has asked for that."""

    def __init__(self, body: bytes, headers: Mapping[str, str]) -> None:
        self.body = body
        self.headers = headers
        self.made_at = time.monotonic()
        self._packing: asyncio.Task[bytes] | None = None

    async def packed(self) -> bytes:
        """The body, compressed once and in a thread; zlib leaves the interpreter to others meanwhile."""
        if self._packing is None:
            self._packing = asyncio.create_task(asyncio.to_thread(gzip.compress, self.body, 1, mtime=0))
        return await asyncio.shield(self._packing)


class Answers:
    """Makes each answer at most once per moment, however many ask for it at the same time."""

    def __init__(self, moment: float = MOMENT) -> None:
        self._moment = moment
        self._made: dict[Hashable, asyncio.Task[Answer]] = {}

    async def get(self, key: Hashable, make: Callable[[], Awaitable[Answer]]) -> Answer:
        """The answer of this moment, which `make` makes unless it is there or on its way."""
        task = self._made.get(key)
        if task is None or self._is_past(task):
            for old in [other for other, made in self._made.items() if self._is_past(made)]:
                del self._made[old]
            while len(self._made) >= KEPT_ANSWERS:
                del self._made[next(iter(self._made))]
            task = self._made[key] = asyncio.ensure_future(_awaited(make()))
        return await asyncio.shield(task)  # whoever gives up must not take it from the others

    def _is_past(self, task: asyncio.Task[Answer]) -> bool:
        if not task.done():
            return False
        failed = task.cancelled() or task.exception() is not None
        return failed or time.monotonic() - task.result().made_at >= self._moment


async def _awaited(making: Awaitable[Answer]) -> Answer:
    return await making


class NodePages:
    """The list of nodes, page by page in the order of their ids; each node is encoded at most once per moment."""

    def __init__(
        self,
        node_ids: Callable[[], Iterable[str]],
        node: Callable[[str], Mapping[str, Any] | None],
        shown: Callable[[bytes], bytes] = bytes,
        moment: float = MOMENT,
    ) -> None:
        self._node_ids = node_ids
        self._node = node
        self._shown = shown
        self._moment = moment
        self._until = 0.0
        self._ids: list[str] = []
        self._encoded: dict[str, bytes] = {}

    async def page(self, *, after: str, limit: int) -> tuple[bytes, str | None]:
        """A JSON list of the nodes whose ids come after this one, and after which id the next page begins.

        `after` may be the beginning of an id, and then stands for all ids that begin so.
        """
        if time.monotonic() >= self._until:
            self._ids, self._encoded = sorted(self._node_ids()), {}
            self._until = time.monotonic() + self._moment
        ids, encoded = self._ids, self._encoded  # others may begin a new moment while we pause
        first = bisect_right(ids, after + "~") if after else 0
        chosen = ids[first : first + limit]
        slices = Slices()
        for node_id in chosen:
            if node_id not in encoded:
                node = self._node(node_id)
                encoded[node_id] = b"" if node is None else self._shown(dumps(node).encode())
                await slices.turn()
        body = b"[" + b", ".join(filter(None, (encoded[node_id] for node_id in chosen))) + b"]"
        return body, chosen[-1] if first + limit < len(ids) else None


class Turns:
    """Spreads requests out: so many at once, then so many a second; those that would wait too long are told so."""

    def __init__(self, *, rate: float, burst: int, longest: float) -> None:
        self._gap = 1 / rate
        self._slack = burst / rate
        self._longest = longest
        self._last = 0.0

    async def take(self) -> bool:
        """Wait for a turn; False at once when that would take too long."""
        now = time.monotonic()
        turn = max(self._last, now - self._slack) + self._gap
        if turn - now > self._longest:
            return False
        self._last = turn
        if turn > now:
            await asyncio.sleep(turn - now)
        return True


def accepts_gzip(accept_encoding: str) -> bool:
    """Whether a client's Accept-Encoding asks for gzip."""
    for choice in accept_encoding.lower().split(","):
        name, _, weight = choice.partition(";")
        if name.strip() in {"gzip", "*"}:
            return weight.replace(" ", "") not in {"q=0", "q=0.0", "q=0.00", "q=0.000"}
    return False


async def dumps_many(rows: Iterable[Any]) -> bytes:
    """A JSON list of these, made in pieces between which others get their turn."""
    encoded, slices = [], Slices()
    for row in rows:
        encoded.append(dumps(row))
        await slices.turn()
    return f"[{', '.join(encoded)}]".encode()


def dumps(value: Any) -> str:
    """JSON; what it has no form for, such as a time, as `json_text` writes it."""
    return json.dumps(value, default=json_text)
