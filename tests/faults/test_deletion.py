"""Nothing but a 404 of the engine that owns a node deletes its document, however that 404 comes about."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest

from eventwatch.store.base import OWNERS
from tests.faults.harness import Oracle, World
from tests.faults.proxies import EngineProxy
from tests.kit.engines import PrivateEngine
from tests.kit.eventwatch import Eventwatch
from tests.kit.mongod import PrivateMongo
from tests.kit.truth import manager_document

FOREIGN = "f" * 64


@pytest.fixture
async def proxy(engine: PrivateEngine, tmp_path: Path) -> AsyncIterator[EngineProxy]:
    async with EngineProxy(tmp_path, engine.url) as made:
        yield made


@asynccontextmanager
async def proxied(world: World, proxy: EngineProxy, folder: Path) -> AsyncIterator[Eventwatch]:
    """Eventwatch behind the proxy, watching, with a sweep each second."""
    settings = world.settings(docker_host=proxy.url, sweep_interval="1s")
    with closing(Eventwatch(folder, settings)) as process:
        process.start()
        await process.says("Nodes status checker started.")
        yield process


async def test_an_inspection_that_failed_once_deletes_no_node_of_another_engine(
    world: World, proxy: EngineProxy, tmp_path: Path
) -> None:
    ours = str((await world.docker.system.info())["ID"])
    async with proxied(world, proxy, tmp_path) as process:
        # It bears our engine's id, as a stale write may leave it, so that it is looked at.
        fields = {"status": "running", "health": "healthy", "ip": "10.0.0.1", "engine_id": ours, "epoch": 1}
        owner = {"_id": FOREIGN, "engine_id": "another engine", "host": "another"}
        await world.client[world.database][OWNERS].insert_one(owner)
        await world.documents.insert_one(manager_document(FOREIGN, **fields))
        undo = proxy.fail("/containers/", 500)
        await process.says("Failed to get node info from docker: " + FOREIGN)
        undo()
        await asyncio.sleep(3)
        assert await world.documents.find_one({"_id": FOREIGN}) is not None, process.tail()


async def test_another_engine_that_takes_over_the_address_unnoticed_deletes_nothing(
    world: World, proxy: EngineProxy, tmp_path: Path
) -> None:
    for node in list(world.nodes.values())[4:]:
        await world.documents.delete_one({"_id": node.id})
        world.inserted.discard(node.id)
    async with proxied(world, proxy, tmp_path) as process:
        await Oracle(world).recovered()
        async with PrivateEngine() as other:
            # The event stream to the old engine stays open, as a half-open connection would.
            proxy.backend = other.url
            await asyncio.sleep(4)
            assert await world.documents.count_documents({}) == 4, process.tail()


async def test_an_engine_that_lost_its_id_but_not_its_nodes_is_watched_again(
    mongo: PrivateMongo, tmp_path: Path
) -> None:
    async with PrivateEngine() as engine, World(engine.url, mongo.url) as world:
        await world.populate(3)
        with closing(Eventwatch(tmp_path, world.settings())) as process:
            for count in (1, 2, 3):  # each start takes a higher epoch
                process.start()
                await process.says("Nodes status checker started.", times=count)
                await Oracle(world).recovered()
                assert await process.stop() == 0
            await engine.stop()
            engine.forget_identity()
            await engine.start()
            process.start()
            await process.says("Nodes status checker started.", times=4)
            for node in list(world.nodes.values()):
                await node.start()
            await Oracle(world).recovered(within=10)
            assert "A later holder of the lease" not in process.output, process.tail()


async def test_inspections_that_are_repeated_do_not_get_round_the_brake_nor_the_engines_id(
    world: World, proxy: EngineProxy, tmp_path: Path
) -> None:
    async with proxied(world, proxy, tmp_path) as process:
        await Oracle(world).recovered()
        async with PrivateEngine() as other:
            undo = proxy.fail("/containers/", 500)
            await process.says("Failed to get node info from docker:", times=8)
            proxy.backend = other.url
            undo()
            await asyncio.sleep(4)
            assert await world.documents.count_documents({}) == 8, process.tail()
