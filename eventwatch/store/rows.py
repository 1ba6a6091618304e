"""What is read from the database's rows, whatever is in them.

Anybody may write there: what is no number, no time or no name is left out, and a row that says nothing is none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final

from eventwatch.core.facts import Owner, Recorded, is_container_id
from eventwatch.core.policy import as_utc

#: Where a status page may be.
_PAGE: Final = re.compile(r"https?://[A-Za-z0-9._:\[\]-]{1,270}/")
FIELDS: Final = ("short_id", "status", "health", "ip", "port", "last_req_time", "engine_id", "epoch")
PROJECTION: Final = dict.fromkeys((*FIELDS, "idle_timeout"), 1)
#: No number of takeovers leads here: what is beyond was written by somebody else. It takes as many again from the
#: highest one that is counted on from to the first that is not believed.
MAX_EPOCH: Final = 2**48
#: Linux has no higher process ids.
MAX_PID: Final = 2**22


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write for one engine, as granted by the database's clock."""

    manager_id: str
    engine_id: str
    epoch: int
    cursor: int | None = None


@dataclass(frozen=True, slots=True)
class Witness:
    """Containers that a process sees on its engine; `look` grows with each time that it looked.

    By these, another process that watches an engine with the same id finds out whether it is the same engine.
    """

    containers: tuple[str, ...] = ()
    look: int = 0


UNSEEN: Final = Witness()


@dataclass(frozen=True, slots=True)
class Life:
    """By what a process can be seen to have ended; each part is empty where it is not known for sure.

    `boot_id` is the machine's since it was booted, `namespaces`, `pid` and `started` (clock ticks since then) are
    the process's, `container` and `container_started` (ns) those of its container on the engine that it watches.
    """

    boot_id: str = ""
    namespaces: str = ""
    pid: int = 0
    started: int = 0
    container: str = ""
    container_started: int = 0


NO_LIFE: Final = Life()


@dataclass(slots=True)
class Entry:
    """A change in a node's history, and how often it has come again between `at` and `until`.

    `tried`: it may be in the database already, as it was at an earlier attempt to write it. `stored`: it is.
    `named` is what is kept of the node itself beside its changes, as last known.
    """

    id: str
    engine_id: str
    node_id: str
    short_id: str
    at: datetime
    until: datetime
    what: Mapping[str, Any]
    count: int = 1
    tried: bool = False
    stored: bool = False
    reason: str = ""
    named: Mapping[str, str] = field(default_factory=dict)
    #: Of an explained end: `end`, `asked` and `ended_at`.
    ending: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Peer:
    """Another live process that watches an engine with our engine's id: the holder of the lease, or a standby.

    Of a holder, also `life`, its `epoch`, when it last renewed its lease (naive UTC), and how long ago that
    was (s, by the database's clock) when a candidate asked.
    """

    manager_id: str
    host: str
    pid: int
    witness: Witness = UNSEEN
    holds: bool = False
    life: Life = NO_LIFE
    epoch: int = 0
    renewed_at: datetime | None = None
    renewed_ago: float | None = None
    #: The URL of its status page; empty: none that others could reach.
    page: str = ""


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """What is on record of an engine: who watches it, and what its watcher last told of itself.

    `alive`: it has a live lease; `watched`: somebody has or had it. `seen_at` (aware UTC) and `age` (s, by the
    database's clock) are of the last sign of life, None without any. `nodes` are counts by status; `sweep_age`,
    `p50` and `p99` (of the latency of events) are in seconds; `reasons` say why it was not ready, as of `seen_at`.
    """

    engine_id: str
    host: str = ""
    version: str = ""
    alive: bool = False
    watched: bool = False
    leader: str = ""
    standbys: tuple[str, ...] = ()
    seen_at: datetime | None = None
    age: float | None = None
    nodes: Mapping[str, int] = field(default_factory=dict)
    sweep_age: float | None = None
    drift: int | None = None
    p50: float | None = None
    p99: float | None = None
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """Changes that matched no document: it vanished, a later epoch owns it, or it no longer says what was read."""

    vanished: frozenset[str] = frozenset()
    fenced: frozenset[str] = frozenset()
    conflicting: frozenset[str] = frozenset()
    #: Refused by the server for what the document is like, whatever is tried.
    impossible: frozenset[str] = frozenset()

    def __contains__(self, node_id: object) -> bool:
        return any(node_id in ids for ids in (self.vanished, self.fenced, self.conflicting, self.impossible))


def parse_recorded(row: Mapping[str, Any]) -> Recorded:
    """Check the types of a projected document. Raises ValueError naming the first field that is wrong."""
    for name, kind, optional in (
        ("_id", str, False),
        ("short_id", str, True),
        ("status", str, True),
        ("health", str, True),
        ("ip", str, True),
        ("port", int, True),
        ("last_req_time", datetime, True),
        ("engine_id", str, True),
        ("epoch", int, True),
    ):
        value = row.get(name)
        if not (isinstance(value, kind) or (optional and value is None)):
            raise ValueError(f"{name} is {type(value).__name__}, not {kind.__name__}")
    if (row.get("epoch") or 0) >= MAX_EPOCH:
        raise ValueError("its epoch is beyond any takeover's")
    if not is_container_id(row["_id"]):
        raise ValueError("its _id is no container's full id (64 lower-case hex digits)")
    fields: dict[str, Any] = {name: row.get(name) for name in FIELDS}
    fields["short_id"] = fields["short_id"] or row["_id"][:12]
    own = row.get("idle_timeout")
    if not (own is None or type(own) in {int, float, str}):
        own = f"a {type(own).__name__}"  # which is no duration, and so told
    return Recorded(node_id=row["_id"], **fields, idle_timeout=own)


def parse_owner(row: Mapping[str, Any]) -> Owner:
    """What is on record of a container."""
    engine_id, host, registered = (row.get(name) for name in ("engine_id", "host", "registered"))
    return Owner(
        engine_id if isinstance(engine_id, str) else None,
        host if isinstance(host, str) else None,
        registered if isinstance(registered, datetime) else None,
    )


def parse_peer(row: Mapping[str, Any], *, holds: bool) -> Peer:
    """A watcher of an engine; `holds`: the one that has the lease."""
    containers, look, pid = row.get("containers"), row.get("look"), row.get("pid")
    ids = (i for i in containers if isinstance(i, str)) if isinstance(containers, list) else ()
    return Peer(
        str(row.get("manager_id")),
        str(row.get("host")),
        pid if isinstance(pid, int) else 0,
        Witness(tuple(i for i in ids if is_container_id(i)), look if isinstance(look, int) else 0),
        holds,
        parse_life(row),
        whole(row.get("epoch")) or 0,
        row["renewed_at"] if isinstance(row.get("renewed_at"), datetime) else None,
        page=_parse_page(row),
    )


def _parse_page(row: Mapping[str, Any]) -> str:
    """The URL of the holder's status page; empty where it is odd, or another's."""
    told = row.get("page")
    if not isinstance(told, dict) or told.get("manager_id") != row.get("manager_id"):
        return ""
    url = told.get("url")
    return url if isinstance(url, str) and _PAGE.fullmatch(url) else ""


def parse_holder(row: Mapping[str, Any]) -> Peer:
    """The holder of a lease, as it was when a candidate asked, which is the last on record of those that wait."""
    holder, asked_at = parse_peer(row, holds=True), row["standbys"][-1]["seen_at"]
    if holder.renewed_at is None:
        return holder
    return replace(holder, renewed_ago=(asked_at - holder.renewed_at).total_seconds())


def parse_life(row: Mapping[str, Any]) -> Life:
    """What the holder has left of itself; nothing at all where any of it is odd, or another's."""
    told = row.get("life")
    if not isinstance(told, dict) or told.get("manager_id") != row.get("manager_id"):
        return NO_LIFE
    texts = [told.get(name) for name in ("boot_id", "namespaces", "container")]
    numbers = [whole(told.get(name)) for name in ("pid", "started", "container_started")]
    boot_id, namespaces, container = (text if isinstance(text, str) else None for text in texts)
    pid, started, container_started = (
        number if number is not None and number >= 0 else None for number in numbers
    )
    if boot_id is None or namespaces is None or container is None:
        return NO_LIFE
    if pid is None or pid > MAX_PID or started is None or container_started is None:
        return NO_LIFE
    if container and not is_container_id(container):
        return NO_LIFE
    return Life(boot_id, namespaces, pid, started, container, container_started)


def parse_engine(row: Mapping[str, Any]) -> EngineRecord | None:
    """What is on record of an engine; None when the row names none."""
    engine_id, report, now = row.get("engine_id"), row.get("report"), row.get("now")
    if not isinstance(engine_id, str):
        return None
    report = report if isinstance(report, dict) else {}
    nodes, reasons = report.get("nodes"), report.get("reasons")
    moments = [row.get(name) for name in ("renewed_at", "seen_at", "ended_at")]
    seen_at = max((each for each in moments if isinstance(each, datetime)), default=None)
    age = (now - seen_at).total_seconds() if seen_at is not None and isinstance(now, datetime) else None
    standbys = row.get("standbys")
    return EngineRecord(
        engine_id=_short(engine_id),
        host=_short(row.get("host")),
        version=_short(row.get("version")),
        alive=row.get("holds") is True,
        watched="renewed_at" in row or "ended_at" in row,
        leader=_short(row.get("manager_id")),
        standbys=tuple(_short(each.get("host")) for each in standbys or () if isinstance(each, dict)),
        seen_at=as_utc(seen_at) if seen_at is not None else None,
        age=None if age is None else max(0.0, age),
        nodes=_counts(nodes) if isinstance(nodes, dict) else {},
        sweep_age=_number(report.get("sweep_age")),
        drift=drift if type(drift := report.get("drift")) is int else None,
        p50=_number(report.get("p50")),
        p99=_number(report.get("p99")),
        reasons=tuple(_short(each) for each in reasons[:20]) if isinstance(reasons, list) else (),
    )


def _counts(found: Mapping[object, object]) -> dict[str, int]:
    return {_short(name): count for name, count in list(found.items())[:20] if type(count) is int}


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _short(value: object) -> str:
    return value[:200] if isinstance(value, str) else ""


def whole(value: object) -> int | None:
    """A whole number as the driver reads it, which makes a type of its own of those with 64 bits; else None."""
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else None
