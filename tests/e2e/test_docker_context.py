"""The engine that `docker context use` chose is watched, as the real command writes its contexts."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from eventwatch.settings.model import load_settings
from tests.kit.processes import run
from tests.kit.waiting import eventually
from tests.kit.world import World


def docker(config: Path, *words: str) -> None:
    run("docker", "context", *words, env={"PATH": os.environ["PATH"], "DOCKER_CONFIG": str(config)})


async def test_the_context_that_was_chosen_is_watched(
    world: World, docker_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "docker"
    socket = tmp_path / "engine.sock"
    socket.symlink_to(urlsplit(docker_url).path)
    docker(config, "create", "other", "--docker", "host=tcp://127.0.0.1:1")
    docker(config, "create", "mine", "--docker", f"host=unix://{socket}")
    docker(config, "use", "other")
    monkeypatch.setenv("DOCKER_CONFIG", str(config))
    for name in ("DOCKER_HOST", "DOCKER_CONTEXT"):
        monkeypatch.delenv(name, raising=False)
    assert load_settings(None).docker_host == "tcp://127.0.0.1:1"
    docker(config, "use", "mine")
    node = await world.start("one")
    async with world.watching() as watched:
        assert watched.app.settings.docker_host == f"unix://{socket}"
        await world.becomes_true()
        await node.kill()
        await eventually(lambda: world.says(node, status="exited"))
