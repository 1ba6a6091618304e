"""What the status page is told: rows that come again only when they changed, problems, and the last hour."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from eventwatch.core.clock import VirtualClock
from eventwatch.core.facts import Cause, Change, Recorded
from eventwatch.core.metrics import Metrics, quantile
from eventwatch.http import rows as rows_module
from eventwatch.http.rows import Facts, Rows, disagreement, problems_of
from eventwatch.http.series import KEPT, Latencies, Series

NOW = 1_800_000_000.0


def facts(status: str = "running", health: str = "none", **more: Any) -> Facts:
    return Facts(recorded=Recorded("a" * 64, "a" * 12, status=status, health=health), **more)


def change(node_id: str, **new: str | int) -> Change:
    return Change(node_id, node_id[:12], {}, new, not new, Cause.EVENT, int(NOW * 1e9), 0.004, int(NOW * 1e9) - 5)


@dataclass
class World:
    """Made-up nodes, and their rows without a pause between two looks at them."""

    nodes: dict[str, Facts] = field(default_factory=dict)
    built: int = 0

    def __post_init__(self) -> None:
        self.rows = Rows(node_ids=lambda: self.nodes, facts=self.nodes.get, more=self.more, now=lambda: NOW)

    def more(self, *_: object) -> dict[str, Any]:
        self.built += 1
        return {"idle_at": None}

    def add(self, *names: str) -> None:
        for name in names:
            self.nodes[name] = replace(facts(), recorded=Recorded(name, name[:12], status="running"))

    def alter(self, name: str, status: str) -> None:
        self.nodes[name] = replace(self.nodes[name], recorded=Recorded(name, name[:12], status=status))

    async def ask(self, since: str = "") -> dict[str, Any]:
        self.rows._fresh_until = 0.0
        return dict(json.loads(await self.rows.answer(since)))


async def test_a_row_comes_again_only_when_it_changed_and_is_not_made_for_nothing() -> None:
    world = World()
    world.add("one", "two", "three")
    first = await world.ask()
    assert [row["node_id"] for row in first["rows"]] == ["one", "two", "three"]
    assert (first["reset"], first["more"], first["total"]) == (True, False, 3)
    world.alter("two", "exited")
    del world.nodes["one"]
    later = await world.ask(first["version"])
    assert [(row["node_id"], row["status"]) for row in later["rows"]] == [("two", "exited")]
    assert (later["gone"], later["reset"]) == (["one"], False)
    again = await world.ask(later["version"])
    assert (again["rows"], again["gone"]) == ([], [])
    assert world.built == 4
    assert +world.rows.statuses == {"running": 1, "exited": 1}


async def test_rows_come_in_pages_which_lack_nothing_that_changes_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rows_module, "PAGE", 10)
    world = World()
    world.add(*(f"n{number:02}" for number in range(25)))
    got: dict[str, str] = {}
    version, more, asked = "", True, 0
    while more:
        answer = await world.ask(version)
        got |= {row["node_id"]: row["status"] for row in answer["rows"]}
        assert answer["reset"] is (asked == 0)
        version, more = answer["version"], answer["more"]
        if not asked:
            world.alter("n03", "exited")  # told of already
        asked += 1
    assert asked == 3
    assert got == {name: "exited" if name == "n03" else "running" for name in world.nodes}


async def test_a_version_of_another_process_or_of_too_long_ago_begins_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rows_module, "KEPT_GONE", 2)
    world, other = World(), World()
    world.add("a", "b", "c", "d")
    version = (await world.ask())["version"]
    other.add("a")
    assert (await other.ask(version))["reset"] is True
    for odd in ("x", "-1", f"{version}0x", "🙂", "9" * 40):
        assert (await world.ask(odd))["reset"] is True
    for name in ("a", "b"):
        del world.nodes[name]
    assert sorted((await world.ask(version))["gone"]) == ["a", "b"]
    del world.nodes["c"]
    late = await world.ask(version)
    assert (late["reset"], [row["node_id"] for row in late["rows"]]) == (True, ["d"])
    del world.nodes["d"]
    await world.ask()
    world.add("d")
    again = await world.ask(late["version"])
    assert ([row["node_id"] for row in again["rows"]], again["gone"]) == (["d"], [])


async def test_since_when_a_node_is_as_it_is_comes_from_the_event() -> None:
    world = World()
    world.add("one")
    world.rows.publish(change("one", status="running"))
    assert (await world.ask())["rows"][0]["since"] == pytest.approx(NOW)
    world.rows.publish(change("one", health="healthy"))
    assert (await world.ask())["rows"][0]["since"] == pytest.approx(NOW)


@pytest.mark.parametrize(
    ("of", "since", "found"),
    [
        (facts(), None, ()),
        (facts(health="unhealthy"), None, ("unhealthy",)),
        (facts("paused", "unhealthy"), None, ()),
        (facts("exited", "unhealthy", told={"end": "asked"}), None, ()),
        (facts("exited", told={"end": "clean"}), None, ()),
        (facts("exited", told={"end": "unknown"}), None, ()),
        (facts("exited", told={"end": "failed"}), None, ("died",)),
        (facts("dead", told={"end": "oom"}), None, ("oom",)),
        (facts(told={"end": "failed"}), None, ()),
        (facts("exited", told={"end": "failed", "crash_loop": True}), None, ("crash-looping",)),
        (facts("stopping"), NOW - 60, ()),
        (facts("stopping"), NOW - 600, ("stuck",)),
        (facts("stopping", stop_timeout=3600.0), NOW - 600, ()),
        (facts("stopping", stop_timeout=3600.0), NOW - 3800, ("stuck",)),
        (facts("removing"), NOW - 600, ("stuck",)),
        (facts("running"), NOW - 600, ()),
        (facts(inspected=False), None, ("disagreeing",)),
        (facts(observed={"status": "exited"}, observed_at=NOW - 9), None, ("disagreeing",)),
        (facts(observed={"status": "exited"}, observed_at=NOW - 1), None, ()),
        (facts(observed={"status": "running"}, observed_at=NOW - 9), None, ()),
        (facts("stopping", observed={"status": "running"}, observed_at=NOW - 9), None, ()),
    ],
)
def test_what_asks_for_attention(of: Facts, since: float | None, found: tuple[str, ...]) -> None:
    assert problems_of(of, NOW, since) == found


def test_a_disagreement_names_what_the_engine_says() -> None:
    seen = {"status": "running", "health": "healthy"}
    assert disagreement(facts(observed=seen), NOW) == {"health": "healthy"}


# -- the last hour ------------------------------------------------------------------------------------------


def test_each_minute_has_its_own_events_writes_and_latencies() -> None:
    clock, metrics = VirtualClock(), Metrics(["start"])
    series = Series(metrics, clock)
    for latency in (0.001, 0.002, 0.003, 0.5):
        series.publish(replace(change("a", status="running"), latency=latency))
    series.publish(replace(change("a", status="running"), latency=None))
    metrics.events.labels("start").inc(120)
    metrics.writes.labels("hint").inc(4)
    clock.advance(59)
    series.tick()
    clock.advance(1)
    series.tick()
    clock.advance(30)
    metrics.events.labels("start").inc(30)
    told = series.as_json()
    assert told["events"] == [2.0, 1.0]
    assert told["latency_p50"] == [0.003, None]
    assert told["latency_p99"] == [0.5, None]
    assert told["writes"]["hint"] == [4.0, 0.0]
    assert told["last_seconds"] == pytest.approx(30)


def test_an_hour_is_kept_and_no_more() -> None:
    clock = VirtualClock()
    series = Series(Metrics(), clock)
    for _ in range(100):
        clock.advance(60)
        series.tick()
    assert len(series.as_json()["events"]) == 60


def test_the_latencies_of_a_busy_minute_are_an_even_selection() -> None:
    latencies = Latencies()
    for number in range(50_000):
        latencies.add(number / 50_000)
    assert KEPT / 2 <= len(latencies.kept) <= KEPT
    for part in (0.5, 0.99):
        assert quantile(latencies.kept, part) == pytest.approx(part, abs=0.01)
    assert quantile(Latencies().kept, 0.5) is None
