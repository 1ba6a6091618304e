"""The facts that flow through eventwatch, as plain immutable values.

An `Event` is what the engine announced, an `Observation` is what an inspection said, `Recorded` is what a
document says, and a `Write` is what the one writer is asked to do. Parsing from the engine's JSON happens
here and nowhere else, and reads only what every API version and Podman agree on: `Type`, `Action`, `Actor`
and `timeNano` of an event (API 1.52 dropped `status`, `id` and `from`).

Not promised: that an event is new, in order, or about a node. Whoever consumes facts decides that.
"""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Iterable, Mapping
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
    "created", "running", STOPPING, "paused", "restarting", "removing", "exited", "dead",
)  # fmt: skip
#: The states in which a container no longer runs, and will not by itself.
ENDED: Final = frozenset({"exited", "dead"})
#: What a node can be waited for to be.
CONDITIONS: Final = ("healthy", "running", "exited", "deleted")
#: Characters of what an event names.
LONGEST_ID: Final = 128
#: Characters of a reason in the engine's words.
LONGEST_REASON: Final = 300
#: Failed health checks that are told of, and entries of the engine's log of checks that are looked at.
FAILURES: Final = 3
_CHECKS_READ: Final = 20
_NOT_RUNNING: Final = ENDED | {"restarting", "removing"}

#: Podman's names for Docker's actions, by which it filters (though it may say `die`), and for Docker's states.
ACTION_ALIASES: Final = {"died": "die", "remove": "destroy"}
STATUS_ALIASES: Final = {"configured": "created", "initialized": "created", "stopped": "exited"}

#: What is subscribed to, beside its aliases. The engine matches `health_status` as a prefix.
CONTAINER_ACTIONS: Final = (
    "create", "start", "restart", "die", "stop", "kill", "oom", "pause", "unpause",
    "rename", "update", "destroy", "health_status",
)  # fmt: skip
NETWORK_ACTIONS: Final = ("connect", "disconnect")

_END_OF_TIME: Final = 2**63
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_PORT: Final = 65535
_BRIEF = re.compile(r"[A-Z0-9+]{1,12}", re.ASCII)
_CONTAINER_ID = re.compile(r"[0-9a-f]{64}")


def is_container_id(text: object) -> bool:
    """Whether this is a full container id. Nothing else may travel into a request's path."""
    return isinstance(text, str) and _CONTAINER_ID.fullmatch(text) is not None


def _is_name(text: object) -> bool:
    """Whether a database can be asked for this, and a log can show it."""
    return isinstance(text, str) and 0 < len(text) <= LONGEST_ID and text.isascii() and text.isprintable()


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
        if kind == "container" and not _is_name(subject):
            raise TypeError(f"{subject!r:.80} is no id")  # noqa: TRY301
        if not 0 < time_nano < _END_OF_TIME:  # the next resumption would ask for it
            raise TypeError("timeNano out of range")  # noqa: TRY301
    except (KeyError, TypeError, AttributeError) as error:
        raise MalformedEventError(f"{type(error).__name__}: {error}") from error
    if kind == "network":
        container = attributes.get("container")
        return Event(action, str(container), time_nano, detail=subject) if _is_name(container) else None
    if kind != "container":
        return None
    action, _, rest = action.partition(":")
    action = ACTION_ALIASES.get(action, action)
    if action == "health_status":
        # Podman names the result in an attribute, Docker in the action itself.
        return Event(action, subject, time_nano, health=(rest.strip() or attributes.get("health_status")))
    return Event(action, subject, time_nano, detail=rest or _told(action, attributes))


def _told(action: str, attributes: Mapping[str, Any]) -> str:
    """The exit code of a `die`, the signal of a `kill`; a label of the same name overwrites either."""
    name = {"die": "exitCode", "kill": "signal"}.get(action)
    value = attributes.get(name) if name else None
    return value if isinstance(value, str) and _BRIEF.fullmatch(value) else ""


@dataclass(frozen=True, slots=True)
class Observation:
    """What the engine says of one container, already in the documents' terms.

    `found=False` is a 404 and nothing else. `time_nano` is a lower bound, on the engine's clock, of when this
    was true: an event with an older `timeNano` tells nothing that the observation does not already contain.

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


def parse_container(
    container: Mapping[str, Any], *, network: str, as_of: int = 0, not_after: int | None = None
) -> Observation:
    """Turn an inspection into an observation: `ip` is the address on `network`.

    `as_of` is the newest engine time (ns) known when the inspection was asked for. What started or ended later
    than `not_after` (ns) did so by a clock that was set back since, and does not count for `time_nano`.

    Raises KeyError, TypeError or AttributeError when this is no inspection. The fields from `restart_count` on
    are empty where the engine says nothing usable.

    The two exceptions to "the document says what the inspection says" live here: a container that is neither
    running nor paused has no ip (after a daemon crash Docker still shows one that may belong to another by
    now), and one that is not running is never healthy (Docker still claims it then).
    """
    state = container["State"]
    status = _text(state["Status"])
    status = STATUS_ALIASES.get(status, status)
    health = _text((state.get("Health") or state.get("Healthcheck") or {}).get("Status") or NO_HEALTH_CHECK)
    settings = container.get("NetworkSettings") or {}
    networks: Mapping[str, Any] = settings.get("Networks") or {}
    config = container.get("Config") or {}
    labels, name = config.get("Labels"), str(container.get("Name") or "").lstrip("/")
    started_at, finished_at = parse_time(state.get("StartedAt")), parse_time(state.get("FinishedAt"))
    restarts, host = container.get("RestartCount"), container.get("HostConfig")
    image = config.get("Image")
    return Observation(
        node_id=str(container["Id"]),
        status=status,
        health=normal_health(status, health),
        ip=_address_on(networks.get(network) or {}) if has_address(status) else NOT_RUNNING_IP,
        tcp_ports=_tcp_ports(config.get("ExposedPorts") or {}),
        started_at=started_at,
        name=name,
        labels=labels if isinstance(labels, dict) else {},
        networks=tuple(networks),
        time_nano=max(as_of, _past(started_at, not_after), _past(finished_at, not_after)),
        restart_count=restarts if type(restarts) is int and restarts > 0 else 0,
        created_at=parse_time(container.get("Created")),
        names=_names(name, config.get("Hostname"), networks),
        addresses=_addresses(networks),
        published_ports=_published_ports(
            settings.get("Ports"), host.get("PortBindings") if isinstance(host, dict) else None
        ),
        image=image if isinstance(image, str) else "",
        finished_at=finished_at,
        ending=_ending(state) if finished_at and status in _NOT_RUNNING else None,
        failures=_failures(state) if health not in {"healthy", NO_HEALTH_CHECK} else (),
    )


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


def parse_ending(container: Mapping[str, Any]) -> Ending | None:
    """How the container of this inspection ended; None if it runs, or will run again by its restart policy.

    Raises KeyError, TypeError or AttributeError when this is no inspection. Fields are empty where the engine says
    nothing usable.
    """
    state = container["State"]
    if STATUS_ALIASES.get(state["Status"], state["Status"]) not in ENDED or state.get("Restarting") is True:
        return None
    return _ending(state)


def _ending(state: Mapping[str, Any]) -> Ending:
    code, error, failures = state.get("ExitCode"), state.get("Error"), _failures(state)
    return Ending(
        exit_code=code if type(code) is int and abs(code) < 2**32 else None,
        oom_killed=state.get("OOMKilled") is True,
        error=error if isinstance(error, str) else "",
        finished_at=parse_time(state.get("FinishedAt")),
        failure=failures[0] if failures else None,
    )


@dataclass(frozen=True, slots=True)
class Usage:
    """What a container has used since its start: CPU time (ns) and bytes received and sent; None: not told."""

    cpu: int | None = None
    network: int | None = None


def parse_usage(stats: Mapping[str, Any]) -> Usage:
    """Read the engine's answer about usage; what is missing or no count is None."""
    cpu, networks = stats.get("cpu_stats"), stats.get("networks")
    used = cpu.get("cpu_usage") if isinstance(cpu, dict) else None
    total = _count(used.get("total_usage")) if isinstance(used, dict) else None
    counts = [
        _count(each.get(name)) if isinstance(each, dict) else None
        for each in (networks.values() if isinstance(networks, dict) else ())
        for name in ("rx_bytes", "tx_bytes")
    ]
    told = [count for count in counts if count is not None]
    return Usage(total, sum(told) if told and len(told) == len(counts) else None)


def _count(value: object) -> int | None:
    return value if type(value) is int and 0 <= value < 2**64 else None


def _failures(state: Mapping[str, Any]) -> tuple[Failure, ...]:
    health = state.get("Health") or state.get("Healthcheck")
    log = health.get("Log") if isinstance(health, dict) else None
    failed = [
        check for check in (log if isinstance(log, list) else [])[-_CHECKS_READ:]
        if isinstance(check, dict) and check.get("ExitCode") != 0
    ]  # fmt: skip
    return tuple(_failure(check) for check in failed[: -FAILURES - 1 : -1])


def _failure(check: Mapping[str, Any]) -> Failure:
    code, output = check.get("ExitCode"), str(check.get("Output") or "")[: 2 * LONGEST_REASON]
    return Failure(
        at=parse_time(check.get("End")),
        exit_code=code if type(code) is int and abs(code) < 2**32 else None,
        output=printable(output.strip(), LONGEST_REASON),
    )


def _signal_of(code: int) -> str:
    """The name of the signal behind an exit code as shells and engines tell it, or nothing."""
    with contextlib.suppress(ValueError):
        return f" ({signal.Signals(code - 128).name})"
    return ""


def _address_on(endpoint: Mapping[str, Any]) -> str:
    """The IPv4 address, or the IPv6 one on a network that has no other."""
    return _text(endpoint.get("IPAddress") or endpoint.get("GlobalIPv6Address") or "")


def _text(value: object) -> str:
    if isinstance(value, str) and value.isascii() and value.isprintable():
        return value
    raise TypeError(f"{value!r:.80} is no printable text")


def _past(moment: datetime | None, not_after: int | None) -> int:
    at = nanos(moment)
    return at if not_after is None or at <= not_after else 0


def _names(name: str, hostname: object, networks: Mapping[str, Any]) -> frozenset[str]:
    names: list[object] = [name, hostname]
    for endpoint in networks.values():
        for more in (endpoint.get("Aliases"), endpoint.get("DNSNames")) if isinstance(endpoint, dict) else ():
            if isinstance(more, list):
                names += more
    return frozenset([each for each in names if each and isinstance(each, str)])


def _addresses(networks: Mapping[str, Any]) -> frozenset[str]:
    found: list[object] = []
    for endpoint in networks.values():
        if isinstance(endpoint, dict):
            found += endpoint.get("IPAddress"), endpoint.get("GlobalIPv6Address")
    return frozenset([each for each in found if each and isinstance(each, str)])


def _published_ports(*published: object) -> frozenset[int]:
    ports = set()
    for each in published:
        for bindings in each.values() if isinstance(each, dict) else ():
            for binding in bindings if isinstance(bindings, list) else ():
                if isinstance(binding, dict):
                    ports.add(_port(binding.get("HostPort")))
    ports.discard(0)
    return frozenset(ports)


def _port(text: Any) -> int:
    """A port's number; 0 for anything else."""
    try:
        number = int(text or 0)
    except (ValueError, TypeError, OverflowError):
        return 0
    return number if 0 < number <= _MAX_PORT else 0


def has_address(status: str) -> bool:
    """Whether a container in this state owns its ip."""
    return status in {"running", "paused"}


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


def _tcp_ports(exposed: Iterable[str]) -> tuple[int, ...]:
    specs = (spec.partition("/") for spec in exposed)
    ports = (_port(port) for port, _, protocol in specs if protocol in {"", "tcp"})
    return tuple(sorted(port for port in ports if port))


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
