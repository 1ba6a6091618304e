"""The engine that answers from a recording, on a clock that the test moves; and how virtual time passes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from eventwatch.core.clock import VirtualClock
from eventwatch.core.errors import EngineError
from eventwatch.core.facts import Event
from eventwatch.replay.engine import ReplayEngine
from eventwatch.replay.recording import disconnect_record, inspect_record, read_recording
from eventwatch.replay.recording import to_json as line
from eventwatch.replay.timeline import Busy, RealTime, Simulation
from tests.unit.test_recording import HEADER, NODE, OTHER, event

MS = 1_000_000
NET = {"Networks": {"net": {"IPAddress": "10.0.0.2"}}}


def seen(at: int, status: str, node_id: str = NODE) -> dict[str, Any]:
    container = {
        "Id": node_id,
        "State": {"Status": status},
        "NetworkSettings": NET,
        "Config": {"Labels": {"role": "node"}},
    }
    return inspect_record(at * MS, node_id, container)


def told(action: str, at: int, node_id: str = NODE) -> dict[str, Any]:
    return event(action, at * MS, node_id)


class Scene:
    def __init__(self, folder: Path, *records: dict[str, Any]) -> None:
        path = folder / "r.jsonl"
        path.write_text("".join(f"{line(record)}\n" for record in (HEADER, *records)))
        self.busy = Busy()
        self.time = Simulation(0, self.busy)
        self.engine = ReplayEngine(read_recording(path), self.time.clock)

    async def at(self, ms: int) -> None:
        await self.time.run_until(ms * MS)

    async def status(self) -> str:
        return (await self.engine.inspect(NODE)).status


async def test_an_answer_is_never_older_than_an_event_that_was_delivered_before(tmp_path: Path) -> None:
    scene = Scene(tmp_path, told("create", 10), seen(12, "created"), told("start", 30), seen(55, "running"))
    await scene.at(20)
    assert await scene.status() == "created"
    await scene.at(30)
    asked = asyncio.create_task(scene.status())
    await scene.at(54)
    assert not asked.done()  # the engine holds the container's lock
    await scene.at(56)
    assert asked.result() == "running"
    observed = await scene.engine.inspect(NODE, as_of=7)
    assert (observed.ip, observed.time_nano) == ("10.0.0.2", 7)


async def test_a_container_that_is_not_in_the_recording_is_not_found(tmp_path: Path) -> None:
    scene = Scene(tmp_path, told("create", 10), seen(12, "created"), inspect_record(20 * MS, NODE, None))
    await scene.at(15)
    assert not (await scene.engine.inspect(OTHER)).found
    await scene.at(25)
    assert not (await scene.engine.inspect(NODE, as_of=3)).found


async def test_events_come_when_they_came(tmp_path: Path) -> None:
    scene = Scene(tmp_path, told("create", 10), told("exec_start", 15), told("start", 30))
    events, _ = await opened(scene)
    await scene.at(9)
    assert events == []
    await scene.at(29)
    assert [e.action for e in events] == ["create"]
    await scene.at(31)
    assert [e.action for e in events] == ["create", "start"]


async def opened(scene: Scene, since: int | None = None) -> tuple[list[Event], asyncio.Task[None]]:
    events: list[Event] = []
    entered = asyncio.Event()

    async def read() -> None:
        async with scene.engine.events(since, lambda _: None) as stream:
            entered.set()
            async for told_event in stream:
                events.append(told_event)  # noqa: PERF401 - looked at while it grows

    task = asyncio.create_task(read())
    opening = asyncio.create_task(entered.wait())
    await asyncio.wait({task, opening}, return_when=asyncio.FIRST_COMPLETED)
    opening.cancel()
    return events, task


async def test_while_the_stream_was_broken_the_engine_is_away(tmp_path: Path) -> None:
    scene = Scene(
        tmp_path,
        told("start", 10),
        seen(11, "running"),
        disconnect_record(50 * MS, "killed"),
        seen(84, "exited"),
        told("die", 80),
        seen(85, "exited"),
    )
    events, task = await opened(scene)
    await scene.at(49)
    assert await scene.status() == "running"
    await scene.at(51)
    with pytest.raises(EngineError, match="Event stream broke: killed"):
        await task
    for call in (scene.engine.identify(), scene.status(), scene.engine.list_running("role")):
        with pytest.raises(EngineError) as raised:
            await call
        assert raised.value.unreachable
    _, refused = await opened(scene)
    with pytest.raises(EngineError, match="away"):
        await refused
    await scene.at(81)
    assert (await scene.engine.identify()).version == "20.10.24"
    later, task = await opened(scene, since=9 * MS)
    asked = asyncio.create_task(scene.status())  # must not be answered with what was before
    await scene.at(86)
    assert asked.result() == "exited"
    assert [e.action for e in later] == ["die"]
    assert [e.action for e in events] == ["start"]
    task.cancel()


async def test_an_inspection_that_never_came_fails_when_the_engine_goes(tmp_path: Path) -> None:
    scene = Scene(tmp_path, told("start", 10), seen(60, "running"), disconnect_record(50 * MS, "eof"))
    await scene.at(10)
    asked = asyncio.create_task(scene.status())
    await scene.at(49)
    assert not asked.done()
    await scene.at(51)
    with pytest.raises(EngineError):
        await asked


async def test_a_second_stream_without_since_brings_only_what_is_new(tmp_path: Path) -> None:
    scene = Scene(tmp_path, told("create", 10), told("start", 30))
    _, first = await opened(scene)
    await scene.at(20)
    second, task = await opened(scene)
    await scene.at(40)
    assert [e.action for e in second] == ["start"]
    first.cancel()
    task.cancel()


async def test_what_runs_is_listed_by_label(tmp_path: Path) -> None:
    scene = Scene(tmp_path, told("start", 10), seen(11, "running"), told("die", 30), seen(31, "exited"))
    await scene.at(5)
    assert await scene.engine.list_running("role") == []
    await scene.at(20)
    assert await scene.engine.list_running("role=node") == [NODE]
    assert await scene.engine.list_running("role=other") == []
    await scene.at(40)
    assert await scene.engine.list_running("role") == []


async def test_a_recording_cannot_be_told_to_do_anything(tmp_path: Path) -> None:
    scene = Scene(tmp_path, told("start", 10), seen(11, "running"))
    with pytest.raises(EngineError, match="cannot be stopped"):
        await scene.engine.stop(NODE, grace=1)
    await scene.engine.close()


async def test_virtual_time_waits_for_tasks_and_calls() -> None:
    busy = Busy()
    time = Simulation(0, busy)
    order: list[str] = []

    async def work() -> None:
        await time.clock.sleep(1.0)
        with busy:  # a database call, on the real clock
            await asyncio.sleep(0.01)
        order.append(f"written at {time.clock.monotonic()}")
        time.clock.call_later(1.0, lambda: order.append(f"settled at {time.clock.monotonic()}"))

    task = asyncio.create_task(work())
    time.clock.call_later(1.5, lambda: order.append("another timer"))
    await time.run_until(3_000_000_000)
    assert order == ["written at 1.0", "another timer", "settled at 2.0"]
    assert time.clock.time_ns() == 3_000_000_000
    await task


async def test_virtual_time_needs_no_private_part_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a loop that hides what can run, as uvloop does, yielding often enough serves as well."""
    time = Simulation(0, Busy())
    hops: list[int] = []

    async def chain() -> None:
        await time.clock.sleep(1.0)
        for hop in range(10):
            await asyncio.sleep(0)
            hops.append(hop)

    task = asyncio.create_task(chain())

    monkeypatch.setattr("eventwatch.replay.timeline.ready_handles", lambda: None)
    await time.run_until(1_000_000_000)
    assert len(hops) == 10
    await task


async def test_real_time_runs_as_fast_as_asked() -> None:
    time = RealTime(1_000, speed=1000.0)
    rung: list[float] = []
    time.clock.call_later(5.0, lambda: rung.append(time.clock.monotonic()))
    await time.run_until(1_000 + 10_000_000_000)
    assert rung
    assert rung[0] >= 5.0
    assert 10.0 <= time.clock.monotonic() < 1000.0
    assert time.clock.time_ns() >= 10_000_000_000
    await time.run_until(0)


async def test_the_engine_needs_no_simulation(tmp_path: Path) -> None:
    scene = Scene(tmp_path, told("start", 10), seen(11, "running"), told("die", 30), seen(31, "exited"))
    recording = scene.engine.recording
    engine = ReplayEngine(recording, VirtualClock(recording.ended_at))
    assert (await engine.inspect(NODE)).status == "exited"


async def test_containers_that_are_there_are_found_by_name_and_by_age(tmp_path: Path) -> None:
    def named(at: int, node_id: str, name: str, created: str) -> dict[str, Any]:
        record = seen(at, "running", node_id)
        record["container"] |= {"Name": f"/{name}", "Created": created}
        return record

    scene = Scene(
        tmp_path,
        named(10, NODE, "one", "2026-01-01T00:00:00Z"),
        named(20, OTHER, "two", "2026-01-02T00:00:00Z"),
        inspect_record(40 * MS, OTHER, None),
    )
    await scene.at(15)
    assert await scene.engine.list_newest(5) == [NODE]
    assert await scene.engine.resolve("two") is None
    await scene.at(30)
    assert await scene.engine.list_newest(5) == [OTHER, NODE]
    assert await scene.engine.list_newest(1) == [OTHER]
    assert [await scene.engine.resolve(name) for name in ("two", OTHER, OTHER[:12], "nobody", "")] == [
        *[OTHER] * 3,
        None,
        None,
    ]
    await scene.at(50)
    assert await scene.engine.list_newest(5) == [NODE]
