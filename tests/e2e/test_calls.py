"""What a manager calls: waiting for nodes, marking them as used, following changes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiodocker import Docker
from beanie import init_beanie
from pymongo import AsyncMongoClient

from eventwatch import (
    Change,
    NodeChecker,
    NodeDiedError,
    NodeGoneError,
    StoreError,
    ToolServerNode,
    WaitTimeoutError,
    in_use,
    touch,
    wait_for,
)
from eventwatch.calls import follower, use
from tests.conftest import free_address
from tests.e2e.test_operator import ask
from tests.e2e.watching import World, ago, eventually, logged, manager_document, texts
from tests.engines import PrivateMongo
from tests.nodes import SLOW, Node

ABSENT = "e" * 64


@asynccontextmanager
async def beside(world: World, where: str) -> AsyncIterator[None]:
    """A manager: in the watcher's own process, or with a Beanie of its own beside a watcher elsewhere."""
    if where == "inside":
        async with world.watching():
            yield
        return
    async with world.watching():
        # What the process of a manager has: Beanie, and no watcher.
        with pytest.MonkeyPatch.context() as patch:
            for module in ("follower", "use", "waiting"):
                patch.setattr(f"eventwatch.calls.{module}.get_here", lambda: None)
            yield


@pytest.fixture(params=["inside", "outside"])
async def managed(world: World, request: pytest.FixtureRequest) -> AsyncIterator[World]:
    async with beside(world, request.param):
        yield world


async def soon(waiting: asyncio.Task[Any]) -> Any:
    return await asyncio.wait_for(waiting, 5)


async def waiting_for(node: Node, condition: Any, **more: Any) -> asyncio.Task[Any]:
    """A wait that has begun, and is not over."""
    task = asyncio.create_task(wait_for(node.id, condition, **more))
    await asyncio.sleep(0.3)
    assert not task.done()
    return task


async def test_a_node_is_returned_once_it_is_healthy(managed: World) -> None:
    node = await managed.start("one", healthcheck="flag", interval_s=0.2)
    running = await wait_for(node.id, "running", 5)
    assert running is not None
    assert running.ip == await managed.ip(node)
    waiting = await waiting_for(node, "healthy")
    await node.set_healthy(True)
    document = await soon(waiting)
    assert isinstance(document, ToolServerNode)
    assert (document.status, document.health) == ("running", "healthy")
    again = await asyncio.wait_for(wait_for(node.id, "healthy"), 1)
    assert again is not None
    assert again.id == node.id


async def test_a_node_that_died_is_an_error_that_tells_why(managed: World) -> None:
    node = await managed.start("one", healthcheck="flag", interval_s=0.2)
    await managed.becomes_true()
    waiting = await waiting_for(node, "healthy")
    ended = await waiting_for(node, "exited")
    await node.kill()
    with pytest.raises(NodeDiedError, match=rf"^Node {node.id[:12]} has ended: exit code 137 \(SIGKILL\)"):
        await soon(waiting)
    assert (await soon(ended)).status == "exited"
    with pytest.raises(NodeDiedError, match="exit code 137"):
        await asyncio.wait_for(wait_for(node.id, "running"), 5)


async def test_a_node_that_starts_again_by_its_policy_is_waited_for(managed: World) -> None:
    node = await managed.start("one", healthcheck="flag", interval_s=0.2, restart="always")
    await managed.becomes_true()
    waiting = await waiting_for(node, "healthy", timeout=20)
    await node.exec(["kill", "1"], check=False)  # which may end with it
    await eventually(lambda: managed.says(node, status="running"))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    await node.set_healthy(True)
    assert (await soon(waiting)).health == "healthy"


async def test_a_node_that_is_removed_is_gone_and_deleted(managed: World) -> None:
    node = await managed.start("one", healthcheck="flag", interval_s=0.2)
    await managed.becomes_true()
    waiting, deleted = await waiting_for(node, "healthy"), await waiting_for(node, "deleted")
    await node.remove()
    with pytest.raises((NodeGoneError, NodeDiedError)):
        await soon(waiting)
    assert await soon(deleted) is None
    assert await wait_for(node.id, "deleted") is None


async def test_a_document_may_come_a_moment_later_or_not_at_all(managed: World) -> None:
    node = await managed.nodes.start("late")
    waiting = await waiting_for(node, "running")
    await managed.collection.insert_one(manager_document(node.id))
    assert (await soon(waiting)).status == "running"
    with pytest.raises(NodeGoneError, match="has no document"):
        await asyncio.wait_for(wait_for(ABSENT, "running"), 5)


async def test_what_somebody_else_wrote_and_any_field_can_be_waited_for(managed: World) -> None:
    node = await managed.start("one")
    await managed.becomes_true()
    waiting = await waiting_for(node, lambda document: getattr(document, "session", "") == "mine")
    await managed.collection.update_one({"_id": node.id}, {"$set": {"session": "mine"}})
    assert (await soon(waiting)).session == "mine"


async def test_a_timeout_tells_what_the_document_says(managed: World) -> None:
    node = await managed.start("one")
    await managed.becomes_true()
    message = "is not healthy after 0.2 s: status running, health none; it has no health check: wait for running"
    with pytest.raises(WaitTimeoutError, match=message):
        await wait_for(node.id, "healthy", 0.2)
    with pytest.raises(TimeoutError):
        await wait_for(node.id, lambda _: False, 0.1)


async def test_wrong_calls_and_odd_documents_are_clear_errors(managed: World) -> None:
    with pytest.raises(ValueError, match="is no full container id"):
        await wait_for("abc", "running")
    with pytest.raises(ValueError, match="'health' is no condition"):
        await wait_for(ABSENT, "health")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is no full container id"):
        await touch("../x")
    with pytest.raises(ValueError, match="is no full container id"):
        async with in_use("x"):
            pass
    await managed.collection.insert_one({"_id": ABSENT, "status": "running", "port": ["\x1b[2J"]})
    with pytest.raises(StoreError, match="The document of node eeeeeeeeeeee cannot be read: port"):
        await wait_for(ABSENT, "exited", 5)
    with pytest.raises(ZeroDivisionError):
        await wait_for((await managed.start("one")).id, lambda _: bool(1 / 0))


async def test_nothing_is_left_running_when_nobody_waits(managed: World) -> None:
    node = await managed.start("one")
    await managed.becomes_true()
    waiting = await waiting_for(node, "exited")
    assert [task for task in asyncio.all_tasks() if task.get_name().startswith("document-")]
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("document-")]


async def test_a_thousand_wait_at_once_at_the_cost_of_one(managed: World, monkeypatch: pytest.MonkeyPatch) -> None:
    node = await managed.start("one")
    await managed.becomes_true()
    queries = []
    find = follower.Follower._find

    async def counted(self: follower.Follower, node_ids: list[str]) -> Any:
        queries.append(node_ids)
        return await find(self, node_ids)

    monkeypatch.setattr(follower.Follower, "_find", counted)
    waiting = [asyncio.create_task(wait_for(node.id, "exited")) for _ in range(1000)]
    await asyncio.sleep(1)
    queries.clear()
    await node.kill()
    documents = await asyncio.wait_for(asyncio.gather(*waiting), 10)
    assert {document.status for document in documents if document} == {"exited"}
    assert len(queries) < 20


async def test_an_outage_of_the_database_is_waited_out(world: World, docker: Docker) -> None:
    async with PrivateMongo(standalone=True) as mongo, AsyncMongoClient[dict[str, Any]](mongo.url) as client:
        await init_beanie(database=client.test, document_models=[ToolServerNode, NodeChecker])
        await client.test.ToolServerNode.insert_one(manager_document(ABSENT))
        waiting = asyncio.create_task(wait_for(ABSENT, "running", 30))
        await asyncio.sleep(0.2)
        await mongo.kill()
        await asyncio.sleep(1)
        assert not waiting.done()
        late = asyncio.create_task(wait_for(ABSENT, "running", 0.5))
        with pytest.raises(WaitTimeoutError, match="its document cannot be read"):
            await late
        await mongo.start()
        await client.test.ToolServerNode.update_one({"_id": ABSENT}, {"$set": {"status": "running"}})
        document = await asyncio.wait_for(waiting, 20)
        assert document is not None
        assert document.status == "running"


async def test_without_beanie_the_error_says_what_to_do() -> None:
    async def ask() -> None:
        await wait_for(ABSENT, "running")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ToolServerNode, "_document_settings", None)
        for call in (ask, lambda: touch(ABSENT)):
            with pytest.raises(StoreError, match=r"Beanie is not initialised: call this inside"):
                await call()


# -- use ----------------------------------------------------------------------------------------------------


async def test_a_touch_writes_the_time_and_nothing_else(managed: World) -> None:
    node = await managed.start("one")
    await managed.becomes_true()
    before = await managed.document(node)
    assert await touch(node.id)
    after = await managed.document(node)
    assert before is not None
    assert after is not None
    assert abs((after["last_req_time"] - ago(0)).total_seconds()) < 5
    assert {**after, "last_req_time": before["last_req_time"]} == before
    assert not await touch(ABSENT)


async def test_a_node_in_use_is_never_idle_and_one_that_is_not_is_stopped(world: World) -> None:
    used, idle = await world.start("used"), await world.start("idle")
    async with world.watching(idle_timeout=1, sweep_interval=0.3, stop_timeout=1):
        async with in_use(used.id), in_use(used.id):
            await eventually(lambda: world.says(idle, status="exited"), 20)
            await asyncio.sleep(4)
            assert await world.says(used, status="running")
        await eventually(lambda: world.says(used, status="exited"), 20)


async def test_many_requests_of_one_node_share_their_writes(
    managed: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await managed.start("one")
    writes = []
    mark = use._mark

    async def counted(node_ids: list[str]) -> int:
        writes.append(node_ids)
        return await mark(node_ids)

    monkeypatch.setattr(use, "_mark", counted)

    async def request(seconds: float) -> None:
        async with in_use(node.id, every=0.5):
            await asyncio.sleep(seconds)

    await asyncio.gather(*(request(1.2) for _ in range(200)))
    assert 3 <= len(writes) <= 5
    await asyncio.sleep(0.7)
    assert 3 <= len(writes) <= 5
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("node")]


async def test_a_request_is_neither_failed_nor_held_up_by_a_database_that_is_away(
    managed: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_: list[str]) -> int:
        raise StoreError("last_req_time cannot be written: gone")

    monkeypatch.setattr(use, "_mark", fail)
    with logged("WARNING") as lines:
        async with in_use(ABSENT):
            pass
    assert "Nodes in use cannot be marked, trying again: last_req_time cannot be written: gone" in texts(lines)

    async def hang(_: list[str]) -> int:
        await asyncio.sleep(3)
        return 0

    monkeypatch.setattr(use, "_mark", hang)
    monkeypatch.setattr(use, "PATIENCE", 0.05)
    began = time.monotonic()
    async with in_use(ABSENT):
        pass
    assert time.monotonic() - began < 1


# -- changes ------------------------------------------------------------------------------------------------


async def test_changes_come_in_order_with_cause_and_times(world: World) -> None:
    node = await world.start("one")
    told: list[Change] = []
    async with world.watching() as watched:
        await world.becomes_true()
        changes = watched.app.changes()
        end = watched.app.on(told.append)
        await node.kill()
        change = await asyncio.wait_for(anext(changes), 5)
        assert (change.node_id, change.cause, change.deleted) == (node.id, "event", False)
        assert (change.old["status"], change.new["status"]) == ("running", "exited")
        assert change.event_ns is not None
        assert change.latency == pytest.approx((change.at_ns - change.event_ns) / 1e9, abs=0.001)
        end()
        await node.remove()
        async with asyncio.timeout(5 * SLOW):
            async for change in changes:
                if change.deleted:
                    break
    assert [change.new.get("status") for change in told] == ["exited"]
    assert [change async for change in changes] == []


async def test_a_callback_that_fails_harms_nobody_and_a_coroutine_function_is_refused(world: World) -> None:
    node = await world.start("one")
    told: list[Change] = []
    async with world.watching() as watched:
        await world.becomes_true()
        watched.app.on(lambda _: 1 / 0)
        watched.app.on(told.append)

        async def never(_: Change) -> None:
            """Would not be awaited."""

        with pytest.raises(TypeError, match=r"use `async for \.\.\. in changes\(\)`"):
            watched.app.on(never)
        with logged("ERROR") as lines:
            await node.kill()
            await eventually(lambda: told)
        assert any("ZeroDivisionError" in text for text in texts(lines))
        await eventually(lambda: world.says(node, status="exited"))


# -- over HTTP, and from a shell ----------------------------------------------------------------------------


async def test_a_manager_in_any_language_waits_over_http(world: World) -> None:
    node, address = await world.start("one", healthcheck="flag", interval_s=0.2), free_address()
    async with world.watching(http_listen=address), httpx.AsyncClient(base_url=f"http://{address}") as client:
        await world.becomes_true()
        row = (await client.get(f"/api/nodes/{node.id}")).json()
        assert (row["node_id"], row["status"], row["ip"]) == (node.id, "running", await world.ip(node))
        [listed] = (await client.get("/api/nodes")).json()
        # The whole id, which is a session of the manager's, is for those who have it.
        assert row | {"idle_left": 0} == listed | {"idle_left": 0, "node_id": node.id}
        assert listed["node_id"] == node.id[:12]
        assert (await client.get(f"/api/nodes/{node.id}?until=healthy&timeout=200ms")).status_code == 408
        waiting = asyncio.create_task(client.get(f"/api/nodes/{node.id}?until=healthy&timeout=10s"))
        await asyncio.sleep(0.3)
        await node.set_healthy(True)
        assert (await soon(waiting)).json()["health"] == "healthy"
        waiting = asyncio.create_task(client.get(f"/api/nodes/{node.id}?until=deleted"))
        await node.kill()
        ended = await client.get(f"/api/nodes/{node.id}?until=running")
        assert ended.status_code == 410
        assert "exit code 137 (SIGKILL)" in ended.json()["error"]
        await node.remove()
        assert (await soon(waiting)).json() == {"node_id": node.id, "deleted": True}
        assert (await client.get(f"/api/nodes/{node.id}")).status_code == 404


async def test_a_shell_waits_for_a_node_by_its_name(world: World, tmp_path: Path) -> None:
    node = await world.start("one", healthcheck="flag", interval_s=0.2)
    async with world.watching():
        await world.becomes_true()
        code, text = await ask(world, tmp_path, "wait", node.name, "--timeout", "300ms")
        assert (code, text.count("\n")) == (1, 1)
        assert "is not healthy after 0.3 s: status running, health unhealthy" in text
        waiting = asyncio.create_task(ask(world, tmp_path, "wait", node.name, "--for", "healthy"))
        await asyncio.sleep(1)
        await node.set_healthy(True)
        code, text = await waiting
        assert (code, text) == (0, f"{node.id[:12]} is running, health healthy, at {await world.ip(node)}:31942\n")
        await node.kill()
        code, text = await ask(world, tmp_path, "wait", node.id[:12], "--for", "running")
        assert code == 3
        assert "exit code 137 (SIGKILL)" in text
        await node.remove()
        assert (await ask(world, tmp_path, "wait", node.id, "--for", "deleted"))[0] == 0
        assert (await ask(world, tmp_path, "wait", "nothing-of-that-name"))[0] == 3
