"""Nodes run, and the database knows none of them: it is said, since nothing else would show it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from eventwatch.core.facts import Observation
from eventwatch.engine.docker import DockerEngine
from tests.e2e.test_operator import ask
from tests.kit.mongod import free_address
from tests.kit.seen import logged, texts
from tests.kit.waiting import eventually
from tests.kit.world import World

QUESTION = "is {} the manager's database?"


async def test_a_database_that_knows_none_of_the_nodes_is_doubted_until_it_knows_one(
    world: World, tmp_path: Path
) -> None:
    one, _ = await world.nodes.start("one"), await world.nodes.start("two")
    question = QUESTION.format(world.database_name)
    said = f"2 containers run on {world.nodes.network} and none has a document: {question}"
    address = free_address()
    settings = {"orphan_grace": 0.5, "sweep_interval": 1, "http_listen": address}
    with logged("WARNING") as lines:
        async with world.watching(**settings), httpx.AsyncClient(base_url=f"http://{address}") as client:

            async def told(expected: list[str]) -> bool:
                reply = await client.get("/readyz")
                return (reply.status_code, reply.json()) == (200, expected)

            await eventually(lambda: told([f"nodes: {said}"]))
            code, text = await ask(world, tmp_path, "doctor", EVENTWATCH_ORPHAN_GRACE="500ms")
            assert (code, f"FAIL documents: {said}" in text) == (1, True)
            await world.insert(one)
            await eventually(lambda: told([]))
            code, text = await ask(world, tmp_path, "doctor", EVENTWATCH_ORPHAN_GRACE="500ms")
            assert (code, "note documents: 1 of the 2 nodes that run have one" in text) == (0, True)
    assert texts(lines).count(said) == 1


async def test_a_labelled_container_that_ends_before_it_has_a_document_is_told_of(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = DockerEngine.inspect

    async def late(self: DockerEngine, node_id: str, **options: Any) -> Observation:
        await world.docker.containers.container(node_id).wait(timeout=20)
        return await real(self, node_id, **options)

    with logged("INFO") as lines:
        async with world.watching(register_label="tool-server.node"):
            monkeypatch.setattr(DockerEngine, "inspect", late)
            node = await world.nodes.create("short", command=["sh", "-c", "exit 3"])
            await node.start()
            who = f"Container {node.id[:12]} ({node.name})"
            said = f"{who} has the register label, and ended before it had a document: exit code 3"
            await eventually(lambda: said in texts(lines), within=20)
    assert texts(lines).count(said) == 1
