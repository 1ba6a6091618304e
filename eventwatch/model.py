"""The facts that flow through eventwatch, as plain immutable values.

An `Event` is what the engine announced, an `Observation` is what an inspection said, `Recorded` is what a
document says, and a `Change` is what the one writer is asked to do. Parsing from the engine's JSON happens
here and nowhere else, and reads only what every API version and Podman agree on: `Type`, `Action`, `Actor`
and `timeNano` of an event (API 1.52 dropped `status`, `id` and `from`).

Not promised: that an event is new, in order, or about a node. Whoever consumes facts decides that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final

NOT_RUNNING_IP: Final = ""
NO_HEALTH_CHECK: Final = "none"
STOPPING: Final = "stopping"

#: Podman's names for Docker's actions, by which it filters (though it may say `die`), and for Docker's states.
ACTION_ALIASES: Final = {"died": "die", "remove": "destroy"}
_STATUS_ALIASES: Final = {"configured": "created", "initialized": "created", "stopped": "exited"}

#: What is subscribed to, beside its aliases. The engine matches `health_status` as a prefix.
CONTAINER_ACTIONS: Final = (
    "create", "start", "restart", "die", "stop", "kill", "oom", "pause", "unpause",
    "rename", "update", "destroy", "health_status",
)  # fmt: skip
NETWORK_ACTIONS: Final = ("connect", "disconnect")

_END_OF_TIME: Final = 2**63
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FRACTION = re.compile(r"\.(\d+)")


class Cause(StrEnum):
    """Why a document was changed: which of the three tiers saw it, or our own idle stop."""

    EVENT = "event"
    SETTLE = "settle"
    SWEEP = "sweep"
    IDLE = "idle"


@dataclass(frozen=True, slots=True)
class Event:
    """One engine event about one container; a network event is about the container that it names."""

    action: str
    node_id: str
    time_nano: int
    health: str | None = None
    detail: str = ""

    @property
    def key(self) -> tuple[int, str, str, str]:
        """Identity for dropping duplicates: a reconnect replays what was seen before."""
        return (self.time_nano, self.action, self.node_id, self.detail)


class MalformedEventError(ValueError):
    """A line of the event stream that is no event."""


def parse_event(raw: object) -> Event | None:
    """Read one decoded line of the event stream.

    Returns None for a well-formed event that is not about a container.
    Raises MalformedEventError for anything else that is not an event.
    """
    try:
        if not isinstance(raw, dict):
            raise TypeError("not a JSON object")  # noqa: TRY301 - one exit for everything malformed
        action, actor, time_nano = raw["Action"], raw["Actor"], raw["timeNano"]
        kind, subject = raw["Type"], actor["ID"]
        attributes = actor.get("Attributes") or {}
        if not (isinstance(action, str) and isinstance(subject, str) and type(time_nano) is int):
            raise TypeError("wrong field types")  # noqa: TRY301
        if not 0 < time_nano < _END_OF_TIME:  # the next resumption would ask for it
            raise TypeError("timeNano out of range")  # noqa: TRY301
    except (KeyError, TypeError, AttributeError) as error:
        raise MalformedEventError(f"{type(error).__name__}: {error}") from error
    if kind == "network":
        container = attributes.get("container")
        return Event(action, container, time_nano, detail=subject) if isinstance(container, str) else None
    if kind != "container":
        return None
    action, _, rest = action.partition(":")
    action = ACTION_ALIASES.get(action, action)
    if action == "health_status":
        # Podman names the result in an attribute, Docker in the action itself.
        return Event(action, subject, time_nano, health=(rest.strip() or attributes.get("health_status")))
    return Event(action, subject, time_nano, detail=rest)


@dataclass(frozen=True, slots=True)
class Observation:
    """What the engine says of one container, already in the documents' terms.

    `found=False` is a 404 and nothing else. `time_nano` is a lower bound, on the engine's clock, of when this
    was true: an event with an older `timeNano` tells nothing that the observation does not already contain.
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


def parse_container(container: Mapping[str, Any], *, network: str, as_of: int = 0) -> Observation:
    """Turn an inspection into an observation: `ip` is the address on `network`.

    `as_of` is the newest engine time (ns) known when the inspection was asked for. Raises KeyError or TypeError
    when this is no inspection.

    The two exceptions to "the document says what the inspection says" live here: a container that is neither
    running nor paused has no ip (after a daemon crash Docker still shows one that may belong to another by
    now), and one that is not running is never healthy (Docker still claims it then).
    """
    state = container["State"]
    status = str(state["Status"])
    status = _STATUS_ALIASES.get(status, status)
    health = str((state.get("Health") or state.get("Healthcheck") or {}).get("Status") or NO_HEALTH_CHECK)
    networks: Mapping[str, Any] = (container.get("NetworkSettings") or {}).get("Networks") or {}
    config = container.get("Config") or {}
    started_at, finished_at = parse_time(state.get("StartedAt")), parse_time(state.get("FinishedAt"))
    return Observation(
        node_id=str(container["Id"]),
        status=status,
        health=normal_health(status, health),
        ip=str((networks.get(network) or {}).get("IPAddress") or "") if has_address(status) else NOT_RUNNING_IP,
        tcp_ports=_tcp_ports(config.get("ExposedPorts") or {}),
        started_at=started_at,
        name=str(container.get("Name") or "").lstrip("/"),
        labels=config.get("Labels") or {},
        networks=tuple(networks),
        time_nano=max(as_of, nanos(started_at), nanos(finished_at)),
    )


def has_address(status: str) -> bool:
    """Whether a container in this state owns its ip."""
    return status in {"running", "paused"}


def normal_health(status: str, health: str) -> str:
    """A node that is not running is never healthy."""
    return "unhealthy" if health == "healthy" and status not in {"running", STOPPING} else health


def parse_time(text: str | None) -> datetime | None:
    """Read the engine's RFC 3339 time (nanoseconds, any offset) as aware UTC; year 1 means never."""
    if not text or text.startswith("0001-"):
        return None
    micros = _FRACTION.sub(lambda match: "." + match.group(1)[:6].ljust(6, "0"), text)
    try:
        return datetime.fromisoformat(micros).astimezone(UTC)
    except ValueError:
        return None


def nanos(moment: datetime | None) -> int:
    """Nanoseconds since 1970, 0 for never. Integers throughout: a float loses the last hundred."""
    return (moment - _EPOCH) // timedelta(microseconds=1) * 1000 if moment else 0


def _tcp_ports(exposed: Iterable[str]) -> tuple[int, ...]:
    ports = (spec.partition("/") for spec in exposed)
    return tuple(sorted(int(port) for port, _, protocol in ports if protocol in {"", "tcp"} and port.isdigit()))


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


@dataclass(frozen=True, slots=True)
class Change:
    """One write to one document: some of our fields, or its deletion.

    `expected` holds the values that the decision was made on; the write is refused when the document no
    longer says so. None: the fact stands by itself, whatever the document says (a hint).
    """

    node_id: str
    fields: Mapping[str, str | int]
    cause: Cause
    delete: bool = False
    expected: Mapping[str, str | int | None] | None = None
