"""A manager writes into our documents between sweeps: what a look makes of it, and what looking costs."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import pytest

from eventwatch.core.clock import KindestClock
from eventwatch.core.facts import Cause, Owner, Recorded
from eventwatch.core.policy import CLOCK_SET_BACK_NS
from eventwatch.pipeline.pipeline import Pipeline
from eventwatch.store.rows import Lease
from tests.unit.simulated import ENGINE_ID, FIRST_PORT, MS, START, Container, Stream, World

SECOND = 1000 * MS


def ended_node() -> Container:
    """A node that starts, becomes healthy and ends, within a second."""
    container = Container(1, random.Random(0), checked=True, starts_at=START)
    for operation in ("start", "health", "exit"):
        container.do(operation, 100)
    return container


def world_of(container: Container) -> World:
    return World([container], Stream(), 0, sweeps=False, looks=True)


async def put_back(world: World, times: Mapping[int, str]) -> None:
    """Let a manager write an old status into the document at these times (s after the start)."""
    node_id = world.containers[0].id

    def write(status: str) -> None:
        document = world.store.documents[node_id]
        world.store.put(replace(document, status=status, ip="10.1.1.1", health="healthy"))

    acts = {START + at * SECOND: partial(write, status) for at, status in times.items()}
    await world.run(meanwhile=acts)


@pytest.mark.parametrize("at", [2, 5, 60])
async def test_a_stale_write_is_undone_without_a_sweep_however_late_it_comes(at: int) -> None:
    world = world_of(ended_node())
    await put_back(world, {at: "running"})
    assert not world.wrong()
    last = world.changes[-1]
    assert (last.cause, last.old["status"], last.new["status"]) == (Cause.LOOK, "running", "exited")


async def test_what_was_put_back_is_wrong_for_less_than_a_second() -> None:
    world = world_of(ended_node())
    said: list[tuple[int, str | None]] = []
    world.store.watchers.append(lambda document: said.append((world.clock.time_ns(), document.status)))
    await put_back(world, {3: "running", 7: "running", 40: "paused"})
    assert not world.wrong()
    wrong_since = [at for at, status in said if at >= START + 3 * SECOND and status != "exited"]
    right_again = [at for at, status in said if at > START + 3 * SECOND and status == "exited"]
    assert len(wrong_since) == len(right_again) == 3
    # Of it, up to 0.7 s are what the simulated engine may take for an inspection.
    assert all(right - wrong < 2 * SECOND for wrong, right in zip(wrong_since, right_again, strict=True))


async def test_a_document_that_is_deleted_and_put_back_is_made_true() -> None:
    container = ended_node()
    world = world_of(container)
    taken: list[Recorded] = []

    def take() -> None:
        taken.append(world.store.documents.pop(container.id))

    def bring_back() -> None:
        world.store.put(replace(taken[0], status="running", ip="10.1.1.1"))

    # 100 s later nobody waits for a document of this container any more.
    await world.run(meanwhile={START + 5 * SECOND: take, START + 105 * SECOND: bring_back})
    assert not world.wrong()
    assert world.store.documents[container.id].status == "exited"


async def test_an_unreadable_document_is_read_once_and_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    container = ended_node()
    world = world_of(container)
    reads = 0

    async def read(_: object, **__: object) -> dict[str, object]:
        nonlocal reads
        reads += 1
        return {}  # as the store does with a document that does not validate

    def spoil() -> None:
        monkeypatch.setattr(world.store, "read", read)
        document = world.store.documents[container.id]
        world.store.put(replace(document, status=5))  # type: ignore[arg-type]

    await world.run(after=60.0, meanwhile={START + 5 * SECOND: spoil})
    # Once to write it, a few times as of a container whose document may still come, once by a look.
    waiting = world.settings.orphan_grace / 0.25
    assert 0 < reads < waiting


async def test_a_watcher_that_begins_looks_only_once_a_pass_has_told_which_documents_there_are() -> None:
    """Else each node that it owns would be new to the look, and inspected beside the pass that inspects all."""
    world = world_of(ended_node())
    node_id = world.containers[0].id
    world.store.put(Recorded(node_id, node_id[:12], "exited", "unhealthy", "", FIRST_PORT))
    async with asyncio.TaskGroup() as tasks:
        pipeline = Pipeline(
            engine=world.engine,
            store=world.store,
            settings=world.settings,
            clock=world.clock,
            time=KindestClock(world.clock, 0.0),
            tasks=tasks,
            engine_id=ENGINE_ID,
            lease=Lease("holder", ENGINE_ID, 1),
        )
        pipeline.owners.owned[node_id] = Owner(ENGINE_ID, "host")
        looking = tasks.create_task(pipeline.afterlook.run())
        await world.time.run_until(START + 5 * SECOND)
        assert not pipeline.reconciler.depth()
        pipeline.reconciler.replace_known(dict(world.store.documents), known_before={})
        await world.time.run_until(START + 10 * SECOND)
        assert world.store.looks
        assert not pipeline.reconciler.depth()
        looking.cancel()


@pytest.mark.parametrize(("engines", "least", "most"), [(1, 100, 300), (1000, 8, 40)])
async def test_the_looks_of_a_fleet_are_rarer(engines: int, least: int, most: int) -> None:
    world = world_of(ended_node())
    world.store.engines = engines
    await world.run(after=60.0)
    assert least <= world.store.looks <= most


async def test_a_look_never_makes_an_older_fact_win() -> None:
    """Stale writes beside a node's whole life: what an event tells meanwhile stays the last word."""
    for seed in range(20):
        container = Container(1, random.Random(seed), checked=True, starts_at=START)
        for operation in ("start", "health", "pause", "unpause", "stop", "start", "health", "crash", "give_up"):
            container.do(operation, 300)
        world = World([container], Stream(), seed, looks=True)
        chance = random.Random(seed)
        moments = {START + chance.randrange(4000) * MS for _ in range(10)}

        def write(world: World = world, node_id: str = container.id) -> None:
            if document := world.store.documents.get(node_id):
                status = random.Random(world.clock.time_ns()).choice(["running", "exited", "paused"])
                world.store.put(replace(document, status=status))

        await world.run(after=CLOCK_SET_BACK_NS / 1e9, meanwhile=dict.fromkeys(moments, write))
        assert not world.wrong(), repr(container)
