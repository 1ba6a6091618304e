"""Which nodes `status` shows, in which order and columns."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rich.console import Console
from rich.text import Text

from eventwatch import Settings
from eventwatch.cli import main as cli
from eventwatch.cli.nodes import (
    COLUMNS,
    DROPPED,
    NodeReport,
    _look_again,
    node_lines,
    node_table,
    print_whole,
    select_nodes,
)
from eventwatch.core.details import OnRecord
from eventwatch.core.facts import Cause, Ending, Observation, Recorded
from eventwatch.core.text import json_text, middle_cut
from eventwatch.store.history import State

NOW = datetime.now(UTC)


def report(name: str, status: str, health: str = "none", *, ago: float = 90_000, **fields: Any) -> NodeReport:
    at = NOW - timedelta(seconds=ago)
    ending = Ending(exit_code=1, finished_at=at) if status == "exited" else None
    seen = Observation(
        name * 64,
        status=status,
        started_at=at,
        finished_at=at if ending else None,
        ending=ending,
        name=name,
        restart_count=fields.pop("restarts", 0),
    )
    recorded = Recorded(name * 64, name * 12, status, health, ip="10.0.0.1", port=80)
    more: dict[str, Any] = {"agrees": True, "idle_left": None, "idle_reason": ""} | fields
    return NodeReport(recorded, seen, **more)


REPORTS = [
    report("a", "running", "unhealthy", restarts=10, idle_left=100.0),
    report("b", "exited", "unhealthy", ago=60, agrees=False, differs={"status": "running", "ip": ""}),
    report("c", "running", "healthy", ago=30_000, restarts=9, idle_left=9.0),
    report("d", "paused", agrees=None, elsewhere="far-away"),
]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, "abcd"),
        ({"unhealthy": True}, "a"),
        ({"statuses": ["exited", "paused"]}, "bd"),
        ({"since": 20_000}, "b"),
        ({"since": 60_000, "statuses": ["running"]}, "c"),
        ({"sort": "age"}, "bcad"),
        ({"sort": "idle"}, "cabd"),
        ({"sort": "restarts"}, "acbd"),
        ({"sort": "status", "unhealthy": True}, "a"),
    ],
)
def test_nodes_are_chosen_and_sorted(options: dict[str, Any], names: str) -> None:
    assert "".join(found.recorded.node_id[0] for found in select_nodes(REPORTS, **options)) == names


def test_a_pipe_gets_whole_texts_in_columns() -> None:
    heading, *lines = node_lines(REPORTS, ["id", "restarts", "agrees"])
    assert heading.split() == ["id", "restarts", "agrees"]
    assert {len(line.partition("  ")[0]) for line in lines} == {64}
    assert lines[1].endswith("  no: status running, ip -")
    assert lines[3].endswith("  on far-away")


def shown(width: int, columns: Sequence[str] = cli.SHOWN_COLUMNS, **fields: Any) -> list[str]:
    ordinary = [report(name, "running", "healthy") for name in "abc"]
    for number, each in enumerate(ordinary):
        assert each.seen is not None
        named = fields | {"name": f"wtr-sandbox-session-8f3a2b1c-worker-{number}" + "x" * 160, "image": "tools:1"}
        ordinary[number] = replace(each, seen=replace(each.seen, **named))
    screen = Console(width=width, file=io.StringIO(), force_terminal=True, no_color=True)
    may_go = DROPPED if columns is cli.SHOWN_COLUMNS else ()
    print_whole(node_table(ordinary, columns, width=width, may_go=may_go), screen)
    text = Text.from_ansi(screen.file.getvalue()).plain  # type: ignore[attr-defined]
    return [line.rstrip() for line in text.splitlines()]


@pytest.mark.parametrize("width", [60, 80, 100, 140, 400])
def test_on_a_terminal_a_node_is_a_line_with_whole_states(width: int) -> None:
    lines = shown(width)
    rows = [line for line in lines if "running" in line]
    assert len(rows) == 3
    assert all("healthy" in row and ("…" in row) is (width < 400) and row.endswith("yes") for row in rows)
    assert max(map(len, lines)) <= max(width, 64)
    assert [("10.0.0.1:80" in row, "tools:1" in row) for row in rows] == [(width > 80, width >= 100)] * 3
    assert ("No room for" in lines[-1]) is (width < 100)


def test_columns_that_were_asked_for_stay_on_a_narrow_terminal() -> None:
    _, heading, first, *_ = shown(40, ["id", "image", "reason"])
    assert heading.split() == ["id", "image", "reason"]
    assert first.split() == ["a" * 64, "tools:1", "-"]


def test_names_are_cut_in_the_middle() -> None:
    assert middle_cut("sandbox-session-17", 18) == "sandbox-session-17"
    assert middle_cut("sandbox-session-17", 9) == "sand…n-17"
    assert [middle_cut("abc", size) for size in (0, 1, 2)] == ["…", "…", "a…"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (datetime(2026, 1, 2, 3, 4, 5, 6000), "2026-01-02T03:04:05.006000+00:00"),  # noqa: DTZ001
        (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "2026-01-02T03:04:05+00:00"),
        (Cause.SWEEP, "sweep"),
    ],
)
def test_times_for_programs_tell_their_offset(value: object, text: str) -> None:
    assert json_text(value) == text


def test_a_crash_loop_and_a_stop_under_way_are_told_as_such() -> None:
    now = datetime.now(UTC)  # what has just started restarts
    at = now - timedelta(seconds=1)
    seen = Observation(
        "a" * 64,
        status="restarting",
        started_at=at,
        finished_at=now,
        restart_count=11,
        ending=Ending(exit_code=3, finished_at=now),
    )
    recorded = Recorded("a" * 64, "a" * 12, "restarting", "none")
    looping = NodeReport(recorded, seen, True, None, "")
    assert looping.reason == "crash loop, restarted 11 times by its restart policy; exit code 3, after 1s"
    assert looping.as_json()["crash_loop"] is True
    running = replace(looping, seen=replace(seen, status="running", ending=None))
    assert running.reason == "crash loop, restarted 11 times by its restart policy"
    old = replace(running.seen, started_at=now - timedelta(hours=1))  # type: ignore[type-var]
    assert replace(running, seen=old).reason == ""
    past = State(OnRecord("stopping", "stopped by eventwatch: idle for 31m, limit 30m by x", now))
    stopping = replace(running, recorded=replace(recorded, status="stopping"), seen=old, past=past, grace=3600.0)
    assert stopping.reason == (
        f"stopped by eventwatch: idle for 31m, limit 30m by x; since {now:%H:%M:%S} UTC, "
        "killed 1h after that if it has not ended by then"
    )


async def test_a_node_that_flaps_disagrees_only_if_it_does_at_each_look() -> None:
    looks = Counter[str]()

    class Documents:
        async def read(self, node_ids: Sequence[str]) -> dict[str, Recorded]:
            return {
                found.recorded.node_id: found.recorded for found in wrong if found.recorded.node_id in node_ids
            }

    wrong = [replace(found, agrees=False) for found in REPORTS[:3]]

    async def look(recorded: Recorded) -> NodeReport:
        looks[recorded.node_id[0]] += 1
        found = next(each for each in wrong if each.recorded is recorded)
        return replace(found, agrees=recorded.node_id[0] == "a" and looks["a"] == 2)

    gone = replace(REPORTS[3], agrees=False)
    settings = Settings(_env_file=None, settle_delay=0.0)
    found = await _look_again([*wrong, gone], look, Documents(), settings)  # type: ignore[arg-type]
    assert [(each.recorded.node_id[0], each.agrees) for each in found] == [("a", True), ("b", False), ("c", False)]
    assert looks == {"a": 2, "b": 2, "c": 2}


def test_the_parser_knows_every_column() -> None:
    assert tuple(COLUMNS) == cli.NODE_COLUMNS
    assert set(cli.SHOWN_COLUMNS) <= set(COLUMNS)
