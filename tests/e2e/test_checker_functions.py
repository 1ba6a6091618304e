"""The three functions that managers call, alone and inside `watch()`: what they write, say and survive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aiodocker import Docker
from aiohttp import web
from beanie import init_beanie
from pymongo import AsyncMongoClient

from eventwatch import (
    NodeChecker,
    Settings,
    StoreError,
    ToolServerNode,
    check_nodes_status,
    check_nodes_status_loop,
    update_node_status,
)
from eventwatch.core.facts import Observation
from eventwatch.engine import docker as engine
from eventwatch.engine.docker import DockerEngine
from eventwatch.store.base import ENGINES, OWNERS
from tests.kit.fakes import served
from tests.kit.nodes import Node
from tests.kit.seen import logged, texts
from tests.kit.truth import Document, ago, manager_document
from tests.kit.waiting import PATIENCE, SLOW, eventually
from tests.kit.world import World

NO_SUCH_NODE = "0" * 64


@pytest.fixture
async def beanie(world: World) -> AsyncIterator[None]:
    """Beanie as a manager initialises it, on a client of its own."""
    async with AsyncMongoClient[Document](world.mongo_url) as client:
        await bind(client, world.database_name)
        yield


async def bind(client: AsyncMongoClient[Document], database: str) -> None:
    await init_beanie(database=client[database], document_models=[ToolServerNode, NodeChecker])


async def found(node_id: str) -> ToolServerNode:
    node = await ToolServerNode.get(node_id)
    assert node is not None
    return node


@asynccontextmanager
async def loop_running(
    world: World, checker: NodeChecker, *, engine: DockerEngine | Docker | None = None
) -> AsyncIterator[asyncio.Task[None]]:
    settings = world.settings(idle_timeout=0)
    task = asyncio.create_task(
        check_nodes_status_loop(checker, engine=engine or world.docker, settings=settings), name="loop"
    )
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


# -- one node -----------------------------------------------------------------------------------------------


async def test_a_node_is_brought_up_to_date_and_each_change_is_told(world: World, beanie: None) -> None:
    node = await world.nodes.start("one", healthcheck="ok", interval_s=0.2)
    await node.wait_health("healthy")
    await world.insert(node, port=1, colour="blue", last_req_time=ago(5))
    before = await world.document(node)
    given = await found(node.id)
    with logged("INFO") as lines:
        await update_node_status(given, engine=world.docker, settings=world.settings())
    ip, short_id = await world.ip(node), node.id[:12]
    assert texts(lines) == [
        f"Node {short_id} status updated: created -> running",
        f"Node {short_id} health updated: starting -> healthy",
        f"Node {short_id} ip updated:  -> {ip}",
        f"Node {short_id} port updated: 1 -> 31942",
    ]
    assert before is not None
    truth = {"status": "running", "health": "healthy", "ip": ip, "port": 31942}
    assert await world.document(node) == before | truth
    assert (given.status, given.health, given.ip, given.port) == tuple(truth.values())


async def test_a_node_that_is_true_already_is_not_written_and_nothing_is_told(world: World, beanie: None) -> None:
    node = await world.start("one")
    await update_node_status(await found(node.id), engine=world.docker, settings=world.settings())
    before = await world.document(node)
    await world.database.command("profile", 2)
    with logged("INFO") as lines:
        await update_node_status(await found(node.id), engine=world.docker, settings=world.settings())
    await world.database.command("profile", 0)
    writes = {"op": {"$in": ["insert", "update", "remove"]}, "ns": world.collection.full_name}
    assert await world.database["system.profile"].count_documents({}) > 0
    assert await world.database["system.profile"].count_documents(writes) == 0
    assert await world.document(node) == before
    assert texts(lines) == []


async def test_the_document_of_a_container_that_is_gone_is_deleted(world: World, beanie: None) -> None:
    await world.insert(NO_SUCH_NODE)
    with logged("INFO") as lines:
        await update_node_status(await found(NO_SUCH_NODE), engine=world.docker, settings=world.settings())
    assert await world.collection.count_documents({}) == 0
    assert texts(lines) == [f"Node deleted from db: {NO_SUCH_NODE}(not in docker)"]


async def test_an_idle_node_is_stopped_when_the_call_returns(world: World, beanie: None) -> None:
    node = await world.nodes.start("one")
    await world.insert(node, last_req_time=ago(60))
    given, settings = await found(node.id), world.settings(idle_timeout=0.2)

    async def stopped() -> bool:
        await update_node_status(given, engine=world.docker, settings=settings)
        return await world.status(node) != "running"

    with logged("INFO") as lines:
        await eventually(stopped)  # not at once: the time of its start counts too
    assert f"Stopping node: {node.id} due to idling time used up" in texts(lines)
    assert await world.status(node) == "exited"
    assert await world.says(node, status="exited", ip="")


async def says_only_who_it_is(status: int, request: web.Request) -> web.Response:
    if request.path.endswith(("/version", "/info")):
        return web.json_response({"ApiVersion": "1.41", "ID": "an engine's id", "Name": "engine"})
    return web.json_response({"message": "not now"}, status=status)


async def says_nothing(_: web.Request) -> web.Response:
    await asyncio.sleep(3600)
    return web.Response()


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(None, id="no-socket"),
        pytest.param(partial(says_only_who_it_is, 403), id="forbidden"),
        pytest.param(partial(says_only_who_it_is, 500), id="failing"),
        pytest.param(partial(says_only_who_it_is, 503), id="unavailable"),
        pytest.param(says_nothing, id="silent"),
    ],
)
@pytest.mark.parametrize("every", [pytest.param(False, id="one"), pytest.param(True, id="all")])
@pytest.mark.usefixtures("beanie")
async def test_an_engine_that_does_not_answer_is_warned_of_and_changes_nothing(
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer: Callable[[web.Request], Awaitable[web.Response]] | None,
    every: bool,
) -> None:
    for deadline in ("INSPECT_DEADLINE", "CALL_DEADLINE"):
        monkeypatch.setattr(engine, deadline, 0.3)
    fields = {"ip": "192.0.2.1", "last_req_time": ago(1e6), "engine_id": "an engine's id"}
    await world.insert(NO_SUCH_NODE, status="running", **fields)
    before = await world.collection.find().to_list()
    socket = tmp_path / "engine.sock"
    serving = served(socket, answer) if answer else nullcontext()
    async with serving, Docker(f"unix://{socket}", api_version="v1.41") as docker:
        with logged("INFO") as lines:
            if every:
                report = await check_nodes_status(engine=docker, settings=world.settings())
                assert (report.checked, report.failed) == (1, 1)
            else:
                node = await found(NO_SUCH_NODE)
                await update_node_status(node, engine=docker, settings=world.settings())
                assert node.status == "running"
    assert texts(lines, "WARNING")[0] == f"Failed to get node info from docker: {NO_SUCH_NODE}"
    assert texts(lines, "WARNING") == texts(lines)
    assert await world.collection.find().to_list() == before


# -- every node ---------------------------------------------------------------------------------------------


async def nodes_of_every_kind(world: World) -> list[str]:
    running = await world.nodes.start("running")
    healthy = await world.nodes.start("healthy", healthcheck="ok", interval_s=0.3)
    unhealthy = await world.nodes.start("unhealthy", healthcheck="flag", interval_s=0.3)
    paused = await world.nodes.start("paused", expose=(8080,))
    exited = await world.nodes.start("exited", expose=(8080, 9090))
    created = await world.nodes.create("created")
    await asyncio.gather(paused.pause(), exited.kill())
    await healthy.wait_health("healthy")
    await unhealthy.wait_health("unhealthy")
    made: list[Node] = [running, healthy, unhealthy, paused, exited, created]
    return [*(node.id for node in made), NO_SUCH_NODE]


@pytest.mark.needs("cgroups")
async def test_checking_all_nodes_ends_where_checking_each_one_ends(world: World) -> None:
    ids = await nodes_of_every_kind(world)
    documents = [
        manager_document(node_id, status=status, health="healthy", ip="192.0.2.1", port=1, extra={"kept": status})
        for node_id, status in zip(
            ids, ("created", "running", "stopping", "exited", "running", "nonsense", "running"), strict=True
        )
    ]
    documents.append({"_id": "not valid", "status": 7})
    del documents[0]["ip"], documents[1]["last_req_time"]
    settings, each_name = world.settings(idle_timeout=0), f"{world.database_name}_each"
    async with AsyncMongoClient[Document](world.mongo_url) as client:
        try:
            each = client[each_name]["ToolServerNode"]
            await world.collection.insert_many(documents)
            await each.insert_many(documents)

            await bind(client, world.database_name)
            report = await check_nodes_status(engine=world.docker, settings=settings)
            await bind(client, each_name)
            for node_id in ids:
                await update_node_status(await found(node_id), engine=world.docker, settings=settings)

            after = await world.collection.find().sort("_id").to_list()
            assert after == await each.find().sort("_id").to_list()
        finally:
            await client.drop_database(each_name)
    assert (report.checked, report.deleted, report.failed) == (7, 1, 0)
    assert NO_SUCH_NODE not in [document["_id"] for document in after]
    assert {"_id": "not valid", "status": 7} in after
    await world.collection.delete_one({"_id": "not valid"})
    await world.becomes_true(within=0.5)


@pytest.mark.needs("cgroups")
async def test_a_document_that_does_not_validate_is_told_of_once_and_skipped(world: World, beanie: None) -> None:
    await world.collection.insert_one({"_id": "not valid", "status": 7})
    node = await world.start("one")
    checker = NodeChecker(interval=0.05)
    await checker.insert()
    with logged("INFO") as lines:
        async with loop_running(world, checker):
            for status, happens in (("running", None), ("paused", node.pause), ("running", node.unpause)):
                if happens:
                    await happens()
                await eventually(partial(world.says, node, status=status))
    told = [text for text in texts(lines, "WARNING") if "not valid" in text]
    assert told == ["Document not valid is skipped: status is int, not str. Correct or delete it."]
    assert await world.collection.find_one({"_id": "not valid"}) == {"_id": "not valid", "status": 7}


# -- again and again ----------------------------------------------------------------------------------------


class FailsOnce(DockerEngine):
    """An engine whose first inspection ends in a bug."""

    failures = 1

    async def inspect(self, node_id: str, *, as_of: int = 0) -> Observation:
        if self.failures:
            self.failures -= 1
            raise LookupError("a bug in the middle of a pass")
        return await super().inspect(node_id, as_of=as_of)


async def test_the_loop_tells_of_a_failed_pass_with_its_traceback_and_goes_on(world: World, beanie: None) -> None:
    node = await world.start("one")
    checker = NodeChecker(interval=0.05)
    await checker.insert()
    with logged("INFO") as lines:
        async with loop_running(world, checker, engine=FailsOnce(world.settings(), world.docker)):
            await eventually(lambda: world.says(node, status="running"))
    failures = [line for line in lines if line.level == "ERROR"]
    assert len(failures) == 1
    assert isinstance(failures[0].error, ExceptionGroup)
    assert failures[0].error.subgroup(LookupError) is not None


async def test_the_loop_says_who_it_is_and_ends_when_its_document_is_deleted(world: World, beanie: None) -> None:
    checker = NodeChecker(interval=0.05)
    await checker.insert()
    with logged("INFO") as lines:
        async with loop_running(world, checker) as task:
            await eventually(lambda: len(lines) >= 2)
            assert not task.done()
            await checker.delete()
            await eventually(task.done)
            await task
    said = texts(lines)
    assert said[0] == "Nodes status checker started."
    assert checker.manager_id in said[1]
    assert said[-1] == "Nodes status checker stopped."


# -- inside watch() -----------------------------------------------------------------------------------------


async def test_inside_watch_the_functions_need_nothing_but_the_node(world: World) -> None:
    node = await world.start("one")
    async with world.watching() as watched:
        await world.becomes_true()
        await world.collection.update_one({"_id": node.id}, {"$set": {"status": "exited", "ip": ""}})
        await update_node_status(await found(node.id))
        await world.becomes_true(within=0.2)

        await world.collection.update_one({"_id": node.id}, {"$set": {"status": "exited", "ip": ""}})
        report = await check_nodes_status()
        assert report.checked == 1
        await world.becomes_true(within=0.2)  # by this pass, or a look that came before it
    # One writer: what they wrote went through the watcher, under its lease.
    assert [change.new["status"] for change in watched.of(node)] == ["running", "running"]


async def test_inside_watch_the_loop_goes_through_the_watcher(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVENTWATCH_NODE_NETWORK", "wrong-network-if-anyone-reads-the-environment")
    node = await world.start("one")
    async with world.watching(sweep_interval=600) as watched:
        await world.becomes_true()
        checker = NodeChecker(interval=0.05)
        await checker.insert()
        async with asyncio.timeout(PATIENCE * SLOW), asyncio.TaskGroup() as tasks:
            tasks.create_task(check_nodes_status_loop(checker), name="loop")
            await world.collection.update_one({"_id": node.id}, {"$set": {"status": "exited"}})
            await eventually(lambda: watched.of(node), PATIENCE / 2)
            await checker.delete()
        await world.becomes_true(within=0.2)
    assert await world.checkers.count_documents({}) == 0


async def test_a_moment_in_the_future_or_none_at_all_is_kept_as_it_is(world: World, beanie: None) -> None:
    ahead = datetime(2999, 1, 1, tzinfo=UTC).replace(tzinfo=None)
    one, other = await world.nodes.start("one"), await world.nodes.start("other")
    await world.insert(one, last_req_time=ahead)
    await world.insert(other, last_req_time=None)
    settings: Settings = world.settings(idle_timeout=1)
    for _ in range(2):
        report = await check_nodes_status(engine=world.docker, settings=settings)
        assert report.stopping == 0
    kept: list[Any] = [(await world.document(node) or {})["last_req_time"] for node in (one, other)]
    assert kept == [ahead, None]


async def test_a_pass_that_would_delete_most_documents_waits_for_others_to_agree(
    world: World, beanie: None
) -> None:
    engine_id = (await world.docker.system.info())["ID"]
    node, gone = await world.start("one"), [f"{number:064x}" for number in range(30)]
    for node_id in gone:
        await world.insert(node_id, engine_id=engine_id)
    await world.database[OWNERS].insert_many([{"_id": node_id, "engine_id": engine_id} for node_id in gone])
    settings = world.settings(delete_limit=5)
    for _ in range(2):
        report = await check_nodes_status(engine=world.docker, settings=settings)
        assert (report.deleted, report.braked) == (0, 30)
    assert await world.collection.count_documents({}) == 31
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eventwatch.pipeline.deletion.AGREEING_SECONDS", 0)
        assert (await check_nodes_status(engine=world.docker, settings=settings)).deleted == 30
    assert await world.says(node, status="running")


async def test_what_a_later_version_has_on_record_is_refused_and_nothing_is_touched(
    world: World, beanie: None
) -> None:
    await world.database[ENGINES].update_one({}, {"$set": {"format": 2, "version": "9.9.9"}})
    settings, node = world.settings(idle_timeout=0.1), await world.nodes.start("one")
    await world.insert(node, status="paused", last_req_time=ago(60))
    await world.insert(NO_SUCH_NODE)
    names = sorted(await world.database.list_collection_names())
    before = [await world.database[name].find().to_list() for name in names]
    one, gone = await found(node.id), await found(NO_SUCH_NODE)
    calls: list[Callable[..., Awaitable[Any]]] = [
        partial(update_node_status, one),
        partial(update_node_status, gone),
        check_nodes_status,
    ]
    for call in calls:
        with pytest.raises(StoreError, match=r"in format 2 .* written by eventwatch 9\.9\.9;"):
            await call(engine=world.docker, settings=settings)
    assert [await world.database[name].find().to_list() for name in names] == before
    assert sorted(await world.database.list_collection_names()) == names
    assert await world.status(node) == "running"
    await world.database[ENGINES].update_one({}, {"$set": {"format": 1}})
    await update_node_status(one, engine=world.docker, settings=world.settings(idle_timeout=0))
    assert await world.says(node, status="running")
