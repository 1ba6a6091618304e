from __future__ import annotations

import re
import tempfile
from pathlib import Path

from aiohttp import web

import eventwatch.engine.docker
from eventwatch.core.facts import is_container_id
from eventwatch.engine.docker import CALLS, NOBODY, DockerEngine
from tests.faults.proxies import EngineProxy
from tests.kit.eventwatch import run_program
from tests.kit.nodes import NODE_LABEL
from tests.kit.truth import ago
from tests.kit.waiting import eventually
from tests.kit.world import World

DOCUMENTED = re.compile(r"`((?:GET|POST|HEAD|PUT|DELETE) /[^`]*)`")


def call(request: web.Request) -> str:
    path = re.sub(r"^/v[\d.]+", "", request.path)
    path = re.sub(r"^/networks/[0-9a-f]{64}$", "/networks/{id}", path)
    return f"{request.method} " + re.sub(r"^/containers/[^/]+/", "/containers/{id}/", path)


async def test_eventwatch_makes_exactly_the_engine_calls_that_its_engine_module_lists(
    world: World, docker_url: str, tmp_path: Path
) -> None:
    calls: set[str] = set()
    names: set[str] = set()

    async def record(request: web.Request) -> None:
        calls.add(call(request))
        names.update(re.findall(r"/containers/([^/]+)/", request.raw_path))

    with tempfile.TemporaryDirectory(prefix="ew") as folder:
        async with EngineProxy(Path(folder), docker_url) as proxy:
            proxy.rules.append(record)
            label = f"{NODE_LABEL}=labelled"
            settings = {"docker_host": proxy.url, "register_label": label, "sweep_interval": 0.5}
            async with world.watching(**settings, idle_timeout=3600):
                node = await world.start("lifecycle", healthcheck="flag")
                await node.set_healthy(True)
                await eventually(lambda: world.says(node, health="healthy"))
                await node.pause()
                await eventually(lambda: world.says(node, status="paused"))
                await node.unpause()
                await node.restart(grace_s=0)
                await node.kill()
                await eventually(lambda: world.says(node, status="exited"))
                registered = await world.nodes.start("labelled")
                await eventually(lambda: world.document(registered))
            idle = await world.start("idle")
            own = {"idle_timeout": 1, "idle_activity": "cpu=0.9", "stop_timeout": 1, "stop_nodes_on_exit": True}
            async with world.watching(**settings, **own):
                await world.collection.update_one({"_id": idle.id}, {"$set": {"last_req_time": ago(3600)}})
                await eventually(lambda: world.says(idle, status="exited"), 20)
                await node.remove()
            env = {
                "EVENTWATCH_MONGO_URL": world.mongo_url,
                "EVENTWATCH_MONGO_DATABASE": world.database_name,
                "EVENTWATCH_DOCKER_HOST": proxy.url,
                "EVENTWATCH_NODE_NETWORK": world.nodes.network,
                "EVENTWATCH_REGISTER_LABEL": label,
            }
            for command in (
                ["doctor"],
                ["sweep"],
                ["status"],
                ["explain", idle.name],
                ["record", "r", "--duration", "1"],
            ):
                code, said = await run_program("-m", "eventwatch", *command, env=env, cwd=tmp_path)
                assert code == 0, said
    assert calls == {f"{call.method} {call.path}" for call in CALLS.values()}
    assert calls == set(DOCUMENTED.findall(eventwatch.engine.docker.__doc__ or ""))
    assert {name for name in names if not is_container_id(name)} == {idle.name}


async def test_this_engine_says_of_itself_what_it_does_not_have(world: World) -> None:
    engine = DockerEngine(world.settings())
    try:
        node = await world.start("node")
        assert not (await engine.inspect(NOBODY)).found
        await engine.stop(NOBODY, grace=0)
        assert await engine.resolve(f"no-{node.name}") is None
        assert [await engine.resolve(name) for name in (node.name, node.id[:12], node.id)] == [node.id] * 3
        assert node.id in await engine.list_newest(1000)
        assert len(await engine.list_newest(1)) == 1
        seen = await engine.inspect(node.id)
        assert {node.name, node.id[:12]} <= seen.names
        assert seen.ip in seen.addresses
        assert seen.created_at is not None
        assert seen.started_at is not None
        assert seen.created_at <= seen.started_at
        await node.remove()
        assert not (await engine.inspect(node.id)).found
        await engine.stop(node.id, grace=0)
    finally:
        await engine.close()
