"""Fixtures of the fault suite: engines and databases that may be broken, and the world between them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.engines import PrivateEngine, PrivateMongo
from tests.faults.harness import Eventwatch, World


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
