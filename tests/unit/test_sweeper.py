"""What a pass is spared, and what it finds all the same; how many there are when the database comes back."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from eventwatch.core.facts import Cause, Event, Observation, Recorded, Write
from eventwatch.engine.wire import parse_container
from eventwatch.pipeline.deletion import Verdict
from eventwatch.pipeline.sweeper import TURNS
from tests.unit.simulated import NETWORK, START, Container, Stream, World

SECOND = 1_000_000_000


def counted_passes(world: World, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many passes have read the documents so far."""
    read_own, passes = world.store.read_own, 0

    async def read(*arguments: object, **named: object) -> object:
        nonlocal passes
        passes += 1
        return await read_own(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(world.store, "read_own", read)
    return lambda: passes


@pytest.mark.parametrize("others", [0, 1])
async def test_the_databases_return_asks_for_one_pass_unless_one_began_since(
    others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    container = Container(1, random.Random(0), checked=True, starts_at=START)
    container.do("start", 100)
    world = World([container], Stream(), 0)
    world.settings = world.settings.model_copy(update={"sweep_interval": 1e6})
    passes, before = counted_passes(world, monkeypatch), 0

    def back() -> None:
        nonlocal before
        before = passes()
        world.requests.database_returned()

    def ask_besides() -> None:
        for _ in range(others):
            world.requests.ask()

    after: list[int] = []
    back_at = START + 10 * SECOND
    acts: dict[int, Callable[[], object]] = {back_at: back, back_at + 1000: ask_besides}
    acts[back_at + 5 * SECOND] = lambda: after.append(passes() - before)
    await world.run(meanwhile=acts)
    assert after == [1]


def quiet_nodes(count: int) -> list[Container]:
    """Nodes that start, become healthy, and then do nothing; each fourth one ends."""
    nodes = [Container(number, random.Random(number), checked=True, starts_at=START) for number in range(count)]
    for node in nodes:
        for operation in ("start", "health", "exit")[: 3 if node.number % 4 == 0 else 2]:
            node.do(operation, 100)
    return nodes


def counted_inspections(world: World, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    inspect, asked = world.engine.inspect, Counter[str]()

    async def counted(node_id: str, *, as_of: int = 0) -> Observation:
        asked[node_id] += 1
        return await inspect(node_id, as_of=as_of)

    monkeypatch.setattr(world.engine, "inspect", counted)
    return asked


async def test_a_pass_of_the_timer_inspects_a_tenth_of_quiet_nodes_each_in_its_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(quiet_nodes(40), Stream(), 0)
    asked = counted_inspections(world, monkeypatch)
    passes = counted_passes(world, monkeypatch)
    before, asked_before, asked_after = 0, Counter[str](), Counter[str]()

    def begin() -> None:
        nonlocal before
        before = passes()
        asked_before.update(asked)

    def end() -> None:
        nonlocal before
        before = passes() - before
        asked_after.update(asked)

    rounds = 3
    seconds = round(TURNS * rounds * world.settings.sweep_interval)
    await world.run(meanwhile={START + 20 * SECOND: begin, START + (20 + seconds) * SECOND: end})
    inspected = {node.id: asked_after[node.id] - asked_before[node.id] for node in world.containers}
    # The timer is varied by up to a fifth, to the shorter side.
    assert rounds * TURNS <= before <= rounds * TURNS * 1.25 + 1
    assert set(inspected.values()) <= {rounds - 1, rounds, rounds + 1}
    assert not world.wrong()


@pytest.mark.parametrize("operation", ["health", "exit", "pause", "remove", "reattach", "crash"])
async def test_what_no_event_told_is_found_by_the_next_pass_that_sees_a_sign_of_it(operation: str) -> None:
    nodes = quiet_nodes(12)
    changed = next(node for node in nodes if node.number % 4)
    changed.do(operation, 60_000)
    at = changed.last.at
    world = World(nodes, Stream(dropped=(at - 2 * SECOND, at + 2 * SECOND)), 0)
    wrong: list[object] = []
    act = {at + 3 * round(world.settings.sweep_interval) * SECOND: lambda: wrong.append(world.wrong())}
    await world.run(meanwhile=act)
    assert wrong == [{}]
    assert Cause.SWEEP in {change.cause for change in world.changes if change.node_id == changed.id}


async def test_two_passes_at_once_do_not_disturb_each_other() -> None:
    """A manager asks for one while the timer's is under way."""
    world = World(quiet_nodes(1500), Stream(), 0)
    world.settings = world.settings.model_copy(update={"sweep_interval": 1e6})
    passes: list[asyncio.Task[object]] = []

    def begin_two() -> None:
        sweeper = world.pipeline.sweeper
        compare, calls = sweeper._writer.compare, 0

        def counted(*arguments: Any) -> Write | None:
            nonlocal calls
            calls += 1
            if calls == 900:  # the first is in the middle of its answers
                now = datetime.fromtimestamp(world.clock.time_ns() / 1e9, UTC)
                passes.append(asyncio.create_task(sweeper._still_known(dict(world.store.documents), now)))
            return compare(*arguments)

        sweeper._writer.compare = counted  # type: ignore[assignment,method-assign]
        passes.append(asyncio.create_task(sweeper.sweep()))

    await world.run(after=60, meanwhile={START + 30 * SECOND: begin_two})
    assert [each.exception() for each in passes] == [None, None]


async def test_nothing_is_remembered_of_a_node_that_went_while_a_pass_was_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone = Container(1, random.Random(1), checked=True, starts_at=START - 100 * SECOND)
    for operation in ("start", "health", "health"):  # which ends unhealthy
        gone.do(operation, 100)
    world = World([gone], Stream(), 0)
    world.settings = world.settings.model_copy(update={"sweep_interval": 1e6})
    # All that happened to it was before anybody listened.
    monkeypatch.setattr(world.engine, "_deliveries", [])
    monkeypatch.setattr(world, "_insert_later", lambda _: None)
    unhealthy = parse_container(gone.last.inspection(gone.id), network=NETWORK)
    world.store.put(Recorded(gone.id, gone.id[:12], "running", "unhealthy", unhealthy.ip, unhealthy.tcp_ports[0]))
    left: list[bool] = []

    def sweep_as_it_goes() -> None:
        pipeline = world.pipeline
        judge = pipeline.sweeper._judge

        async def judged(*arguments: Any, **named: Any) -> Verdict:
            # Between the inspections and their answers.
            pipeline.reconciler.on_event(Event("destroy", gone.id, world.clock.time_ns()))
            await pipeline.writer.flush()
            return await judge(*arguments, **named)

        pipeline.sweeper._judge = judged  # type: ignore[method-assign]
        asyncio.get_running_loop().create_task(pipeline.sweeper.sweep())

    def look() -> None:
        roster = world.pipeline.roster
        left.extend(gone.id in there for there in (roster.known, roster._states, roster.reasons._nodes))

    await world.run(after=40, meanwhile={START + 30 * SECOND: sweep_as_it_goes, START + 35 * SECOND: look})
    assert left == [False, False, False]
