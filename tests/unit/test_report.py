"""Which nodes `status` shows, in which order and columns."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from eventwatch.cli import main as cli
from eventwatch.cli.nodes import COLUMNS, NodeReport, node_lines, select_nodes
from eventwatch.core.facts import Ending, Observation, Recorded

NOW = datetime.now(UTC)


def report(name: str, status: str, health: str = "none", *, ago: float = 90_000, **fields: Any) -> NodeReport:
    at = NOW - timedelta(seconds=ago)
    ending = Ending(exit_code=1, finished_at=at) if status == "exited" else None
    seen = Observation(
        name * 64, status=status, started_at=at, finished_at=at if ending else None, ending=ending, name=name,
        restart_count=fields.pop("restarts", 0),
    )  # fmt: skip
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


def test_the_parser_knows_every_column() -> None:
    assert tuple(COLUMNS) == cli.NODE_COLUMNS
    assert set(cli.SHOWN_COLUMNS) <= set(COLUMNS)
