"""What an operator asks at the command line: status, explain, doctor, healthcheck."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from tests.kit.eventwatch import run_program
from tests.kit.mongod import free_address
from tests.kit.truth import manager_document
from tests.kit.waiting import eventually
from tests.kit.world import World


async def ask(world: World, cwd: Path, *words: str, **more: str) -> tuple[int, str]:
    env = {
        **{name: value for name, value in os.environ.items() if name.startswith("DOCKER_")},
        "EVENTWATCH_MONGO_URL": world.mongo_url,
        "EVENTWATCH_MONGO_DATABASE": world.database.name,
        "EVENTWATCH_NODE_NETWORK": world.nodes.network,
        **more,
    }
    return await run_program("-m", "eventwatch", *words, env=env, cwd=cwd)


async def test_status_shows_each_node_and_whether_the_engine_agrees(world: World, tmp_path: Path) -> None:
    node = await world.start("shown")
    async with world.watching():
        await world.becomes_true()
        code, table = await ask(world, tmp_path, "status")
        assert code == 0
        assert node.id[:12] in table
        assert "running" in table
        code, text = await ask(world, tmp_path, "status", "--json")
        [row] = json.loads(text)
        assert (row["id"], row["status"], row["agrees"]) == (node.id, "running", True)
        assert row["idle_left"] is None or row["idle_left"] > 0
    await world.collection.update_one({"_id": node.id}, {"$set": {"status": "exited"}})
    code, text = await ask(world, tmp_path, "status", "--json")
    listed, failure = text.splitlines()
    assert json.loads(listed)[0]["verdict"] == "no: status running"
    assert (code, failure) == (1, "eventwatch: 1 of 1 nodes disagree with the engine")


@pytest.mark.needs("cgroups")
async def test_explain_tells_both_sides_the_changes_and_the_idle_time(world: World, tmp_path: Path) -> None:
    node = await world.start("explained")
    async with world.watching():
        await world.becomes_true()
        await node.pause()
        await eventually(lambda: world.says(node, status="paused"))
        await asyncio.sleep(1.2)  # the history is written once a second
        for name in (node.id, node.id[:12], node.name):
            code, text = await ask(world, tmp_path, "explain", name)
            assert code == 0
            assert "They agree." in text
            assert "status running -> paused (by event" in text
            assert "it is paused, not running" in text
    await node.remove()
    async with world.watching():

        async def gone() -> bool:
            return await world.document(node) is None

        await eventually(gone)
    code, text = await ask(world, tmp_path, "explain", node.name)
    assert code == 0
    assert f"Node {node.id} ({node.name}, " in text
    assert "document deleted (by sweep" in text


async def test_explaining_what_nobody_knows_is_one_line_and_a_failure(world: World, tmp_path: Path) -> None:
    code, text = await ask(world, tmp_path, "explain", "nobody")
    assert (code, text.strip()) == (1, "eventwatch: nobody: no document, no container")


async def test_the_doctor_finds_a_healthy_place_well_and_names_what_is_wrong(world: World, tmp_path: Path) -> None:
    code, text = await ask(world, tmp_path, "doctor")
    assert code == 0
    assert {line.split()[0] for line in text.splitlines()} == {"ok"}
    code, text = await ask(world, tmp_path, "doctor", EVENTWATCH_DOCKER_HOST="unix:///nowhere/docker.sock")
    assert code == 1
    assert "FAIL engine: Engine at unix:///nowhere/docker.sock unreachable: no such socket" in text
    assert "ok   database rights" in text
    code, text = await ask(world, tmp_path, "doctor", EVENTWATCH_NODE_NETWORK=f"{world.nodes.network}s")
    assert code == 1
    assert f"no network is called {world.nodes.network}s, the nearest name is {world.nodes.network}" in text


async def test_healthcheck_tells_whether_a_watcher_is_ready(world: World, tmp_path: Path) -> None:
    address = free_address()
    code, text = await ask(world, tmp_path, "healthcheck", EVENTWATCH_HTTP_LISTEN=address)
    assert code == 1
    assert text.count("\n") == 1
    async with world.watching(http_listen=address):
        code, text = await ask(world, tmp_path, "healthcheck", EVENTWATCH_HTTP_LISTEN=address)
        assert (code, text) == (0, "ready\n")
    code, text = await ask(world, tmp_path, "healthcheck", EVENTWATCH_HTTP_LISTEN="")
    assert code == 2
    assert "EVENTWATCH_HTTP_LISTEN" in text


async def test_a_sweep_by_hand_heeds_the_brake_until_it_is_forced(world: World, tmp_path: Path) -> None:
    engine_id = (await world.docker.system.info())["ID"]
    gone = [f"{number:064x}" for number in range(6)]
    await world.collection.insert_many([manager_document(node_id, engine_id=engine_id) for node_id in gone])
    code, text = await ask(world, tmp_path, "sweep")
    assert code == 1
    assert "6 containers are gone, more than delete_limit: nothing was deleted" in text
    assert await world.collection.count_documents({}) == 6
    code, text = await ask(world, tmp_path, "sweep", "--force")
    assert code == 0, text
    assert await world.collection.count_documents({}) == 0


async def test_a_sweep_by_hand_leaves_alone_what_another_engine_or_nobody_owns(
    world: World, tmp_path: Path
) -> None:
    documents = [manager_document(f"{number:064x}", engine_id="another") for number in range(6)]
    documents += [manager_document(f"{number:064x}") for number in range(6, 9)]
    await world.collection.insert_many(documents)
    for options in ([], ["--force"]):
        code, text = await ask(world, tmp_path, "sweep", *options)
        assert code == 0, text
        assert "0 nodes checked" in text
        assert await world.collection.count_documents({}) == 9


async def test_json_logs_are_one_object_per_line(world: World, tmp_path: Path) -> None:
    node = await world.start("logged")
    await node.kill()
    code, text = await ask(world, tmp_path, "sweep", EVENTWATCH_LOG_FORMAT="json")
    assert code == 0
    # The summary goes to another output, so that a line of the log may come behind it.
    [summary] = [line for line in text.splitlines() if not line.startswith("{")]
    assert summary.startswith("1 nodes checked")
    records = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    [record] = [record for record in records if record.get("field") == "status"]
    assert record.pop("time").count(":") >= 2
    assert record == {
        "level": "INFO",
        "message": f"Node {node.id[:12]} status updated: created -> exited",
        "node": node.id,
        "field": "status",
        "old": "created",
        "new": "exited",
        "cause": "sweep",
    }
    assert all(list(row)[:3] == ["time", "level", "message"] for row in records if row is not record)
