"""The README's manager: sessions on real containers, from the first request to the last."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import ModuleType
from typing import Any

import httpx
import pytest

from eventwatch.calls.here import get_here
from tests.kit.nodes import IMAGE
from tests.kit.waiting import eventually
from tests.kit.world import World


@asynccontextmanager
async def running_manager(world: World, docker_url: str) -> AsyncIterator[httpx.AsyncClient]:
    """It, with its containers in this world; what it leaves is removed."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "NODE_IMAGE": IMAGE,
            "DOCKER_HOST": docker_url,
            "EVENTWATCH_NODE_NETWORK": world.nodes.network,
            "EVENTWATCH_MONGO_URL": world.mongo_url,
            "EVENTWATCH_MONGO_DATABASE": world.database_name,
            "EVENTWATCH_HTTP_LISTEN": "",
        }.items():
            patch.setenv(name, value)
        module: ModuleType = importlib.reload(importlib.import_module("tests.manager"))
        module.CONTAINER["Labels"] = world.nodes.labels
        async with module.app.router.lifespan_context(module.app):
            transport = httpx.ASGITransport(app=module.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://manager", timeout=30) as client:
                yield client


@pytest.mark.needs("reach")
async def test_the_manager_of_the_readme_serves_sessions(world: World, docker_url: str) -> None:
    async with running_manager(world, docker_url) as client:
        session = (await client.post("/sessions")).raise_for_status().json()["session"]
        document = await world.collection.find_one({"_id": session})
        assert document is not None
        assert (document["status"], document["health"]) == ("running", "healthy")
        answer = await client.get(f"/sessions/{session}/")
        assert answer.status_code == 200
        after = await world.collection.find_one({"_id": session})
        assert after is not None
        assert after["last_req_time"] > document["last_req_time"]
        await client.post(f"/sessions/{session}/close")
        await eventually(lambda: says(world, session, "exited"))
        assert (await client.get(f"/sessions/{session}/")).status_code == 409
        (await client.post(f"/sessions/{session}/reopen")).raise_for_status()
        assert (await client.get(f"/sessions/{session}/")).status_code == 200
        await client.delete(f"/sessions/{session}")
        await eventually(lambda: gone(world, session))
        assert (await client.get(f"/sessions/{session}/")).status_code == 404


async def test_a_session_whose_node_dies_at_once_is_told_why_and_leaves_nothing(
    world: World, docker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_manager(world, docker_url) as client:
        manager = importlib.import_module("tests.manager")
        monkeypatch.setitem(manager.CONTAINER, "Cmd", ["sh", "-c", "sleep 0.5; exit 7"])
        answer = await client.post("/sessions")
        assert answer.status_code == 503
        assert "has ended: exit code 7" in answer.json()["detail"]
        await eventually(lambda: empty(world))


async def test_a_session_is_there_as_soon_as_its_node_is_healthy(world: World, docker_url: str) -> None:
    """No poll is waited for: between the health event's write and the answer there is no second."""
    async with running_manager(world, docker_url) as client:
        written: list[float] = []
        watched = get_here()
        assert watched is not None
        loop = asyncio.get_running_loop()
        end = watched.changes.on(
            lambda change: written.append(loop.time()) if change.new.get("health") == "healthy" else None
        )
        lags = []
        for _ in range(5):
            session = (await client.post("/sessions")).json()["session"]
            lags.append(loop.time() - written[-1])
            await client.delete(f"/sessions/{session}")
        end()
        assert len(written) == 5
        assert sorted(lags)[2] < 0.2  # a poll of once a second would make it half a second


async def says(world: World, session: str, status: str) -> bool:
    return await world.collection.find_one({"_id": session, "status": status}) is not None


async def gone(world: World, session: str) -> bool:
    return await world.collection.find_one({"_id": session}) is None


async def empty(world: World) -> Any:
    return not await world.collection.count_documents({})
