"""What the database's URL may say, and what is read and written its own way whatever it says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pymongo import AsyncMongoClient
from pymongo.monitoring import (
    CommandFailedEvent,
    CommandListener,
    CommandStartedEvent,
    CommandSucceededEvent,
)

import eventwatch.store.connection
from tests.e2e.test_idle_stop import quick, start_idle, stops
from tests.kit.eventwatch import run_program
from tests.kit.truth import ago, manager_document
from tests.kit.waiting import eventually
from tests.kit.world import World

GONE = "0" * 64
#: Collections of which no acknowledged write may be lost.
SURE = ("NodeChecker", "NodeOwner", "NodeEngine")


class Commands(CommandListener):
    """Every command that was sent to the database."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def started(self, event: CommandStartedEvent) -> None:
        self.sent.append({**event.command})

    def succeeded(self, event: CommandSucceededEvent) -> None:
        """Of no interest."""

    def failed(self, event: CommandFailedEvent) -> None:
        """Of no interest."""


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> Commands:
    heard = Commands()

    def client(url: str, **options: Any) -> AsyncMongoClient[dict[str, Any]]:
        return AsyncMongoClient(url, **{**options, "event_listeners": [*options["event_listeners"], heard]})

    monkeypatch.setattr(eventwatch.store.connection, "AsyncMongoClient", client)
    return heard


async def test_reads_are_from_the_primary_and_what_decides_is_written_with_majority(
    world: World, commands: Commands
) -> None:
    node = await start_idle(world, "idle")
    await world.collection.insert_one(manager_document(GONE, engine_id="another"))
    engine_id = (await world.docker.system.info())["ID"]
    await world.collection.insert_one(manager_document("1" * 64, engine_id=engine_id, last_req_time=ago(0)))
    url = f"{world.mongo_url}&readPreference=secondary&w=1"
    async with world.watching(**quick(mongo_url=url)) as watched:
        await eventually(lambda: stops(watched, "stopped"))
        await eventually(lambda: world.says(node, status="exited"))
    seen: Counter[tuple[str, str]] = Counter()
    for command in commands.sent:
        name = next(iter(command))
        collection = str(command[name])
        if name == "endSessions":  # the driver's own
            continue
        assert command.get("$readPreference", {"mode": "primary"}) == {"mode": "primary"}, command
        if name in {"update", "findAndModify", "delete"} and collection in {*SURE, "ToolServerNode"}:
            sure = command.get("writeConcern") == {"w": "majority"}
            claims = "stopping" in str(command.get("updates"))
            seen[name, collection] += 1
            assert sure or not (name == "delete" or collection in SURE or claims), command
    for write in (("findAndModify", "NodeChecker"), ("delete", "ToolServerNode")):
        assert seen[write], seen
    assert seen["update", "NodeOwner"]
    assert seen["findAndModify", "NodeOwner"]
    assert seen["findAndModify", "NodeEngine"]


@pytest.mark.parametrize("command", ["run", "sweep", "doctor"])
async def test_a_url_with_which_no_write_is_known_to_be_done_is_refused(
    world: World, tmp_path: Path, docker_url: str, command: str
) -> None:
    env = {
        "EVENTWATCH_MONGO_URL": world.mongo_url.replace("mongodb://", "mongodb://us:SECRET@") + "&w=0",
        "EVENTWATCH_MONGO_DATABASE": world.database_name,
        "EVENTWATCH_DOCKER_HOST": docker_url,
        "EVENTWATCH_HTTP_LISTEN": "",
    }
    code, said = await run_program("-m", "eventwatch", command, env=env, cwd=tmp_path)
    assert code == (1 if command == "doctor" else 2), said
    lines = [line for line in said.splitlines() if "w=0" in line]
    assert len(lines) == 1
    assert "EVENTWATCH_MONGO_URL" in lines[0]
    assert "SECRET" not in said


async def test_a_checker_that_a_restore_of_the_database_lost_is_taken_again(world: World) -> None:
    async with world.watching(lease_duration=2) as watched:
        first = watched.app.pipeline
        assert await world.checkers.count_documents({}) == 1
        # As `mongorestore --drop` of an older dump: all that we have is gone, and no server was away.
        for name in SURE:
            await world.database[name].drop()
        await eventually(lambda: watched.app.pipeline and watched.app.pipeline is not first)
        await eventually(lambda: world.checkers.count_documents({}))
