"""The engine goes away and comes back while nodes die: on a private engine, which can be ended at will."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator

import pytest
from aiodocker import Docker

from tests.kit.engines import PrivateEngine
from tests.kit.nodes import Nodes
from tests.kit.seen import logged, texts
from tests.kit.truth import ago, assert_documents_true
from tests.kit.waiting import eventually
from tests.kit.world import World, opened_world

#: Seconds: every document is right this soon after the engine's return.
RIGHT_WITHIN = 2.0
NO_SUCH_NODE = "e" * 64


@pytest.fixture(scope="module")
def private_engine() -> Iterator[PrivateEngine]:
    """One for all of these tests: its start takes seconds, and each test leaves it running."""
    engine = PrivateEngine()
    asyncio.run(engine.__aenter__())
    try:
        yield engine
    finally:
        asyncio.run(engine.__aexit__(None, None, None))


@pytest.fixture
async def private_world(private_engine: PrivateEngine, mongo_url: str, database: str) -> AsyncIterator[World]:
    prefix = f"ew-{secrets.token_hex(3)}"
    async with (
        Docker(private_engine.url) as docker,
        Nodes(docker, f"{prefix}-", network=prefix) as nodes,
        opened_world(docker, nodes, mongo_url, database) as world,
    ):
        yield world


@pytest.mark.parametrize("crash", [pytest.param(False, id="restart"), pytest.param(True, id="crash")])
async def test_the_documents_are_right_soon_after_the_engine_is_back(
    private_engine: PrivateEngine, private_world: World, crash: bool
) -> None:
    world = private_world
    steady, dying, removed = [await world.start(name) for name in ("steady", "dying", "removed")]
    healthy = await world.start("healthy", healthcheck="ok", interval_s=0.3)
    reborn = await world.start("reborn", restart="always")
    exited = await world.start("exited")
    await exited.kill()
    await world.insert(NO_SUCH_NODE, status="running", ip="192.0.2.1", engine_id="another", last_req_time=ago(0))
    foreign = await world.collection.find_one({"_id": NO_SUCH_NODE})
    await healthy.wait_health("healthy")
    pid = (await dying.inspect())["State"]["Pid"]
    with logged("INFO") as lines:
        async with world.watching(docker_host=private_engine.url, idle_timeout=0) as watched:
            await removed.remove()
            await eventually(lambda: watched.events(removed, "destroy"))
            if crash:
                await private_engine.kill()
                private_engine.kill_container_process(pid)
            else:
                await private_engine.stop()
            await private_engine.start()
            # The document of a node that this engine does not know must not be compared, and must still be there.
            assert await world.collection.find_one({"_id": NO_SUCH_NODE}) == foreign
            await world.collection.delete_one({"_id": NO_SUCH_NODE})
            await assert_documents_true(world.docker, world.database, world.nodes.network, within=RIGHT_WITHIN)
            assert await world.collection.count_documents({}) == 5
            for node in (steady, dying, healthy, exited):
                assert await world.says(node, status="exited", ip="")
            await eventually(lambda: world.says(reborn, status="running"))
            await steady.start()
            await eventually(lambda: world.says(steady, status="running"))
            assert watched.count("eventwatch_stream_reconnects_total", reason="broken") >= 1
    assert not texts(lines, "ERROR")


async def test_a_document_of_another_engine_survives_an_engine_that_comes_and_goes(
    private_engine: PrivateEngine, private_world: World
) -> None:
    """Inspections fail while it is away and are repeated; its 404 then is about nodes that it never owned."""
    world = private_world
    node = await world.start("one")
    others = [f"{number:064x}" for number in range(20)]
    for node_id in others:
        await world.insert(node_id, status="running", ip="192.0.2.1", engine_id="another", last_req_time=ago(0))
    async with world.watching(docker_host=private_engine.url, idle_timeout=0, sweep_interval=0.3) as watched:
        sweeps = watched.count("eventwatch_sweep_duration_seconds_count")
        await private_engine.stop()
        await eventually(lambda: watched.count("eventwatch_sweep_duration_seconds_count") > sweeps + 1)
        await private_engine.start()
        await eventually(lambda: world.says(node, status="exited"))
        sweeps = watched.count("eventwatch_sweep_duration_seconds_count")
        await eventually(lambda: watched.count("eventwatch_sweep_duration_seconds_count") > sweeps + 2)
        assert await world.collection.count_documents({"_id": {"$in": others}, "status": "running"}) == len(others)
