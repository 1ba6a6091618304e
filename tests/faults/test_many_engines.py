"""Two engines, one watcher each, one database: neither touches what the other's watcher looks after."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from tests.engines import PrivateEngine, PrivateMongo
from tests.faults.harness import CALL, OLDER_MODEL, Document, Eventwatch, Oracle, World

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
        await host.watcher.logged(LEADS)
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
        log = stranger.watcher.text()
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
        assert DELETED not in host.watcher.text()
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
    assert await other.watcher.terminate() == 0
    for node_id, document in list((await other.documents()).items())[:3]:
        older = {name: document[name] for name in OLDER_MODEL}
        await other.world.documents.replace_one({"_id": node_id}, older)
    await asyncio.sleep(3)
    assert sorted(await other.documents()) == other.ids, one.watcher.tail()
    other.watcher.start()
    await other.is_right()


@pytest.mark.parametrize("stamped", [True, False], ids=["stamped", "written back by an older manager"])
async def test_a_wiped_engine_brakes_its_own_watcher_and_leaves_the_others_nodes_alone(
    newer_engine: PrivateEngine, mongo: PrivateMongo, tmp_path: Path, stamped: bool
) -> None:
    """Wiped, but with its id kept: three sweeps in a row have to agree before its documents go."""
    async with (
        PrivateEngine() as doomed,
        World(newer_engine.url, mongo.url) as kept_world,
        World(doomed.url, mongo.url, seed=1, database=kept_world.database) as doomed_world,
    ):
        hosts = []
        for number, (private, world) in enumerate(((newer_engine, kept_world), (doomed, doomed_world))):
            settings = world.settings(sweep_interval="1s", lease_duration="2s")
            hosts.append(Host(private, world, Eventwatch(tmp_path, settings, name=f"watcher{number}")))
        kept, lost = hosts
        with closing(kept.watcher), closing(lost.watcher):
            await begin(hosts)
            if not stamped:
                await kept_world.documents.update_many({}, {"$unset": {"engine_id": "", "epoch": ""}})
            await doomed.wipe()
            await doomed.start()
            await lost.watcher.logged(BRAKE, within=30)
            assert sorted(await kept.documents()) == kept.ids, lost.watcher.tail()
            await asyncio.sleep(CALL)
            assert sorted(await kept.documents()) == kept.ids, lost.watcher.tail()
            assert not [node_id for node_id in kept.ids if DELETED + node_id in lost.watcher.text()]
            await kept.is_right()
            if stamped:
                # What it owned and what three sweeps agree on is gone for good.
                assert not await lost.documents(), lost.watcher.tail()
                assert lost.watcher.text().count(BRAKE) >= 2


async def test_an_engine_with_another_id_deletes_nothing(
    newer_engine: PrivateEngine, mongo: PrivateMongo, tmp_path: Path
) -> None:
    async with PrivateEngine() as doomed, World(doomed.url, mongo.url) as world:
        await world.populate(NODES)
        with closing(Eventwatch(tmp_path, world.settings(sweep_interval="1s", lease_duration="2s"))) as watcher:
            watcher.start()
            await watcher.logged(LEADS)
            await Oracle(world).recovered(within=10)
            await doomed.wipe(new_identity=True)
            await doomed.start()
            await watcher.logged(LEADS, times=2)
            await asyncio.sleep(4)
            assert await world.documents.count_documents({}) == NODES, watcher.tail()
