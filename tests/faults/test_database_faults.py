"""The database goes away in every way that it can, and comes back; nobody touches eventwatch."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
from pymongo import AsyncMongoClient

import eventwatch.store.connection  # noqa: F401 - it mends the driver
from tests.faults.harness import RECOVERY, Oracle, World, endure, freeze_for, long
from tests.kit.engines import PrivateEngine
from tests.kit.eventwatch import Eventwatch
from tests.kit.mongod import PrivateMongo, free_port
from tests.kit.truth import Document
from tests.kit.waiting import eventually


async def test_all_is_right_after_mongod_was_killed_and_started_again(
    mongo: PrivateMongo, world: World, eventwatch: Eventwatch
) -> None:
    async def inject() -> None:
        await mongo.kill()
        await asyncio.sleep(2)
        await mongo.start()

    await endure("mongod SIGKILL and restart", world, eventwatch, inject)


async def test_all_is_right_after_mongod_was_frozen_for_10_s(
    mongo: PrivateMongo, world: World, eventwatch: Eventwatch
) -> None:
    await endure("mongod SIGSTOP for 10 s", world, eventwatch, lambda: freeze_for(10, mongo))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_calls_that_are_cancelled_while_the_database_is_away_leave_the_client_as_it_was() -> None:
    """On Python 3.11 the driver's lock would stay locked for ever: every later call would hang."""
    chance = random.Random(1)
    for _ in range(25):
        client: AsyncMongoClient[Document] = AsyncMongoClient(
            f"mongodb://127.0.0.1:{free_port()}/", serverSelectionTimeoutMS=5000, connectTimeoutMS=500
        )
        calls = [asyncio.create_task(client.nowhere.nothing.find_one()) for _ in range(8)]
        # The driver looks again every half second, and is vulnerable then.
        await asyncio.sleep(0.5 + chance.uniform(-0.002, 0.004))
        for call in calls:
            call.cancel()
        _, deaf = await asyncio.wait(calls, timeout=1)
        assert not deaf, "a cancellation was swallowed"
        async with asyncio.timeout(2):
            await client.close()
    gc.collect()  # the driver's half-made connections, while their warnings are ignored


@asynccontextmanager
async def beside(
    engine: PrivateEngine, mongo: PrivateMongo, folder: Path, **settings: str
) -> AsyncIterator[tuple[World, Eventwatch]]:
    """A world on the shared engine and on a database of the test's own."""
    async with mongo, World(engine.url, mongo.url) as world:
        await world.populate(8)
        with closing(Eventwatch(folder, world.settings(**settings))) as process:
            process.start()
            yield world, process


@long
async def test_all_is_right_after_the_primary_stepped_down(engine: PrivateEngine, tmp_path: Path) -> None:
    replica_set = PrivateMongo(members=3)

    async def inject() -> None:
        await replica_set.step_down(for_s=3)
        await replica_set.wait_primary()
        await asyncio.sleep(1)

    async with beside(engine, replica_set, tmp_path) as (world, process):
        await endure("mongod steps down in a replica set of three", world, process, inject)


@long
async def test_all_is_right_after_a_failover(engine: PrivateEngine, tmp_path: Path) -> None:
    replica_set = PrivateMongo(members=3)

    async def inject() -> None:
        killed = await replica_set.fail_over()
        await asyncio.sleep(1)
        await replica_set.start(killed)
        await replica_set.wait_replicated()

    async with beside(engine, replica_set, tmp_path) as (world, process):
        await endure("primary SIGKILL and failover in a replica set of three", world, process, inject)


async def test_a_replica_set_without_a_primary_is_waited_for(engine: PrivateEngine, tmp_path: Path) -> None:
    async with PrivateMongo(members=3) as replica_set, World(engine.url, replica_set.url) as world:
        await world.populate(2)
        for number in (1, 2):
            await replica_set.kill(number)

        async def without_primary() -> bool:
            return await replica_set.primary() is None

        await eventually(without_primary, 30)  # the one that is left stays primary for some seconds
        with closing(Eventwatch(tmp_path, world.settings())) as process:
            process.start()
            await process.says("no primary")
            assert process.output.count("\n") == 1
            await replica_set.start(1)  # a majority is enough, also to make the first indexes
            await Oracle(world).recovered(within=60)
            assert await process.stop() == 0, process.tail()


@long
async def test_all_is_right_after_the_databases_disk_was_full(engine: PrivateEngine, tmp_path: Path) -> None:
    small = PrivateMongo(disk_mb=400)

    async def inject() -> None:
        with small.full_disk():
            # Out of space, mongod ends itself at its next checkpoint, if not at once.
            for _ in range(100):
                await asyncio.sleep(0.1)
                if not small.members[0].running:
                    break
        if not small.members[0].running:
            await small.start()

    async with beside(engine, small, tmp_path) as (world, process):
        await endure("disk full for the database", world, process, inject)


async def test_all_is_right_after_a_database_without_a_replica_set_was_killed(
    engine: PrivateEngine, tmp_path: Path
) -> None:
    standalone = PrivateMongo(standalone=True)

    async def inject() -> None:
        await standalone.kill()
        await standalone.start()

    async with beside(engine, standalone, tmp_path) as (world, process):
        await endure("standalone mongod SIGKILL, unjournaled writes lost", world, process, inject)


async def test_a_write_that_a_crash_of_the_database_lost_is_repeated(
    engine: PrivateEngine, tmp_path: Path
) -> None:
    standalone = PrivateMongo(standalone=True)
    # No sweep by the timer may help: the database's return alone has to be reason enough.
    async with beside(engine, standalone, tmp_path, sweep_interval="60s") as (world, process):
        oracle = Oracle(world)
        await process.says("Nodes status checker started.")
        await oracle.recovered()
        await standalone.kill()
        standalone.save_data()
        await standalone.start()
        await asyncio.gather(*(node.kill() for node in world.nodes.values()))
        await process.says(" status updated: running -> exited", times=len(world.nodes))
        await standalone.kill()
        standalone.roll_back()
        await standalone.start()
        assert await oracle.recovered() <= RECOVERY


async def test_a_lease_that_the_database_lost_in_a_crash_is_taken_again_and_only_a_deleted_one_is_obeyed(
    engine: PrivateEngine, tmp_path: Path
) -> None:
    async with PrivateMongo(standalone=True) as standalone, World(engine.url, standalone.url) as world:
        await world.populate(2)
        await standalone.kill()
        standalone.save_data()
        await standalone.start()
        with closing(Eventwatch(tmp_path, world.settings(lease_duration="4s", sweep_interval="1s"))) as process:
            process.start()
            await process.says("Nodes status checker started.")
            await Oracle(world).recovered(within=10)
            await standalone.kill()
            standalone.roll_back()
            await standalone.start()
            await process.says("Nodes status checker started.", times=2, within=20)
            await Oracle(world).recovered(within=10)
            assert process.running
            await asyncio.sleep(5)  # a lease, in which the database was not away
            await world.checkers.delete_many({})
            await process.says("The checker's document was deleted: stopping", within=10)
            assert await process.ends() == 0
