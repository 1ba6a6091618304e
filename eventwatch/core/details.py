"""What is told of a node besides its document: who it is, why it ended, whether it starts again and again. Pure.

Contract: whatever a container brings along (name, image, labels, what its health checks print) is cleaned for a
terminal and cut to a bound here, so that it can be kept, shown and sent as it is.

Not promised: that an end is explained for certain. The engine says with which code and whether for lack of memory;
who asked for it is concluded from its `kill` events and our own stops.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final

from eventwatch.core.durations import about
from eventwatch.core.facts import STOPPING, Ending, Failure, Observation
from eventwatch.core.text import printable

#: Characters of a name or image, labels that are kept, and characters of their keys and values.
LONGEST_NAME: Final = 200
LABELS: Final = 32
LONGEST_LABEL: Final = 100
#: Characters of a whole reason.
LONGEST_TEXT: Final = 600
#: A container crash-loops that was started again by its restart policy so often within so many seconds.
CRASH_LOOP: Final = 3
CRASH_LOOP_SECONDS: Final = 300.0
#: Seconds since its start in which a container that was restarted often is taken for one in a loop at first sight.
JUST_STARTED: Final = 60.0
#: Looks that are remembered of a container's restarts.
LOOKS: Final = 16
#: A time from the database is rounded to milliseconds.
SAME_MOMENT: Final = timedelta(milliseconds=2)
#: Signals that end no container as a rule: somebody sent them to make it do something else.
_HARMLESS: Final = {"SIGHUP", "SIGUSR1", "SIGUSR2", "SIGWINCH", "SIGCONT", "SIGCHLD"}
#: Exit codes after SIGTERM and SIGKILL, by which stops on demand end, and not only these.
_STOPPED: Final = {143, 137}


class End(StrEnum):
    """What kind of end a container's last one was."""

    #: The kernel killed it, or a process in it, for lack of memory.
    OOM = "oom"
    #: By itself, with an error.
    FAILED = "failed"
    #: By itself, with exit code 0.
    CLEAN = "clean"
    #: Somebody asked for it: eventwatch itself, or a client of the engine.
    ASKED = "asked"
    #: By a signal that nobody was seen to send, as nobody looked.
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Details:
    """A container as an inspection told of it. Times are aware UTC, and None for never."""

    name: str = ""
    image: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    networks: tuple[str, ...] = ()
    created_at: datetime | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    restart_count: int = 0
    #: How the last run ended; None while it runs.
    ending: Ending | None = None
    #: The last failed health checks, the newest first, while it is not healthy.
    failures: tuple[Failure, ...] = ()

    @property
    def ran(self) -> float | None:
        """For how long (s) the run lasted that ended."""
        if not (self.ending and self.ending.finished_at and self.started_at):
            return None
        return max(0.0, (self.ending.finished_at - self.started_at).total_seconds())


def details_of(seen: Observation, before: Details | None = None) -> Details:
    """What is kept of an inspection; `before` is of an earlier one of the same container, whose labels stay."""
    if before and before.labels and before.created_at == seen.created_at:
        labels = before.labels
    else:
        kept = list(seen.labels.items())[:LABELS]
        labels = {printable(key, LONGEST_LABEL): printable(value, LONGEST_LABEL) for key, value in kept}
    return Details(
        name=printable(seen.name, LONGEST_NAME),
        image=sys.intern(printable(seen.image, LONGEST_NAME)),  # many nodes have the same
        labels=labels,
        networks=tuple(printable(name, LONGEST_NAME) for name in seen.networks[:LABELS]),
        created_at=seen.created_at,
        started_at=seen.started_at,
        finished_at=seen.finished_at,
        restart_count=seen.restart_count,
        ending=seen.ending,
        failures=seen.failures,
    )


# -- ends ---------------------------------------------------------------------------------------------------


def end_kind(ending: Ending, *, asked: bool | None) -> End:
    """What kind of end it was. `asked`: whether somebody asked for it; None: nobody looked."""
    if ending.oom_killed and not asked:
        return End.OOM
    if asked:
        return End.ASKED
    if ending.exit_code == 0 and not ending.error:
        return End.CLEAN
    return End.UNKNOWN if asked is None and ending.exit_code in _STOPPED else End.FAILED


@dataclass(frozen=True, slots=True)
class OnRecord:
    """A node's last change of status in the history: why, and when it came last (`at`).

    Of an end that was explained also its kind, who asked for it, and when the run ended, by the engine's clock.
    """

    status: str
    reason: str
    at: datetime
    end: str = ""
    asked: str = ""
    ended_at: datetime | None = None


def end_on_record(record: OnRecord | None, details: Details) -> tuple[End, str] | None:
    """What kind of end the last one was, and who asked for it, if it is this one that is on record."""
    if record is None or details.ending is None:
        return None
    if record.ended_at and details.ending.finished_at and record.end in set(End):
        same = abs(details.ending.finished_at - record.ended_at) < SAME_MOMENT
        return (End(record.end), record.asked) if same else None
    same_run = details.started_at is not None and details.started_at <= record.at
    return (End.ASKED, record.reason) if record.status == STOPPING and same_run else None


def end_reason(ending: Ending, *, ran: float | None = None, asked: str = "") -> str:
    """Such as `exit code 137 (SIGKILL), out of memory, after 3h 2m; stopped by ...`."""
    text = str(ending)
    if ran is not None:
        told, separator, rest = text.partition("; ")
        text = f"{told}, after {about(ran)}{separator}{rest}"
    return printable(f"{text}; {asked}" if asked else text, LONGEST_TEXT)


def die_reason(code: str, *, asked: str = "") -> str:
    """What the event of an end tells by itself: its exit code, if that is one."""
    known = int(code) if code.isdigit() and len(code) < 4 else None  # noqa: PLR2004 - an exit code's digits
    return end_reason(Ending(exit_code=known), asked=asked)


def asked_by(number: str) -> str:
    """Who asked for an end by this signal (a number, or a name); empty if it is none that ends a container."""
    name = number if number.startswith("SIG") else f"SIG{number}"
    if number.isdigit():
        with contextlib.suppress(ValueError):
            name = signal.Signals(int(number)).name
    return "" if name in _HARMLESS else f"stopped by a client of the engine ({name})"


def idle_reason(idle: float, *, limit: float, source: str) -> str:
    """Why we stop an idle node; `source` says where the limit (s) comes from."""
    return f"stopped by eventwatch: idle for {about(idle)}, limit {about(limit)} by {source}"


# -- crash loops --------------------------------------------------------------------------------------------

#: Looks at a container: when (monotonic, s), and how often its restart policy had started it by then.
Looks = tuple[tuple[float, int], ...]


def look_at_restarts(looks: Looks, seen: Observation, *, now: float, since_start: float | None) -> Looks:
    """The looks with this one. `since_start` (s): for how long the container has run, by its engine."""
    count = seen.restart_count
    if not looks:
        in_loop = seen.status == "restarting" or (since_start is not None and since_start < JUST_STARTED)
        return ((now, max(0, count - CRASH_LOOP) if in_loop else count), (now, count))
    if count < looks[-1][1]:  # a person has started it, and the engine counts anew
        return ((now, 0), (now, count))
    if count == looks[-1][1]:
        return looks
    return (*looks, (now, count))[-LOOKS:]


def restarts_lately(looks: Looks, *, now: float) -> int:
    """How often the restart policy has started it within the last `CRASH_LOOP_SECONDS`."""
    if not looks:
        return 0
    before = [count for at, count in looks if now - at > CRASH_LOOP_SECONDS]
    return looks[-1][1] - (before[-1] if before else looks[0][1])


def is_crash_loop(looks: Looks, *, now: float) -> bool:
    """Whether it starts again and again."""
    return bool(looks) and restarts_lately(looks, now=now) >= CRASH_LOOP


# -- for programs -------------------------------------------------------------------------------------------


def brief_row(details: Details) -> dict[str, Any]:
    """What a list of nodes shows of each, for JSON."""
    ending = details.ending
    return {
        "name": details.name,
        "image": details.image,
        "started_at": details.started_at,
        "finished_at": details.finished_at,
        "restart_count": details.restart_count,
        "exit_code": ending.exit_code if ending else None,
        "oom_killed": ending.oom_killed if ending else False,
    }


def full_row(details: Details) -> dict[str, Any]:
    """What is shown of one node besides `brief_row`, for JSON."""
    return {
        "labels": dict(details.labels),
        "networks": list(details.networks),
        "created_at": details.created_at,
        "ran": details.ran,
        "error": printable(details.ending.error, LONGEST_NAME) if details.ending else "",
        "failures": [
            {"at": failure.at, "exit_code": failure.exit_code, "output": failure.output}
            for failure in details.failures
        ],
    }
