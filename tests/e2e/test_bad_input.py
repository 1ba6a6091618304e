"""What operators get wrong, and what engines send: one clear line, the right exit code, never a traceback."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.faults.proxies import EngineProxy
from tests.kit.eventwatch import program, run_program
from tests.kit.fakes import served
from tests.kit.mongod import find_mongod, free_port, listens
from tests.kit.seen import logged, texts
from tests.kit.waiting import eventually
from tests.kit.world import World

PASSWORD = "s3cret-of-the-test"

#: Imports as whoever runs the tests, then becomes somebody with no rights at all.
AS_NOBODY = """
import concurrent.futures.thread, encodings.idna, os  # what would else be imported later, and then cannot be
import eventwatch.cli.main, eventwatch.cli.commands
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
eventwatch.cli.main.main()
"""


def environment(mongo_url: str, **env: str) -> dict[str, str]:
    docker = {name: value for name, value in os.environ.items() if name.startswith("DOCKER_")}
    return docker | {"EVENTWATCH_MONGO_URL": mongo_url, "EVENTWATCH_HTTP_LISTEN": "", **env}


def with_password(mongo_url: str) -> str:
    return mongo_url.replace("mongodb://", f"mongodb://somebody:{PASSWORD}@")


def assert_clean(output: str) -> None:
    assert "Traceback" not in output
    assert PASSWORD not in output
    assert "Exception" not in output
    assert "Warning" not in output


def the_line(output: str) -> str:
    """The one line that the command ended with, as people read it."""
    lines = [line for line in output.splitlines() if line.startswith("eventwatch: ")]
    assert len(lines) == 1, output
    assert output.rstrip().endswith(lines[0])
    return lines[0]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that anybody may enter, with a path that is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="ew") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def fake_engine(path: Path, answers: dict[str, Any]) -> AbstractAsyncContextManager[str]:
    """An engine that answers requests for these paths (without the version prefix), and 404 for all others."""

    async def answer(request: web.Request) -> web.Response:
        name = re.sub(r"^/v[\d.]+", "", request.path)
        if name not in answers:
            return web.json_response({"message": "page not found"}, status=404)
        return web.json_response(answers[name])

    return served(path, answer)


# -- no engine ----------------------------------------------------------------------------------------------


async def test_run_without_an_engine_says_so_and_keeps_trying_until_it_is_stopped(
    mongo_url: str, database: str, tmp_path: Path
) -> None:
    env = environment(mongo_url, EVENTWATCH_MONGO_DATABASE=database, DOCKER_HOST=f"unix://{tmp_path}/none.sock")
    async with program("-m", "eventwatch", "run", env=env, cwd=tmp_path) as running:
        await running.says("Retrying until it is there")
        assert f"Engine at unix://{tmp_path}/none.sock unreachable: no such socket" in running.output
        assert "start the engine, mount its socket, or set DOCKER_HOST" in running.output
        async with fake_engine(tmp_path / "none.sock", {"/version": {"ApiVersion": "1.24"}}):
            assert await running.ends() == 2  # it went on trying, for it has met what came
    assert_clean(running.output)
    assert running.output.count("no such socket") == 1


async def test_run_without_an_engine_ends_well_when_it_is_told_to(
    mongo_url: str, database: str, tmp_path: Path
) -> None:
    env = environment(mongo_url, EVENTWATCH_MONGO_DATABASE=database, DOCKER_HOST=f"unix://{tmp_path}/none.sock")
    async with program("-m", "eventwatch", "run", env=env, cwd=tmp_path) as running:
        await running.says("Retrying until it is there")
        running.send(signal.SIGTERM)
        assert await running.ends() == 0
    assert_clean(running.output)


async def test_sweep_without_an_engine_fails_at_once(mongo_url: str, database: str, tmp_path: Path) -> None:
    env = environment(
        with_password(mongo_url), EVENTWATCH_MONGO_DATABASE=database, DOCKER_HOST=f"unix://{tmp_path}/none.sock"
    )
    code, output = await run_program("-m", "eventwatch", "sweep", env=env, cwd=tmp_path)
    assert code == 1
    assert "no such socket: start the engine" in the_line(output)
    assert_clean(output)


# -- an engine that cannot be used --------------------------------------------------------------------------


@contextmanager
def forbidden_socket(folder: Path) -> Iterator[Path]:
    path = folder / "forbidden.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        path.chmod(stat.S_IRUSR if os.getuid() == 0 else 0)
        yield path


@pytest.mark.parametrize("command", ["run", "sweep"])
async def test_a_folder_where_the_socket_should_be_is_bad_configuration(
    mongo_url: str, folder: Path, command: str
) -> None:
    """What Docker makes of a mount whose source is missing: waiting does not make a socket of it."""
    (folder / "docker.sock").mkdir()
    env = environment(mongo_url, DOCKER_HOST=f"unix://{folder}/docker.sock")
    code, output = await run_program("-m", "eventwatch", command, env=env, cwd=folder)
    assert code == 2
    assert "it is a folder: Docker makes one where a mount's source is missing" in the_line(output)


@pytest.mark.parametrize("command", ["run", "sweep"])
async def test_a_socket_that_may_not_be_used_is_bad_configuration(
    mongo_url: str, database: str, folder: Path, command: str
) -> None:
    arguments = ("-c", AS_NOBODY) if os.getuid() == 0 else ("-m", "eventwatch")
    with forbidden_socket(folder) as path:
        env = environment(mongo_url, EVENTWATCH_MONGO_DATABASE=database, DOCKER_HOST=f"unix://{path}")
        code, output = await run_program(*arguments, command, env=env, cwd=folder)
    assert code == 2, output
    assert f"Engine at unix://{path} unreachable: permission denied: add this user" in the_line(output)
    assert_clean(output)


@pytest.mark.parametrize("command", ["run", "sweep"])
async def test_an_engine_that_is_too_old_is_bad_configuration(
    mongo_url: str, database: str, tmp_path: Path, command: str
) -> None:
    async with fake_engine(
        tmp_path / "engine.sock", {"/version": {"ApiVersion": "1.24", "Version": "1.12"}}
    ) as url:
        env = environment(mongo_url, EVENTWATCH_MONGO_DATABASE=database, DOCKER_HOST=url)
        code, output = await run_program("-m", "eventwatch", command, env=env, cwd=tmp_path)
    assert code == 2
    assert "speaks API 1.24, eventwatch needs 1.40 or later: upgrade the engine" in the_line(output)
    assert_clean(output)


@pytest.mark.parametrize(
    "version",
    [
        pytest.param({}, id="no-version"),
        pytest.param({"ApiVersion": "new"}, id="no-number"),
        pytest.param(["not", "an", "object"], id="no-object"),
    ],
)
async def test_an_engine_that_answers_nonsense_is_told_of(
    mongo_url: str, database: str, tmp_path: Path, version: Any
) -> None:
    async with fake_engine(tmp_path / "engine.sock", {"/version": version}) as url:
        env = environment(mongo_url, EVENTWATCH_MONGO_DATABASE=database, DOCKER_HOST=url)
        code, output = await run_program("-m", "eventwatch", "sweep", env=env, cwd=tmp_path)
    assert code == 1
    assert "Engine failed while asking the engine who it is" in the_line(output)
    assert_clean(output)


# -- a database that cannot be used -------------------------------------------------------------------------


async def test_run_without_a_database_says_so_and_keeps_trying(tmp_path: Path) -> None:
    port = free_port()
    env = environment(f"mongodb://somebody:{PASSWORD}@127.0.0.1:{port}/")
    async with program("-m", "eventwatch", "run", env=env, cwd=tmp_path) as running:
        await running.says("Retrying until it is there")
        assert (
            f"Database unreachable while connecting to mongodb://somebody:***@127.0.0.1:{port}/" in running.output
        )
        running.send(signal.SIGTERM)
        assert await running.ends() == 0
    assert_clean(running.output)


async def test_sweep_without_a_database_fails_with_one_line(tmp_path: Path) -> None:
    port = free_port()
    env = environment(f"mongodb://somebody:{PASSWORD}@127.0.0.1:{port}/")
    code, output = await run_program("-m", "eventwatch", "sweep", env=env, cwd=tmp_path)
    assert code == 1
    assert f"Database unreachable while connecting to mongodb://somebody:***@127.0.0.1:{port}/" in the_line(output)
    assert_clean(output)


@pytest.fixture(scope="module")
def locked_mongo() -> Iterator[str]:
    """The URL of a mongod that wants a login and knows no user."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ew") as data:
        command = (find_mongod(), "--dbpath", data, "--port", str(port), "--auth", "--nounixsocket", "--quiet")
        with subprocess.Popen((*command, "--bind_ip", "127.0.0.1"), stdout=subprocess.DEVNULL) as process:
            try:
                asyncio.run(eventually(lambda: listens(port), within=30))
                yield f"mongodb://127.0.0.1:{port}/"
            finally:
                process.kill()


@pytest.mark.parametrize("command", ["run", "sweep"])
@pytest.mark.parametrize("login", [pytest.param(True, id="wrong-login"), pytest.param(False, id="no-login")])
async def test_a_refused_login_is_bad_configuration(
    locked_mongo: str, tmp_path: Path, command: str, login: bool
) -> None:
    env = environment(with_password(locked_mongo) if login else locked_mongo)
    code, output = await run_program("-m", "eventwatch", command, env=env, cwd=tmp_path)
    assert code == 2, output
    assert "Database refused the login" in the_line(output)
    assert "Check the user, password and authSource in EVENTWATCH_MONGO_URL" in the_line(output)
    assert_clean(output)


# -- settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["run", "sweep", "config"])
async def test_an_unknown_name_is_bad_configuration_and_the_nearest_right_one_is_told(
    mongo_url: str, tmp_path: Path, command: str
) -> None:
    env = environment(with_password(mongo_url), EVENTWATCH_IDEL_TIMEOUT="5m")
    code, output = await run_program("-m", "eventwatch", command, env=env, cwd=tmp_path)
    assert code == 2
    assert "EVENTWATCH_IDEL_TIMEOUT: unknown setting" in the_line(output)
    assert "EVENTWATCH_IDLE_TIMEOUT" in the_line(output)
    assert_clean(output)


async def test_a_value_that_is_no_duration_is_bad_configuration(mongo_url: str, tmp_path: Path) -> None:
    env = environment(with_password(mongo_url), EVENTWATCH_SWEEP_INTERVAL="soon")
    code, output = await run_program("-m", "eventwatch", "run", env=env, cwd=tmp_path)
    assert code == 2
    assert "EVENTWATCH_SWEEP_INTERVAL: must be seconds or a duration" in the_line(output)
    assert_clean(output)


async def test_config_shows_every_setting_but_no_secret(mongo_url: str, tmp_path: Path) -> None:
    env = environment(with_password(mongo_url), EVENTWATCH_IDLE_TIMEOUT="90s")
    code, output = await run_program("-m", "eventwatch", "config", env=env, cwd=tmp_path)
    assert code == 0
    assert "EVENTWATCH_IDLE_TIMEOUT=90s" in output
    assert "mongodb://somebody:***@" in output
    assert_clean(output)


# -- garbage on the event stream ----------------------------------------------------------------------------

GARBAGE = (
    b"this is no JSON",
    b"[1, 2, 3]",
    b"null",
    b'{"Type": "container"}',
    b'{"Type": "container", "Action": "die", "Actor": {"ID": 5}, "timeNano": 1}',
    b'{"Type": "container", "Action": "die", "Actor": null, "timeNano": 1}',
    b'{"Type": "container", "Action": "die", "Actor": {"ID": "x"}, "timeNano": "now"}',
    b"\x00\xff\xfe",
    b"[" * 100_000,
    b'{"a": "' + b"x" * (9 << 20),  # longer than a line may be
)
#: Well-formed, and nothing to worry about.
HARMLESS = (
    b"",
    b'{"Type": "image", "Action": "pull", "Actor": {"ID": "x"}, "timeNano": 1}',
    b'{"Type": "container", "Action": "levitate", "Actor": {"ID": "x"}, "timeNano": 1}',
)


@pytest.mark.needs("cgroups")
async def test_garbage_on_the_event_stream_is_counted_logged_and_skipped(
    world: World, docker_url: str, folder: Path
) -> None:
    node = await world.start("one")
    with logged("WARNING") as lines:
        async with EngineProxy(folder, docker_url) as proxy, world.watching(docker_host=proxy.url) as watched:
            await proxy.emit(b"\n".join((*GARBAGE, *HARMLESS)) + b"\n")
            await eventually(lambda: watched.count("eventwatch_events_total", action="malformed") >= len(GARBAGE))
            assert watched.count("eventwatch_events_total", action="malformed") == len(GARBAGE)
            await node.pause()
            await eventually(lambda: world.says(node, status="paused"))
            await node.kill()
            await world.becomes_true()
    told = [text for text in texts(lines) if text.startswith("Event stream: skipped a malformed line")]
    assert [int(re.findall(r"number (\d+)", text)[0]) for text in told] == [1, 2, 4, 8]
    assert max(map(len, told)) < 500


# -- what is no engine --------------------------------------------------------------------------------------


async def test_a_web_server_is_no_engine_and_its_password_is_not_shown(
    mongo_url: str, database: str, tmp_path: Path
) -> None:
    async def answer(_: web.BaseRequest) -> web.Response:
        return web.Response(status=404, text="<html>", content_type="text/html")

    server = web.Server(answer)
    runner = web.ServerRunner(server)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    url = f"tcp://ann:{PASSWORD}@127.0.0.1:{port}"
    try:
        for words in (["run"], ["status"], ["doctor"]):
            env = environment(mongo_url, EVENTWATCH_MONGO_DATABASE=database, EVENTWATCH_DOCKER_HOST=url)
            code, output = await run_program("-m", "eventwatch", *words, env=env, cwd=tmp_path)
            assert code == (1 if words == ["doctor"] else 2), output
            assert_clean(output)
            assert f"EVENTWATCH_DOCKER_HOST: what answers at tcp://ann:***@127.0.0.1:{port} is a web" in output
    finally:
        await runner.cleanup()


async def test_an_engine_behind_ssh_with_a_password_is_one_line(
    mongo_url: str, database: str, tmp_path: Path
) -> None:
    env = environment(mongo_url, EVENTWATCH_MONGO_DATABASE=database, DOCKER_HOST="ssh://ann:word@host")
    code, output = await run_program("-m", "eventwatch", "run", env=env, cwd=tmp_path)
    assert code == 2
    assert_clean(output)
    assert "EVENTWATCH_DOCKER_HOST: ssh://ann:***@host is not usable: it must be ssh" in the_line(output)
