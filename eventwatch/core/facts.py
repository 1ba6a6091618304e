"""The facts that flow through eventwatch, as plain immutable values.

An `Event` is what the engine announced, an `Observation` is what an inspection said, `Recorded` is what a
document says, and a `Write` is what the one writer is asked to do. How they are read from the engine's JSON is
`engine/wire.py`'s.

Not promised: that an event is new, in order, or about a node. Whoever consumes facts decides that.
"""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final

from eventwatch.core.text import printable

NOT_RUNNING_IP: Final = ""
NO_HEALTH_CHECK: Final = "none"
STOPPING: Final = "stopping"
#: What a document says of a container.
STATUSES: Final = (
    "created",
    "running",
    STOPPING,
    "paused",
    "restarting",
    "removing",
    "exited",
    "dead",
)
#: The states in which a container no longer runs, and will not by itself.
ENDED: Final = frozenset({"exited", "dead"})
#: What a node can be waited for to be.
CONDITIONS: Final = ("healthy", "running", "exited", "deleted")
#: Characters of what an event names.
LONGEST_ID: Final = 128
#: Characters of a reason in the engine's words.
LONGEST_REASON: Final = 300
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_CONTAINER_ID = re.compile(r"[0-9a-f]{64}")


def is_container_id(text: object) -> bool:
    """Whether this is a full container id. Nothing else may travel into a request's path."""
    return isinstance(text, str) and _CONTAINER_ID.fullmatch(text) is not None


class Cause(StrEnum):
    """Why a document was changed: which of the three tiers or a look saw it, an idle stop, or that we made it."""

    EVENT = "event"
    SETTLE = "settle"
    SWEEP = "sweep"
    LOOK = "look"
    IDLE = "idle"
    REGISTER = "register"


@dataclass(frozen=True, slots=True)
class Event:
    """One engine event about one container; a network event is about the container that it names.

    `network`: the name of the network of a network event, whose id is in `detail`. `raw` is what the engine sent,
    for recordings.
    """

    action: str
    node_id: str
    time_nano: int
    health: str | None = None
    detail: str = ""
    network: str = ""
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def key(self) -> tuple[int, str, str, str]:
        """Identity for dropping duplicates: a reconnect replays what was seen before."""
        return (self.time_nano, self.action, self.node_id, self.detail)


@dataclass(frozen=True, slots=True)
class Observation:
    """What the engine says of one container, already in the documents' terms.

    `found=False` is a 404 and nothing else. `time_nano` is a lower bound, on the engine's clock, of when this
    was true: an event with an older `timeNano` tells nothing that the observation does not already contain.

    `checked`: whether the container was made with a health check, running or not.
    `restart_count`: starts by the restart policy since the last start by a person, which sets it to 0.
    `names`, `addresses` (of all networks) and `published_ports` (of the host) say what others reach it by.
    """

    node_id: str
    found: bool = True
    status: str = ""
    health: str = NO_HEALTH_CHECK
    ip: str = NOT_RUNNING_IP
    tcp_ports: tuple[int, ...] = ()
    started_at: datetime | None = None
    name: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    networks: tuple[str, ...] = ()
    time_nano: int = 0
    checked: bool = False
    restart_count: int = 0
    created_at: datetime | None = None
    names: frozenset[str] = frozenset()
    addresses: frozenset[str] = frozenset()
    published_ports: frozenset[int] = frozenset()
    image: str = ""
    finished_at: datetime | None = None
    #: How its last run ended; None while it runs.
    ending: Ending | None = None
    #: Its last failed health checks, the newest first, while it is not healthy.
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True, slots=True)
class Failure:
    """A health check that failed, with what it printed (cleaned, and cut)."""

    at: datetime | None
    exit_code: int | None
    output: str

    def __str__(self) -> str:
        """Such as `its last health check said: ...`."""
        if self.output:
            return f"its last health check said: {self.output}"
        code = "no exit code" if self.exit_code is None else f"exit code {self.exit_code}"
        return f"its last health check failed with {code} and said nothing"


@dataclass(frozen=True, slots=True)
class Ending:
    """How a container ended, in the engine's words. `failure` is its last health check that failed."""

    exit_code: int | None = None
    oom_killed: bool = False
    error: str = ""
    finished_at: datetime | None = None
    failure: Failure | None = None

    def __str__(self) -> str:
        """Such as `exit code 137 (SIGKILL), out of memory; its last health check said: ...`."""
        code = self.exit_code
        told = ["no exit code" if code is None else f"exit code {code}{_signal_of(code)}"]
        told += ["out of memory"] if self.oom_killed else []
        told += [printable(self.error, LONGEST_REASON)] if self.error else []
        return ", ".join(told) + (f"; {self.failure}" if self.failure else "")


@dataclass(frozen=True, slots=True)
class Usage:
    """What a container has used since its start: CPU time (ns) and bytes received and sent; None: not told."""

    cpu: int | None = None
    network: int | None = None


def _signal_of(code: int) -> str:
    """The name of the signal behind an exit code as shells and engines tell it, or nothing."""
    with contextlib.suppress(ValueError):
        return f" ({signal.Signals(code - 128).name})"
    return ""


def normal_health(status: str, health: str) -> str:
    """A node that is not running is never healthy."""
    return "unhealthy" if health == "healthy" and status not in {"running", STOPPING} else health


def parse_time(text: object) -> datetime | None:
    """Read the engine's RFC 3339 time (nanoseconds, any offset) as aware UTC; year 1 means never."""
    if not isinstance(text, str) or text.startswith("0001-"):
        return None
    try:
        moment = datetime.fromisoformat(text)  # cuts the nanoseconds down to microseconds
        return moment if moment.tzinfo is UTC else moment.astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def nanos(moment: datetime | None) -> int:
    """Nanoseconds since 1970, 0 for never. Integers throughout: a float loses the last hundred."""
    if moment is None:
        return 0
    since = moment - _EPOCH
    return ((since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds) * 1000


@dataclass(frozen=True, slots=True)
class Claim:
    """An idle stop under way, as every process can see it.

    It is about one run of the container, told by when that started (naive UTC, ms): a start since then ends it.
    `stands` once it was looked at again and decided; until then a request may still come in between.
    """

    run: datetime | None
    stands: bool = False


@dataclass(frozen=True, slots=True)
class Recorded:
    """What a node's document says, read by projection; fields that eventwatch does not know stay unread."""

    node_id: str
    short_id: str
    status: str | None = None
    health: str | None = None
    ip: str | None = None
    port: int | None = None
    last_req_time: datetime | None = None
    engine_id: str | None = None
    epoch: int | None = None
    #: The live claim on the node, by whichever process.
    claim: Claim | None = None
    #: As a manager wrote it: seconds, a duration such as `2h`, or `never`.
    idle_timeout: str | float | None = None


@dataclass(frozen=True, slots=True)
class Owner:
    """What is on record of a container apart from its document, where no replace of that document can drop it.

    `engine_id` and `host` are the engine that last had the container and its name then; None where only a claim
    is on record. `registered` is the `last_req_time` (naive UTC) that eventwatch itself gave the document.
    """

    engine_id: str | None = None
    host: str | None = None
    registered: datetime | None = None


@dataclass(frozen=True, slots=True)
class Write:
    """One write to one document: some of our fields, or its deletion.

    `expected` holds the values that the decision was made on; the write is refused when the document no
    longer says so. None: the fact stands by itself, whatever the document says (a hint).
    """

    node_id: str
    fields: Mapping[str, str | int]
    cause: Cause
    delete: bool = False
    expected: Mapping[str, str | int | None] | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a document that the database acknowledged.

    `old` and `new` hold what changed of `status`, `health`, `ip` and `port` (and `engine_id` and `epoch`); the old
    values are as last known. `at_ns` is when it was acknowledged and `event_ns` when the engine says that it
    happened (Unix times, ns; None: no event told of it); `latency` (s) is between the two. `reason` tells why, as
    far as that is known when it is written; `name` and `image` are the container's, as last told. All three are
    cleaned, and empty where nothing is known.
    """

    node_id: str
    short_id: str
    old: Mapping[str, str | int | None]
    new: Mapping[str, str | int]
    deleted: bool
    cause: Cause
    at_ns: int
    latency: float | None
    event_ns: int | None = None
    reason: str = ""
    name: str = ""
    image: str = ""
