"""What is told of a node besides its document: ends, crash loops, bounds."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from eventwatch.core.clock import VirtualClock
from eventwatch.core.details import (
    CRASH_LOOP_SECONDS,
    LONGEST_TEXT,
    LOOKS,
    End,
    Looks,
    OnRecord,
    asked_by,
    details_of,
    die_reason,
    end_kind,
    end_reason,
    full_row,
    idle_reason,
    is_crash_loop,
    look_at_restarts,
    restarts_lately,
)
from eventwatch.core.durations import about
from eventwatch.core.facts import Cause, Ending, Event, Failure, Observation, Write
from eventwatch.core.metrics import Metrics
from eventwatch.core.reasons import Ended, Reasons
from eventwatch.engine.wire import parse_container, parse_event

ID = "a" * 64
START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
KILLED = Ending(exit_code=137, finished_at=START + timedelta(hours=3, minutes=2))


def inspection(status: str = "exited", **state: Any) -> dict[str, Any]:
    return {
        "Id": ID,
        "Name": "/sandbox\x1b[2J",
        "RestartCount": 2,
        "State": {
            "Status": status,
            "StartedAt": "2026-01-02T03:04:05Z",
            "FinishedAt": "2026-01-02T06:06:05Z",
            "ExitCode": 137,
            "OOMKilled": True,
            **state,
        },
        "Config": {
            "Image": "tools:1" + "x" * 1000,
            "Labels": {f"key{n}": "v\n" * 1000 for n in range(100)},
        },
    }


def test_what_is_kept_of_an_inspection_is_clean_and_bounded() -> None:
    log = [
        {"ExitCode": 1, "Output": f"refused {n}\x1b[31m" + "x" * 10_000, "End": f"2026-01-02T06:06:0{n}Z"}
        for n in range(5)
    ]
    health = {"Status": "unhealthy", "Log": [*log, {"ExitCode": 0, "Output": "fine"}, 7]}
    details = details_of(parse_container(inspection(Health=health), network="net"))
    assert details.name == r"sandbox\x1b[2J"
    assert (details.restart_count, details.ran) == (2, 3 * 3600 + 120)
    assert details.ending is not None
    assert [failure.output[:13] for failure in details.failures] == [
        r"refused 4\x1b",
        r"refused 3\x1b",
        r"refused 2\x1b",
    ]
    assert details.failures[0].at == datetime(2026, 1, 2, 6, 6, 4, tzinfo=UTC)
    row = str(full_row(details))
    assert len(row) < 10_000
    assert "\\x1b" in row
    assert "\x1b" not in row
    running = parse_container(inspection("running", ExitCode=0), network="net")
    assert running.ending is None
    odd = {**inspection(), "Config": {"Image": 7, "Labels": 7}, "RestartCount": "x"}
    assert details_of(parse_container(odd, network="net")).image == ""


@pytest.mark.parametrize(
    ("ending", "asked", "kind"),
    [
        (replace(KILLED, oom_killed=True), False, End.OOM),
        (replace(KILLED, oom_killed=True), None, End.OOM),
        (replace(KILLED, oom_killed=True), True, End.ASKED),
        (KILLED, True, End.ASKED),
        (KILLED, False, End.FAILED),
        (KILLED, None, End.UNKNOWN),
        (Ending(exit_code=1), None, End.FAILED),
        (Ending(exit_code=0), False, End.CLEAN),
        (Ending(exit_code=0, error="no such file"), False, End.FAILED),
    ],
)
def test_an_end_is_of_one_kind(ending: Ending, asked: bool | None, kind: End) -> None:
    assert end_kind(ending, asked=asked) is kind


def test_an_end_is_told_with_its_signal_how_long_it_ran_and_who_asked() -> None:
    text = end_reason(
        replace(KILLED, oom_killed=True, failure=Failure(None, 1, "refused")), ran=10920, asked="asked"
    )
    assert text == (
        "exit code 137 (SIGKILL), out of memory, after 3h 2m; its last health check said: refused; asked"
    )
    assert (
        len(end_reason(replace(KILLED, error="x" * 9999, failure=Failure(None, 1, "y" * 9999))))
        <= LONGEST_TEXT + 1
    )
    assert die_reason("143", asked=asked_by("15")) == (
        "exit code 143 (SIGTERM); stopped by a client of the engine (SIGTERM)"
    )
    assert die_reason("LAB") == "no exit code"
    assert asked_by("1") == asked_by("SIGHUP") == ""
    assert asked_by("KILL") == asked_by("9") == "stopped by a client of the engine (SIGKILL)"
    assert idle_reason(1861, limit=1800, source="label eventwatch.idle-timeout") == (
        "stopped by eventwatch: idle for 31m 1s, limit 30m by label eventwatch.idle-timeout"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0ms"),
        (0.25, "250ms"),
        (4.4, "4s"),
        (60, "1m"),
        (1861, "31m 1s"),
        (93_784, "1d 2h"),
        (86_400, "1d"),
        (float("inf"), "never"),
        (-3, "0ms"),
        (3601, "1h"),
    ],
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert about(seconds) == text


def looked(counts: list[tuple[float, int]], status: str = "running", since_start: float | None = 999.0) -> Looks:
    looks: Looks = ()
    for at, count in counts:
        seen = Observation(ID, status=status, restart_count=count)
        looks = look_at_restarts(looks, seen, now=at, since_start=since_start)
    return looks


def test_a_crash_loop_is_some_restarts_in_a_short_time() -> None:
    assert not is_crash_loop(looked([(0, 1), (10, 2), (20, 3)]), now=20)  # the first may be long ago
    assert is_crash_loop(looked([(0, 1), (10, 2), (20, 4)]), now=20)
    assert not is_crash_loop(looked([(0, 1), (400, 2), (800, 3), (1200, 4)]), now=1200)
    looping = looked([(0, 1), (10, 2), (20, 4)])
    assert is_crash_loop(looping, now=CRASH_LOOP_SECONDS)
    assert not is_crash_loop(looping, now=CRASH_LOOP_SECONDS + 21)
    many = looked([(second, second) for second in range(1, 200)])
    assert len(many) == LOOKS
    assert is_crash_loop(many, now=200)
    by_a_person = looked([(0, 9), (1, 0)])
    assert restarts_lately(by_a_person, now=1) == 0
    assert restarts_lately(looked([(0, 9), (1, 0), (2, 1), (3, 3)]), now=3) == 3


def test_at_first_sight_a_container_is_in_a_crash_loop_if_it_has_just_started_once_more() -> None:
    assert is_crash_loop(looked([(0, 57)], "restarting"), now=0)
    assert is_crash_loop(looked([(0, 57)], since_start=5), now=0)
    assert not is_crash_loop(looked([(0, 57)]), now=0)
    assert not is_crash_loop(looked([(0, 2)], "restarting"), now=0)


# -- what a process remembers -------------------------------------------------------------------------------


def event(action: str, detail: str = "", *, second: float = 0.0) -> Event:
    return Event(action, ID, round((START.timestamp() + second) * 1e9), detail=detail)


def seen(status: str, *, finished: float = 0.0, **fields: Any) -> Observation:
    ending = Ending(exit_code=fields.pop("code", 137), finished_at=START + timedelta(seconds=finished))
    ended = None if status == "running" else ending
    return Observation(ID, status=status, started_at=START, ending=ended, **fields)


EXITED = Write(ID, {"status": "exited", "ip": ""}, Cause.EVENT)


@pytest.fixture
def told() -> list[Ended]:
    return []


@pytest.fixture
def reasons(told: list[Ended]) -> Reasons:
    known = Reasons(clock=VirtualClock(round(START.timestamp() * 1e9)), metrics=Metrics())
    known.on_end.append(told.append)
    return known


def test_an_end_is_told_once_and_only_when_an_inspection_explains_that_very_end(
    reasons: Reasons, told: list[Ended]
) -> None:
    reasons.on_inspection(seen("restarting", finished=1, code=1))
    reasons.on_event(event("start", second=2))
    reasons.on_event(event("die", "137", second=60))
    assert reasons.of_change(EXITED, "exited") == "exit code 137 (SIGKILL)"
    reasons.ended(ID)
    assert told == []
    assert reasons.row(ID)["reason"] == "exit code 137 (SIGKILL)"
    for _ in range(3):
        reasons.on_inspection(seen("exited", finished=60.001))
    assert [(end.kind, end.reason) for end in told] == [(End.FAILED, "exit code 137 (SIGKILL), after 1m")]
    assert reasons.row(ID)["end"] == "failed"


def test_who_asked_is_forgotten_with_the_next_start(reasons: Reasons, told: list[Ended]) -> None:
    reasons.on_event(event("kill", "1"))
    reasons.on_event(event("kill", "15"))
    reasons.on_event(event("die", "0", second=1))
    reasons.on_inspection(seen("exited", finished=1, code=0))
    reasons.ended(ID)
    reasons.on_event(event("start", second=2))
    reasons.on_event(event("die", "1", second=3))
    reasons.ended(ID)
    reasons.on_inspection(seen("exited", finished=3, code=1))
    assert [end.kind for end in told] == [End.ASKED, End.FAILED]
    assert told[0].reason == "exit code 0, after 1s; stopped by a client of the engine (SIGTERM)"
    assert "stopped by" not in told[1].reason


def test_our_own_stop_counts_more_than_its_kill_event(reasons: Reasons, told: list[Ended]) -> None:
    reasons.will_stop(ID, "stopped by eventwatch: idle")
    assert reasons.of_change(Write(ID, {}, Cause.IDLE), "stopping") == "stopped by eventwatch: idle"
    reasons.on_event(event("kill", "15"))
    reasons.on_event(event("die", "143", second=1))
    reasons.ended(ID)
    reasons.on_inspection(seen("exited", finished=1, code=143))
    assert told[0].reason == "exit code 143 (SIGTERM), after 1s; stopped by eventwatch: idle"


def test_what_ended_before_anybody_looked_is_not_told(reasons: Reasons, told: list[Ended]) -> None:
    reasons.on_inspection(seen("exited"))
    assert told == []
    assert reasons.row(ID)["end"] == "unknown"


STOPPED = "stopped by eventwatch: idle for 31m, limit 30m by setting EVENTWATCH_IDLE_TIMEOUT"
CLIENT = "stopped by a client of the engine (SIGKILL)"


def on_record(status: str, *, at: float, ended: float | None = None, end: str = "", asked: str = "") -> OnRecord:
    ended_at = None if ended is None else START + timedelta(seconds=ended, microseconds=-400)
    return OnRecord(status, asked, START + timedelta(seconds=at), end, asked, ended_at)


@pytest.mark.parametrize("recalled_first", [True, False])
@pytest.mark.parametrize(
    ("record", "code", "kind", "asked"),
    [
        (on_record("exited", at=61, ended=60, end="asked", asked=STOPPED), 1, "asked", STOPPED),
        (on_record("exited", at=61, ended=60, end="asked", asked=CLIENT), 137, "asked", CLIENT),
        (on_record("exited", at=61, ended=60, end="failed"), 137, "failed", ""),  # somebody looked, nobody asked
        (on_record("stopping", at=50, asked=STOPPED), 1, "asked", STOPPED),  # the watcher itself ended meanwhile
        (on_record("stopping", at=-50, asked=STOPPED), 1, "failed", ""),  # of an earlier run
        (on_record("exited", at=31, ended=30, end="asked", asked=STOPPED), 1, "failed", ""),
        (on_record("exited", at=61, ended=60, end="\x1b[2J", asked=STOPPED), 137, "unknown", ""),
        (on_record("running", at=50), 137, "unknown", ""),
    ],
)
def test_who_asked_for_an_end_outlives_the_process_that_saw_it(
    reasons: Reasons, record: OnRecord, code: int, kind: str, asked: str, *, recalled_first: bool
) -> None:
    if recalled_first:
        reasons.recall(ID, record)
    reasons.on_inspection(seen("exited", finished=60, code=code))
    if not recalled_first:
        reasons.recall(ID, record)
    row = reasons.row(ID)
    assert row["end"] == kind
    assert row["reason"].partition("; ")[2] == asked


REFUSED, SILENT = Failure(START, 1, "refused"), Failure(START, 3, "")


def test_why_a_node_is_unhealthy_is_told_once_an_inspection_explains_it(reasons: Reasons) -> None:
    told: list[tuple[str, str]] = []
    reasons.on_unhealthy.append(lambda node_id, reason: told.append((node_id, reason)))
    unhealthy = {"health": "unhealthy"}
    reasons.on_inspection(seen("running", health="starting", failures=(Failure(START, 1, "too early"),)))
    reasons.on_event(Event("health_status", ID, 1, health="unhealthy"))
    assert reasons.of_change(Write(ID, unhealthy, Cause.EVENT), None) == ""
    reasons.unhealthy(ID, Cause.EVENT)
    assert told == []
    for _ in range(2):
        reasons.on_inspection(seen("running", health="unhealthy", failures=(REFUSED,)))
    assert told == [(ID, "its last health check said: refused")]
    reasons.on_event(Event("health_status", ID, 1, health="healthy"))
    reasons.on_inspection(seen("running", health="unhealthy", failures=(SILENT,)))
    settled = reasons.of_change(Write(ID, unhealthy, Cause.SETTLE), None)
    reasons.unhealthy(ID, Cause.SETTLE)
    assert told[1:] == [(ID, settled)] == [(ID, "its last health check failed with exit code 3 and said nothing")]
    reasons.unhealthy(ID, Cause.EVENT)
    reasons.on_inspection(seen("running", health="healthy"))  # it has recovered before anybody looked
    reasons.on_inspection(seen("paused", health="unhealthy", failures=(REFUSED,)))
    assert len(told) == 2


def test_what_is_on_record_of_an_end_says_nothing_of_the_next(reasons: Reasons, told: list[Ended]) -> None:
    reasons.recall(ID, on_record("stopping", at=50, asked=STOPPED))
    reasons.on_inspection(seen("running"))
    reasons.runs(ID)  # the claim was taken back
    reasons.on_inspection(seen("exited", finished=70, code=1))
    assert reasons.row(ID)["end"] == "failed"
    reasons.recall(ID, on_record("exited", at=71, ended=70, end="asked", asked=CLIENT))
    assert reasons.row(ID)["end"] == "asked"
    reasons.on_event(event("start", second=80))
    reasons.on_event(event("die", "1", second=90))
    reasons.on_inspection(seen("exited", finished=90, code=1))
    reasons.ended(ID)
    assert [(end.kind, end.asked) for end in told] == [(End.FAILED, "")]


@pytest.mark.parametrize("recalled_first", [True, False])
def test_since_when_a_node_is_unhealthy_outlives_the_process(reasons: Reasons, *, recalled_first: bool) -> None:
    since = START - timedelta(minutes=5)
    if recalled_first:
        reasons.recall(ID, None, unhealthy_since=since)
    reasons.on_inspection(seen("running", health="unhealthy"))
    if not recalled_first:
        reasons.recall(ID, None, unhealthy_since=since)
    assert reasons.row(ID)["unhealthy_for"] == reasons.longest_unhealthy() == 300
    reasons.on_inspection(seen("running", health="healthy"))
    reasons.on_inspection(seen("running", health="unhealthy"))
    assert reasons.row(ID)["unhealthy_for"] == 0


def test_what_is_on_record_counts_no_more_once_it_was_seen_healthy(reasons: Reasons) -> None:
    reasons.on_inspection(seen("running", health="healthy"))
    reasons.recall(ID, None, unhealthy_since=START - timedelta(minutes=5))
    reasons.on_inspection(seen("running", health="unhealthy"))
    assert reasons.row(ID)["unhealthy_for"] == 0


def test_for_how_long_a_node_has_been_unhealthy(reasons: Reasons) -> None:
    clock = reasons._clock
    assert isinstance(clock, VirtualClock)
    reasons.on_event(Event("health_status", ID, 1, health="unhealthy"))
    clock.advance_to(100)
    reasons.on_inspection(seen("running", health="unhealthy"))
    assert reasons.row(ID)["unhealthy_for"] == reasons.longest_unhealthy() == 100
    reasons.on_inspection(seen("paused", health="unhealthy"))
    assert reasons.row(ID)["unhealthy_for"] is None
    assert reasons.longest_unhealthy() == 0
    reasons.forget(ID)
    assert reasons.row(ID)["name"] == ""


@pytest.mark.parametrize("code", ["137", "0", "lab", "9" * 99, 7, None, "\x1b[2J"])
def test_what_a_label_makes_of_an_exit_code_harms_nothing(reasons: Reasons, code: Any) -> None:
    raw = {
        "Type": "container",
        "Action": "die",
        "timeNano": 10**18,
        "Actor": {"ID": ID, "Attributes": {"exitCode": code}},
    }
    died = parse_event(raw)
    assert died is not None
    reasons.on_event(died)
    assert reasons.of_change(EXITED, "exited").isprintable()
