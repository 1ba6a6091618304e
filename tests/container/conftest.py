"""Images are made once per run; each test runs its own containers and removes them."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from aiodocker import Docker

from tests.kit.images import build_sidecar, ensure_base, ensure_services
from tests.kit.nodes import Nodes
from tests.kit.world import World, opened_world


@pytest.fixture(scope="session")
def sidecar(docker_url: str) -> str:
    """The project's image, built from the stand-in base."""
    ensure_base()
    return build_sidecar()


@pytest.fixture(scope="session")
def services(sidecar: str) -> None:
    """What stands in for MongoDB's and haproxy's images."""
    ensure_services()


@pytest.fixture
async def world(docker: Docker, nodes: Nodes, mongo_url: str, database: str) -> AsyncIterator[World]:
    async with opened_world(docker, nodes, mongo_url, database) as made:
        yield made
