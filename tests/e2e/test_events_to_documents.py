"""Each event of the README's table, on real containers: what the document says at once, and what it says then.

Where a hint is tested, the settle comes minutes later and the sweep never, so only the hint can have done it.
Where settling is tested, the document is spoiled first, so that even an event that changes nothing must show.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import pytest

from eventwatch.core.errors import EngineError
from eventwatch.core.facts import Cause, Observation
from eventwatch.engine.docker import DockerEngine
from eventwatch.pipeline import foresight
from tests.kit.lacks import told
from tests.kit.nodes import CALL_TIMEOUT, NODE_LABEL, NODE_PORT, Node, ensure_network, node_config
from tests.kit.seen import Film, filmed
from tests.kit.waiting import NEVER, eventually
from tests.kit.world import World

#: Settling may take four times this; nothing here lasts as long.
LATE_SETTLE = NEVER / 10

PAUSES = pytest.mark.needs("cgroups")

Step = Callable[[World, Node], Awaitable[object]]


def late(**changes: Any) -> dict[str, Any]:
    return {"settle_delay": LATE_SETTLE, **changes}


async def connect(world: World, node: Node, network: str | None = None) -> None:
    async with asyncio.timeout(CALL_TIMEOUT):
        joined = await world.docker.networks.get(network or world.nodes.network)
        await joined.connect({"Container": node.id})


async def disconnect(world: World, node: Node) -> None:
    async with asyncio.timeout(CALL_TIMEOUT):
        left = await world.docker.networks.get(world.nodes.network)
        await left.disconnect({"Container": node.id})


async def update(world: World, node: Node) -> None:
    async with asyncio.timeout(CALL_TIMEOUT):
        await world.docker._query_json(
            f"containers/{node.id}/update", method="POST", data={"RestartPolicy": {"Name": "no"}}
        )


async def create_hungry(world: World, name: str) -> Node:
    """Create a node that takes more memory than it may have once `/go` is there."""
    command = ["sh", "-c", "while [ ! -e /go ]; do sleep 0.05; done; exec dd if=/dev/zero of=/dev/null bs=64M"]
    config = node_config(
        network=world.nodes.network, labels={NODE_LABEL: name, **world.nodes.labels}, command=command
    )
    config["HostConfig"] |= {"Memory": 16 << 20, "MemorySwap": 16 << 20}
    async with asyncio.timeout(CALL_TIMEOUT):
        container = await world.docker.containers.create(config, name=world.nodes.prefix + name)
    return Node(container, world.nodes.prefix + name, world.nodes.prefix)


# -- hints --------------------------------------------------------------------------------------------------


async def test_a_start_shows_status_health_and_ip_in_one_write_long_before_it_settles(world: World) -> None:
    node = await world.nodes.create("one", healthcheck="flag", interval_s=NEVER)
    await world.insert(node, health="none")
    async with filmed(world.collection) as film, world.watching(**late()) as watched:
        await node.start()
        await eventually(lambda: film.of(node) and film.of(node)[-1].says(status="running"))
    change = next(change for change in watched.of(node) if change.new.get("status") == "running")
    assert change.cause is Cause.EVENT
    assert change.latency is not None
    shown = next(image for image in film.of(node) if image.says(status="running"))
    assert shown.says(health="starting", ip=await world.ip(node))
    assert {"status", "health", "ip"} <= shown.updated.keys()


@pytest.mark.needs("told-connect")
@pytest.mark.parametrize("denied", [False, True])
async def test_a_start_is_written_by_what_was_asked_for_before_it(
    world: World, monkeypatch: pytest.MonkeyPatch, *, denied: bool
) -> None:
    """Its address; or, where a proxy denies that, an inspection, which the engine answers behind the start."""
    for name in ("PATIENCE", "KEPT", "LONGEST"):  # however slow the machine is
        monkeypatch.setattr(foresight, name, NEVER)
    node = await world.nodes.create("one", healthcheck="ok", interval_s=60)
    await world.insert(node)
    inspect, addresses, released = DockerEngine.inspect, DockerEngine.addresses, asyncio.Event()
    answered = []

    async def held_unless_foreseen(engine: DockerEngine, node_id: str, *, as_of: int = 0) -> Observation:
        task = asyncio.current_task()
        if task is None or not task.get_name().startswith("foresight-"):
            await released.wait()
        return await inspect(engine, node_id, as_of=as_of)

    async def noted(engine: DockerEngine, network_id: str) -> Mapping[str, str]:
        if denied:
            raise EngineError("denied", status=403)
        answered.append((await addresses(engine, network_id))[node.id])
        return {node.id: answered[-1]}

    async with world.watching(**late()):
        await eventually(lambda: world.says(node, health="none"))
        monkeypatch.setattr(DockerEngine, "inspect", held_unless_foreseen)
        monkeypatch.setattr(DockerEngine, "addresses", noted)
        for number in range(1, 4):
            await node.start()
            ip = await world.ip(node)
            await eventually(partial(world.says, node, status="running", ip=ip, health="starting"))
            assert answered == ([] if denied else [ip] * number)
            await node.kill()
            await eventually(partial(world.says, node, status="exited", ip=""))
        released.set()


@pytest.mark.parametrize(
    ("happens", "shown"),
    [
        pytest.param(lambda _, node: node.kill(), {"status": "exited", "ip": ""}, id="die"),
        pytest.param(lambda _, node: node.stop(), {"status": "exited", "ip": ""}, id="stop"),
        pytest.param(lambda _, node: node.pause(), {"status": "paused"}, id="pause", marks=PAUSES),
    ],
)
async def test_what_an_event_proves_is_shown_at_once(
    world: World, happens: Step, shown: Mapping[str, str]
) -> None:
    node = await world.start("one", healthcheck="ok", interval_s=0.2)
    await node.wait_health("healthy")
    async with filmed(world.collection) as film, world.watching(**late()) as watched:
        await world.becomes_true()
        await happens(world, node)
        await eventually(lambda: film.of(node) and film.of(node)[-1].says(**shown))
        await world.becomes_true()
        # A node that does not run is not healthy: no image, not even one between two writes, may say so.
        assert not [i for i in film.of(node) if i.says(health="healthy") and not i.says(status="running")]
    assert {change.cause for change in watched.of(node)} == {Cause.EVENT}


@pytest.mark.needs("cgroups")
async def test_an_unpause_shows_running_with_its_ip_at_once(world: World) -> None:
    node = await world.start("one")
    await node.pause()
    async with filmed(world.collection) as film, world.watching(**late()) as watched:
        await world.becomes_true()
        await node.unpause()
        await eventually(lambda: film.of(node) and film.of(node)[-1].says(status="running"))
        assert await world.says(node, ip=await world.ip(node))
    assert {change.cause for change in watched.of(node)} == {Cause.EVENT}


async def test_a_health_result_is_shown_at_once(world: World) -> None:
    async with world.watching(**late()) as watched:
        # After the first sweep, which a health event would make worthless, and no settle comes to the rescue here.
        node = await world.start("one", healthcheck="flag", interval_s=0.2)
        await eventually(partial(world.says, node, status="running"))
        for health in ("unhealthy", "healthy", "unhealthy"):
            await node.set_healthy(health == "healthy")
            await eventually(partial(world.says, node, health=health))
        await world.becomes_true()
    assert {change.cause for change in watched.of(node)} == {Cause.EVENT}


async def test_a_removed_container_takes_its_document_along_at_once(world: World) -> None:
    node, other = await world.start("one"), await world.start("other")
    async with world.watching(**late()) as watched:
        await node.remove()
        await eventually(lambda: any(change.deleted for change in watched.of(node)))
        assert await world.document(node) is None
        assert await world.says(other, status="running")
    assert {change.cause for change in watched.of(node)} == {Cause.EVENT}


async def test_a_restart_is_followed_through_by_hints_alone(world: World) -> None:
    node = await world.start("one", healthcheck="flag", interval_s=NEVER)
    async with filmed(world.collection) as film, world.watching(**late()):
        await world.becomes_true()
        seen = len(film.of(node))
        await node.restart()
        await eventually(lambda: film.of(node)[seen:] and film.of(node)[-1].says(status="running"))
        await world.becomes_true()
        said = [image.updated["status"] for image in film.of(node)[seen:] if "status" in image.updated]
        assert said == ["exited", "running"]


@pytest.mark.needs("used-addresses")
async def test_a_node_is_never_shown_running_with_an_ip_that_was_anothers(world: World) -> None:
    """The engine gives the lowest free address, so a stopped node's address goes to the next that starts."""
    one, other = await world.start("one"), await world.start("other")
    async with filmed(world.collection) as film, world.watching():
        await world.becomes_true()
        await other.kill()
        reused = 0
        for going, coming in ((one, other), (other, one), (one, other), (other, one)):
            old_ip = await world.ip(going)
            await going.kill()
            await world.becomes_true()
            seen = len(film.images)
            await coming.start()
            ip = await world.ip(coming)
            await world.becomes_true()
            await eventually(partial(is_shown_running, film, coming))
            lives = [image for image in film.images[seen:] if image.says(_id=coming.id, status="running")]
            assert {image.document["ip"] for image in lives if image.document} == {ip}
            reused += old_ip == ip
        assert reused, "no address was reused, so that nothing was proven"


# -- settling -----------------------------------------------------------------------------------------------


async def oom(_: World, node: Node) -> None:
    await node.exec(["touch", "/go"])
    await eventually(lambda: is_over(node))


async def is_over(node: Node) -> bool:
    return bool((await node.inspect())["State"]["Status"] == "exited")


def is_shown_running(film: Film, node: Node) -> bool:
    return film.of(node)[-1].says(status="running")


@pytest.mark.parametrize(
    ("happens", "actions"),
    [
        pytest.param(lambda _, node: node.stop(), {"kill", "die", "stop", "disconnect"}, id="stop"),
        pytest.param(lambda _, node: node.exec(["kill", "1"], check=False), {"die", "disconnect"}, id="own-exit"),
        pytest.param(lambda _, node: node.kill(), {"kill", "die", "disconnect"}, id="kill"),
        pytest.param(lambda _, node: node.kill("SIGWINCH"), {"kill"}, id="harmless-signal"),
        pytest.param(lambda _, node: node.restart(), {"die", "stop", "start", "restart", "connect"}, id="restart"),
        pytest.param(lambda _, node: node.pause(), {"pause"}, id="pause", marks=PAUSES),
        pytest.param(lambda _, node: node.rename("renamed"), {"rename"}, id="rename"),
        pytest.param(update, {"update"}, id="update", marks=pytest.mark.needs("update")),
        pytest.param(disconnect, {"disconnect"}, id="network-disconnect"),
        pytest.param(oom, {"oom", "die"}, id="oom", marks=pytest.mark.needs("cgroups")),
    ],
)
async def test_after_each_event_a_spoiled_document_is_made_true(
    world: World, happens: Step, actions: set[str], request: pytest.FixtureRequest
) -> None:
    actions = told(request.node.callspec.id, actions)
    hungry = happens is oom
    node = await (create_hungry(world, "one") if hungry else world.nodes.create("one"))
    await node.start()
    await world.insert(node)
    async with world.watching() as watched:
        await world.becomes_true()
        before = {action: watched.events(node, action) for action in actions}
        spoiled = {"status": "created", "health": "healthy", "ip": "192.0.2.1", "port": 1}
        await world.collection.update_one({"_id": node.id}, {"$set": spoiled})
        await happens(world, node)
        await eventually(lambda: all(watched.events(node, action) > before[action] for action in actions))
        await world.becomes_true()
    assert Cause.SWEEP not in {change.cause for change in watched.of(node)}


async def test_a_created_container_is_shown_as_created(world: World) -> None:
    async with world.watching() as watched:
        node = await world.nodes.create("one")
        await world.insert(node, status="running", health="healthy", ip="192.0.2.1")
        await world.becomes_true()
        assert watched.events(node, "create") == 1
        assert await world.says(node, status="created", health="none", ip="")


async def test_an_address_follows_the_network(world: World) -> None:
    node = await world.start("one")
    async with world.watching():
        await world.becomes_true()
        await disconnect(world, node)
        await eventually(lambda: world.says(node, status="running", ip=""))
        await connect(world, node)
        await world.becomes_true()
        document = await world.document(node)
        assert document is not None
        assert document["ip"] == await world.ip(node) != ""


async def test_a_node_on_another_network_only_has_no_address(world: World) -> None:
    elsewhere = f"{world.nodes.network}-elsewhere"
    await ensure_network(world.docker, elsewhere, labels=world.nodes.labels)
    node = await world.start("one", network=elsewhere)
    async with world.watching():
        await world.becomes_true()
        assert await world.says(node, status="running", ip="")
        await node.restart()
        await eventually(lambda: world.says(node, status="running", ip=""))
        await connect(world, node)
        await eventually(lambda: shows_its_ip(world, node))


async def shows_its_ip(world: World, node: Node) -> bool:
    ip = await world.ip(node)
    return ip != "" and await world.says(node, status="running", ip=ip)


@pytest.mark.needs("restarting")
async def test_a_node_that_crashes_again_and_again_is_shown_as_it_is_in_the_end(world: World) -> None:
    node = await world.start("one", command=["sh", "-c", "sleep 0.2; exit 1"], restart="always")
    async with world.watching() as watched:
        await eventually(lambda: watched.events(node, "die") >= 3)
        await eventually(lambda: world.says(node, status="restarting", ip=""))
        await node.stop()  # while it waits for its restart there is no die, only a stop
        await eventually(lambda: is_over(node))
        await world.becomes_true()


# -- rules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exposed", "recorded", "port"),
    [
        pytest.param((), 1, NODE_PORT, id="exposes-nothing"),
        pytest.param((NODE_PORT,), 1, NODE_PORT, id="exposes-the-node-port"),
        pytest.param((8080, NODE_PORT), 1, NODE_PORT, id="exposes-the-node-port-among-others"),
        pytest.param((8080,), 1, 8080, id="exposes-one-other"),
        pytest.param((8080, 9090), 1, 1, id="exposes-several-others-so-it-is-left-alone"),
    ],
)
async def test_the_port_is(world: World, exposed: tuple[int, ...], recorded: int, port: int) -> None:
    async with world.watching():
        node = await world.nodes.start("one", expose=exposed)
        await world.insert(node, port=recorded)
        await world.becomes_true()
        assert await world.says(node, port=port, status="running")


async def test_a_container_without_health_check_has_the_health_none(world: World) -> None:
    async with world.watching():
        node = await world.start("one")
        await eventually(lambda: world.says(node, status="running", health="none"))
        await node.kill()
        await eventually(lambda: world.says(node, status="exited", health="none"))


@pytest.mark.needs("cgroups")
async def test_health_is_left_alone_when_it_is_somebody_elses(world: World) -> None:
    async with filmed(world.collection) as film, world.watching(health_check=False) as watched:
        node = await world.nodes.start("one", healthcheck="ok", interval_s=0.2)
        await world.insert(node, health="somebody's word")
        await eventually(lambda: watched.events(node, "health_status"))
        for happens, status in (
            (node.pause, "paused"),
            (node.unpause, "running"),
            (node.kill, "exited"),
            (node.start, "running"),
        ):
            await happens()
            await eventually(partial(world.says, node, status=status))
        watched.app.sweep_now()
        await eventually(lambda: watched.count("eventwatch_sweep_duration_seconds_count") >= 2)
        assert film.of(node)
        assert all(image.says(health="somebody's word") for image in film.of(node))
