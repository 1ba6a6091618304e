"""The last changes of each node, kept in the database, so that "why was it stopped at 3 a.m." has an answer.

One document a node (collection NodeChanges) with its last 50 changes, whatever other nodes do: so one that flaps
costs no other its history. What comes again within minutes (a health check that flaps) is counted, with its first
and last time, instead of told again. Bounded in all: a history without a change for 30 days expires, those of an
engine that changed longest ago go when it has more than 10,000, and texts are cut. Read by `explain` and, when a
watcher starts, for the status page; rows that earlier versions wrote (collection NodeHistory) are read too. A
change has its reason; that of an end is put to it once an inspection has explained it. With the changes, the last
known name and image of the container are kept, by which a node is found that is gone.

Written in the background in one bulk a second, so never in the way of a change. Every entry has an id of its own
before it is first written, so a write whose acknowledgement was lost is repeated without effect. Nothing that
happens here ends or delays the watching, whatever is wrong with the collection or with a row in it. While the
database is away the newest changes wait, up to a bound. Not promised: completeness. A process that is killed takes
up to a second of history along, and nothing depends on it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from loguru import logger

from eventwatch.core.backoff import Pace
from eventwatch.core.clock import Clock
from eventwatch.core.details import LONGEST_TEXT, OnRecord
from eventwatch.core.errors import StoreError
from eventwatch.core.facts import ENDED, Change, is_container_id
from eventwatch.core.policy import as_utc
from eventwatch.core.reasons import Ended
from eventwatch.core.text import printable
from eventwatch.store.changes import HISTORY_CHANGES
from eventwatch.store.connection import Store
from eventwatch.store.rows import Entry

#: Entries that wait for the database, entries of one bulk, seconds between two writes, and for the last one.
WAITING: Final = 10_000
BULK: Final = 2_000
INTERVAL: Final = 1.0
LAST_WRITE: Final = 3.0
#: Seconds between attempts while the history cannot be written.
RETRY: Final = Pace(base=1.0, cap=60.0)
#: A change is counted, not told again, if it is one of a node's last few and was seen this lately.
REPEATED: Final = 8
REPEATED_WITHIN: Final = timedelta(minutes=5)
#: Nodes whose last changes are remembered for that.
REMEMBERED: Final = 2_000
#: Nodes whose history is kept; after so many new ones, or so many seconds, it is seen to.
NODES: Final = 10_000
NEW_NODES: Final = 100
TIDY_INTERVAL: Final = 60.0
#: Nodes, those that changed last, of which a watcher that starts reads why they are as they are.
RECALLED: Final = 5_000
#: Characters that are kept of a text.
LONGEST: Final = 200
_INT64: Final = 2**63
_TEXTS: Final = ("reason", "name", "image", "end", "asked")


@dataclass(slots=True)
class _Node:
    """A node's last changes, the newest last, and those of its entries that are to be written."""

    last: OrderedDict[tuple[Any, ...], Entry] = field(default_factory=OrderedDict)
    to_write: dict[str, Entry] = field(default_factory=dict)


class History:
    """Remembers changes; `remember` is a listener of the writer."""

    def __init__(self, store: Store, clock: Clock, *, engine_id: str) -> None:
        self._store = store
        self._engine_id = engine_id
        self._clock = clock
        self._nodes: OrderedDict[str, _Node] = OrderedDict()
        self._waiting = 0
        self._has_waiting = asyncio.Event()
        self._complaint = ""
        self._new = NEW_NODES
        self._tidied = clock.monotonic()
        self._backoff = RETRY.start()

    def remember(self, written: Change) -> None:
        """Take one acknowledged change. Raises nothing."""
        try:
            self._remember(written)
        except Exception as error:  # noqa: BLE001 - whatever is odd about it, the change itself is written
            self._complain(error)

    def _remember(self, written: Change) -> None:
        at = datetime.fromtimestamp(written.at_ns / 1e9, UTC)
        what = _what(written)
        key = (what["deleted"], what["cause"], *sorted(what["old"].items()), None, *sorted(what["new"].items()))
        reason = str(_sound(written.reason, LONGEST_TEXT))
        node = self._nodes.setdefault(written.node_id, _Node())
        self._nodes.move_to_end(written.node_id)
        entry = node.last.get(key)
        if entry is not None and at - entry.until <= REPEATED_WITHIN:
            entry.count += 1
            entry.until = max(at, entry.until)
            entry.reason = reason or entry.reason
        else:
            short_id = _sound(written.short_id)
            name = f"{written.at_ns:016x}{secrets.token_hex(8)}"  # in order, for those of one millisecond
            entry = node.last[key] = Entry(
                name, self._engine_id, written.node_id, str(short_id), at, at, what, reason=reason
            )
        known = (("name", written.name), ("image", written.image))
        entry.named = {name: str(_sound(value)) for name, value in known if value}
        node.last.move_to_end(key)
        while len(node.last) > REPEATED:
            node.last.popitem(last=False)
        self._want(node, entry)
        self._limit()
        self._has_waiting.set()

    def explain(self, ended: Ended) -> None:
        """Put the reason of an end to the change that told of it. Raises nothing."""
        node = self._nodes.get(ended.node_id)
        for entry in reversed(node.last.values() if node else ()):
            if node and entry.what["new"].get("status") in ENDED:
                entry.reason = str(_sound(ended.reason, LONGEST_TEXT))
                asked = _sound(ended.asked, LONGEST_TEXT)
                entry.ending = {"end": str(ended.kind), "asked": asked, "ended_at": ended.at}
                self._want(node, entry)
                self._has_waiting.set()
                return

    def explain_health(self, node_id: str, reason: str) -> None:
        """Put to the change by which a node became unhealthy why it is. Raises nothing."""
        node = self._nodes.get(node_id)
        for entry in reversed(node.last.values() if node else ()):
            if node and entry.what["new"].get("health") == "unhealthy":
                if entry.reason != reason and "status" not in entry.what["new"]:
                    entry.reason = str(_sound(reason, LONGEST_TEXT))
                    self._want(node, entry)
                    self._has_waiting.set()
                return

    def _want(self, node: _Node, entry: Entry) -> None:
        self._waiting -= len(node.to_write)
        node.to_write[entry.id] = entry
        while len(node.to_write) > HISTORY_CHANGES:
            del node.to_write[next(iter(node.to_write))]
        self._waiting += len(node.to_write)

    def _limit(self) -> None:
        """Forget nodes that wait for nothing; of what waits, first the older half of each node's changes."""
        if len(self._nodes) > REMEMBERED:
            for node_id in [i for i, node in self._nodes.items() if not node.to_write][: REMEMBERED // 10]:
                del self._nodes[node_id]
        if self._waiting > WAITING:
            for node in self._nodes.values():
                for entry_id in list(node.to_write)[: len(node.to_write) // 2]:
                    del node.to_write[entry_id]
            self._waiting = sum(len(node.to_write) for node in self._nodes.values())
            while self._waiting > WAITING * 9 // 10:
                self._waiting -= len(self._nodes.popitem(last=False)[1].to_write)

    async def run(self) -> None:
        """Write what is remembered, once a second. Never ends."""
        while True:
            await self._has_waiting.wait()
            await self._clock.sleep(self._backoff.next_delay() if self._complaint else INTERVAL)
            await self.flush()

    async def recall(self, tell: Callable[[list[dict[str, Any]]], object], *, limit: int) -> None:
        """Tell of its engine's last changes, newest first, as `Change` says them; no matter if that fails."""
        try:
            changes = await read_changes(self._store, engine_id=self._engine_id, limit=limit)
            tell([change.as_written() for change in changes])
        except Exception as error:  # noqa: BLE001 - the page lacks them, and nothing else does
            logger.warning("History is not read: {}", _reason(error))

    async def recall_reasons(self, tell: Callable[..., object]) -> None:
        """Tell of its engine's nodes as `Reasons.recall` takes it; no matter if that fails."""
        try:
            states = await read_states(self._store, engine_id=self._engine_id, limit=RECALLED)
        except Exception as error:  # noqa: BLE001 - some reasons lack who asked, and all else goes on
            logger.warning("History is not read: {}", _reason(error))
            return
        for node_id, state in states.items():
            if state.status or state.unhealthy_since:
                tell(node_id, state.status, unhealthy_since=state.unhealthy_since)

    async def finish(self) -> None:
        """Write what is remembered, at the end: in a few seconds, or not at all."""
        try:
            async with asyncio.timeout(LAST_WRITE):
                await self.flush()
        except TimeoutError:
            logger.warning("History is not written: the database takes longer than {:.0f} s", LAST_WRITE)

    async def flush(self) -> None:
        """Write now what is remembered. What goes wrong is logged once, and tried again later."""
        try:
            await self._write()
            await self._tidy()
        except Exception as error:  # noqa: BLE001 - nothing depends on the history, and all else goes on
            self._complain(error)
        else:
            self._complaint = ""
            self._backoff.succeeded_for(0)

    async def _write(self) -> None:
        entries = [entry for node in self._nodes.values() for entry in node.to_write.values()][:BULK]
        if not entries:
            self._has_waiting.clear()
            return
        written = {entry.id: _news(entry) for entry in entries}
        try:
            new, refusals = await self._store.write_history(entries)
        finally:
            for entry in entries:
                entry.tried = True
        self._new += new
        for entry in entries:
            entry.stored = True
            node = self._nodes.get(entry.node_id)
            if node and _news(entry) == written[entry.id] and node.to_write.pop(entry.id, None):
                self._waiting -= 1
        if not self._waiting:
            self._has_waiting.clear()
        if refusals:  # for what is there already; written or not, they are done with
            logger.debug("{} changes are not in the history: {}", len(refusals), refusals[0])

    async def _tidy(self) -> None:
        now = self._clock.monotonic()
        if self._new >= NEW_NODES or now - self._tidied >= TIDY_INTERVAL:
            await self._store.tidy_history(NODES, engine_id=self._engine_id)
            self._new, self._tidied = 0, now

    def _complain(self, error: Exception) -> None:
        reason = _reason(error)
        if reason != self._complaint:
            logger.warning("History is not written: {}", reason)
        self._complaint = reason


def _reason(error: Exception) -> str:
    return printable(error if isinstance(error, StoreError) else repr(error), LONGEST)


def _news(entry: Entry) -> tuple[object, ...]:
    return entry.count, entry.reason, entry.ending


def _what(written: Change) -> dict[str, Any]:
    return {
        "cause": str(written.cause),
        "deleted": written.deleted,
        "old": {name: _sound(value) for name, value in written.old.items()},
        "new": {name: _sound(value) for name, value in written.new.items()},
        "latency": written.latency,
    }


def _sound(value: object, longest: int = LONGEST) -> str | int | None:
    """A value that any database takes, and that is not endless."""
    if value is None or (isinstance(value, int) and -_INT64 <= value < _INT64):
        return value
    return str(value)[:longest].encode("utf-8", "replace").decode()


# -- reading ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PastChange:
    """A change on record. It came `count` times between `at` and `until` (aware UTC, in milliseconds)."""

    node_id: str
    short_id: str
    at: datetime
    until: datetime
    count: int
    cause: str
    deleted: bool
    old: Mapping[str, Any]
    new: Mapping[str, Any]
    latency: float | None
    reason: str = ""
    name: str = ""
    image: str = ""
    #: Of an end that was explained: its kind, who asked for it (empty: nobody), and when the container ended.
    end: str = ""
    asked: str = ""
    ended_at: datetime | None = None

    def on_record(self) -> OnRecord:
        """What it tells of how the node is since."""
        status = str(self.new.get("status"))
        return OnRecord(status, self.reason, self.until, self.end, self.asked, self.ended_at)

    def as_written(self) -> dict[str, Any]:
        """In the words of `Change`, as when it came last."""
        return {
            "node_id": self.node_id,
            "short_id": self.short_id,
            "old": self.old,
            "new": self.new,
            "deleted": self.deleted,
            "cause": self.cause,
            "at_ns": round(self.until.timestamp() * 1e3) * 1_000_000,
            "latency": self.latency,
            "reason": self.reason,
            "name": self.name,
            "image": self.image,
        }


async def read_changes(store: Store, node_id: str = "", *, engine_id: str = "", limit: int) -> list[PastChange]:
    """The newest changes of a node, or of an engine, newest first. Odd rows are left out. Raises StoreError."""
    histories = await store.read_history(node_id, engine_id=engine_id, limit=limit)
    rows = [row for document in histories for row in _rows(document)]
    rows += await store.read_old_history(node_id or None, limit=limit)
    changes = [change for row in rows if (change := parse_change(row)) is not None]
    return sorted(changes, key=lambda change: (change.until, change.at), reverse=True)[:limit]


@dataclass(frozen=True, slots=True)
class Named:
    """Whose history it is, and when it changed last."""

    node_id: str
    name: str
    image: str
    at: datetime


def parse_name(row: Mapping[str, Any]) -> Named | None:
    """Whose history a row of `Store.find_history` is; None if it is odd."""
    node_id, at = row.get("_id"), row.get("at")
    if not (is_container_id(node_id) and isinstance(at, datetime)):
        return None
    name, image = (printable(row.get(key) or "", LONGEST) for key in ("name", "image"))
    return Named(str(node_id), name, image, as_utc(at))


@dataclass(frozen=True, slots=True)
class State:
    """How and who a node is, by its history: its last change of status, and since when it has been unhealthy."""

    status: OnRecord | None = None
    unhealthy_since: datetime | None = None
    why_unhealthy: str = ""
    name: str = ""
    image: str = ""


async def read_states(
    store: Store, node_ids: Collection[str] = (), *, engine_id: str = "", limit: int
) -> dict[str, State]:
    """How these nodes, or an engine's, are by their histories. Odd rows are left out. Raises StoreError."""
    states = {}
    for document in await store.read_last_states(node_ids, engine_id=engine_id, limit=limit):
        changes = [change for row in _rows(document) if (change := parse_change(row))]
        name, image = (printable(document.get(key) or "", LONGEST) for key in ("name", "image"))
        states[str(document.get("_id"))] = replace(state_of(changes), name=name, image=image)
    return states


def state_of(changes: Iterable[PastChange]) -> State:
    """How a node is by its changes, the newest first; nothing once its document was deleted."""
    status: OnRecord | None = None
    unhealthy_since: datetime | None = None
    told: set[str] = set()
    why = ""
    for change in sorted(changes, key=lambda change: change.until, reverse=True):
        if change.deleted:
            break
        if "status" in change.new and "status" not in told:
            status = change.on_record()
        if change.new.get("health") == "unhealthy" and "health" not in told:
            unhealthy_since, why = change.until, change.reason
        told |= change.new.keys()
    return State(status, unhealthy_since, why)


def _rows(document: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
    changes = document.get("changes")
    named = {name: document.get(name) for name in ("short_id", "name", "image")} | {"node_id": document.get("_id")}
    return (
        [{**named, **row} for row in changes if isinstance(row, dict)][::-1] if isinstance(changes, list) else []
    )


def parse_change(row: Mapping[str, Any]) -> PastChange | None:
    """A change that `Entry` or an earlier version wrote; None if it is neither."""
    node_id, at, old, new = row.get("node_id"), row.get("at"), row.get("old", {}), row.get("new", {})
    deleted = row.get("deleted") is True
    if not (isinstance(node_id, str) and isinstance(at, datetime) and isinstance(old, dict)):
        return None
    if not isinstance(new, dict) or not (new or deleted):
        return None
    ended_at = row.get("ended_at")
    until, count, latency, short_id = (row.get(name) for name in ("until", "count", "latency", "short_id"))
    return PastChange(
        node_id=node_id,
        short_id=short_id if isinstance(short_id, str) else node_id[:12],
        at=as_utc(at),
        until=as_utc(until) if isinstance(until, datetime) else as_utc(at),
        count=count if isinstance(count, int) else 1,
        cause=str(row.get("cause")),
        deleted=deleted,
        old={name: _sound(value) for name, value in old.items()},
        new={name: _sound(value) for name, value in new.items()},
        latency=latency if isinstance(latency, float) else None,
        ended_at=as_utc(ended_at) if isinstance(ended_at, datetime) else None,
        **{name: printable(row.get(name) or "", LONGEST_TEXT) for name in _TEXTS},
    )
