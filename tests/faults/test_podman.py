"""Podman in place of Docker: its events and inspections keep documents true as Docker's do.

What cannot be had from it, and so is not asked of it: events of networks (4.3 sends none), `update` (404), the
status `restarting`, and health checks without systemd, which runs their probes. Its `stopped` means `exited`.
"""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path

import pytest

from eventwatch.engine.docker import NOBODY, DockerEngine
from eventwatch.settings.model import Settings
from tests.faults.harness import RECOVERY, Oracle, World, long
from tests.kit.eventwatch import Eventwatch
from tests.kit.mongod import PrivateMongo
from tests.kit.podman import PODMANS, PodmanVersion, PrivatePodman


@long
@pytest.mark.parametrize("version", PODMANS)
async def test_documents_of_podmans_containers_are_right_by_its_events_alone(
    version: PodmanVersion, mongo: PrivateMongo, tmp_path: Path
) -> None:
    async with PrivatePodman(version) as podman, World(podman.url, mongo.url, seed=5) as world:
        await world.populate(3)
        with closing(Eventwatch(tmp_path, world.settings(sweep_interval="1h"))) as watcher:
            watcher.start()
            await watcher.says("Nodes status checker started.")
            oracle = Oracle(world)
            await oracle.recovered()
            for _ in range(4):
                async with world.busy(workers=1):
                    await asyncio.sleep(5)
                assert await oracle.recovered(within=15) <= RECOVERY, watcher.tail()
            assert world.operations > 30
            assert not await oracle.lost_requests()
            assert await watcher.stop() == 0, watcher.tail()
            assert "Traceback" not in watcher.output


@long
@pytest.mark.parametrize("version", PODMANS)
async def test_podman_says_of_itself_what_it_does_not_have(version: PodmanVersion, mongo: PrivateMongo) -> None:
    async with PrivatePodman(version) as podman, World(podman.url, mongo.url, seed=6) as world:
        await world.populate(1)
        (node,) = world.nodes.values()
        engine = DockerEngine(Settings(_env_file=None, **world.settings()))
        try:
            info = await engine.identify()
            assert info.id.startswith(f"podman-{info.name}-")
            assert not (await engine.inspect(NOBODY)).found
            await engine.stop(NOBODY, grace=0)
            assert await engine.resolve(f"no-{node.name}") is None
            assert await engine.resolve(node.name) == node.id
            assert await engine.list_newest(1) == [node.id]
            seen = await engine.inspect(node.id)
            assert node.name in seen.names
            assert seen.ip in seen.addresses
            assert seen.created_at is not None
            await node.remove()
            assert not (await engine.inspect(node.id)).found
            await engine.stop(node.id, grace=0)
        finally:
            await engine.close()
