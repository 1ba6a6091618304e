"""What a manager calls: waiting for nodes, marking them as used, following changes."""

from __future__ import annotations

import argparse
import asyncio
import gc
import math
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pymongo
import pytest
from aiodocker import Docker
from beanie import init_beanie
from pymongo import AsyncMongoClient

from eventwatch import (
    Change,
    ConfigError,
    NodeChecker,
    NodeDiedError,
    NodeGoneError,
    StoreError,
    ToolServerNode,
    WaitTimeoutError,
    in_use,
    touch,
    wait_for,
    watch,
)
from eventwatch.calls import follower, use
from eventwatch.calls import waiting as waiting_calls
from eventwatch.calls.here import get_here
from eventwatch.cli.commands import wait
from eventwatch.pipeline.orphans import Orphans
from eventwatch.pipeline.sweeper import Sweeper
from eventwatch.pipeline.watcher import Watcher
from eventwatch.pipeline.writer import Writer
from eventwatch.store.history import History
from tests.e2e.test_operator import ask
from tests.kit.mongod import PrivateMongo, free_address
from tests.kit.nodes import Node
from tests.kit.seen import logged, texts
from tests.kit.truth import ago, manager_document
from tests.kit.waiting import SLOW, eventually
from tests.kit.world import World

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

    async def runs_again() -> bool:
        seen = await node.inspect()
        return bool(seen["RestartCount"] > 0 and seen["State"]["Status"] == "running")

    await eventually(runs_again)
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


async def test_a_timeout_of_nothing_looks_once_and_one_that_is_none_is_refused(managed: World) -> None:
    node = await managed.start("one")
    await managed.becomes_true()
    found = await wait_for(node.id, "running", 0)
    assert found is not None
    assert found.status == "running"
    with pytest.raises(
        WaitTimeoutError, match="is not healthy now: status running, health none; it has no health"
    ):
        await wait_for(node.id, "healthy", timedelta(0))
    assert await wait_for(ABSENT, "deleted", 0) is None
    with pytest.raises(NodeGoneError, match="has no document"):
        await wait_for(ABSENT, "running", 0)
    assert await wait_for(node.id, "running", timedelta(seconds=5)) is not None
    assert await wait_for(node.id, "running", math.inf) is not None
    for wrong in (math.nan, -1, -math.inf, timedelta(days=-1), "soon", True):
        with pytest.raises(ValueError, match="is no timeout: it must be seconds or a duration"):
            await wait_for(node.id, "running", wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="must be"):
            async with in_use(node.id, every=wrong):  # type: ignore[arg-type]
                pytest.fail("the request began")


async def test_what_would_have_to_be_awaited_is_no_condition(managed: World) -> None:
    node = await managed.start("one")

    async def ready(_: ToolServerNode) -> bool:
        return False

    class Ready:
        async def __call__(self, _: ToolServerNode) -> bool:
            return False

    with pytest.raises(TypeError, match="a coroutine function would not be awaited"):
        await wait_for(ABSENT, ready)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a coroutine function would not be awaited"):  # at the first look
        await wait_for(node.id, Ready())  # type: ignore[arg-type]


async def test_who_comes_does_not_slow_down_those_who_came_before_nor_wait_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a server that tells nothing: each node is looked at in its own time."""
    looks: list[tuple[float, set[str]]] = []
    loop = asyncio.get_running_loop()

    async def looked(_: follower.Follower, node_ids: list[str]) -> dict[str, Any]:
        looks.append((loop.time(), set(node_ids)))
        return {}

    async def no_stream(_: follower.Follower) -> None:
        """There is none."""

    monkeypatch.setattr(follower.Follower, "_find", looked)
    monkeypatch.setattr(follower.Follower, "_follow_stream", no_stream)
    async with AsyncMongoClient[dict[str, Any]]() as client:
        following = follower.Follower(client.test.nodes)

        def count(name: str, since: float) -> int:
            return sum(name in ids for at, ids in looks if at >= since)

        async with following.following("old"):
            await eventually(lambda: count("old", 0) >= 20, 30)  # for a second or two: a tenth of that is waited
            began = loop.time()
            async with following.following("new"):
                await eventually(lambda: count("new", began) >= 12, 30)
                assert count("old", began) < count("new", began) - 2


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


async def test_hundreds_that_wait_ask_the_engine_once_why_a_node_died_and_hear_of_changes_once(
    managed: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await managed.start("one", healthcheck="flag", interval_s=0.2)
    await managed.becomes_true()
    asked, look = list[str](), waiting_calls._inspect

    async def counted(node_id: str, engine: Any) -> Any:
        asked.append(node_id)
        return await look(node_id, engine)

    monkeypatch.setattr(waiting_calls, "_inspect", counted)
    waiting = [asyncio.create_task(wait_for(node.id, "healthy", 60)) for _ in range(320)]
    await asyncio.sleep(0.5)
    if here := get_here():
        assert len(here.changes._callbacks) <= 1
    await node.kill()
    await asyncio.wait(waiting, timeout=60)
    ended = [task.exception() for task in waiting]
    assert {type(each) for each in ended} == {NodeDiedError}
    assert {str(each) for each in ended} == {str(ended[0])}
    assert 2 <= len(asked) <= 40


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
    await touch(node.id)
    after = await managed.document(node)
    assert before is not None
    assert after is not None
    assert abs((after["last_req_time"] - ago(0)).total_seconds()) < 5
    assert {**after, "last_req_time": before["last_req_time"]} == before


async def test_of_a_node_without_document_nobody_can_make_use(managed: World) -> None:
    with pytest.raises(NodeGoneError, match=r"^Node eeeeeeeeeeee has no document$"):
        await touch(ABSENT)
    with pytest.raises(NodeGoneError, match=r"^Node eeeeeeeeeeee has no document$"):
        async with in_use(ABSENT):
            pytest.fail("the request began")
    node = await managed.start("one")
    async with in_use(node.id):  # what is deleted meanwhile does not fail the request that is under way
        await managed.collection.delete_one({"_id": node.id})
        await asyncio.sleep(1.1)
    await no_mark_is_left()


async def no_mark_is_left() -> None:
    await eventually(lambda: not [task for task in asyncio.all_tasks() if task.get_name() == "node-marks"])


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
    writes = counted_marks(monkeypatch)

    async def request(seconds: float) -> None:
        async with in_use(node.id, every=0.5):
            await asyncio.sleep(seconds)

    await asyncio.gather(*(request(1.2) for _ in range(200)))
    assert 3 <= len(writes) <= 5
    await no_mark_is_left()
    assert 3 <= len(writes) <= 5


def counted_marks(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The nodes of each write of marks from now on."""
    writes: list[set[str]] = []
    mark = use._mark

    async def counted(node_ids: Collection[str], **more: Any) -> dict[str, float]:
        writes.append(set(node_ids))
        return await mark(node_ids, **more)

    monkeypatch.setattr(use, "_mark", counted)
    return writes


async def test_requests_of_others_do_not_keep_a_long_request_from_its_marks(
    managed: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await managed.start("one")
    crowd = [f"{number:064x}" for number in range(300)]
    await managed.collection.insert_many(manager_document(other) for other in crowd)
    writes = counted_marks(monkeypatch)

    async def requests(of: list[str]) -> None:
        while True:
            for other in of:
                async with in_use(other, every=0.4):
                    await asyncio.sleep(0.002)

    async with in_use(node.id, every=0.4):
        others = [asyncio.create_task(requests(crowd[number::30])) for number in range(30)]
        await eventually(lambda: sum(node.id in written for written in writes) >= 5, 20)
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
    # One at a time, which takes all along, instead of one for each request.
    assert max(len(written) for written in writes) > 5


async def test_a_mark_that_fails_or_hangs_is_tried_again_long_before_the_idle_time_ends(
    managed: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await managed.start("one")
    mark, deadlines = use._mark, list[float]()

    async def broken(node_ids: Collection[str], *, seconds: float) -> dict[str, float]:
        deadlines.append(seconds)
        if 2 <= len(deadlines) <= 4:
            await asyncio.sleep(seconds)  # as long as the database is given
            raise StoreError("last_req_time cannot be written: gone")
        return await mark(node_ids, seconds=seconds)

    monkeypatch.setattr(use, "_mark", broken)
    monkeypatch.setattr(use, "SHORTEST_DEADLINE", 0.05)
    with logged("INFO") as lines:
        async with in_use(node.id, every=0.4):
            await eventually(lambda: len(deadlines) >= 5, 20)
            await eventually(lambda: "Nodes in use are marked again" in texts(lines), 20)
    assert max(deadlines) <= 0.2
    assert sum("cannot be marked" in text for text in texts(lines, "WARNING")) == 1


@pytest.mark.parametrize("where", ["field", "label"])
async def test_a_node_with_a_short_idle_time_of_its_own_is_marked_as_often_as_that_needs(
    world: World, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = {"eventwatch.idle-timeout": "1500ms"} if where == "label" else {}
    used = await world.nodes.start("used", labels=labels)
    await world.insert(used, **({"idle_timeout": "1500ms"} if where == "field" else {}))
    async with beside(world, "inside" if where == "label" else "outside"):
        writes = counted_marks(monkeypatch)
        async with in_use(used.id), in_use(used.id):
            await eventually(lambda: len(writes) >= 5, 20)
        async with in_use(used.id):  # which needs no mark at once, and knows the idle time all the same
            count = len(writes)
            await eventually(lambda: len(writes) >= count + 3, 20)


async def test_shared_work_is_done_by_no_callers_deadline(managed: World) -> None:
    """The first one that waits, or uses a node, gives up soon: those that come later must not."""
    node = await managed.start("one", healthcheck="flag", interval_s=0.2)
    await managed.becomes_true()

    async def hasty() -> None:
        with pymongo.timeout(0.3):
            async with in_use(node.id, every=0.2):
                await wait_for(node.id, "healthy", 20)

    first = asyncio.create_task(hasty())
    await asyncio.sleep(0.5)
    before = await managed.document(node)
    await managed.collection.update_one({"_id": node.id}, {"$set": {"session": "mine"}})
    found = await wait_for(node.id, lambda document: getattr(document, "session", "") == "mine", 20)
    assert found is not None

    async def is_marked() -> bool:
        after = await managed.document(node)
        return bool(before and after and after["last_req_time"] > before["last_req_time"])

    await eventually(is_marked)
    await node.set_healthy(True)
    await first


async def test_a_request_is_neither_failed_nor_held_up_by_a_database_that_is_away(
    managed: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_: Collection[str], **__: float) -> dict[str, float]:
        raise StoreError("last_req_time cannot be written: gone")

    monkeypatch.setattr(use, "_mark", fail)
    with logged("WARNING") as lines:
        async with in_use(ABSENT):
            pass
    assert "Nodes in use cannot be marked, trying again: last_req_time cannot be written: gone" in texts(lines)

    async def hang(_: Collection[str], **__: float) -> dict[str, float]:
        await asyncio.sleep(3)
        return {}

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


async def test_a_callback_that_makes_up_a_cancellation_ends_nothing(world: World) -> None:
    node = await world.start("one")
    told: list[Change] = []

    def cancelled(change: Change) -> None:
        told.append(change)
        raise asyncio.CancelledError

    async with world.watching() as watched:
        await world.becomes_true()
        watched.app.on(cancelled)
        with logged("INFO") as lines:
            await node.kill()
            await eventually(lambda: world.says(node, status="exited"))
            await node.start()
            await eventually(lambda: world.says(node, status="running"))
        await eventually(lambda: len(told) >= 2)
        assert any("A callback for changes failed: CancelledError" in text for text in texts(lines, "ERROR"))
        assert not any(text.startswith("Starting over") for text in texts(lines))


@pytest.mark.parametrize(
    ("part", "name", "how"),
    [
        ((Writer, "run"), "writer", "silently"),
        ((Orphans, "run"), "orphanage", "cancelled by nobody"),
        ((Sweeper, "run"), "sweeper", "silently"),
        ((Watcher, "run"), "watcher", "cancelled by nobody"),
        ((History, "run"), "history", "silently"),
    ],
)
async def test_when_a_part_of_the_watcher_ends_all_of_it_begins_anew(
    world: World, part: tuple[type, str], name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []
    real = getattr(*part)

    async def run(self: Any) -> None:
        if not ended:
            ended.append(name)
            await asyncio.sleep(0.1)
            if how == "silently":
                return
            raise asyncio.CancelledError
        await real(self)

    monkeypatch.setattr(*part, run)
    node = await world.start("one")
    with logged("ERROR") as lines:
        async with watch(world.settings()) as app:
            await eventually(lambda: ended, 20)
            await eventually(lambda: any(f"{name} ended by itself" in text for text in texts(lines)), 20)
            await eventually(lambda: app.pipeline and app.pipeline.sweeper.last_success is not None, 40)
            await node.kill()
            await eventually(lambda: world.says(node, status="exited"), 40)


async def test_readers_whose_loop_was_left_are_forgotten_and_those_that_wait_are_not(world: World) -> None:
    node = await world.start("one")
    async with world.watching() as watched:
        await world.becomes_true()
        kept = watched.app.changes()
        reading = asyncio.create_task(anext(watched.app.changes()))  # of which only the task knows

        async def first() -> str:
            async for change in watched.app.changes():
                return change.node_id
            return ""

        hasty = [asyncio.create_task(first()) for _ in range(50)]
        await asyncio.sleep(0.1)
        gc.collect()
        await node.kill()
        assert {await soon(each) for each in hasty} == {node.id}
        assert (await soon(reading)).node_id == node.id
        del hasty, reading
        await node.start()
        await eventually(lambda: world.says(node, status="running"))
        gc.collect()
        assert list(watched.app._changes._readers) == [kept]
        assert not watched.app._changes._waiting
        assert (await soon(asyncio.create_task(anext(kept)))).node_id == node.id


# -- over HTTP, and from a shell ----------------------------------------------------------------------------


async def test_a_manager_in_any_language_waits_over_http(world: World) -> None:
    node, address = await world.start("one", healthcheck="flag", interval_s=0.2), free_address()
    async with world.watching(http_listen=address), httpx.AsyncClient(base_url=f"http://{address}") as client:
        await world.becomes_true()
        row = (await client.get(f"/api/nodes/{node.id}")).json()
        assert (row["node_id"], row["status"], row["ip"]) == (node.id, "running", await world.ip(node))
        [listed] = (await client.get("/api/nodes")).json()
        # The whole id, which is a session of the manager's, is for those who have it.
        same = ("short_id", "status", "ip", "port")  # the others may have changed between the two
        assert {name: row[name] for name in same} == {name: listed[name] for name in same}
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


async def test_a_node_is_waited_for_by_the_beginning_of_its_id_whoever_has_its_container(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """The engine of the command need not be that of the node; it may be one of many, or have forgotten it."""
    ids = [f"abcdef{digit}" + 57 * "0" for digit in "12"]
    for node_id in ids:
        await world.insert(node_id, status="running")
    node = await world.start("one")
    settings = world.settings()

    async def ask_for(name: str) -> str:
        await wait(argparse.Namespace(name=name, condition="running", timeout=5.0), settings)
        return capsys.readouterr().out

    assert (await ask_for("abcdef1")).startswith("abcdef100000 is running")
    with pytest.raises(ConfigError, match="several nodes begin with it, give more of the id"):
        await ask_for("abcdef")
    await world.collection.update_one({"_id": node.id}, {"$set": {"status": "running"}})
    for name in (node.id[:6], node.name):
        assert (await ask_for(name)).startswith(f"{node.id[:12]} is running")
    with pytest.raises(NodeGoneError, match="no document and no container is called nothing"):
        await ask_for("nothing")
    with pytest.raises(NodeGoneError, match="is called"):
        await ask_for("")
