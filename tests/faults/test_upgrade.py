"""The last release (its wheel is in tests/releases) and this tree on one database, as while a fleet is updated."""

from __future__ import annotations

import asyncio
import json
import sys
import zipfile
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest

from eventwatch import StoreError
from eventwatch.store.base import ENGINES, HISTORY, OWNERS, checker_id
from eventwatch.store.connection import open_store
from eventwatch.store.documents import NodeChecker
from eventwatch.store.rows import Lease, Peer
from tests.faults.epochs import followed
from tests.faults.harness import Oracle, World
from tests.kit.engines import PrivateEngine
from tests.kit.eventwatch import Eventwatch, variables
from tests.kit.mongod import PrivateMongo, free_address
from tests.kit.processes import ROOT, our_environment, run
from tests.kit.truth import ago
from tests.kit.waiting import eventually
from tests.takeover import disturb, holder, succeeded

STANDS_BY: Final = "Standing by"
#: A lease that does not expire meanwhile, and sweeps that look at everything again and again.
SETTINGS: Final = {"lease_duration": "5m", "sweep_interval": "1s", "log_level": "INFO"}
PATIENCE: Final = 60.0
COLLECTIONS: Final = ("ToolServerNode", "NodeChecker", OWNERS, ENGINES, HISTORY)


@pytest.fixture(scope="session")
def last_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    [wheel] = (ROOT / "tests" / "releases").glob("eventwatch-*.whl")
    folder = tmp_path_factory.mktemp("release")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder)
    return folder


@pytest.fixture
async def world(engine: PrivateEngine, mongo: PrivateMongo) -> AsyncIterator[World]:
    async with World(engine.url, mongo.url) as made:
        await made.populate(3)
        yield made


@pytest.fixture
def versions(world: World, tmp_path: Path, last_release: Path) -> Iterator[tuple[Eventwatch, Eventwatch]]:
    """The last release and this tree on that world, not started."""
    with ExitStack() as stack:
        settings = world.settings(**SETTINGS)
        old, new = (
            stack.enter_context(closing(Eventwatch(tmp_path, settings, name=name, code=code)))
            for name, code in (("old", last_release), ("new", ROOT))
        )
        yield old, new
        for each in (old, new):
            assert "Traceback" not in each.output, each.tail()
            assert "Warning: " not in each.output, each.tail()


async def asks(code: Path, world: World, *arguments: str, codes: tuple[int, ...] = (0,)) -> Any:
    """What a command of that version answers in JSON."""
    environment = our_environment(PYTHONPATH=str(code), **variables(world.settings()))
    command = (sys.executable, "-m", "eventwatch", *arguments, "--json")
    ended = await asyncio.to_thread(run, *command, env=environment, cwd=code, check=False)
    assert ended.code in codes, ended.output
    return json.loads(ended.stdout)


async def leads(world: World, version: Eventwatch) -> None:
    """Wait until this process has the lease."""

    async def is_holder() -> bool:
        return bool((await holder(world))["pid"] == version.pid)

    await eventually(is_holder, PATIENCE, what=lambda: f"{version.name} leads\n{version.tail()}")


async def indexes(world: World) -> dict[str, Any]:
    database = world.client[world.database]
    return {name: await database[name].index_information() for name in COLLECTIONS}


async def stands_by(version: Eventwatch) -> None:
    """Start it, and wait until it has seen the leader alive."""
    before = version.output.count(STANDS_BY)
    version.start()
    await version.says(STANDS_BY, times=before + 1, within=PATIENCE)


async def test_each_version_takes_over_from_the_other_however_that_ends(
    world: World, versions: tuple[Eventwatch, Eventwatch]
) -> None:
    old, new = versions
    old.start()
    await leads(world, old)
    await Oracle(world).recovered()
    made_by_old = await indexes(world)
    async with followed(world) as epochs:
        # An update and its rollback, each with either signal.
        for leader, follower, killed in ((old, new, False), (new, old, True), (old, new, True), (new, old, False)):
            await stands_by(follower)
            before = await holder(world)
            await (leader.kill() if killed else leader.stop())
            await disturb(world)
            await succeeded(world, before)
            await leads(world, follower)
            await disturb(world)
            await Oracle(world).recovered()
    assert not epochs.went_back
    assert await indexes(world) == made_by_old


async def test_while_both_run_one_leads_and_no_document_flaps(
    world: World, versions: tuple[Eventwatch, Eventwatch]
) -> None:
    old, new = versions
    for leader, follower in ((new, old), (old, new)):
        leader.start(lease_duration="6s")
        await leads(world, leader)
        follower.start(lease_duration="6s")
        await follower.says(STANDS_BY, within=PATIENCE)
        await Oracle(world).recovered()
        before = await world.documents.find().to_list()
        reports: list[Any] = []

        async def is_told_twice(reports: list[Any] = reports) -> bool:
            renewed_at = (await holder(world))["renewed_at"]
            if renewed_at not in reports:
                reports.append(renewed_at)
            return len(reports) > 1

        async with followed(world) as epochs:
            await eventually(is_told_twice, PATIENCE)
        assert epochs.writes == 0
        assert await world.documents.find().to_list() == before
        assert (await holder(world))["pid"] == leader.pid
        for each in (follower, leader):
            await each.stop()


async def test_each_version_shows_and_keeps_what_the_other_wrote_and_what_no_version_knows(
    world: World, versions: tuple[Eventwatch, Eventwatch], last_release: Path
) -> None:
    old, new = versions
    database = world.client[world.database]
    codes = {"old": last_release, "new": ROOT}
    killed = next(iter(world.nodes.values()))
    for writer, reader in ((old, new), (new, old)):
        address = free_address()
        writer.start(http_listen=address)
        await leads(world, writer)
        await Oracle(world).recovered()
        await (killed.kill() if (await killed.inspect())["State"]["Running"] else killed.start())
        await Oracle(world).recovered()
        status = (await killed.inspect())["State"]["Status"]

        async def is_recorded(status: str = status) -> bool:
            row = await database[HISTORY].find_one({"_id": killed.id})
            return bool(row and any(change["new"].get("status") == status for change in row["changes"]))

        await eventually(is_recorded, PATIENCE)
        await writer.stop()
        await put_in_what_nobody_knows(world, killed.id)
        ask = partial(asks, codes[reader.name], world)
        told, rows, engines = await asyncio.gather(
            ask("explain", killed.id), ask("status", codes=(0, 1)), ask("engines", codes=(0, 1))
        )
        assert any(change["new"].get("status") == status for change in told["changes"])
        assert {row["id"] for row in rows} == set(world.nodes), rows
        assert engines
        reader.start(http_listen=address)
        await leads(world, reader)
        await Oracle(world).recovered()
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"http://{address}/api/nodes/{killed.id}/changes") as answer,
        ):
            changes = await answer.json()
        assert any(change["new"].get("status") == status for change in changes), changes
        await reader.stop()
    for name in ("ToolServerNode", OWNERS, ENGINES, HISTORY):
        row = await database[name].find_one({"future": {"shape": [1]}})
        assert row is not None, name
    history = await database[HISTORY].find_one({"_id": killed.id})
    assert history is not None
    assert {"id": "future", "cause": "teleport"}.items() <= history["changes"][0].items()


async def put_in_what_nobody_knows(world: World, node_id: str) -> None:
    """Fields and values of a version to come."""
    database, future = world.client[world.database], {"$set": {"future": {"shape": [1]}}}
    strange = {"status": "checkpointing", "health": "resting"}
    await world.documents.update_one({"_id": node_id}, {"$set": {**future["$set"], **strange}})
    for name in (OWNERS, ENGINES, HISTORY):
        await database[name].update_many({}, future)
    change = {
        "id": "future",
        "cause": "teleport",
        "end": "vaporised",
        "asked": {"by": 7},
        "count": "many",
        "at": ago(3600),
        "until": "soon",
        "new": {"gravity": [9.8], "status": "floating"},
        "old": {},
    }
    await database[HISTORY].update_one({"_id": node_id}, {"$pull": {"changes": {"id": "future"}}})
    pushed = {"$push": {"changes": {"$each": [change], "$position": 0}}}
    await database[HISTORY].update_one({"_id": node_id}, pushed)


async def test_a_later_format_is_refused_in_one_line_and_nothing_of_it_is_touched(
    world: World, versions: tuple[Eventwatch, Eventwatch]
) -> None:
    _, new = versions
    new.start()
    await leads(world, new)
    await Oracle(world).recovered()
    await new.stop()
    engines, later = world.client[world.database][ENGINES], {"format": 2, "version": "9.9.9"}
    await engines.update_one({}, {"$set": later})
    await disturb(world)
    before = await world.documents.find().to_list(), await engines.find().to_list()
    new.start()
    assert await new.ends(PATIENCE) == 2
    assert "in format 2 (NodeEngine.format), written by eventwatch 9.9.9;" in new.output
    environment = our_environment(**variables(world.settings()))
    ended = run(sys.executable, "-m", "eventwatch", "sweep", env=environment, check=False)
    assert (ended.code, "in format 2 (NodeEngine.format), written by eventwatch 9.9.9;" in ended.stderr) == (
        2,
        True,
    ), ended
    assert (await world.documents.find().to_list(), await engines.find().to_list()) == before
    assert await world.checkers.find_one() is None
    await engines.update_one({}, {"$set": {"format": 1}})
    new.start()
    await Oracle(world).recovered()


@pytest.mark.parametrize("odd", ["2", 2**60, -1, 0, None, float("nan"), [], {"$": 2}, True])
async def test_what_is_no_format_counts_for_nothing(mongo: PrivateMongo, odd: object) -> None:
    one, two = (
        NodeChecker.model_construct(manager_id=name, interval=1.0, pid=1, host="host", version="0")
        for name in ("one", "two")
    )
    key = {"_id": checker_id("engine")}
    async with mongo.client() as client, open_store(mongo.url, "odd_formats") as store:
        try:
            await client["odd_formats"][ENGINES].insert_one({**key, "engine_id": "engine", "format": odd})
            lease = await store.acquire_lease(one, engine_id="engine", duration=10)
            assert isinstance(lease, Lease)
            row = await client["odd_formats"][ENGINES].find_one(key)
            assert row
            assert row["format"] == 1
            await client["odd_formats"]["NodeChecker"].update_one(key, {"$set": {"format": odd}})
            assert isinstance(await store.acquire_lease(two, engine_id="engine", duration=10), Peer)
            assert await store.renew_lease(lease, duration=10, cursor=None)
        finally:
            await client.drop_database("odd_formats")


async def test_who_could_not_take_over_is_no_standby_of_a_later_format(mongo: PrivateMongo) -> None:
    one, two = (
        NodeChecker.model_construct(manager_id=name, interval=1.0, pid=1, host="host", version="0")
        for name in ("one", "two")
    )
    async with mongo.client() as client, open_store(mongo.url, "later_format") as store:
        try:
            assert isinstance(await store.acquire_lease(one, engine_id="engine", duration=10), Lease)
            for name in ("NodeChecker", ENGINES):
                await client["later_format"][name].update_one({}, {"$set": {"format": 2}})
            with pytest.raises(StoreError, match="format 2") as caught:
                await store.acquire_lease(two, engine_id="engine", duration=10)
            assert caught.value.permanent
            assert not await store.peers("engine", besides="one")
        finally:
            await client.drop_database("later_format")
