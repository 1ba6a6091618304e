"""Fixtures of the fault suite: engines and databases that may be broken, and the world between them."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.engines import PrivateEngine, PrivateMongo
from tests.faults.harness import Eventwatch, World


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
    process = Eventwatch(tmp_path, world.settings())
    process.start()
    yield process
    process.close()
