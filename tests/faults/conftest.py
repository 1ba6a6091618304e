"""Fixtures of the fault suite: engines and databases that may be broken, and the world between them.

What the suite does is chosen by the environment:
- `EVENTWATCH_TEST_FAULTS=all` runs the tests too that take more than 30 s each, left out of CI (marked `long`);
- `EVENTWATCH_TEST_FAULT_TIMES=20` injects each fault so often instead of once, for the fault table;
- `EVENTWATCH_TEST_SOAK_SECONDS` and `EVENTWATCH_TEST_SOAK_SEED` make the soak another one (see test_soak.py).
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import pytest_asyncio

from tests.faults.harness import World
from tests.kit.engines import PrivateEngine
from tests.kit.eventwatch import Eventwatch
from tests.kit.mongod import PrivateMongo


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is too long for CI."""
    if os.environ.get("EVENTWATCH_TEST_FAULTS") == "all":
        return
    left_out = [item for item in items if hasattr(getattr(item, "function", None), "long_fault")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session", autouse=True)
def cleaned_up_when_cut() -> Iterator[None]:
    """A run that is told to end (by `timeout`, or by CI) ends as with Ctrl-C, so that it leaves nothing behind."""
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    yield
    signal.signal(signal.SIGTERM, before)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def engine() -> AsyncIterator[PrivateEngine]:
    async with PrivateEngine() as private:
        yield private


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def mongo() -> AsyncIterator[PrivateMongo]:
    async with PrivateMongo() as private:
        yield private


@pytest.fixture
async def world(engine: PrivateEngine, mongo: PrivateMongo) -> AsyncIterator[World]:
    async with World(engine.url, mongo.url) as made:
        await made.populate(8)
        yield made


@pytest.fixture
def eventwatch(world: World, tmp_path: Path) -> Iterator[Eventwatch]:
    """Eventwatch on that world, started."""
    with closing(Eventwatch(tmp_path, world.settings())) as process:
        process.start()
        yield process
