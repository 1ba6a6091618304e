"""`watch()` inside a host application, and beside another eventwatch: who leads, who stands by, what is left."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, HTTPException

from eventwatch import NodeChecker, Settings, ToolServerNode, check_nodes_status_loop, update_node_status, watch
from eventwatch.core.errors import ConfigError
from tests.kit.eventwatch import program
from tests.kit.nodes import Node
from tests.kit.processes import Process
from tests.kit.seen import logged, texts
from tests.kit.truth import ago
from tests.kit.waiting import eventually
from tests.kit.world import World

NO_SUCH_NODE = "f" * 64


def application(settings: Settings) -> FastAPI:
    """A manager that embeds eventwatch: the lifespan is three lines."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with watch(settings):
            yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/nodes/{node_id}")
    async def node(node_id: str) -> dict[str, str]:
        found = await ToolServerNode.get(node_id)
        if found is None:
            raise HTTPException(404)
        return {"status": found.status, "ip": found.ip}

    @app.post("/nodes/{node_id}/check")
    async def check(node_id: str) -> dict[str, str]:
        found = await ToolServerNode.get(node_id)
        if found is None:
            raise HTTPException(404)
        await update_node_status(found)
        return {"status": found.status, "ip": found.ip}

    return app


@asynccontextmanager
async def served(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Serve the application with a real server on a port of its own."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_config=None))
        serving = asyncio.create_task(server.serve(sockets=[listening]), name="server")
        try:
            await eventually(lambda: server.started or serving.done())
            port = listening.getsockname()[1]
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
                yield client
        finally:
            server.should_exit = True
            await serving


@asynccontextmanager
async def eventwatch_beside(world: World, cwd: Path, **env: str) -> AsyncIterator[Process]:
    """Another process that watches the same engine for the same database."""
    async with program("-m", "eventwatch", "run", env=environment(world, **env), cwd=cwd) as running:
        yield running


def environment(world: World, **env: str) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if name.startswith("DOCKER_")},
        "EVENTWATCH_MONGO_URL": world.mongo_url,
        "EVENTWATCH_MONGO_DATABASE": world.database_name,
        "EVENTWATCH_NODE_NETWORK": world.nodes.network,
        "EVENTWATCH_HTTP_LISTEN": "",
        **env,
    }


async def follows(world: World, node: Node) -> None:
    """Pause and unpause a node: its document follows, so somebody leads."""
    await node.pause()
    await eventually(lambda: world.says(node, status="paused"))
    await node.unpause()
    await eventually(lambda: world.says(node, status="running"))


@pytest.mark.needs("cgroups")
async def test_a_web_application_with_a_lifespan_of_three_lines_follows_its_containers(world: World) -> None:
    async with served(application(world.settings())) as client:
        node = await world.start("one")
        await eventually(lambda: world.says(node, status="running"))
        assert (await client.get(f"/nodes/{node.id}")).json() == {"status": "running", "ip": await world.ip(node)}
        await follows(world, node)
        await node.kill()
        await eventually(lambda: world.says(node, status="exited"))

        await world.collection.update_one({"_id": node.id}, {"$set": {"status": "running"}})
        assert (await client.post(f"/nodes/{node.id}/check")).json() == {"status": "exited", "ip": ""}
        assert await world.checkers.count_documents({}) == 1
    assert await world.checkers.count_documents({}) == 0


async def test_a_host_that_fails_gets_its_own_error_and_leaves_no_checker(world: World) -> None:
    with pytest.raises(LookupError, match="the host's own"):
        await fail_while_watching(world)
    assert await world.checkers.count_documents({}) == 0


async def fail_while_watching(world: World) -> None:
    async with world.watching():
        assert await world.checkers.count_documents({}) == 1
        raise LookupError("the host's own")


async def test_a_host_that_is_cancelled_leaves_no_checker(world: World) -> None:
    entered = asyncio.Event()

    async def host() -> None:
        async with world.watching():
            entered.set()
            await asyncio.Event().wait()

    hosting = asyncio.create_task(host(), name="host")
    await entered.wait()
    hosting.cancel()
    with suppress(asyncio.CancelledError):
        await hosting
    assert await world.checkers.count_documents({}) == 0


async def test_a_setting_that_can_never_work_is_an_error_at_the_start(world: World) -> None:
    settings = world.settings(mongo_url="mongodb://127.0.0.1:99999/")
    with pytest.raises(ConfigError, match="EVENTWATCH_MONGO_URL"):
        async with watch(settings):
            pytest.fail("entered")


@pytest.mark.parametrize(
    ("ends_by", "lease"),
    [pytest.param(signal.SIGTERM, "60s", id="released"), pytest.param(signal.SIGKILL, "1s", id="expired")],
)
@pytest.mark.needs("cgroups")
async def test_a_second_watcher_stands_by_and_takes_over_when_the_first_ends(
    world: World, tmp_path: Path, ends_by: signal.Signals, lease: str
) -> None:
    node = await world.start("one")
    async with eventwatch_beside(world, tmp_path, EVENTWATCH_LEASE_DURATION=lease) as first:
        await first.says("Nodes status checker started.")
        await eventually(lambda: world.says(node, status="running"))
        with logged("INFO") as lines:
            async with watch(world.settings(lease_duration=lease)) as app:
                await eventually(
                    lambda: [text for text in texts(lines) if text.startswith("Standing by: checker")]
                )
                assert app.pipeline is None
                document = await ToolServerNode.get(node.id)
                assert document is not None
                # With the settings of `watch()`, not with those of the environment, which names no node network.
                await update_node_status(document)
                assert document.ip == await world.ip(node)
                own = NodeChecker(interval=0.05)
                await own.insert()
                looping = asyncio.create_task(check_nodes_status_loop(own), name="loop")
                await world.collection.update_one({"_id": node.id}, {"$set": {"ip": ""}})
                await eventually(lambda: world.says(node, ip=document.ip))
                await own.delete()
                await looping
                assert not [text for text in texts(lines) if text.endswith("ip updated: " + document.ip + " -> ")]
                await follows(world, node)  # through the first
                checker = await NodeChecker.find_one()
                assert checker is not None
                assert checker.pid == first.pid

                first.send(ends_by)
                assert await first.ends() == (0 if ends_by is signal.SIGTERM else -signal.SIGKILL)
                await eventually(lambda: app.pipeline and app.pipeline.sweeper.last_success)
                await follows(world, node)  # through this one
                again = await NodeChecker.find_one()
                assert again is not None
                assert again.pid == os.getpid()
                assert (again.epoch or 0) > (checker.epoch or 0)
    assert await world.checkers.count_documents({}) == 0


@pytest.mark.needs("cgroups")
async def test_a_program_takes_over_from_an_embedded_watcher(world: World, tmp_path: Path) -> None:
    node = await world.start("one")
    async with world.watching() as watched, eventwatch_beside(world, tmp_path) as second:
        await second.says("Standing by: checker")
        assert watched.app.checker.manager_id in second.output
        await follows(world, node)
        assert "Nodes status checker started." not in second.output
        watched.app.stop()
        await second.says("Nodes status checker started.")
        await follows(world, node)
        second.send(signal.SIGTERM)
        assert await second.ends() == 0
        assert "Traceback" not in second.output
    assert await world.checkers.count_documents({}) == 0


async def test_a_watcher_whose_checker_document_is_deleted_stops(world: World, tmp_path: Path) -> None:
    async with eventwatch_beside(world, tmp_path, EVENTWATCH_LEASE_DURATION="1s") as running:
        await running.says("Nodes status checker started.")
        await eventually(lambda: world.checkers.count_documents({}))
        await world.checkers.delete_many({})
        assert await running.ends(within=4) == 0
        assert running.output.count("Nodes status checker stopped.") == 1
        assert "Traceback" not in running.output
    assert await world.checkers.count_documents({}) == 0


# -- stop_nodes_on_exit -------------------------------------------------------------------------------------


@pytest.mark.needs("cgroups")
async def test_the_running_nodes_are_stopped_at_exit_when_so_told(world: World) -> None:
    running, paused = await world.start("running"), await world.start("paused")
    stranger = await world.nodes.start("stranger")
    await paused.pause()
    async with world.watching(stop_nodes_on_exit=True, stop_timeout=2):
        await world.becomes_true()
    assert [await world.status(node) for node in (running, paused, stranger)] == ["exited", "exited", "running"]
    await world.becomes_true(within=0.5)
    assert await world.checkers.count_documents({}) == 0


async def test_the_running_nodes_are_left_running_at_exit_by_default(world: World) -> None:
    node = await world.start("one")
    async with world.watching():
        await world.becomes_true()
    assert await world.status(node) == "running"
    assert await world.says(node, status="running")


async def test_a_dry_run_stops_no_node_at_exit(world: World) -> None:
    node = await world.nodes.start("one")
    await world.insert(node, status="running", ip=await world.ip(node), health="none")
    with logged("INFO") as lines:
        async with world.watching(stop_nodes_on_exit=True, dry_run=True, stop_timeout=2):
            pass
    assert await world.status(node) == "running"
    assert [text for text in texts(lines) if text.startswith("Dry run: would stop") and node.id in text]


async def test_documents_of_another_engine_outlive_the_exit(world: World) -> None:
    """This engine answers 404 for them, and that is no proof of anything."""
    await world.insert(NO_SUCH_NODE, status="running", ip="192.0.2.1", engine_id="another", last_req_time=ago(0))
    before = await world.collection.find().to_list()
    async with world.watching(stop_nodes_on_exit=True, stop_timeout=1):
        pass
    assert await world.collection.find().to_list() == before


async def test_a_node_that_is_slow_to_stop_does_not_hold_up_the_exit_beyond_the_drain_timeout(
    world: World,
) -> None:
    node = await world.nodes.start("slow", command=("sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"))
    await world.insert(node, status="running", last_req_time=ago(3600))
    with logged("INFO") as lines:
        async with (
            asyncio.timeout(6),
            world.watching(
                idle_timeout=0.2, settle_delay=0.1, sweep_interval=0.3, stop_timeout=8, drain_timeout=0.5
            ),
        ):
            await eventually(lambda: f"Stopping node: {node.id} due to idling time used up" in texts(lines))
    assert await world.checkers.count_documents({}) == 0
