"""What `status`, `explain` and `doctor` show beside the documents: names, reasons, other hosts, other settings."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from eventwatch.cli.doctor import examine
from eventwatch.cli.nodes import compare_nodes, explain_node, identity_of, settings_in_force
from eventwatch.core.errors import ConfigError, DocumentError, EventwatchError
from eventwatch.engine.docker import DockerEngine
from eventwatch.store.base import OWNERS
from eventwatch.store.connection import open_store
from tests.e2e.test_operator import ask
from tests.kit.seen import logged, texts
from tests.kit.truth import ago, manager_document
from tests.kit.waiting import eventually
from tests.kit.world import World

SLOWLY = 20.0
ELSEWHERE = "e" * 64


async def test_status_shows_names_reasons_and_other_hosts_in_full_when_piped(world: World, tmp_path: Path) -> None:
    node = await world.start("with-a-name-that-is-rather-long-for-a-table-of-eighty-columns")
    dead = await world.start("dead", command=["sh", "-c", "exit 3"])
    # It bears our engine's id still; of what bears another one's, `engines` tells.
    ours = str((await world.docker.system.info())["ID"])
    await world.collection.insert_one(manager_document(ELSEWHERE, status="running", engine_id=ours))
    await world.database[OWNERS].insert_one({"_id": ELSEWHERE, "engine_id": "another", "host": "far-away"})
    async with world.watching():
        await world.nodes.docker.containers.container(dead.id).wait(timeout=20)
        await eventually(lambda: world.says(dead, status="exited"), within=SLOWLY)
        columns = "id,name,status,restarts,agrees,reason"
        code, text = await ask(world, tmp_path, "status", "--columns", columns, "--sort", "name", COLUMNS="80")
        assert code == 0, text
        heading, *lines = text.splitlines()
        assert heading.split() == columns.split(",")
        rows = {line.split()[0]: " ".join(line.split()) for line in lines}
        assert rows[ELSEWHERE] == f"{ELSEWHERE} - running - on far-away -"
        assert rows[node.id] == f"{node.id} {node.name} running 0 yes -"
        assert rows[dead.id].startswith(f"{dead.id} {dead.name} exited 0 yes exit code 3, after ")
        assert [line.split()[0] for line in lines] == [ELSEWHERE, dead.id, node.id]
    code, text = await ask(world, tmp_path, "status", EVENTWATCH_DOCKER_HOST="unix:///nowhere/docker.sock")
    assert code == 1
    assert text.splitlines()[-1] == ("eventwatch: the engine does not answer")


async def test_explain_tells_why_and_of_a_name_that_was_used_again_the_last(world: World, tmp_path: Path) -> None:
    ids = []
    settings = world.settings()
    async with world.watching():
        for attempt in range(2):
            node = await world.start("again", healthcheck="flag", interval_s=0.2)
            ids.append(node.id)
            await eventually(partial(world.says, node, health="unhealthy"), within=SLOWLY)
            if attempt:
                code, text = await ask(world, tmp_path, "explain", node.name, "--json")
                assert code == 0, text
                said = json.loads(text)
                assert (said["name"], said["document"]["agrees"]) == (node.name, True)
                assert said["docker"]["failures"]
                assert said["idle"]["source"] == "setting EVENTWATCH_IDLE_TIMEOUT"
            await node.remove()
            await eventually(partial(is_gone, world, node.id), within=SLOWLY)
    async with open_store(world.mongo_url, world.database_name) as store:
        engine = DockerEngine(settings)
        try:
            told = await explain_node(node.name, store, engine, settings)
            assert (told.node_id, told.name) == (ids[1], node.name)
            assert told.changes[0].deleted
            lines = "\n".join(told.lines())
            assert f"Node {ids[1]} ({node.name}, {told.image}) has no document any more." in lines
            assert "document deleted (by event" in lines
            assert "its container was removed" in lines
            twins = [f"{number:04x}" + "d" * 60 for number in range(2)]
            for twin in twins:
                await world.database["NodeChanges"].insert_one(
                    {"_id": f"beef{twin[4:-4]}{twin[:4]}", "at": ago(1)}
                )
            with pytest.raises(ConfigError, match="several nodes begin with it"):
                await explain_node("beef", store, engine, settings)
        finally:
            await engine.close()


async def test_explain_knows_a_node_by_its_name_without_the_engine(world: World) -> None:
    node = await world.start("known")
    async with world.watching():
        await world.becomes_true()
        await node.kill()
        await eventually(partial(world.says, node, status="exited"), within=SLOWLY)
    settings = world.settings(docker_host="unix:///nowhere/docker.sock")
    engine = DockerEngine(settings)
    async with open_store(world.mongo_url, world.database_name) as store:
        told = await explain_node(node.name, store, engine, settings)
        assert (told.node_id, told.name) == (node.id, node.name)
        assert told.report is not None
        assert told.report.recorded.status == "exited"
        assert told.report.verdict == "no answer"
        assert told.report.reason.endswith("stopped by a client of the engine (SIGKILL)")
        with pytest.raises(EventwatchError, match="no document, Docker does not answer"):
            await explain_node("somebody-else", store, engine, settings)
        await world.collection.update_one({"_id": node.id}, {"$set": {"status": 7}})
        for name in (node.name, node.id, node.id[:12]):
            with pytest.raises(DocumentError, match="it has a document, which is skipped"):
                await explain_node(name, store, engine, settings)
    await engine.close()


async def test_nodes_are_judged_by_the_settings_of_the_running_eventwatch(world: World) -> None:
    node = await world.start("judged", expose=(80, 81))
    theirs, ours = {"node_port": 81, "idle_timeout": 7200.0}, world.settings()
    engine = DockerEngine(ours)
    try:
        async with world.watching(**theirs), open_store(world.mongo_url, world.database_name) as store:
            await eventually(lambda: world.says(node, port=81), within=SLOWLY)
            engine_id = await identity_of(engine)
            with logged("WARNING") as lines:
                used = await settings_in_force(store, engine_id, ours)
            assert (used.node_port, used.idle_timeout) == (81, 7200)
            [line] = texts(lines)
            assert "node_port 81 (here 31942)" in line
            [report] = await compare_nodes(store, engine, used, engine_id=engine_id)
            assert report.agrees
            assert report.idle_left is not None
            assert report.idle_left > 3600
            await world.checkers.update_many({}, {"$set": {"settings": {"node_port": "x", "idle_timeout": None}}})
            assert await settings_in_force(store, engine_id, ours) is ours
        async with open_store(world.mongo_url, world.database_name) as store:
            assert await settings_in_force(store, engine_id, ours) is ours  # nobody runs
    finally:
        await engine.close()


async def test_the_doctor_names_containers_without_document_and_a_label_that_nobody_has(world: World) -> None:
    known, unknown = await world.start("known"), await world.nodes.start("unknown")
    settings = world.settings(orphan_grace=0.0, register_label="nobody.has-this")
    engine = DockerEngine(settings)
    try:
        found = {finding.subject: finding async for finding in examine(settings, engine, world.mongo_url)}
        assert found["documents"].text == f"1 of the 2 nodes that run have one; without: {unknown.name}"
        assert found["register label"].text == "no running container has nobody.has-this"
        assert found["register label"].cure
        await world.insert(unknown)
        there = world.settings(register_label=f"tool-server.node={known.name.removeprefix(world.nodes.prefix)}")
        found = {finding.subject: finding async for finding in examine(there, engine, world.mongo_url)}
        assert found["register label"].text.endswith("1 running containers have it")
    finally:
        await engine.close()


async def is_gone(world: World, node_id: str) -> bool:
    return await world.collection.count_documents({"_id": node_id}) == 0
