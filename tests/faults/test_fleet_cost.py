"""What a watcher costs its database depends on its own nodes, not on how many nodes other engines have there.

Told by the database's own profiler: it notes each query of eventwatch, with its plan and how many documents it
examined, while the collection holds a hundred thousand documents of a thousand other engines.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pymongo import AsyncMongoClient
from pymongo.asynchronous.database import AsyncDatabase

from eventwatch.store.indexes import INDEXES
from tests.faults.harness import Oracle, World
from tests.kit.eventwatch import Eventwatch
from tests.kit.fleet import EACH, crowd
from tests.kit.mongod import find_mongod, free_address, free_port
from tests.kit.processes import OUR_VARIABLES, ROOT
from tests.kit.truth import Document

LEADS = "Nodes status checker started."
ENGINES_AWAY = 1000
#: What a login needs, but for `createIndex`.
LACKING = ("find", "insert", "update", "remove", "listCollections", "listIndexes", "changeStream")
#: Documents that a query may examine besides those of the nodes.
BESIDES = 20


@pytest.fixture
async def crowded(world: World) -> AsyncDatabase[Document]:
    database = world.client[world.database]
    await crowd(database, ENGINES_AWAY)
    return database


async def until_indexed(database: AsyncDatabase[Document]) -> None:
    """Wait until a watcher has created all indexes, which it does beside its work."""
    lacking = [(name, list(keys.items())) for name, wanted in INDEXES.items() for keys, _ in wanted]
    async with asyncio.timeout(60):
        while lacking:
            await asyncio.sleep(0.1)
            there = {n: await (await database[n].list_indexes()).to_list() for n in INDEXES}
            keys = {n: [list(each["key"].items()) for each in rows] for n, rows in there.items()}
            lacking = [(n, wanted) for n, wanted in lacking if wanted not in keys[n]]


class Profiler:
    """The queries of eventwatch, as the database notes them."""

    def __init__(self, database: AsyncDatabase[Document], own: int) -> None:
        self._database = database
        self._own = own

    @asynccontextmanager
    async def frugal(self, doing: str) -> AsyncIterator[None]:
        """Demand of each query meanwhile that it scans no collection, and examines hardly more than is own."""
        database = self._database
        await database.command("profile", 0)
        await database["system.profile"].drop()
        await database.create_collection("system.profile", capped=True, size=32 * 2**20)
        await database.command("profile", 2)
        yield
        await database.command("profile", 0)
        rows = await database["system.profile"].find({"appName": "eventwatch"}).to_list()
        assert rows, f"{doing}: the database was not asked at all"
        greedy = [row for row in rows if self._is_greedy(row)]
        assert not greedy, f"{doing}: {[_brief(row) for row in greedy[:5]]}"

    def _is_greedy(self, row: Document) -> bool:
        return "COLLSCAN" in row.get("planSummary", "") or row.get("docsExamined", 0) > self._own + BESIDES


def _brief(row: Document) -> str:
    plan, examined = row.get("planSummary"), row.get("docsExamined")
    return f"{row['ns']} {plan}, {examined} examined: {row.get('command')!s:.300}"


async def get(address: str, path: str) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as session, session.get(f"http://{address}{path}") as answer:
        return answer.status, await answer.text()


@asynccontextmanager
async def locked_mongo(folder: Path, actions: Sequence[str]) -> AsyncIterator[str]:
    """The URL of a mongod for a user that has these rights, on every database, and no others."""
    port, data = free_port(), folder / "locked"
    data.mkdir()
    options = ("--dbpath", str(data), "--port", str(port), "--bind_ip", "127.0.0.1", "--nounixsocket", "--quiet")
    process = await asyncio.create_subprocess_exec(
        find_mongod(), *options, "--auth", stdout=asyncio.subprocess.DEVNULL
    )
    try:
        # As long as there is no user, one may be made without a login.
        url = f"mongodb://127.0.0.1:{port}/"
        async with AsyncMongoClient[Document](url, serverSelectionTimeoutMS=20_000) as client:
            await client.admin.command("createUser", "root", pwd="root", roles=["root"])
        async with AsyncMongoClient[Document](f"mongodb://root:root@127.0.0.1:{port}/") as client:
            rights = [{"resource": {"db": "", "collection": ""}, "actions": list(actions)}]
            await client.admin.command("createRole", "lacking", privileges=rights, roles=[])
            await client.admin.command("createUser", "ew", pwd="ew", roles=["lacking"])
        yield f"mongodb://ew:ew@127.0.0.1:{port}/"
    finally:
        process.kill()
        await process.wait()


async def command(folder: Path, settings: dict[str, str], *arguments: str, code: int = 0) -> str:
    """Run a command of eventwatch that ends with this code, and what it printed."""
    foreign = {name: os.environ[name] for name in os.environ if not name.startswith(OUR_VARIABLES)}
    ours = {f"EVENTWATCH_{name.upper()}": value for name, value in settings.items()}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "eventwatch",
        *arguments,
        cwd=folder,
        env={**foreign, **ours, "PYTHONPATH": str(ROOT)},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == code, output.decode()
    return output.decode()


async def test_no_query_reads_what_is_others(
    world: World, crowded: AsyncDatabase[Document], tmp_path: Path
) -> None:
    address = free_address()
    settings = world.settings(sweep_interval="1h", lease_duration="2s", http_listen=address)
    profiler, own = Profiler(crowded, len(world.inserted)), sorted(world.inserted)
    with (
        closing(Eventwatch(tmp_path, settings)) as leader,
        closing(Eventwatch(tmp_path, settings, name="standby")) as standby,
    ):
        leader.start()
        await until_indexed(crowded)
        await leader.stop()

        async with profiler.frugal("a start"):
            leader.start()
            await leader.says("Sweep: ", times=2)
            await Oracle(world, only_ours=True).recovered()

        async with profiler.frugal("sweeps, and an event"):
            for node in list(world.nodes.values())[:2]:
                await node.kill()
            for count in (2, 3):
                leader.send(signal.SIGHUP)
                await leader.says("Sweep: ", times=count)
            await Oracle(world, only_ours=True).recovered()

        async with profiler.frugal("the page"):
            for path in ("/api/nodes", "/metrics", "/readyz", f"/api/nodes/{own[0]}", "/"):
                status, text = await get(address, path)
                assert status == 200, text
            _, text = await get(address, "/api/nodes")
            assert sorted(row["node_id"] for row in json.loads(text)) == sorted(i[:12] for i in own)

        async with profiler.frugal("standing by"):
            standby.start()
            await standby.says("Standing by")
            await asyncio.sleep(2.5)

        async with profiler.frugal("commands"):
            listed = json.loads(await command(tmp_path, settings, "status", "--json"))
            assert sorted(row["id"] for row in listed) == own
            assert own[0] in await command(tmp_path, settings, "explain", own[0][:12])
            assert f"{len(own)} nodes checked" in await command(tmp_path, settings, "sweep", "--dry-run")

        async with profiler.frugal("a takeover"):
            await leader.kill()
            await standby.says("Sweep: ")
            await Oracle(world, only_ours=True).recovered()
    assert "Node deleted" not in leader.output + standby.output
    assert await world.documents.count_documents({}) == ENGINES_AWAY * EACH + len(own)


async def test_documents_without_an_engines_id_are_nobodys_business_beside_another_engine(
    world: World, crowded: AsyncDatabase[Document], tmp_path: Path
) -> None:
    """Those of our own containers are adopted; those of others' are not even looked at."""
    settings = world.settings(sweep_interval="1h")
    node_id = min(world.inserted)
    with closing(Eventwatch(tmp_path, settings)) as process:
        process.start()
        await process.says("Sweep: ")
        await Oracle(world, only_ours=True).recovered()
        older = {"$unset": {"engine_id": "", "epoch": ""}, "$set": {"status": "exited"}}
        await world.documents.update_one({"_id": node_id}, older)
        process.send(signal.SIGHUP)
        await process.says(f"Sweep: {len(world.inserted)} nodes checked", times=2)
        await Oracle(world, only_ours=True).recovered()
    assert "belong to no engine" not in process.output, process.tail()


async def test_indexes_are_created_beside_the_watching_and_their_lack_is_told_by_doctor(
    world: World, tmp_path: Path
) -> None:
    settings = world.settings()
    with closing(Eventwatch(tmp_path, settings)) as process:
        process.start()
        await until_indexed(world.client[world.database])
    assert "ok   indexes: all are there" in await command(tmp_path, settings, "doctor")


async def test_a_login_that_may_not_create_indexes_is_told_by_doctor_and_the_log_and_watches_all_the_same(
    world: World, tmp_path: Path
) -> None:
    async with locked_mongo(tmp_path, LACKING) as url:
        settings = {**world.settings(), "mongo_url": url}
        said = await command(tmp_path, settings, "doctor", code=1)
        assert "FAIL indexes: this login may not create those that are missing" in said
        assert "ToolServerNode (engine_id, _id)" in said
        with closing(Eventwatch(tmp_path, settings)) as process:
            process.start()
            await process.says("An index cannot be created, so queries read every engine's documents")
            await process.says("Sweep: 0 nodes checked")
