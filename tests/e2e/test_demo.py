"""`make run` on an engine that others use: only the demo's own nodes get documents, change, stop and go."""

from __future__ import annotations

import secrets
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from aiodocker import Docker
from pymongo import AsyncMongoClient

from tests.demo import DATABASE, DEMO_LABEL, NETWORK, OUR_LABEL, PAGE_PORT
from tests.kit.eventwatch import program
from tests.kit.nodes import NODE_LABEL, NODE_NETWORK, Node, Nodes
from tests.kit.processes import Process
from tests.kit.truth import Document, manager_document
from tests.kit.waiting import eventually


def demo(folder: Path, docker_url: str, **settings: str) -> AbstractAsyncContextManager[Process]:
    """The demo, for a user whose home is `folder`, and whose settings are for his manager's nodes."""
    ours = {f"EVENTWATCH_{name.upper()}": value for name, value in settings.items()}
    env = {
        "HOME": str(folder),
        "DOCKER_HOST": docker_url,
        "EVENTWATCH_NODE_NETWORK": NODE_NETWORK,
        "EVENTWATCH_REGISTER_LABEL": NODE_LABEL,
    }
    return program("-m", "tests.demo", "--duration", "60", env=env | ours, cwd=folder)


async def shows(running: Process) -> None:
    """It has changed a node, and the node's document has followed."""
    await running.says(" status updated: ", within=30)


async def ended(running: Process) -> None:
    running.send(signal.SIGTERM)
    assert await running.ends() == 0, running.output
    assert "Traceback" not in running.output


async def demo_nodes(docker: Docker, label: str = OUR_LABEL) -> set[str]:
    return {node.id for node in await docker.containers.list(all=True, filters={"label": [label]})}


async def networks(docker: Docker) -> list[str]:
    return [network["Name"] for network in await docker.networks.list()]


async def lives(node: Node) -> Any:
    state = (await node.inspect())["State"]
    return [state[name] for name in ("Status", "StartedAt", "FinishedAt")]


@pytest.fixture
async def others(docker: Docker, nodes: Nodes) -> AsyncIterator[list[Node]]:
    """Nodes of a manager, on a network of any name and on the one that managers use."""
    async with Nodes(docker, prefix=f"ew-test-{secrets.token_hex(4)}-", network=NODE_NETWORK) as managed:
        yield [await made.start(f"other-{number}") for made in (nodes, managed) for number in range(3)]


@asynccontextmanager
async def server(mongo_url: str) -> AsyncIterator[AsyncMongoClient[Document]]:
    """The server; at exit without the manager's database and the demo's."""
    async with AsyncMongoClient[Document](mongo_url) as client:
        yield client
        for name in ("TSM", DATABASE):
            await client.drop_database(name)


async def test_the_nodes_of_others_get_no_document_and_are_not_stopped_however_idle(
    docker: Docker, docker_url: str, others: list[Node], mongo_url: str, tmp_path: Path
) -> None:
    before = [await lives(node) for node in others]
    async with server(mongo_url) as client:
        real, shown = client["TSM"]["ToolServerNode"], client[DATABASE]["ToolServerNode"]
        await real.insert_many([manager_document(node.id, status="running") for node in others])
        recorded = await real.find().to_list()
        idle = {"idle_timeout": "1s", "sweep_interval": "1s"}
        async with demo(tmp_path, docker_url, mongo_url=mongo_url, **idle) as running:
            await running.says(f"documents are in the database {DATABASE} of {mongo_url}")
            await eventually(lambda: shown.count_documents({}), within=30)
            await running.says("restarting eventwatch-demo-2", within=30)
            assert set(await shown.distinct("_id")) == await demo_nodes(docker)
            await ended(running)
        assert not [node for node in others if node.id[:12] in running.output]
        assert [await lives(node) for node in others] == before
        assert await real.find().to_list() == recorded
        assert not await shown.count_documents({})
    assert not await demo_nodes(docker)
    assert NETWORK not in await networks(docker)


async def test_a_database_with_documents_of_others_is_refused(
    docker_url: str, others: list[Node], mongo_url: str, database: str, tmp_path: Path
) -> None:
    async with AsyncMongoClient[Document](mongo_url) as client:
        documents = client[database]["ToolServerNode"]
        await documents.insert_one(manager_document(others[0].id, ip="10.0.0.1"))
        recorded = await documents.find().to_list()
        async with demo(tmp_path, docker_url, mongo_url=mongo_url, mongo_database=database) as running:
            assert await running.ends() == 1
        assert f"the database {database} has 1 documents that are not the demo's" in running.output
        assert running.output.count("\n") == 1
        assert await documents.find().to_list() == recorded


async def test_the_private_database_is_the_demos_and_a_taken_port_does_not_end_it(
    docker: Docker, docker_url: str, tmp_path: Path
) -> None:
    with socket.socket() as taker:
        with suppress(OSError):  # whoever has it already will do
            taker.bind(("127.0.0.1", PAGE_PORT))
            taker.listen()
        async with demo(tmp_path, docker_url) as running:
            await running.says(f"port {PAGE_PORT} is taken: the status page is on ")
            await shows(running)
            await ended(running)
    assert not [*tmp_path.iterdir()]  # noqa: ASYNC240 - nothing else runs


async def test_a_second_demo_says_that_one_runs_and_leaves_it_alone(
    docker: Docker, docker_url: str, tmp_path: Path
) -> None:
    async with demo(tmp_path, docker_url) as first:
        await shows(first)
        nodes = await demo_nodes(docker)
        async with demo(tmp_path, docker_url, http_listen="") as second:
            assert await second.ends() == 1
        assert second.output == "==> demo: another demo runs on this engine; nothing is started\n"
        assert await demo_nodes(docker) == nodes
        await ended(first)


async def test_what_a_killed_demo_left_is_removed_by_the_next_and_nothing_else(
    docker: Docker, docker_url: str, others: list[Node], tmp_path: Path
) -> None:
    label = {DEMO_LABEL: "another-machine"}
    async with Nodes(
        docker, prefix=f"ew-test-{secrets.token_hex(4)}-", network=NODE_NETWORK, labels=label
    ) as made:
        others.append(await made.start("of-another-machine"))
        before = [await lives(node) for node in others]
        async with demo(tmp_path, docker_url) as killed:
            await shows(killed)
            left = await demo_nodes(docker)
            await killed.kill()
        assert await demo_nodes(docker) == left
        async with demo(tmp_path, docker_url) as running:
            await running.says("Nodes status checker started.", within=30)
            assert not left & await demo_nodes(docker)
            await ended(running)
        assert not await demo_nodes(docker)
        assert NETWORK not in await networks(docker)
        assert [await lives(node) for node in others] == before
