"""Every fenced block of the README is run: each command and snippet, just as it is written.

A block or command that nothing here claims fails its test, so that nobody adds one that is not tried. Commands of
`eventwatch` run beside a real engine and a real MongoDB, snippets as a user's own files.

Not run here, since other tests do or they would run these tests themselves, but looked up in what they name:
- `make ...`: the Makefile must have the target. `make test` is what runs this; each target has its own recipe.
- `docker compose ...`: the files must be there, and have the service and the variables. test_compose.py and
  test_secrets.py run them, with images that stand in for those of a registry.
- `pip install ...`: pyproject.toml must have the extra. test_package.py installs it.
- `docker stack deploy ...`: the file must be there. test_swarm.py deploys it.
- the manager: it must be the file that test_manager.py runs. The line that waits: the file must wait like that.
- the picture: its words must be modules. The lines of the log: the program must say such lines.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import shlex
import shutil
import signal
import tomllib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from eventwatch.store.base import checker_id
from tests.e2e.test_embedding import environment, served
from tests.kit.eventwatch import program, run_program
from tests.kit.mongod import free_address
from tests.kit.nodes import Node
from tests.kit.processes import Process
from tests.kit.truth import ago
from tests.kit.waiting import eventually
from tests.kit.world import World
from tests.readme import README, ROOT, Block, blocks, commands

TEXT = README.read_text()
RECORDING = ROOT / "tests" / "recordings" / "lifecycle.jsonl"

#: What claims a block: its language and something that stands in it. `sh` blocks are claimed line by line.
EMBEDDED: Final = ("python", "async def nodes()")
MANAGER: Final = ("python", "async def pass_on(")
WAITED: Final = ("python", "await wait_for(node_id")
REPLAYED: Final = ("python", "played.until")
LOG: Final = ("text", " status updated: ")
PICTURE: Final = ("text", "Docker Engine ──events──▶")
CLAIMS: Final = (EMBEDDED, MANAGER, WAITED, REPLAYED, LOG, PICTURE)


def claimed(block: Block, claim: tuple[str, str]) -> bool:
    return block.language == claim[0] and claim[1] in block.text


def the_block(claim: tuple[str, str]) -> str:
    [block] = [block for block in blocks(TEXT) if claimed(block, claim)]
    return block.text


@pytest.mark.parametrize("block", [block for block in blocks(TEXT) if block.language != "sh"], ids=str)
def test_a_block_is_claimed(block: Block) -> None:
    assert [claimed(block, claim) for claim in CLAIMS].count(True) == 1, f"nothing runs {block}"


# -- the commands of eventwatch -----------------------------------------------------------------------------


@dataclass
class Place:
    """Where a reader types the commands: a folder, an engine with one node, its document in a database."""

    world: World
    node: Node
    folder: Path
    env: dict[str, str]

    def words(self, command: str) -> list[str]:
        """What the shell makes of a command, behind `eventwatch`; ID is the node's."""
        return [self.node.id[:12] if word == "ID" else word for word in shlex.split(command)[1:]]

    async def ended(self, command: str) -> tuple[int, str]:
        return await run_program("-m", "eventwatch", *self.words(command), env=self.env, cwd=self.folder)

    async def done(self, command: str) -> str:
        """What a command that must end with 0 has said."""
        code, said = await self.ended(command)
        assert code == 0, said
        return said

    @asynccontextmanager
    async def started(self, command: str) -> AsyncIterator[Process]:
        async with program("-m", "eventwatch", *self.words(command), env=self.env, cwd=self.folder) as running:
            yield running

    async def wrong_document(self) -> None:
        await self.world.collection.update_one({"_id": self.node.id}, {"$set": {"status": "dead"}})


async def run(place: Place, command: str) -> None:
    """Beside it, the lines that the README shows of the log."""
    async with place.started(command) as running:
        await running.says("Nodes status checker started.")
        await eventually(lambda: place.world.says(place.node, health="healthy"))
        await place.node.pause()
        await eventually(lambda: place.world.says(place.node, status="paused"))
        for line in the_block(LOG).splitlines():
            moment, shape = line.split(" ", 1)
            assert re.fullmatch(r"[\d:.]{12}", moment)
            await running.says(shape.replace("fc66cb08e05e", place.node.id[:12]))
        await place.node.unpause()
        await eventually(lambda: place.world.says(place.node, status="running", health="healthy"))
        await place.wrong_document()
        running.send(signal.SIGHUP)
        await eventually(lambda: place.world.says(place.node, status="running"))
        running.send(signal.SIGTERM)
        assert await running.ends() == 0
        assert "Traceback" not in running.output


async def doctor(place: Place, command: str) -> None:
    said = await place.done(command)
    assert {line.split()[0] for line in said.splitlines()} == {"ok"}
    for subject in ("engine: ", "database: ", "clock: ", "POST /containers/{id}/stop: "):
        assert subject in said


async def create_user(place: Place, command: str) -> None:
    (place.folder / "FILE").write_text("\n")
    code, said = await place.ended(command)
    assert (code, "the new user's password is empty" in said) == (2, True)
    (place.folder / "FILE").write_text("s3cret\n")
    name, admin = place.world.database_name, place.world.client.admin
    try:
        assert f"User eventwatch created: may read and write database {name}" in await place.done(command)
        assert "User eventwatch is there already: may read and write" in await place.done(command)
        # Whoever is there already is never changed.
        there = await admin.command("usersInfo", "eventwatch", showCredentials=True)
        assert [user["roles"] for user in there["users"]] == [[{"role": "readWrite", "db": name}]]
        (place.folder / "FILE").write_text("an0ther\n")
        code, said = await place.ended(command)
        assert (code, said.count("\n"), "there already, with other password, and is left" in said) == (2, 1, True)
        (place.folder / "FILE").write_text("s3cret\n")
        place.env["EVENTWATCH_MONGO_DATABASE"] = "another"
        code, said = await place.ended(command)
        assert (code, said.count("\n"), "there already, with other rights, and is left" in said) == (2, 1, True)
        assert (await admin.command("usersInfo", "eventwatch", showCredentials=True))["users"] == there["users"]
    finally:
        await admin.command("dropUser", "eventwatch")


async def status(place: Place, command: str) -> None:
    await place.wrong_document()
    code, said = await place.ended(command)
    assert code == 1
    assert place.node.id[:12] in said
    assert re.search(r"\bdead\b.*\bno: status running\b", said), said  # the engine does not agree


async def status_watch(place: Place, command: str) -> None:
    place.env["FORCE_COLOR"] = "1"  # what rich takes for a terminal
    async with place.started(command) as running:
        await running.says(place.node.id[:12])
        assert "dead" not in running.output
        await place.wrong_document()
        await running.says("dead")
        running.send(signal.SIGINT)
        assert await running.ends() == 128 + signal.SIGINT
        assert "Traceback" not in running.output


async def status_json(place: Place, command: str) -> None:
    code, said = await place.ended(command)
    assert code == 1  # nobody has made the document true yet
    [row] = json.loads(said.splitlines()[0])
    assert row["id"] == place.node.id


async def status_some(place: Place, command: str) -> None:
    code, said = await place.ended(command)
    assert (code, said.split()) == (0, ["node", "name", "age", "reason"]), said  # the one node is healthy


async def top(place: Place, command: str) -> None:
    """It needs a terminal; tests/e2e/test_top.py presses its keys."""
    assert await place.ended(command) == (2, "eventwatch: top needs a terminal; elsewhere: eventwatch status\n")


async def completion(place: Place, command: str) -> None:
    assert "complete -o" in await place.done(command)


async def wait(place: Place, command: str) -> None:
    async with place.started("eventwatch run") as running:
        await running.says("Nodes status checker started.")
        assert "is running, health healthy" in await place.done(command)


async def explain(place: Place, command: str) -> None:
    said = await place.done(command)
    for beginning in ("Node ", "Docker ", "Document ", "Last request: "):
        assert f"\n{beginning}" in f"\n{said}"


async def sweep(place: Place, command: str) -> None:
    await place.wrong_document()
    assert "1 nodes checked, 1 changed\n" in await place.done(command)
    assert await place.world.says(place.node, status="running")


async def sweep_dry(place: Place, command: str) -> None:
    await place.wrong_document()
    assert "Dry run: 1 nodes checked" in await place.done(command)
    assert await place.world.says(place.node, status="dead")


async def sweep_force(place: Place, command: str) -> None:
    """Nine nodes of this engine are gone, more than the brake allows, and nine of another one."""
    engine_id = (await place.world.docker.system.info())["ID"]
    for number in range(9):
        await place.world.insert(f"{number:064}", engine_id=engine_id)
        await place.world.insert(f"{number + 9:064}", engine_id="another")
    code, said = await place.ended("eventwatch sweep")
    assert code == 1, said
    assert await place.world.collection.count_documents({}) == 19
    assert "9 deleted" in await place.done(command)
    assert (await place.world.collection.delete_many({"engine_id": "another"})).deleted_count == 9
    assert await place.world.collection.distinct("_id") == [place.node.id]


async def engines(place: Place, command: str) -> None:
    await place.done("eventwatch sweep")
    async with place.started("eventwatch run") as running:
        await running.says("Nodes status checker started.")
        assert "ready" in await place.done(command)
        running.send(signal.SIGTERM)  # one that is killed looks alive until its lease runs out
        assert await running.ends() == 0
    rows = json.loads(await place.done(f"{command} --json"))
    assert [row["state"] for row in rows] == ["away"]


async def engines_forget(place: Place, command: str) -> None:
    """Nobody is there to be asked, so nothing goes without `--yes`."""
    await place.world.insert("e" * 64, engine_id="gone", epoch=1)
    last = {"manager_id": "m", "epoch": 1, "renewed_at": ago(3600), "expires_at": ago(3600)}
    await place.world.checkers.insert_one({"_id": checker_id("gone"), "engine_id": "gone", **last})
    words = command.replace("ID", "gone")
    code, said = await place.ended(words)
    assert (code, "1 documents would be deleted" in said) == (2, True), said
    assert "1 documents are deleted" in await place.done(f"{words} --yes")
    assert await place.world.collection.distinct("_id") == [place.node.id]


async def healthcheck(place: Place, command: str) -> None:
    assert (await place.ended(command))[0] == 1
    async with place.started("eventwatch run") as running:
        await running.says("Nodes status checker started.")
        await eventually(lambda: ready(place, command))


async def ready(place: Place, command: str) -> bool:
    return await place.ended(command) == (0, "ready\n")


async def config(place: Place, command: str) -> None:
    shown = dict(line.split("=", 1) for line in (await place.done(command)).splitlines())
    assert shown["EVENTWATCH_MONGO_DATABASE"] == place.world.database_name
    assert len(shown) > 20


async def record(place: Place, command: str) -> None:
    """Its end comes early, by Ctrl-C."""
    part = place.folder / "session.jsonl.part"
    async with place.started(command) as running:
        await eventually(lambda: part.exists() and part.read_text().count("\n") > 1)
        await place.node.pause()
        await eventually(lambda: "pause" in part.read_text())
        running.send(signal.SIGINT)
        assert await running.ends() == 0
    truth = json.loads((place.folder / "session.expected.json").read_text())
    assert truth[place.node.id]["status"] == "paused"


async def replay(place: Place, command: str) -> None:
    await place.world.collection.delete_many({})  # a database of the replay's own
    copy_recording(place.folder)
    assert "Divergence: 0 of 4 documents" in await place.done(command)
    expected = place.folder / "session.expected.json"
    expected.write_text(expected.read_text().replace('"running"', '"dead"'))
    code, said = await place.ended(command)
    assert (code, "diverge from session.expected.json" in said) == (1, True)


async def replay_json(place: Place, command: str) -> None:
    await place.world.collection.delete_many({})
    copy_recording(place.folder)
    assert json.loads(await place.done(command))["divergences"] == []


def copy_recording(folder: Path) -> None:
    shutil.copy(RECORDING, folder / "session.jsonl")
    shutil.copy(RECORDING.with_suffix(".expected.json"), folder / "session.expected.json")


EVENTWATCH: Final[dict[str, Callable[[Place, str], Awaitable[None]]]] = {
    "eventwatch run": run,
    "eventwatch doctor": doctor,
    "eventwatch doctor --create-user eventwatch --password-file FILE": create_user,
    "eventwatch status": status,
    "eventwatch status --watch": status_watch,
    "eventwatch status --json": status_json,
    "eventwatch status --unhealthy --sort age --columns node,name,age,reason": status_some,
    "eventwatch top": top,
    "eventwatch completion bash": completion,
    "eventwatch explain ID": explain,
    "eventwatch engines": engines,
    "eventwatch engines forget ID": engines_forget,
    "eventwatch wait ID --for healthy": wait,
    "eventwatch sweep": sweep,
    "eventwatch sweep --dry-run": sweep_dry,
    "eventwatch sweep --force": sweep_force,
    "eventwatch healthcheck": healthcheck,
    "eventwatch config": config,
    "eventwatch record session.jsonl --duration 90s": record,
    "eventwatch replay session.jsonl --speed 0": replay,
    "eventwatch replay session.jsonl --speed 0 --expect session.expected.json --json": replay_json,
}
#: Commands that an extra brings.
EXTRAS: Final = {"completion": "completion", "top": "top"}
OURS: Final = [command for command in commands(TEXT) if command.startswith("eventwatch ")]


@pytest.mark.parametrize("command", OURS)
async def test_a_command_of_eventwatch_does_what_the_readme_says(
    command: str, world: World, tmp_path: Path
) -> None:
    assert command in EVENTWATCH, "nothing runs this command"
    node = await world.start("tried", healthcheck="ok", interval_s=0.2)
    await node.wait_health("healthy")
    env = environment(world, EVENTWATCH_HTTP_LISTEN=free_address(), EVENTWATCH_SWEEP_INTERVAL="10m")
    await EVENTWATCH[command](Place(world, node, tmp_path, env), command)


# -- the commands of others ---------------------------------------------------------------------------------


def test_what_is_run_for_eventwatch_is_in_the_readme() -> None:
    assert EVENTWATCH.keys() <= set(OURS)


@pytest.mark.parametrize("command", [command for command in commands(TEXT) if command not in OURS])
def test_a_command_of_another_program_names_what_is_there(command: str) -> None:
    words = shlex.split(re.sub(r"\$\([^)]*\)", "", command))
    variables = [words.pop(0).partition("=")[0] for word in list(words) if re.match(r"[A-Z_]+=", word)]
    if words[0] == "make" and not variables:
        assert len(words) == 2
        assert re.search(rf"^{words[1]}:.* ## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[:2] == ["docker", "compose"]:
        names_what_is_in_compose(words[2:], variables)
    elif words[:3] == ["docker", "stack", "deploy"]:
        text = (ROOT / words[words.index("-c") + 1]).read_text()
        assert [variable for variable in variables if f"${{{variable}:" not in text] == []
    elif words[:2] == ["pip", "install"] and not variables:
        extras = re.fullmatch(r"\.\[([\w,]+)\]", words[2]).group(1).split(",")  # type: ignore[union-attr]
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert set(extras) <= project["optional-dependencies"].keys()
        # With no other must its commands run, whatever a developer has installed.
        needed = {extra for word, extra in EXTRAS.items() if f"\neventwatch {word}" in TEXT}
        assert needed <= set(extras)
    else:
        pytest.fail("nothing runs this command")


def names_what_is_in_compose(words: list[str], variables: list[str]) -> None:
    files = []
    while words[0] == "-f":
        files.append(words[1])
        words = words[2:]
    # The manager's own file is not ours.
    files = [file for file in files if file != "docker-compose.yml"] or ["compose.yaml"]
    texts = [(ROOT / file.removeprefix("eventwatch/")).read_text() for file in files]
    services = "".join(text.partition("\nservices:\n")[2].partition("\nnetworks:\n")[0] for text in texts)
    for variable in variables:
        assert re.search(rf"\$\{{{variable}:[-?]", "".join(texts)), variable
    command, *rest = words
    named = [word for word in rest if not word.startswith("-")]
    if command == "exec":
        named, inside = named[:1], named[1:]
        assert " ".join(inside) in OURS
    else:
        assert command == "up"
    for service in named:
        assert f"\n  {service}:\n" in f"\n{services}", service


# -- the snippets -------------------------------------------------------------------------------------------


async def test_a_manager_with_the_lifespan_of_the_readme_follows_its_nodes(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "manager.py").write_text(the_block(EMBEDDED))
    for name, value in environment(world).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("manager", tmp_path / "manager.py")
    assert spec is not None
    assert spec.loader is not None
    manager = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(manager)
    node = await world.start("managed")
    async with served(manager.app) as client:

        async def shows(status: str) -> bool:
            found: dict[str, str] = (await client.get("/nodes")).json()
            return found == {node.id[:12]: status}

        await eventually(lambda: shows("running"))
        assert await world.checkers.count_documents({}) == 1
        await node.kill()
        await eventually(lambda: shows("exited"))
    assert await world.checkers.count_documents({}) == 0


MY_MANAGER = """\
from eventwatch import ToolServerNode


async def routable_nodes():
    nodes = ToolServerNode.find(ToolServerNode.status == "running", ToolServerNode.health == "healthy")
    return sorted([node.ip async for node in nodes])
"""


async def test_a_users_test_replays_a_recording_as_the_readme_says(tmp_path: Path, mongo_url: str) -> None:
    (tmp_path / "my_manager.py").write_text(MY_MANAGER)
    (tmp_path / "test_mine.py").write_text(the_block(REPLAYED))
    assert "`asyncio_mode = auto`" in TEXT
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\n")
    copy_recording(tmp_path)
    env = {"EVENTWATCH_TEST_MONGO_URL": mongo_url, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    plugin = () if "eventwatch.testing" in plugins() else ("-p", "eventwatch.testing")
    arguments = ("-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin)
    code, said = await run_program(*arguments, env=env, cwd=tmp_path)
    assert (code, "1 passed" in said) == (0, True), said


def plugins() -> set[str]:
    """What an installed eventwatch brings by itself."""
    return {entry.name for entry in importlib.metadata.entry_points(group="pytest11")}


def test_the_manager_is_the_one_that_serves_sessions_in_a_test() -> None:
    manager = (ROOT / "tests" / "manager.py").read_text()
    assert the_block(MANAGER) == manager
    assert len(manager.splitlines()) < 80
    waits = the_block(WAITED).partition("#")[0].partition("wait_for(")[2].strip()
    assert waits.replace("node_id", "container.id") in manager


def test_the_parts_in_the_picture_are_modules() -> None:
    parts = set(re.findall(r"\b[a-z]+er\b", the_block(PICTURE)))
    assert parts == {"watcher", "reconciler", "sweeper"}
    assert all((ROOT / "eventwatch" / "pipeline" / f"{part}.py").is_file() for part in parts)
