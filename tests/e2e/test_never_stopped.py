"""What is never stopped, whatever a document says, and what many stops at once must wait for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from beanie import init_beanie

from eventwatch import NodeChecker, ToolServerNode, check_nodes_status, update_node_status
from eventwatch.app import Application
from eventwatch.core.clock import SystemClock
from eventwatch.core.facts import STOPPING, Observation, Recorded
from eventwatch.engine.docker import DockerEngine
from eventwatch.engine.protocol import EngineInfo
from eventwatch.pipeline import deletion, essentials, idle
from eventwatch.pipeline.writer import Writer
from eventwatch.store.base import ENGINES, OWNERS
from eventwatch.store.connection import Store
from tests.e2e.test_idle_stop import STUBBORN, aged, quick, start_idle, stops, sweep
from tests.kit.eventwatch import program
from tests.kit.mongod import free_address
from tests.kit.nodes import Node
from tests.kit.seen import filmed, logged, texts
from tests.kit.truth import ago
from tests.kit.waiting import eventually
from tests.kit.world import World

LABEL = "eventwatch.test-node"


async def sweeps_past(world: World, *nodes: Node, **settings: Any) -> list[str]:
    """Sweep several times with these nodes there; what was logged. All of them must still run."""
    with logged("INFO") as lines:
        async with world.watching(**quick(**settings)) as watched:
            for _ in range(4):
                assert await sweep(watched) == 0
                await asyncio.sleep(0.05)
    for node in nodes:
        assert await world.status(node) == "running"
    return texts(lines)


async def start_idle_elsewhere(world: World, **options: Any) -> Node:
    """Start what looks like an idle node but for its network."""
    node = await world.nodes.start("elsewhere", network="bridge", **options)
    await eventually(lambda: aged(node))
    await world.insert(node, status="running", health="none", last_req_time=ago(3600))
    return node


# -- what is no node ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("called", ["name", "short id"])
async def test_a_document_that_only_names_a_container_is_reported_once_and_skipped(
    world: World, called: str
) -> None:
    node = await start_idle(world, "victim")
    await world.collection.delete_many({})
    name = node.name if called == "name" else node.id[:12]
    row = {"_id": name, "status": "running", "last_req_time": ago(1e6)}
    await world.collection.insert_one(row)
    said = await sweeps_past(world, node)
    reason = "its _id is no container's full id (64 lower-case hex digits)"
    told = [text for text in said if "is skipped" in text]
    assert told == [f"Document {name} is skipped: {reason}. Correct or delete it."]
    assert await world.collection.find_one({"_id": name}) == row


async def test_a_container_off_the_node_network_is_not_stopped(world: World) -> None:
    node = await start_idle_elsewhere(world)
    await sweeps_past(world, node)
    assert await world.says(node, status="running")


async def test_a_container_off_the_network_but_with_the_register_label_is_a_node(world: World) -> None:
    node = await start_idle_elsewhere(world, labels={LABEL: "yes"})
    async with world.watching(**quick(register_label=LABEL)) as watched:
        await eventually(lambda: stops(watched, "stopped"))
    assert await world.status(node) == "exited"


def is_own(monkeypatch: pytest.MonkeyPatch, node: Node, _: str) -> None:
    monkeypatch.setattr(essentials, "own_container_ids", lambda: frozenset({node.id}))


def is_database_by_name(monkeypatch: pytest.MonkeyPatch, node: Node, _: str) -> None:
    monkeypatch.setattr(Store, "addresses", lambda _: frozenset({(node.name, 27017)}))


def is_database_by_address(monkeypatch: pytest.MonkeyPatch, _: Node, ip: str) -> None:
    monkeypatch.setattr(Store, "addresses", lambda _: frozenset({(ip, 27017)}))


@pytest.mark.parametrize("make", [is_own, is_database_by_name, is_database_by_address])
async def test_what_eventwatch_itself_lives_on_is_not_stopped(
    world: World, monkeypatch: pytest.MonkeyPatch, make: Callable[[pytest.MonkeyPatch, Node, str], None]
) -> None:
    node = await start_idle(world, "essential")
    make(monkeypatch, node, await world.ip(node))
    await sweeps_past(world, node)
    other = await world.start("other")
    async with world.watching(idle_timeout=0, stop_timeout=1, stop_nodes_on_exit=True):
        await world.becomes_true()
    assert await world.status(node) == "running"
    assert await world.status(other) == "exited"


async def test_the_proxy_is_told_by_the_address_that_the_engine_is_reached_at(world: World) -> None:
    node = await start_idle(world, "proxy")
    found = await essentials.find_essentials(f"tcp://{node.name}:2375", ())
    assert found.ports == {2375}
    engine = DockerEngine(world.settings(), world.docker)
    seen = await engine.inspect(node.id)
    assert found.why_not_to_stop(seen)
    assert not essentials.Essentials().why_not_to_stop(seen)


async def test_a_node_that_eventwatch_registered_lives_until_somebody_has_used_it(world: World) -> None:
    node = await world.nodes.start("registered", labels={LABEL: "yes"})
    settings = quick(register_label=LABEL)
    async with world.watching(**settings) as watched:
        await eventually(lambda: world.says(node, status="running"))
        await eventually(lambda: aged(node, 1))
        for _ in range(4):
            assert await sweep(watched) == 0
    # What it knows must not be forgotten with the process, nor with a manager's replace of the document.
    document = await world.document(node)
    assert document is not None
    older = {
        name: document[name] for name in ("_id", "short_id", "status", "health", "ip", "port", "last_req_time")
    }
    await world.collection.replace_one({"_id": node.id}, older)
    await sweeps_past(world, node, register_label=LABEL)
    await world.collection.update_one({"_id": node.id}, {"$set": {"last_req_time": ago(60)}})
    async with world.watching(**settings) as watched:
        await eventually(lambda: stops(watched, "stopped"))
    assert await world.status(node) == "exited"


# -- what is no use -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [("sleep", "0.5"), ("false",)], ids=["runs a little", "never runs"])
async def test_a_crash_loop_is_idle_in_the_end(world: World, command: tuple[str, ...]) -> None:
    node = await world.nodes.start("loop", command=command, restart="always")
    await world.insert(node, last_req_time=ago(3600))

    async def ended() -> bool:
        inspection = await node.inspect()
        return bool(inspection["State"]["Status"] == "exited" and inspection["RestartCount"] > 0)

    async with world.watching(**quick(idle_timeout=3, sweep_interval=0.3)) as watched:
        await eventually(lambda: stops(watched, "stopped"), within=30)
        await eventually(ended)
    assert await world.says(node, status="exited")


async def test_a_start_right_before_the_claim_keeps_the_node_alive(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The claim is made on what the document says, and a restart does not show there."""
    node = await start_idle(world, "one")
    real_claim = Writer.claim
    restarted = asyncio.Event()

    async def claim(self: Writer, recorded: Recorded, seen: Observation, **options: Any) -> bool:
        if not restarted.is_set():
            await node.restart(grace_s=0)
            restarted.set()
            await eventually(lambda: world.says(node, status="running"))
        return await real_claim(self, recorded, seen, **options)

    monkeypatch.setattr(Writer, "claim", claim)
    async with world.watching(**quick(idle_timeout=3)) as watched:
        await eventually(lambda: aged(node, 3))
        assert await sweep(watched) == 1
        await restarted.wait()
        await eventually(lambda: stops(watched, "withdrawn"))
        assert await world.status(node) == "running"
        await eventually(lambda: world.says(node, status="running"))


# -- many at once -------------------------------------------------------------------------------------------


async def idle_crowd(world: World, count: int = 6) -> list[Node]:
    """So many idle nodes, and one in use."""
    crowd = [await start_idle(world, f"idle-{number}") for number in range(count)]
    used = await world.start("used")
    await world.collection.update_one({"_id": used.id}, {"$set": {"last_req_time": ago(-3600)}})
    return crowd


async def running(world: World, nodes: list[Node]) -> int:
    return [await world.status(node) for node in nodes].count("running")


async def get(address: str, path: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(f"http://{address}{path}") as answer:
        return answer.status, await answer.text()


async def test_a_mass_stop_waits_until_sweeps_and_a_minute_agree(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deletion, "AGREEING_SECONDS", 3.0)
    crowd, address = await idle_crowd(world), free_address()
    with logged("INFO") as lines:
        async with world.watching(**quick(http_listen=address)) as watched:
            for _ in range(4):
                assert await sweep(watched) == 0
            status, reasons = await get(address, "/readyz")
            assert status == 503
            assert "brake: a sweep would stop more than stop_limit" in json.loads(reasons)
            assert watched.count("eventwatch_brake_engaged") == watched.count("eventwatch_stop_brake_engaged") == 1
            assert await running(world, crowd) == 6
            await asyncio.sleep(3)
            assert await sweep(watched) == 6
            await eventually(lambda: stops(watched, "stopped") == 6)
            await sweep(watched)
            assert (await get(address, "/readyz"))[0] == 200
            assert watched.count("eventwatch_brake_engaged") == 0
    brake = [text for text in texts(lines, "WARNING") if text.startswith("Brake: ")]
    assert brake[0].startswith("Brake: 6 of 7 running nodes are idle, more than stop_limit (5): none is stopped")


@pytest.mark.parametrize(("stop_limit", "stopped"), [(6, 6), (0, 0)])
async def test_the_limit_of_a_mass_stop_is_a_setting(world: World, stop_limit: int, stopped: int) -> None:
    await idle_crowd(world)
    async with world.watching(**quick(stop_limit=stop_limit)) as watched:
        await sweep(watched)
        await eventually(lambda: stops(watched, "stopped") == stopped)


async def test_a_sweep_by_hand_stops_many_only_when_forced(world: World, tmp_path: Path, docker_url: str) -> None:
    crowd = await idle_crowd(world)
    env = {
        "EVENTWATCH_MONGO_URL": world.mongo_url,
        "EVENTWATCH_MONGO_DATABASE": world.database_name,
        "EVENTWATCH_NODE_NETWORK": world.nodes.network,
        "EVENTWATCH_DOCKER_HOST": docker_url,
        "EVENTWATCH_IDLE_TIMEOUT": "200ms",
        "EVENTWATCH_STOP_TIMEOUT": "1s",
    }
    async with program("-m", "eventwatch", "sweep", env=env, cwd=tmp_path) as plain:
        await plain.ends()
    assert await running(world, crowd) == 6
    async with program("-m", "eventwatch", "sweep", "--force", env=env, cwd=tmp_path) as forced:
        assert await forced.ends(within=30) == 0, forced.output
    assert await running(world, crowd) == 0


async def test_the_first_contact_with_a_database_announces_its_idle_nodes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.database[ENGINES].drop()
    monkeypatch.setattr(idle, "FIRST_CONTACT_GRACE", 4.0)
    node = await start_idle(world, "one")
    with logged("INFO") as lines:
        async with world.watching(**quick()) as watched:
            assert await sweep(watched) == 0
        async with world.watching(**quick()) as watched:  # the grace does not begin anew
            assert await sweep(watched) == 0
            assert await world.status(node) == "running"
            await asyncio.sleep(4)
            assert await sweep(watched) == 1
            await eventually(lambda: stops(watched, "stopped"))
    announced = [text for text in texts(lines, "WARNING") if text.startswith("First contact")]
    assert len(announced) == 2
    assert announced[0].startswith(
        "First contact with this database: 1 nodes have used up their idle time; they are stopped in 4 s"
    )


async def test_a_first_contact_without_idle_nodes_needs_no_grace(world: World) -> None:
    await world.database[ENGINES].drop()
    async with world.watching(**quick()) as watched:
        assert await sweep(watched) == 0
        node = await start_idle(world, "one")
        await eventually(lambda: sweep(watched))
        await eventually(lambda: stops(watched, "stopped"))
    assert await world.status(node) == "exited"


# -- two processes ------------------------------------------------------------------------------------------


@asynccontextmanager
async def manager(world: World) -> AsyncIterator[None]:
    """A manager's own Beanie, in this process; its calls name engine and settings, and so know no watcher."""
    await init_beanie(database=world.database, document_models=[ToolServerNode, NodeChecker])
    yield


async def test_a_watcher_leaves_alone_what_a_managers_call_is_stopping(world: World, tmp_path: Path) -> None:
    node = await start_idle(world, "slow", command=STUBBORN)
    settings = world.settings(**quick(stop_timeout=4))
    async with filmed(world.collection) as film, world.watching(idle_timeout=3600) as watched:
        before = await world.document(node)
        given = await ToolServerNode.get(node.id)
        assert given is not None
        stopping = asyncio.create_task(
            update_node_status(given, engine=world.docker, settings=settings), name="manager"
        )
        await eventually(lambda: world.says(node, status=STOPPING))
        await asyncio.sleep(0.5)  # the second look is over
        for _ in range(5):
            await sweep(watched)
        # A manager writes back what it read before; once it is decided, that takes the claim back no more.
        assert before is not None
        await world.collection.replace_one({"_id": node.id}, before)
        await sweep(watched)
        assert await world.says(node, status=STOPPING)
        assert await world.status(node) == "running"
        await stopping
        await eventually(lambda: world.says(node, status="exited"))
    said = [image.updated["status"] for image in film.of(node) if "status" in image.updated]
    assert said == [STOPPING, STOPPING, "exited"]
    assert given.status == "exited"


async def test_a_managers_call_leaves_alone_what_the_watcher_is_stopping(world: World) -> None:
    node = await start_idle(world, "slow", command=STUBBORN)
    async with filmed(world.collection) as film, world.watching(**quick(stop_timeout=3)) as watched:
        await eventually(lambda: world.says(node, status=STOPPING))
        while not stops(watched, "stopped"):
            await check_nodes_status(engine=world.docker, settings=world.settings(idle_timeout=0))
            await asyncio.sleep(0.05)
        await eventually(lambda: world.says(node, status="exited"))
    said = [image.updated["status"] for image in film.of(node) if "status" in image.updated]
    assert said == [STOPPING, "exited"]


async def test_of_two_that_find_a_node_idle_one_stops_it(world: World) -> None:
    node = await start_idle(world, "slow", command=STUBBORN)
    settings = world.settings(**quick(stop_timeout=2))
    async with manager(world):
        given = [await ToolServerNode.get(node.id) for _ in range(3)]
        with logged("INFO") as lines:
            calls = (update_node_status(one, engine=world.docker, settings=settings) for one in given if one)
            await asyncio.gather(*calls)
    assert texts(lines).count(f"Stopping node: {node.id} due to idling time used up") == 1
    assert await world.says(node, status="exited")
    assert "claim" not in (await world.database[OWNERS].find_one({"_id": node.id}) or {})


async def test_a_claim_ends_with_the_run_of_the_container_that_it_was_about(world: World) -> None:
    node = await start_idle(world, "one")
    soon = datetime.now(UTC) + timedelta(minutes=5)
    claim = {"by": "somebody who died", "until": soon, "stands": True, "run": ago(3600)}
    await world.database[OWNERS].insert_one({"_id": node.id, "claim": claim})
    await world.collection.update_one({"_id": node.id}, {"$set": {"status": STOPPING}})
    async with world.watching(idle_timeout=3600):
        await eventually(lambda: world.says(node, status="running"))


async def test_at_exit_the_nodes_are_handed_over_to_a_standby(
    world: World, tmp_path: Path, docker_url: str
) -> None:
    node = await world.start("one")
    env = {
        "EVENTWATCH_MONGO_URL": world.mongo_url,
        "EVENTWATCH_MONGO_DATABASE": world.database_name,
        "EVENTWATCH_NODE_NETWORK": world.nodes.network,
        "EVENTWATCH_DOCKER_HOST": docker_url,
        "EVENTWATCH_HTTP_LISTEN": "",
    }
    with logged("INFO") as lines:
        async with world.watching(stop_nodes_on_exit=True):
            await eventually(lambda: world.says(node, status="running"))
            successor = program("-m", "eventwatch", "run", env=env, cwd=tmp_path)
            standby = await successor.__aenter__()
            await standby.says("Standing by")
    assert [text for text in texts(lines) if text.endswith("takes the nodes over")]
    await standby.says("Nodes status checker started.")
    assert await world.status(node) == "running"
    await successor.__aexit__(None, None, None)


# -- clocks -------------------------------------------------------------------------------------------------


class LeapingClock(SystemClock):
    """A wall clock that can be set."""

    ahead = 0.0

    def time_ns(self) -> int:
        return super().time_ns() + round(self.ahead * 1e9)


@asynccontextmanager
async def watching_by(clock: LeapingClock, world: World, **settings: Any) -> AsyncIterator[Application]:
    application = Application(world.settings(**settings), clock=clock)
    task = asyncio.create_task(application.run(), name="application")
    try:
        await eventually(lambda: application.pipeline and application.pipeline.sweeper.last_success)
        yield application
    finally:
        application.stop()
        await task


async def test_a_leap_of_the_clock_outlives_a_restart_of_the_pipeline(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = LeapingClock()
    node = await start_idle(world, "one")
    await world.collection.update_one({"_id": node.id}, {"$set": {"last_req_time": ago(0)}})
    # As if engine and database stood on the machine whose clock leaps.
    database_time, identify = Store.system_time, DockerEngine.identify

    async def leaping(self: Store) -> datetime:
        return await database_time(self) + timedelta(seconds=clock.ahead)

    async def leaping_too(self: DockerEngine) -> EngineInfo:
        info = await identify(self)
        assert info.system_time is not None
        return replace(info, system_time=info.system_time + timedelta(seconds=clock.ahead))

    monkeypatch.setattr(Store, "system_time", leaping)
    monkeypatch.setattr(DockerEngine, "identify", leaping_too)
    async with watching_by(clock, world, idle_timeout=600, sweep_interval=0.5) as application:
        await asyncio.sleep(1.2)
        clock.ahead = 3600
        await asyncio.sleep(1)
        first = application.pipeline
        await world.checkers.update_one({}, {"$set": {"manager_id": "somebody", "expires_at": ago(1)}})
        await eventually(lambda: application.pipeline and application.pipeline is not first, within=20)
        await eventually(lambda: application.pipeline and application.pipeline.sweeper.last_success)
        assert await world.status(node) == "running"
        assert await world.says(node, status="running")


async def test_a_sidecar_whose_clock_is_ahead_stops_nobody_and_says_so(world: World) -> None:
    clock, address = LeapingClock(), free_address()
    clock.ahead = 3600
    node = await start_idle(world, "one")
    await world.collection.update_one({"_id": node.id}, {"$set": {"last_req_time": ago(0)}})
    async with watching_by(clock, world, idle_timeout=600, sweep_interval=0.5, http_listen=address):
        await asyncio.sleep(1)
        status, notes = await get(address, "/readyz")
        assert (status, len(json.loads(notes))) == (200, 2)
        assert "clock: the database's is 3600 s behind ours" in notes
        _, metrics = await get(address, "/metrics")
        assert 'eventwatch_clock_skew_seconds{clock="engine"} -3' in metrics
    assert await world.status(node) == "running"
