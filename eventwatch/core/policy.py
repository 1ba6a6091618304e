"""The decisions, each a pure function of what is passed in: no clock, no engine, no database.

Everything that eventwatch ever writes, deletes or stops is decided here, so this is the file to read when a
document surprises you, and the file that the property tests drive.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum, auto
from typing import Final

from eventwatch.core.durations import TooLongError, format_duration, parse_duration
from eventwatch.core.facts import (
    NO_HEALTH_CHECK,
    NOT_RUNNING_IP,
    STOPPING,
    Claim,
    Event,
    Observation,
    Owner,
    Recorded,
    Usage,
    nanos,
    normal_health,
)
from eventwatch.core.text import printable

Fields = Mapping[str, str | int]

#: What a node is that can be idle; one that its restart policy starts again and again is as good as running.
#: Labels by which whoever makes a container says when it is idle, and how long it may take to end.
IDLE_LABEL: Final = "eventwatch.idle-timeout"
STOP_LABEL: Final = "eventwatch.stop-timeout"
#: Seconds. The caller of a stop waits so long at most.
LONGEST_STOP: Final = 3600.0
#: Characters of a duration.
LONGEST_TIMEOUT: Final = 40
NO_TIMEOUT: Final = "is no duration such as 2h, and not never"
AT_WORK: Final = frozenset({"running", "restarting"})

#: An event this much older than the newest fact is no inversion (up to 0.1 s were measured): the engine's
#: clock was set back, and believing the old reading would make every later event look stale.
CLOCK_SET_BACK_NS: Final = 5_000_000_000


@dataclass(frozen=True, slots=True)
class Hint:
    """What an event itself proves, to be acted on at once: fields, a removal, or the need to inspect now."""

    fields: Fields | None = None
    delete: bool = False
    inspect: bool = False

    def __bool__(self) -> bool:
        return self.fields is not None or self.delete or self.inspect


_NO_HINT: Final = Hint()
_HINTS: Final = {
    # An inspection takes 1 ms here, and never shows `running` with the ip of an earlier life.
    "start": Hint(inspect=True),
    "unpause": Hint(inspect=True),
    # An inspection would block on the container's lock here, for seconds in a burst.
    "die": Hint(fields={"status": "exited", "ip": NOT_RUNNING_IP}),
    "pause": Hint(fields={"status": "paused"}),
    "destroy": Hint(delete=True),
}

#: Events that carry no hint but may stand for a change: the node is inspected once it has been quiet.
SETTLING: Final = frozenset(
    {"stop", "kill", "oom", "restart", "rename", "create", "update", "connect", "disconnect"}
)
KNOWN_ACTIONS: Final = SETTLING | _HINTS.keys() | {"health_status"}


def hint_of(event: Event, *, health_check: bool) -> Hint:
    """What may be written the moment `event` arrives, before anyone asks the engine."""
    if event.action == "health_status":
        return Hint(fields={"health": event.health}) if health_check and event.health else _NO_HINT
    return _HINTS.get(event.action, _NO_HINT)


def is_older(time_nano: int, as_of: int) -> bool:
    """Whether a fact of engine time `time_nano` is older than what is known as of `as_of`."""
    return 0 < as_of - time_nano < CLOCK_SET_BACK_NS


def is_run_of(seen: Observation, *, since: int, until: int | None = None) -> bool:
    """Whether a container was seen running, in a run that began between two engine times (ns)."""
    started = nanos(seen.started_at)
    # The engine's own time of a start is cut down to microseconds.
    return (
        seen.found and seen.status == "running" and since < started + 1000 and (until is None or started <= until)
    )


def complete_hint(fields: Fields, known: Recorded | None, *, health_check: bool) -> dict[str, str | int]:
    """Keep the documents' invariant (not running, so not healthy) in a write that does not read first."""
    completed = dict(fields)
    status = completed.get("status", known.status if known else None)
    health = completed.get("health", known.health if known else None)
    if health_check and isinstance(status, str) and isinstance(health, str):
        normal = normal_health(status, health)
        if normal != health:
            completed["health"] = normal
    return completed


def desired_fields(seen: Observation, *, node_port: int, health_check: bool) -> dict[str, str | int]:
    """The fields of ours that follow from an observation; absent means: leave as it is."""
    fields: dict[str, str | int] = {"status": seen.status, "ip": seen.ip}
    if health_check:
        fields["health"] = seen.health
    if not seen.tcp_ports or node_port in seen.tcp_ports:
        fields["port"] = node_port
    elif len(seen.tcp_ports) == 1:
        fields["port"] = seen.tcp_ports[0]
    return fields


def started_fields(ip: str, *, checked: bool, health_check: bool) -> dict[str, str | int]:
    """What a start proves of a container whose address is known; `checked`: whether it has a health check."""
    fields: dict[str, str | int] = {"status": "running", "ip": ip}
    if health_check:
        fields["health"] = "starting" if checked else NO_HEALTH_CHECK
    return fields


def difference(recorded: Recorded, wanted: Fields, *, claim: Claim | None = None) -> dict[str, str | int]:
    """The fields of `wanted` that the document does not say yet.

    `claim` is a live claim on this run of the container (see `claim_on`). The node keeps saying `stopping` then;
    once the claim stands it says so again after a manager has written `running` back, not before: that is how a
    request is noticed. Without a claim the word is the leftover of a process that died, and what the engine says
    replaces it.
    """
    if claim and wanted.get("status") in AT_WORK and (claim.stands or recorded.status == STOPPING):
        wanted = {**wanted, "status": STOPPING}
    return {name: value for name, value in wanted.items() if getattr(recorded, name) != value}


def claim_on(seen: Observation, *claims: Claim | None) -> Claim | None:
    """The first of `claims` that is about this run of the container; a start by its restart policy is none."""
    run = as_run(seen)
    return next((claim for claim in claims if claim and (seen.restart_count or claim.run == run)), None)


def as_run(seen: Observation) -> datetime | None:
    """What identifies the run of a container: when it started, as the database keeps it (naive UTC, ms)."""
    started = seen.started_at
    return started.replace(tzinfo=None, microsecond=started.microsecond // 1000 * 1000) if started else None


class Ownership(Enum):
    """Whose business a document is, from the point of view of one engine."""

    OWN = auto()
    OTHERS = auto()
    NOBODYS = auto()


def ownership(recorded: Recorded, owner: Owner | None, *, engine_id: str) -> Ownership:
    """Which engine last had the container, by the record of owners or else by the document's own stamp.

    The record counts more: a manager's replace of the whole document drops or revives a stamp, never the record.
    """
    last = (owner.engine_id if owner else None) or recorded.engine_id
    if not last:
        return Ownership.NOBODYS
    return Ownership.OWN if last == engine_id else Ownership.OTHERS


def mass_limit(configured: int | None, nodes: int) -> int:
    """How many of `nodes` one sweep may delete or stop: as configured, else half of them and at least 5."""
    return configured if configured is not None else max(5, nodes // 2)


@dataclass(frozen=True, slots=True)
class Timeout:
    """A time in seconds (infinite: never), what is wrong with a node's own one, and where the time comes from."""

    seconds: float
    problem: str = ""
    source: str = ""


def idle_timeout_of(written: str | float | None, labels: Mapping[str, str], default: float) -> Timeout:
    """After how long a node is idle: by its document, which a manager can change, its label, or the setting.

    A value of its own counts even where the setting turns idle stops off: whoever made the node wants it. One that
    cannot be read is a problem, and the setting stands.
    """
    places = [("field idle_timeout", written), (f"label {IDLE_LABEL}", labels.get(IDLE_LABEL))]
    return _own_timeout(places, default, setting="setting EVENTWATCH_IDLE_TIMEOUT")


def stop_timeout_of(labels: Mapping[str, str], default: float) -> Timeout:
    """How long a container is given to end by itself: by its label, at most an hour, or by the setting."""
    places = [(f"label {STOP_LABEL}", labels.get(STOP_LABEL))]
    own = _own_timeout(places, default, setting="setting EVENTWATCH_STOP_TIMEOUT")
    if own.seconds > LONGEST_STOP and own.seconds != default:
        return Timeout(
            default, f"label {STOP_LABEL} is longer than {format_duration(LONGEST_STOP)}; the setting stands"
        )
    return own


def _own_timeout(places: Iterable[tuple[str, str | float | None]], default: float, *, setting: str) -> Timeout:
    for place, value in places:
        if value is None:
            continue
        try:
            if isinstance(value, str) and value.strip().lower() == "never":
                return Timeout(math.inf, source=place)
            if isinstance(value, str) and len(value) > LONGEST_TIMEOUT:
                raise ValueError  # noqa: TRY301 - one exit for everything that is none
            return Timeout(parse_duration(value) or math.inf, source=place)
        except ValueError as error:
            wrong = f"{error}, or never" if isinstance(error, TooLongError) else NO_TIMEOUT
            shown = printable(str(value)[:LONGEST_TIMEOUT])
            return Timeout(default, f"{place} {wrong}: {shown}; the setting stands", setting)
    return Timeout(default, source=setting)


@dataclass(frozen=True, slots=True)
class Activity:
    """Whether a node works; None: that cannot be told. `reason` says by what."""

    works: bool | None
    reason: str


def activity(first: Usage, second: Usage, *, seconds: float, thresholds: Mapping[str, float]) -> Activity:
    """Whether a node worked between two looks that were `seconds` apart.

    `thresholds` has what is looked at: `cpu`, a share of one CPU, and `network`, bytes a second. What is not told,
    or whose count went back, leaves it open, unless the other shows work.
    """
    rates = {
        "cpu": _rate(first.cpu, second.cpu, seconds * 1e9),
        "network": _rate(first.network, second.network, seconds),
    }
    words = {"cpu": "it uses {:.0%} of a CPU", "network": "it receives and sends {:.0f} bytes a second"}
    for kind, threshold in thresholds.items():
        rate = rates[kind]
        if rate is not None and rate >= threshold:
            return Activity(works=True, reason=words[kind].format(rate))
    unknown = [kind for kind in thresholds if rates[kind] is None]
    if unknown:
        return Activity(works=None, reason=f"the engine does not tell its usage of {' and '.join(unknown)}")
    return Activity(works=False, reason="it does nothing")


def _rate(first: int | None, second: int | None, time: float) -> float | None:
    return None if first is None or second is None or second < first or time <= 0 else (second - first) / time


@dataclass(frozen=True, slots=True)
class Idleness:
    """When a node would be stopped, and why not yet. `left` is in seconds; None means never as things stand."""

    idle: bool
    left: float | None
    reason: str


def idleness(
    recorded: Recorded,
    seen: Observation,
    *,
    now: datetime,
    timeout: float,
    used_at: datetime | None = None,
    owner: Owner | None = None,
) -> Idleness:
    """Whether a node has been without a request for `timeout` seconds (0 = off), by `now` (aware UTC).

    Counts from the later of the last request and `used_at`, the last start by a person or a manager (None: the
    inspection's own start). A `last_req_time` that is missing, lies in the future, or was only ever written by
    eventwatch itself (`owner.registered`) never stops a node.
    """
    if reason := _why_never_idle(recorded, seen, now=now, timeout=timeout, owner=owner):
        return Idleness(idle=False, left=None, reason=reason)
    last_request = as_utc(recorded.last_req_time or now)
    start = used_at or seen.started_at
    since = max(last_request, start) if start else last_request
    left = timeout - (now - since).total_seconds()
    if left > 0:
        return Idleness(idle=False, left=left, reason=f"{left:.0f} s of its idle time are left")
    return Idleness(idle=True, left=0.0, reason="its idle time is used up")


def _why_never_idle(
    recorded: Recorded, seen: Observation, *, now: datetime, timeout: float, owner: Owner | None
) -> str:
    if timeout <= 0:
        return "idle stops are off (idle_timeout is 0)"
    if timeout == math.inf:
        return "its own idle timeout is never"
    if seen.status not in AT_WORK:
        return f"it is {seen.status or 'gone'}, not running"
    if recorded.last_req_time is None:
        return "it has no last_req_time"
    if owner and owner.registered is not None and owner.registered == recorded.last_req_time:
        return "nobody has written its last_req_time since it was registered"
    return "its last_req_time lies in the future" if as_utc(recorded.last_req_time) > now else ""


def recorded_idleness(
    recorded: Recorded, used_at: datetime | None, now: datetime, timeout: float, owner: Owner | None = None
) -> Idleness:
    """`idleness` by what the document says, for showing it; the sweep asks the engine."""
    seen = Observation(recorded.node_id, status=recorded.status or "", started_at=used_at)
    return idleness(recorded, seen, now=now, timeout=timeout, owner=owner)


def start_as_use(seen: Observation, before: datetime | None) -> datetime | None:
    """The last start that counts as a use of the node; `before` is what this said at the last look, if any.

    The engine counts the starts that its restart policy made since the last start by a person or a manager, and
    begins anew with each of those: a start that is counted is no use. A container that is already in a crash
    loop at the first look counts as used then.
    """
    return seen.started_at if not seen.restart_count or before is None else before


def why_not_to_stop(seen: Observation, *, network: str, label: str | None) -> str:
    """Why a container is no node that may be stopped; empty when it may be.

    A document alone makes no container a node: whoever can write the database could stop any container.
    """
    if network in seen.networks or (label and label_matches(label, seen.labels)):
        return ""
    which = f" and has no label {label}" if label else ""
    return f"its container is not on {network}{which}"


def as_utc(moment: datetime) -> datetime:
    """The manager stores UTC without saying so."""
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def is_elsewhere(seen: Observation, network: str) -> bool:
    """Whether a running container cannot be reached on the node network."""
    return seen.status == "running" and network not in seen.networks


def where_it_is(seen: Observation) -> str:
    """On which networks a container is, in words."""
    if seen.networks == ("host",):
        return "uses its host's network and has no address of its own"
    return f"is on {', '.join(seen.networks)} only" if seen.networks else "is on no network"


def label_matches(wanted: str, labels: Mapping[str, str]) -> bool:
    """Whether `labels` has `key`, or `key=value`, as the engine's own label filter reads it."""
    key, separator, value = wanted.partition("=")
    return key in labels and (not separator or labels[key] == value)
