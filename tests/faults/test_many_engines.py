"""Two engines, one watcher each, one database: neither touches what the other's watcher looks after."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from tests.faults.harness import CALL, OLDER_MODEL, Oracle, World, long
from tests.kit.engines import PrivateEngine
from tests.kit.eventwatch import Eventwatch
from tests.kit.mongod import PrivateMongo
from tests.kit.truth import Document
from tests.kit.waiting import eventually

LEADS = "Nodes status checker started."
BRAKE = "Brake: "
DELETED = "Node deleted from db: "
NODES = 8


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def newer_engine() -> AsyncIterator[PrivateEngine]:
    async with PrivateEngine("28.5") as private:
        yield private


@dataclass
class Host:
    """One Docker host: its engine, what runs on it, and its watcher."""

    engine: PrivateEngine
    world: World
    watcher: Eventwatch

    @property
    def ids(self) -> list[str]:
        return sorted(self.world.inserted)

    async def documents(self) -> dict[str, Document]:
        rows = await self.world.documents.find({"_id": {"$in": self.ids}}).to_list()
        return {row["_id"]: row for row in rows}

    async def is_right(self, within: float = 10.0) -> None:
        await Oracle(self.world, only_ours=True).recovered(within=within)


@pytest.fixture
async def hosts(
    engine: PrivateEngine, newer_engine: PrivateEngine, mongo: PrivateMongo, tmp_path: Path
) -> AsyncIterator[tuple[Host, Host]]:
    """An engine of 20.10 and one of 28.5, each with nodes and a watcher, and all documents in one collection."""
    async with AsyncExitStack() as stack:
        made: list[Host] = []
        for number, private in enumerate((engine, newer_engine)):
            database = made[0].world.database if made else ""
            world = await stack.enter_async_context(World(private.url, mongo.url, seed=number, database=database))
            settings = world.settings(sweep_interval="1s", lease_duration="2s")
            watcher = Eventwatch(tmp_path, settings, name=f"watcher{number}")
            stack.callback(watcher.close)
            made.append(Host(private, world, watcher))
        await begin(made)
        yield made[0], made[1]


async def begin(hosts: list[Host]) -> None:
    """All watchers first, then the nodes: what no engine owns yet, a watcher that is alone takes for its own."""
    for host in hosts:
        host.watcher.start()
        await host.watcher.says(LEADS)
    for host in hosts:
        await host.world.populate(NODES)
    for host in hosts:
        await host.is_right()


async def test_each_watcher_keeps_its_own_nodes_right_and_never_touches_the_others(
    hosts: tuple[Host, Host],
) -> None:
    one, other = hosts
    async with one.world.busy(), other.world.busy():
        await asyncio.sleep(6)
    for host in hosts:
        await host.is_right()
        assert not await Oracle(host.world, only_ours=True).lost_requests()
    for host, stranger in ((one, other), (other, one)):
        owners = {row.get("engine_id") for row in (await host.documents()).values()}
        assert len(owners) == 1, owners
        log = stranger.watcher.output
        assert not [node_id for node_id in host.ids if f"{node_id[:12]} status updated" in log]
        assert not [node_id for node_id in host.ids if DELETED + node_id in log]
    assert {owner for host in hosts for row in (await host.documents()).values() if (owner := row["engine_id"])}
    assert await one.world.checkers.count_documents({}) == 2


async def test_documents_that_a_manager_wrote_back_without_their_engines_id_are_nobodys_to_delete(
    hosts: tuple[Host, Host],
) -> None:
    one, other = hosts
    for round_number in range(3):
        for host in hosts:
            for node_id, document in (await host.documents()).items():
                older = {name: document[name] for name in OLDER_MODEL}
                await host.world.documents.replace_one({"_id": node_id}, older)
        # Beyond a sweep of both, in another step each time.
        await asyncio.sleep(1 + 0.3 * round_number)
    for host in hosts:
        assert sorted(await host.documents()) == host.ids, host.watcher.tail()
        assert DELETED not in host.watcher.output
    await asyncio.sleep(1.5)
    mine, theirs = [{row.get("engine_id") for row in (await host.documents()).values()} for host in hosts]
    assert len(mine) == len(theirs) == 1, "the stamp is not put back"
    assert mine != theirs
    assert one.watcher.running
    assert other.watcher.running


async def test_documents_without_their_engines_id_survive_a_restart_of_their_own_watcher(
    hosts: tuple[Host, Host],
) -> None:
    """While it is down, the other watcher is the only live one; it knows that it is not alone for all that."""
    one, other = hosts
    assert await other.watcher.stop() == 0
    for node_id, document in list((await other.documents()).items())[:3]:
        older = {name: document[name] for name in OLDER_MODEL}
        await other.world.documents.replace_one({"_id": node_id}, older)
    await asyncio.sleep(3)
    assert sorted(await other.documents()) == other.ids, one.watcher.tail()
    other.watcher.start()
    await other.is_right()


async def test_documents_that_nobody_owns_yet_survive_a_watcher_of_another_engine_that_starts_first(
    engine: PrivateEngine, newer_engine: PrivateEngine, mongo: PrivateMongo, tmp_path: Path
) -> None:
    """A fleet's first day: a manager's documents without a stamp, and hosts that are upgraded one by one."""
    async with (
        World(engine.url, mongo.url) as early_world,
        World(newer_engine.url, mongo.url, seed=1, database=early_world.database) as late_world,
    ):
        hosts = []
        for number, (private, world) in enumerate(((engine, early_world), (newer_engine, late_world))):
            settings = world.settings(sweep_interval="1s", lease_duration="2s")
            hosts.append(Host(private, world, Eventwatch(tmp_path, settings, name=f"watcher{number}")))
        early, late = hosts
        with closing(early.watcher), closing(late.watcher):
            await early.world.populate(2)
            await late.world.populate(3)
            early.watcher.start()
            await early.watcher.says("3 documents belong to no engine on record")
            await asyncio.sleep(3)
            assert sorted(await late.documents()) == late.ids, early.watcher.tail()
            late.watcher.start()
            for host in hosts:
                await host.is_right()
            # From now on it is on record whose they are, even with their watcher down and their stamps dropped.
            assert await late.watcher.stop() == 0
            await late.world.documents.update_many({}, {"$unset": {"engine_id": "", "epoch": ""}})
            await asyncio.sleep(3)
            assert sorted(await late.documents()) == late.ids, early.watcher.tail()
            assert DELETED not in early.watcher.output


async def wipe_one_of_two(kept: Host, lost: Host, *, stamped: bool) -> None:
    await begin([kept, lost])
    if not stamped:
        await kept.world.documents.update_many({}, {"$unset": {"engine_id": "", "epoch": ""}})
    await lost.engine.wipe()
    await lost.engine.start()
    await lost.watcher.says(BRAKE, within=30)
    await asyncio.sleep(CALL)  # several sweeps, but no minute
    assert sorted(await kept.documents()) == kept.ids, lost.watcher.tail()
    assert sorted(await lost.documents()) == lost.ids, lost.watcher.tail()
    assert lost.watcher.output.count(BRAKE) >= 3
    assert not [node_id for node_id in kept.ids if DELETED + node_id in lost.watcher.output]
    await kept.is_right()


@pytest.fixture
async def doomed(
    newer_engine: PrivateEngine, mongo: PrivateMongo, tmp_path: Path
) -> AsyncIterator[tuple[Host, Host]]:
    """A host to keep and one to lose, nothing started yet."""
    async with (
        PrivateEngine() as engine,
        World(newer_engine.url, mongo.url) as kept_world,
        World(engine.url, mongo.url, seed=1, database=kept_world.database) as lost_world,
    ):
        hosts = []
        for number, (private, world) in enumerate(((newer_engine, kept_world), (engine, lost_world))):
            settings = world.settings(sweep_interval="1s", lease_duration="2s")
            hosts.append(Host(private, world, Eventwatch(tmp_path, settings, name=f"watcher{number}")))
        with closing(hosts[0].watcher), closing(hosts[1].watcher):
            yield hosts[0], hosts[1]


@pytest.mark.parametrize("stamped", [True, False], ids=["stamped", "written back by an older manager"])
async def test_a_wiped_engine_brakes_its_own_watcher_and_leaves_the_others_nodes_alone(
    doomed: tuple[Host, Host], stamped: bool
) -> None:
    await wipe_one_of_two(*doomed, stamped=stamped)


@long
async def test_what_an_engine_owned_and_all_sweeps_of_a_minute_miss_is_gone_for_good(
    doomed: tuple[Host, Host],
) -> None:
    kept, lost = doomed
    await wipe_one_of_two(kept, lost, stamped=True)

    async def gone() -> bool:
        return not await lost.documents()

    await eventually(gone, within=90)
    assert sorted(await kept.documents()) == kept.ids, lost.watcher.tail()


async def test_an_engine_with_another_id_deletes_nothing(
    newer_engine: PrivateEngine, mongo: PrivateMongo, tmp_path: Path
) -> None:
    async with PrivateEngine() as doomed, World(doomed.url, mongo.url) as world:
        await world.populate(NODES)
        with closing(Eventwatch(tmp_path, world.settings(sweep_interval="1s", lease_duration="2s"))) as watcher:
            watcher.start()
            await watcher.says(LEADS)
            await Oracle(world).recovered(within=10)
            await doomed.wipe(new_identity=True)
            await doomed.start()
            await watcher.says(LEADS, times=2)
            await asyncio.sleep(4)
            assert await world.documents.count_documents({}) == NODES, watcher.tail()
