"""The engine's JSON, and its event stream, turned into facts.

Reads only what every API version and Podman agree on: `Type`, `Action`, `Actor` and `timeNano` of an event (API
1.52 dropped `status`, `id` and `from`). Nothing here asks the engine anything.

Contract: what is no event is a `MalformedEventError`, what is no inspection a KeyError, TypeError or
AttributeError.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any, Final

from eventwatch.core.facts import (
    ENDED,
    LONGEST_ID,
    LONGEST_REASON,
    NO_HEALTH_CHECK,
    NOT_RUNNING_IP,
    Ending,
    Event,
    Failure,
    Observation,
    Usage,
    is_container_id,
    nanos,
    normal_health,
    parse_time,
)
from eventwatch.core.listing import Listed
from eventwatch.core.text import printable

#: Failed health checks that are told of, and entries of the engine's log of checks that are looked at.
_FAILURES: Final = 3
_CHECKS_READ: Final = 20
_NOT_RUNNING: Final = ENDED | {"restarting", "removing"}

#: Podman's names for Docker's actions, by which it filters (though it may say `die`), and for Docker's states.
ACTION_ALIASES: Final = {"died": "die", "remove": "destroy"}
STATUS_ALIASES: Final = {
    "configured": "created",
    "initialized": "created",
    "stopped": "exited",
    "stopping": "running",  # which is a word of ours, for a stop of ours
}

#: What is subscribed to, beside its aliases. The engine matches `health_status` as a prefix.
CONTAINER_ACTIONS: Final = (
    "create",
    "start",
    "restart",
    "die",
    "stop",
    "kill",
    "oom",
    "pause",
    "unpause",
    "rename",
    "update",
    "destroy",
    "health_status",
)
NETWORK_ACTIONS: Final = ("connect", "disconnect")
#: What Podman calls it when it has cut the log of which it reads its events, and the `Type` of that.
LOG_CUT: Final = "log-rotation"
LOG_CUT_TYPE: Final = "system"

_HEALTH_RESULTS: Final = ("starting", "healthy", "unhealthy")
_END_OF_TIME: Final = 2**63
_MAX_PORT: Final = 65535
_BRIEF = re.compile(r"[A-Z0-9+]{1,12}", re.ASCII)


def _is_name(text: object) -> bool:
    """Whether a database can be asked for this, and a log can show it."""
    return isinstance(text, str) and 0 < len(text) <= LONGEST_ID and text.isascii() and text.isprintable()


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
        if not (isinstance(action, str) and isinstance(subject, str) and isinstance(attributes, dict)):
            raise TypeError("wrong field types")  # noqa: TRY301
        if type(time_nano) is not int:
            raise TypeError("wrong field types")  # noqa: TRY301
        if kind == "container" and not _is_name(subject):
            raise TypeError(f"{subject!r:.80} is no id")  # noqa: TRY301
        if not 0 < time_nano < _END_OF_TIME:  # the next resumption would ask for it
            raise TypeError("timeNano out of range")  # noqa: TRY301
    except (KeyError, TypeError, AttributeError) as error:
        raise MalformedEventError(f"{type(error).__name__}: {error}") from error
    if kind == "network":
        return _network_event(action, subject, attributes, raw)
    if kind != "container":
        return None
    action, _, rest = action.partition(":")
    action = ACTION_ALIASES.get(action, action)
    if action == "health_status":
        # Podman names the result beside the action, Docker in it.
        told = raw.get("HealthStatus")
        health = rest.strip() or (told if told in _HEALTH_RESULTS else None)
        return Event(action, subject, time_nano, health=health, raw=raw)
    return Event(action, subject, time_nano, detail=rest or _told(action, attributes), raw=raw)


def _network_event(
    action: str, subject: str, attributes: Mapping[str, Any], raw: Mapping[str, Any]
) -> Event | None:
    container, name = attributes.get("container"), attributes.get("name")
    if container is None and action in NETWORK_ACTIONS:  # Podman's are about the container, and name that
        container, name, subject = subject, attributes.get("network"), ""
    if not _is_name(container) or action not in NETWORK_ACTIONS:
        return None
    network = name if isinstance(name, str) else ""
    return Event(action, str(container), raw["timeNano"], detail=subject, network=network, raw=raw)


def log_cut(raw: object) -> int:
    """Engine time (ns) at which Podman has cut its log of events, of its word of that; 0 for all else."""
    if isinstance(raw, dict) and (raw.get("Type"), raw.get("Action")) == (LOG_CUT_TYPE, LOG_CUT):
        at = raw.get("timeNano")
        return at if type(at) is int else 0
    return 0


def _told(action: str, attributes: Mapping[str, Any]) -> str:
    """The exit code of a `die`, the signal of a `kill`; a label of the same name overwrites either."""
    name = {"die": "exitCode", "kill": "signal"}.get(action)
    value = attributes.get(name) if name else None
    return value if isinstance(value, str) and _BRIEF.fullmatch(value) else ""


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
        checked=health != NO_HEALTH_CHECK or _has_check(config.get("Healthcheck")),
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


def _has_check(configured: object) -> bool:
    """Whether this configuration makes the engine check; `NONE` turns off the check of an image."""
    test = configured.get("Test") if isinstance(configured, dict) else None
    return isinstance(test, list) and bool(test) and test[0] in {"CMD", "CMD-SHELL"}


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


def parse_addresses(network: Mapping[str, Any]) -> dict[str, str]:
    """Addresses of the containers on a network, by container; what is odd in its answer is left out."""
    containers, found = network.get("Containers"), {}
    for node_id, endpoint in containers.items() if isinstance(containers, dict) else ():
        with suppress(TypeError, AttributeError):
            address = _text(endpoint.get("IPv4Address") or endpoint.get("IPv6Address") or "")
            found[node_id] = address.partition("/")[0]
    return found


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
        check
        for check in (log if isinstance(log, list) else [])[-_CHECKS_READ:]
        if isinstance(check, dict) and check.get("ExitCode") != 0
    ]
    return tuple(_failure(check) for check in failed[: -_FAILURES - 1 : -1])


def _failure(check: Mapping[str, Any]) -> Failure:
    code, output = check.get("ExitCode"), str(check.get("Output") or "")[: 2 * LONGEST_REASON]
    return Failure(
        at=parse_time(check.get("End")),
        exit_code=code if type(code) is int and abs(code) < 2**32 else None,
        output=printable(output.strip(), LONGEST_REASON),
    )


def parse_listed(row: object) -> Listed | None:
    """Read a row of the list; None for what is about no container. What is odd in it is left out."""
    if not isinstance(row, dict) or not is_container_id(row.get("Id")):
        return None
    names, labels, networks = row.get("Names"), row.get("Labels"), row.get("NetworkSettings")
    # Links add names with two slashes.
    own = [
        name[1:]
        for name in (names if isinstance(names, list) else ())
        if isinstance(name, str) and name.count("/") == 1
    ]
    state, text, image = (
        value if isinstance(value := row.get(key), str) else "" for key in ("State", "Status", "Image")
    )
    endpoints = networks.get("Networks") if isinstance(networks, dict) else None
    return Listed(
        row["Id"],
        STATUS_ALIASES.get(state, state),
        text,
        _listed_addresses(endpoints) if isinstance(endpoints, dict) else None,
        name=own[0] if own else "",
        image=image,
        labels={str(key): str(value) for key, value in labels.items()} if isinstance(labels, dict) else {},
    )


def _listed_addresses(endpoints: Mapping[str, Any]) -> Mapping[str, str] | None:
    try:
        return {name: _address_on(endpoint or {}) for name, endpoint in endpoints.items()}
    except (TypeError, AttributeError):
        return None


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


def _tcp_ports(exposed: Iterable[str]) -> tuple[int, ...]:
    specs = (spec.partition("/") for spec in exposed)
    ports = (_port(port) for port, _, protocol in specs if protocol in {"", "tcp"})
    return tuple(sorted(port for port in ports if port))


#: A line is its container's labels, mostly; beyond this it is skipped, not buffered.
MAX_LINE: Final = 8 * 1024 * 1024


def engine_time(time_nano: int) -> str:
    """`SECONDS.NANOS` as the engine's `since` wants it; through a float it would lose events."""
    return "{}.{:09d}".format(*divmod(time_nano, 1_000_000_000))


async def split_lines(
    chunks: AsyncIterator[bytes], on_oversized: Callable[[str], object], *, limit: int = MAX_LINE
) -> AsyncIterator[bytes]:
    """Split a byte stream into non-empty lines; one longer than `limit` is reported and skipped.

    An unfinished last line is dropped: the stream was cut in the middle of it.
    """
    pending = bytearray()
    skipping = False
    async for chunk in chunks:
        *complete, rest = chunk.split(b"\n")
        for end in complete:
            pending += end
            if not skipping and pending.strip():
                yield bytes(pending)
            pending.clear()
            skipping = False
        pending += rest
        if len(pending) > limit:
            if not skipping:
                on_oversized(f"line longer than {limit} bytes: {bytes(pending[:120])!r}")
            skipping = True
            pending.clear()
