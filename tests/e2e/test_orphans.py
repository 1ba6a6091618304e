"""A manager inserts the document after the container has started: events that came too early are not lost."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from eventwatch.core.facts import Cause
from eventwatch.store.nodes import LOOKED_AT
from tests.kit.nodes import Node
from tests.kit.waiting import eventually
from tests.kit.world import Watched, World


async def insert_after(world: World, delay: float) -> Node:
    """Start a node, insert its document that much later (a late one after the node's first health event)."""
    node = await world.nodes.start(f"after-{delay}", healthcheck="ok", interval_s=0.4)
    await asyncio.sleep(delay)
    if delay >= 1:
        await node.wait_health("healthy")
    await world.insert(node)
    return node


async def test_a_document_inserted_late_becomes_true_without_another_event(world: World) -> None:
    async with world.watching() as watched:
        async with asyncio.TaskGroup() as tasks:
            inserting = [
                tasks.create_task(insert_after(world, delay), name=f"insert-after-{delay}")
                for delay in (0, 0.3, 1, 3)
            ]
        made = [task.result() for task in inserting]
        await eventually(lambda: all(watched.events(node, "health_status") for node in made))
        events = len(watched.noticed)
        for node in made:
            await eventually(partial(world.says, node, status="running", health="healthy"))
        await world.becomes_true()
        assert not [event for event in watched.noticed[events:] if event.node_id in {node.id for node in made}]
    assert Cause.SWEEP not in {change.cause for change in watched.written}


async def test_a_document_is_made_true_though_its_container_started_before_anybody_watched(world: World) -> None:
    """A restart of the watcher between the start and the insertion loses nothing."""
    node = await world.nodes.start("earlier")
    async with world.watching() as watched:
        await eventually(lambda: watched.count("eventwatch_sweep_duration_seconds_count"))
        await world.insert(node)
        await eventually(partial(world.says, node, status="running", ip=await world.ip(node)))
        await eventually(lambda: {change.cause for change in watched.of(node)} == {Cause.EVENT})


async def test_a_container_that_was_removed_before_its_document_came_takes_the_document_along(
    world: World,
) -> None:
    async with world.watching() as watched:
        node = await world.nodes.start("one")
        await node.remove()
        await eventually(lambda: watched.events(node, "destroy"))
        await world.insert(node, status="running")
        await eventually(lambda: is_gone(world, node))
    assert [change.deleted for change in watched.of(node)] == [True]


async def is_gone(world: World, node: Node) -> bool:
    return await world.document(node) is None


@pytest.mark.needs("cgroups")
async def test_events_of_containers_that_are_no_nodes_cost_no_query(world: World) -> None:
    node = await world.start("one")
    async with world.watching(orphan_grace=1) as watched:
        await world.becomes_true()
        await world.database.command("profile", 2)
        stranger = await world.nodes.start("stranger", healthcheck="flag", interval_s=1)
        await eventually(lambda: queries(world, stranger))  # its document may still come, so it is looked for
        await eventually(lambda: gave_up(watched, stranger))
        before = await queries(world, stranger)
        # It was not healthy at first, which may be told only now; a change that no probe saw in between is none.
        for events, healthy in enumerate((False, True, False, True), start=1):
            await stranger.set_healthy(healthy)
            await eventually(partial(has_events, watched, stranger, events), within=30)
        await stranger.pause()
        await stranger.unpause()
        await stranger.restart()
        await eventually(lambda: watched.events(stranger, "restart"))
        assert await queries(world, stranger) == before
        await node.pause()
        await eventually(lambda: queries(world, node))  # the profiler still sees what is asked for


def has_events(watched: Watched, node: Node, count: int) -> bool:
    return watched.events(node, "health_status") >= count


def gave_up(watched: Watched, node: Node) -> bool:
    return watched.app.pipeline is not None and node.id in watched.app.pipeline.orphans.foreign


async def queries(world: World, node: Node) -> int:
    """How many commands that name this node the database has served since it is profiling, the looks left out.

    Those are as many whatever the events.
    """
    return await world.database["system.profile"].count_documents(
        {
            "ns": world.collection.full_name,
            "command.projection": {"$ne": dict.fromkeys(LOOKED_AT, 1)},
            "$or": [
                {"command.filter._id": node.id},
                {"command.filter._id.$in": node.id},
                {"command.q._id": node.id},
            ],
        }
    )
