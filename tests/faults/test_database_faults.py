"""The database goes away in every way that it can, and comes back; nobody touches eventwatch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.engines import PrivateEngine, PrivateMongo
from tests.faults.harness import RECOVERY, Eventwatch, Oracle, World, endure, long


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
    async def inject() -> None:
        mongo.freeze()
        try:
            await asyncio.sleep(10)
        finally:
            mongo.thaw()

    await endure("mongod SIGSTOP for 10 s", world, eventwatch, inject)


@asynccontextmanager
async def beside(
    engine: PrivateEngine, mongo: PrivateMongo, folder: Path, **settings: str
) -> AsyncIterator[tuple[World, Eventwatch]]:
    """A world on the shared engine and on a database of the test's own."""
    async with mongo, World(engine.url, mongo.url) as world:
        await world.populate(8)
        process = Eventwatch(folder, world.settings(**settings))
        process.start()
        try:
            yield world, process
        finally:
            process.close()


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
        await process.logged("Nodes status checker started.")
        await oracle.recovered()
        await standalone.kill()
        standalone.save_data()
        await standalone.start()
        await asyncio.gather(*(node.kill() for node in world.nodes.values()))
        await process.logged(" status updated: running -> exited", times=len(world.nodes))
        await standalone.kill()
        standalone.roll_back()
        await standalone.start()
        assert await oracle.recovered() <= RECOVERY
