"""What `eventwatch top` shows of which nodes; tests/e2e/test_top.py runs it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from eventwatch.cli.top import HEADINGS, SORTS, _texts, disagreement, matches, row_of, summary
from eventwatch.core.details import OnRecord
from eventwatch.core.facts import Recorded
from eventwatch.core.listing import Listed
from eventwatch.store.history import State

NODE = Recorded("ab" * 32, "ab" * 6, "exited", "unhealthy", ip="", port=80)
NOW = datetime.now(UTC)
REASON = "exit code 137 (SIGKILL), out of memory, after 2h"
KILLED = State(OnRecord("exited", REASON, NOW - timedelta(minutes=5), "oom"))
OTHER = Recorded("cd" * 32, "cd" * 6, "running", "unhealthy", ip="10.0.0.1", port=80)
ROW = row_of(
    NODE,
    now=NOW,
    state=KILLED,
    listed=Listed(NODE.node_id, "exited", name="Sandbox-1", image="tools:2"),
    agrees="yes",
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", True),
        ("sandbox", True),
        ("SAND tools", True),
        ("sand missing", False),
        ("status:exited", True),
        ("status:exit health:unhealthy", True),
        ("health:healthy", False),
        ("reason:memory", True),
        ('reason:"out of memory" name:sandbox', True),
        ('reason:"out of', False),
        ("id:abab", True),
        ("id:bab", False),
        ("nothing:here", False),
        ("status:exited -name:sandbox", False),
        ("status:exited -name:other -missing", True),
        ("problem:memory", True),
        ("-", True),
    ],
)
def test_a_filter_finds_words_anywhere_or_in_a_field(text: str, *, found: bool) -> None:
    assert matches(ROW, text) is found


def test_the_first_line_counts_and_tells_of_trouble() -> None:
    other = row_of(OTHER, now=NOW)
    line = summary([ROW, other], 1, trouble="as of before: Database is away", sort="name")
    assert line.startswith(
        "as of before: Database is away · 2 nodes: 1 exited, 1 running · 1 out of memory, 1 unhealthy · 1 shown · "
    )
    assert line.endswith(" UTC")
    assert summary([], 0, sort="name").startswith("0 nodes · by name")


def test_problems_come_first_and_an_end_that_was_asked_for_is_none() -> None:
    asked = row_of(
        replace(NODE, node_id="1" * 64), now=NOW, state=State(OnRecord("exited", "stopped by", NOW, "asked"))
    )
    failed = row_of(
        replace(NODE, node_id="2" * 64), now=NOW, state=State(OnRecord("exited", "exit code 3", NOW, "failed"))
    )
    unhealthy = row_of(OTHER, now=NOW, state=State(why_unhealthy="its last health check said: refused"))
    wrong = row_of(replace(OTHER, health="none"), now=NOW, agrees="no: exited")
    assert (asked.problem, unhealthy.reason) == ("", "its last health check said: refused")
    rows = sorted([wrong, asked, unhealthy, failed, ROW], key=SORTS["problems"])
    assert [row.problem for row in rows] == ["out of memory", "died", "unhealthy", "disagrees", ""]


def test_a_node_between_two_restarts_is_one_that_restarts_and_keeps_its_reason() -> None:
    reason = "restarted 7 times by its restart policy; exit code 3, after 300ms"
    restarting = row_of(
        replace(OTHER, status="restarting"), now=NOW, state=State(OnRecord("restarting", reason, NOW))
    )
    between = row_of(OTHER, now=NOW, before=restarting, state=State(OnRecord("running", "", NOW)))
    assert (between.problem, between.reason) == ("restarting", reason)
    later = row_of(
        OTHER, now=NOW + timedelta(minutes=2), before=between, state=State(OnRecord("running", "", NOW))
    )
    assert (later.problem, later.reason) == ("unhealthy", "")


def test_what_is_known_stays_while_history_and_engine_tell_nothing() -> None:
    assert row_of(NODE, now=NOW, before=ROW, agrees="yes") == ROW
    started = row_of(replace(NODE, status="running", health="none"), now=NOW, before=ROW)
    assert (started.name, started.reason, started.problem, started.changed) == ("Sandbox-1", "", "", None)


def test_idle_time_left_counts_from_the_last_request_or_start() -> None:
    recorded = replace(OTHER, last_req_time=(NOW - timedelta(minutes=9)).replace(tzinfo=None))
    state = State(OnRecord("running", "", NOW - timedelta(minutes=4)))
    limits = [(600.0, {}), (600.0, {"eventwatch.idle-timeout": "1h"}), (0.0, {})]
    left = [
        row_of(
            recorded, now=NOW, state=state, listed=Listed(recorded.node_id, labels=labels), idle_timeout=limit
        ).idle_left
        for limit, labels in limits
    ]
    assert [None if seconds is None else round(seconds / 60) for seconds in left] == [6, 56, None]


def test_a_list_disagrees_by_state() -> None:
    assert disagreement(OTHER, Listed(OTHER.node_id, "running")) == "yes"
    assert disagreement(OTHER, Listed(OTHER.node_id, "ex\x1bited")) == "no: ex\\x1bited"
    assert disagreement(OTHER, None) == "no: no such container"
    assert disagreement(replace(OTHER, status="stopping"), Listed(OTHER.node_id, "running")) == "yes"


def test_a_long_name_leaves_the_rest_on_the_screen() -> None:
    named = replace(ROW, name="sandbox-session-" + "x" * 200 + "-17", reason="r\x1b" * 200)
    cells = dict(zip(HEADINGS, map(str, _texts(named, 80)), strict=True))
    assert len(cells["name"]) == 20
    assert cells["name"].startswith("sandbox-s")
    assert cells["name"].endswith("-17")
    assert cells["reason"].isprintable()
    before_reason = HEADINGS[: HEADINGS.index("reason")]
    assert sum(max(len(cells[heading]), len(heading)) + 2 for heading in before_reason) < 80
