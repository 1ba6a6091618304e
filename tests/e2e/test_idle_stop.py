"""Idle nodes are stopped, and nothing else is: every way in which a stop could meet somebody's request."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import pytest

from eventwatch.core.errors import EngineError
from eventwatch.core.facts import STOPPING, Observation, Recorded, Usage, parse_time
from eventwatch.engine.docker import DockerEngine
from eventwatch.pipeline.writer import Writer
from tests.kit.nodes import Node
from tests.kit.seen import filmed, logged, texts
from tests.kit.truth import Document, ago
from tests.kit.waiting import SLOW, eventually
from tests.kit.world import Watched, World

IDLE = 0.2
STUBBORN = ("sh", "-c", "trap '' TERM; while :; do sleep 0.1; done")


async def aged(node: Node, seconds: float = IDLE) -> bool:
    """Whether the node was started that long ago."""
    started_at = parse_time((await node.inspect())["State"]["StartedAt"])
    assert started_at is not None
    return datetime.now(UTC) - started_at > timedelta(seconds=seconds)


async def start_idle(world: World, name: str, **options: Any) -> Node:
    """Start a node that has been idle for long enough when this returns."""
    node = await world.nodes.start(name, **options)
    await eventually(lambda: aged(node))
    await world.insert(node, status="running", health="none", ip=await world.ip(node), last_req_time=ago(3600))
    return node


async def sweep(watched: Watched) -> int:
    """Run one sweep to its end; how many stops it began."""
    assert watched.app.pipeline is not None
    return (await watched.app.pipeline.sweeper.sweep()).stopping


def stops(watched: Watched, result: str) -> float:
    return watched.count("eventwatch_stops_total", reason="idle", result=result)


def quick(**changes: Any) -> dict[str, Any]:
    return {"idle_timeout": IDLE, "settle_delay": 0.1, "stop_timeout": 2, **changes}


# -- who is stopped -----------------------------------------------------------------------------------------


async def test_an_idle_node_is_claimed_then_stopped(world: World) -> None:
    node = await start_idle(world, "one")
    before = await world.document(node)
    with logged("INFO") as lines:
        async with filmed(world.collection) as film, world.watching(**quick()) as watched:
            await eventually(lambda: stops(watched, "stopped"))
            await world.becomes_true()
            await eventually(lambda: film.of(node)[-1].says(status="exited"))
    said = [image.updated["status"] for image in film.of(node) if "status" in image.updated]
    assert said == [STOPPING, "exited"]
    assert texts(lines).count(f"Stopping node: {node.id} due to idling time used up") == 1
    assert (await node.inspect())["State"]["ExitCode"] == 0
    after = await world.document(node)
    assert before is not None
    assert after is not None
    assert after["last_req_time"] == before["last_req_time"]


async def test_a_node_in_use_is_left_running_until_it_is_idle(world: World) -> None:
    node = await start_idle(world, "one")
    await world.collection.update_one({"_id": node.id}, {"$set": {"last_req_time": ago(0)}})
    async with filmed(world.collection) as film, world.watching(**quick(idle_timeout=1)) as watched:
        sweeping = asyncio.create_task(again_and_again(watched), name="sweeps")
        requests = 0
        while not (requests > 50 and await aged(node, 3)):
            last = ago(0)
            await world.collection.update_one({"_id": node.id}, {"$set": {"last_req_time": last}})
            requests += 1
            await asyncio.sleep(0.02)
        assert not [image for image in film.of(node) if image.says(status=STOPPING)]
        assert await world.status(node) == "running"
        await eventually(lambda: stops(watched, "stopped"))
        sweeping.cancel()
        await asyncio.gather(sweeping, return_exceptions=True)
    claimed = next(change for change in watched.of(node) if change.new.get("status") == STOPPING)
    assert claimed.at_ns / 1e9 - last.replace(tzinfo=UTC).timestamp() >= 1


async def again_and_again(watched: Watched) -> None:
    while True:
        await sweep(watched)
        await asyncio.sleep(0.05)


async def test_a_node_that_was_just_started_is_not_idle_however_old_its_last_request(world: World) -> None:
    async with world.watching(**quick(idle_timeout=1.5)) as watched:
        # After the sweep that comes first, which would stop it where a start takes that long.
        node = await world.nodes.start("one")
        await world.insert(node, last_req_time=ago(1e6))
        await eventually(lambda: sweep(watched))
    started_at = parse_time((await node.inspect())["State"]["StartedAt"])
    claimed = next(change for change in watched.of(node) if change.new.get("status") == STOPPING)
    assert started_at is not None
    assert claimed.at_ns / 1e9 - started_at.timestamp() >= 1.5


@pytest.mark.parametrize(
    "last_req_time",
    [
        pytest.param({}, id="missing"),
        pytest.param({"last_req_time": None}, id="none"),
        pytest.param({"last_req_time": ago(-3600)}, id="future"),
    ],
)
async def test_a_node_whose_last_request_is_not_known_is_never_stopped(
    world: World, last_req_time: Document
) -> None:
    idle, node = await start_idle(world, "idle"), await start_idle(world, "one")
    await world.collection.update_one({"_id": node.id}, {"$unset": {"last_req_time": 1}})
    if last_req_time:
        await world.collection.update_one({"_id": node.id}, {"$set": last_req_time})
    async with world.watching(**quick()) as watched:
        await eventually(lambda: stops(watched, "stopped"))
        assert await sweep(watched) == 0
    assert await world.status(idle) == "exited"
    assert await world.status(node) == "running"
    assert not [change for change in watched.of(node) if "status" in change.new]


async def test_an_idle_timeout_of_zero_stops_nobody(world: World) -> None:
    node = await start_idle(world, "one")
    async with world.watching(**quick(idle_timeout=0)) as watched:
        assert await sweep(watched) == 0
    assert await world.status(node) == "running"


async def test_a_dry_run_says_whom_it_would_stop_and_stops_nobody(world: World) -> None:
    node = await start_idle(world, "one")
    before = await world.collection.find().to_list()
    with logged("INFO") as lines:
        async with world.watching(**quick(dry_run=True)) as watched:
            assert await sweep(watched) == 0
    assert f"Dry run: would stop node {node.id} due to idling time used up" in texts(lines)
    assert await world.status(node) == "running"
    assert await world.collection.find().to_list() == before


# -- a request that comes in while it is decided --------------------------------------------------------------


async def test_a_request_between_decision_and_claim_keeps_the_node_alive(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await start_idle(world, "one")
    real_claim, requested = Writer.claim, ago(0)
    claimed: list[bool] = []

    async def claim(self: Writer, recorded: Recorded, seen: Observation, **options: Any) -> bool:
        nonlocal requested
        requested = ago(0)
        await world.collection.update_one({"_id": node.id}, {"$set": {"last_req_time": requested}})
        claimed.append(await real_claim(self, recorded, seen, **options))
        return claimed[-1]

    monkeypatch.setattr(Writer, "claim", claim)
    async with filmed(world.collection) as film, world.watching(**quick()) as watched:
        await eventually(lambda: stops(watched, "withdrawn"))
        assert await world.says(node, last_req_time=requested, status="running")
        await eventually(lambda: film.of(node))
    assert claimed == [False]
    assert not [image for image in film.of(node) if image.says(status=STOPPING)]
    assert await world.status(node) == "running"


@pytest.mark.parametrize(
    "with_request", [pytest.param(True, id="with-request"), pytest.param(False, id="without")]
)
async def test_a_manager_that_writes_back_what_it_read_before_the_claim_keeps_the_node_alive(
    world: World, with_request: bool
) -> None:
    node = await start_idle(world, "one")
    old = await world.document(node)
    assert old is not None
    if with_request:
        old["last_req_time"] = ago(-0.5)  # its clock may be ahead
    with logged("INFO") as lines:
        async with filmed(world.collection) as film, world.watching(**quick(settle_delay=1)) as watched:
            await eventually(lambda: [image for image in film.of(node) if image.says(status=STOPPING)])
            await world.collection.replace_one({"_id": node.id}, old)
            await eventually(lambda: stops(watched, "withdrawn"))
            await world.becomes_true()
            assert await world.says(node, status="running", last_req_time=old["last_req_time"])
    assert f"Stopping node: {node.id} due to idling time used up" not in texts(lines)
    assert f"Node {node.id[:12]} had a request just now and is left running" in texts(lines)
    assert await world.status(node) == "running"


# -- stops that do not go well ------------------------------------------------------------------------------


async def test_a_stop_that_fails_takes_its_claim_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    node = await start_idle(world, "one")

    async def stop(_: DockerEngine, node_id: str, *, grace: float) -> None:
        raise EngineError(f"Engine failed while stopping {node_id}: it does not want to", status=500)

    with monkeypatch.context() as patch, logged("INFO") as lines:
        patch.setattr(DockerEngine, "stop", stop)
        async with filmed(world.collection) as film, world.watching(**quick()) as watched:
            await eventually(lambda: stops(watched, "failed"))
            await eventually(lambda: film.of(node)[-1].says(status="running"))
            assert not watched.app.pipeline.writer.claims if watched.app.pipeline else False
            said = [image.updated["status"] for image in film.of(node) if "status" in image.updated]
            assert said == [STOPPING, "running"]
            assert await world.status(node) == "running"
            patch.undo()
            assert await sweep(watched) == 1
            await eventually(lambda: stops(watched, "stopped"))
    assert [text for text in texts(lines, "WARNING") if node.id in text and "failed" in text]


async def test_a_slow_stop_holds_up_neither_events_nor_sweeps(world: World) -> None:
    slow = await start_idle(world, "slow", command=STUBBORN)
    killed, spoiled = await world.nodes.start("killed"), await world.nodes.start("spoiled")
    await world.insert(killed, last_req_time=None)
    await world.insert(spoiled, last_req_time=None)
    async with world.watching(**quick(stop_timeout=5)) as watched:
        await eventually(lambda: world.says(slow, status=STOPPING))
        await killed.kill()
        await eventually(lambda: world.says(killed, status="exited"))
        await world.collection.update_one({"_id": spoiled.id}, {"$set": {"status": "exited"}})
        sweeper = watched.app.pipeline.sweeper if watched.app.pipeline else None
        assert sweeper
        before = sweeper.last_success
        watched.app.sweep_now()
        await eventually(lambda: sweeper.last_success != before)
        await eventually(lambda: world.says(spoiled, status="running"))
        assert await world.status(slow) == "running"
        assert await world.says(slow, status=STOPPING)
        await eventually(lambda: stops(watched, "stopped"))
        await world.becomes_true()
    ends = [(change.node_id, change.new["status"]) for change in watched.written if "status" in change.new]
    assert ends.index((killed.id, "exited")) < ends.index((slow.id, "exited"))
    assert ends.index((spoiled.id, "running")) < ends.index((slow.id, "exited"))
    assert (await slow.inspect())["State"]["ExitCode"] == 137


async def test_no_more_nodes_are_stopped_at_once_than_allowed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle = [await start_idle(world, f"idle-{number}") for number in range(5)]
    real_stop = DockerEngine.stop
    under_way, most = 0, 0

    async def stop(self: DockerEngine, node_id: str, *, grace: float) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        try:
            await real_stop(self, node_id, grace=grace)
        finally:
            under_way -= 1

    monkeypatch.setattr(DockerEngine, "stop", stop)
    async with world.watching(**quick(stop_concurrency=2)) as watched:
        await eventually(lambda: stops(watched, "stopped") == len(idle))
        await world.becomes_true()
    assert most == 2
    assert {await world.status(node) for node in idle} == {"exited"}


async def test_a_node_that_was_restarted_while_it_waited_for_its_turn_is_left_running(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits for a slot was judged idle a while ago; its start since then counts as much as a request."""
    idle, real_stop, its_turn = 3 * SLOW, DockerEngine.stop, asyncio.Event()

    async def stop(self: DockerEngine, node_id: str, *, grace: float) -> None:
        await its_turn.wait()
        await real_stop(self, node_id, grace=grace)

    monkeypatch.setattr(DockerEngine, "stop", stop)
    slow = await start_idle(world, "slow")
    async with world.watching(**quick(stop_concurrency=1, idle_timeout=idle)) as watched:
        await eventually(lambda: sweep(watched))
        await eventually(lambda: world.says(slow, status=STOPPING))
        waiting = await start_idle(world, "waiting")
        await eventually(lambda: aged(waiting, idle))
        assert await sweep(watched) == 1
        await waiting.restart()
        its_turn.set()
        await eventually(lambda: stops(watched, "withdrawn") + stops(watched, "stopped") == 2)
        assert await world.status(waiting) == "running"
        await world.becomes_true()


async def test_a_nodes_own_idle_timeout_counts_more_than_the_setting(world: World) -> None:
    def label(text: str) -> dict[str, str]:
        return {"eventwatch.idle-timeout": text, "eventwatch.stop-timeout": "1s"}

    hasty = await start_idle(world, "hasty", labels=label("1s"))
    told = await start_idle(world, "told")
    await world.collection.update_one({"_id": told.id}, {"$set": {"idle_timeout": "1s"}})
    never = await start_idle(world, "never", labels=label("1s"))
    await world.collection.update_one({"_id": never.id}, {"$set": {"idle_timeout": "never"}})
    odd = await start_idle(world, "odd", labels=label("\x1b[2Jsoon"))
    with logged("WARNING") as lines:
        async with world.watching(**quick(idle_timeout=0)) as watched:

            async def is_stopped(node: Node) -> bool:
                await sweep(watched)  # a node may have been idle for too short a time at the one before
                return await world.says(node, status="exited")

            for node in (hasty, told):
                await eventually(partial(is_stopped, node), 20)
            for _ in range(3):
                await sweep(watched)
            for node in (never, odd):
                assert await world.says(node, status="running")
            shown = {node.id: (watched.app.view.node(node.id) or {})["idle_left"] for node in (never, odd)}
            assert shown == {never.id: None, odd.id: None}
    complaints = [text for text in texts(lines) if "the setting stands" in text]
    assert len(complaints) == 1
    assert complaints[0].startswith(f"Node {odd.id[:12]}: label eventwatch.idle-timeout is no duration")


@pytest.mark.needs("cgroups")
async def test_a_node_that_works_lives_beside_an_idle_one_that_is_stopped(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eventwatch.pipeline.idle.ACTIVITY_GAP", 0.4)
    busy = await start_idle(world, "busy", command=("sh", "-c", "trap 'exit 0' TERM; while :; do :; done"))
    rest = await start_idle(world, "rest", command=("sh", "-c", "trap 'exit 0' TERM; while :; do sleep 1; done"))
    with logged("INFO") as lines:
        async with world.watching(
            **quick(idle_timeout=1, sweep_interval=0.3, idle_activity="cpu=0.02,network")
        ) as watched:
            await eventually(lambda: world.says(rest, status="exited"), 20)
            await asyncio.sleep(5)
            assert await world.says(busy, status="running")
            left = (watched.app.view.node(busy.id) or {})["idle_left"]
            assert left is not None
            assert stops(watched, "works") >= 2
    told = [
        text for text in texts(lines) if f"Node {busy.id[:12]} is past its idle time, but works: it uses" in text
    ]
    assert told
    before = await world.document(busy)
    assert before is not None
    assert datetime.now(UTC).replace(tzinfo=None) - before["last_req_time"] > timedelta(minutes=50)


@pytest.mark.needs("cgroups")
async def test_whatever_is_wrong_with_a_node_is_told_once_and_unread_usage_stops_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eventwatch.pipeline.idle.ACTIVITY_GAP", 0.01)
    real = DockerEngine.usage
    odd = {"eventwatch.idle-timeout": "soon"}  # so that the setting stands, and another thing is wrong as well
    one, other = await start_idle(world, "one", labels=odd), await start_idle(world, "other")

    async def usage(engine: DockerEngine, node_id: str) -> Usage:
        if node_id == one.id:
            raise EngineError("Engine denies it", status=403)
        return await real(engine, node_id)

    monkeypatch.setattr(DockerEngine, "usage", usage)
    with logged("WARNING") as lines:
        async with world.watching(**quick(idle_activity="cpu=0.9")) as watched:
            await eventually(lambda: world.says(other, status="exited"), 20)
            for _ in range(3):
                await sweep(watched)
                await asyncio.sleep(0.1)
            assert await world.says(one, status="running")
    for problem in ("not stopped, as its usage cannot be read", "no duration such as 2h, and not never: soon"):
        assert sum(problem in text for text in texts(lines)) == 1
