"""Fixtures of every test: a real engine, a real MongoDB, and nodes on a network of their own."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
from asyncio.selector_events import BaseSelectorEventLoop
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
from aiodocker import Docker
from pymongo import AsyncMongoClient

from tests.kit import lacks
from tests.kit.mongod import PrivateMongo
from tests.kit.nodes import Nodes
from tests.kit.waiting import SLOW

# The engine of the tests is that of `DOCKER_HOST`, or the local one, whatever context their user has chosen.
os.environ.setdefault("DOCKER_CONTEXT", "default")

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


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this engine cannot do."""
    needs = [need for marker in item.iter_markers("needs") for need in marker.args]
    if reason := lacks.why_not(needs):
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool, bool]:
    """Keep what passed in all its phases."""
    before = item.session.testsfailed
    done = yield
    if item.session.testsfailed == before and PASSED_TESTS in os.environ:
        with Path(os.environ[PASSED_TESTS]).open("a") as kept:
            kept.write(json.dumps(item.nodeid) + "\n")
    return done


@pytest.fixture(scope="session", autouse=True)
def closed_sockets() -> Iterator[None]:
    """Close what pymongo leaves open when it is cancelled as it connects: a later test would be blamed for it."""
    connect = BaseSelectorEventLoop.sock_connect

    async def sock_connect(loop: BaseSelectorEventLoop, sock: socket.socket, address: Any) -> None:
        try:
            await connect(loop, sock, address)
        except asyncio.CancelledError:
            sock.close()
            raise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BaseSelectorEventLoop, "sock_connect", sock_connect)
        yield


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


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def mongo_url() -> AsyncIterator[str]:
    """A private mongod, as a replica set of one, for the whole run."""
    async with PrivateMongo() as mongo:
        yield mongo.url


@pytest.fixture
async def database(mongo_url: str) -> AsyncIterator[str]:
    """The name of a database of the test's own."""
    name = f"ew_test_{secrets.token_hex(4)}"
    yield name
    async with AsyncMongoClient[dict[str, Any]](mongo_url) as client:
        await client.drop_database(name)


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
