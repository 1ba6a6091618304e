"""The fixtures of the end-to-end tests: nodes on a real engine and their documents in a real MongoDB."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from aiodocker import Docker

from tests.kit.fakes import Failing
from tests.kit.nodes import Nodes
from tests.kit.world import World, opened_world


@pytest.fixture
async def world(docker: Docker, nodes: Nodes, mongo_url: str, database: str) -> AsyncIterator[World]:
    async with opened_world(docker, nodes, mongo_url, database) as made:
        yield made


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    return Failing(monkeypatch)
