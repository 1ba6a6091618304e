"""The helper that makes nodes is itself proven here: what other tests build on has to be true."""

from __future__ import annotations

import secrets
from typing import Any

import pytest
from aiodocker import Docker, DockerError
from pymongo import AsyncMongoClient

from tests.kit.nodes import NODE_LABEL, NODE_PORT, RUN_LABEL, Nodes


def run_name() -> str:
    return f"ew-test-{secrets.token_hex(4)}"


async def left_behind(docker: Docker, nodes: Nodes) -> tuple[list[Any], list[Any]]:
    filters = {"label": [f"{RUN_LABEL}={nodes.run}"]}
    return (
        await docker.containers.list(all=True, filters=filters),
        await docker.networks.list(filters=filters),
    )


async def network_exists(docker: Docker, name: str) -> bool:
    try:
        await docker.networks.get(name)
    except DockerError as error:
        if error.status != 404:
            raise
        return False
    return True


async def test_a_node_is_healthy_and_has_an_ip_on_the_network(nodes: Nodes) -> None:
    node = await nodes.start("one", healthcheck="ok")
    await node.wait_health("healthy")

    seen = await node.inspect()

    assert seen["Id"] == node.id
    assert seen["Name"] == f"/{node.name}"
    assert seen["State"]["Status"] == "running"
    assert seen["NetworkSettings"]["Networks"][nodes.network]["IPAddress"]
    assert seen["Config"]["ExposedPorts"] == {f"{NODE_PORT}/tcp": {}}
    assert seen["Config"]["Labels"][NODE_LABEL] == "one"


async def test_health_follows_the_flag(nodes: Nodes) -> None:
    node = await nodes.start("flagged", healthcheck="flag", interval_s=0.2)
    await node.wait_health("unhealthy")
    await node.set_healthy(True)
    await node.wait_health("healthy")
    await node.set_healthy(False)
    await node.wait_health("unhealthy")


@pytest.mark.needs("cgroups")
async def test_each_operation_does_what_its_name_says(nodes: Nodes) -> None:
    node = await nodes.create("busy", expose=(), labels={"extra": "label"}, env={"COLOUR": "blue"})

    async def status() -> str:
        state: dict[str, str] = (await node.inspect())["State"]
        return state["Status"]

    assert await status() == "created"
    await node.start()
    assert await node.exec(["sh", "-c", "echo $COLOUR"]) == (0, "blue\n")
    assert (await node.exec(["false"], check=False)).code == 1
    with pytest.raises(RuntimeError, match="ended with 1"):
        await node.exec(["false"])
    await node.pause()
    assert await status() == "paused"
    await node.unpause()
    await node.restart()
    assert await status() == "running"
    await node.stop()
    assert (await node.inspect())["State"]["ExitCode"] == 0
    await node.start()
    await node.kill()
    await node.container.wait(timeout=None)
    assert (await node.inspect())["State"]["ExitCode"] == 137
    await node.rename("renamed")
    seen = await node.inspect()
    assert seen["Name"] == f"/{nodes.prefix}renamed"
    assert not seen["Config"].get("ExposedPorts")
    assert seen["Config"]["Labels"]["extra"] == "label"
    await node.remove()
    with pytest.raises(DockerError, match="No such container"):
        await node.inspect()


async def fail_with_nodes_of_every_kind(nodes: Nodes) -> None:
    async with nodes:
        await nodes.start("running")
        await (await nodes.start("paused")).pause()
        await nodes.start("restarting", command=["false"], restart="always")
        await nodes.start("gone-by-itself", command=["true"], auto_remove=True)
        await nodes.create("created")
        await (await nodes.start("removed")).remove()
        raise LookupError("a test's own failure")


@pytest.mark.needs("cgroups")
async def test_nothing_is_left_behind_even_after_a_failure(docker: Docker) -> None:
    run = run_name()
    nodes = Nodes(docker, prefix=f"{run}-", network=run)
    with pytest.raises(LookupError, match="a test's own failure"):
        await fail_with_nodes_of_every_kind(nodes)

    assert await left_behind(docker, nodes) == ([], [])
    assert not await network_exists(docker, run)


async def test_a_network_that_was_there_before_stays(docker: Docker, nodes: Nodes) -> None:
    other = await nodes.start("other")
    async with Nodes(docker, prefix=f"{run_name()}-", network=nodes.network) as guests:
        await guests.start("guest")

    assert await left_behind(docker, guests) == ([], [])
    assert await network_exists(docker, nodes.network)
    assert (await other.inspect())["State"]["Status"] == "running"


async def test_a_name_taken_on_the_engine_is_an_error(nodes: Nodes) -> None:
    await nodes.create("twice")
    with pytest.raises(DockerError, match="already in use"):
        await nodes.create("twice")


async def test_the_database_is_a_replica_set_of_ones_own(mongo_url: str, database: str) -> None:
    async with AsyncMongoClient[dict[str, Any]](mongo_url) as client:
        collection = client[database]["probe"]
        async with await collection.watch() as changes:
            await collection.insert_one({"_id": 1})
            assert (await anext(changes))["fullDocument"] == {"_id": 1}
