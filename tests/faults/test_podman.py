"""Podman in place of Docker: its events and inspections keep documents true as Docker's do.

What cannot be had from it, and so is not asked of it: a word of the network before a start, `update` (4.3: 404)
and the status `restarting`. Its health checks are run by systemd; here the kit does.
"""

from __future__ import annotations

import asyncio
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from aiodocker import Docker

from eventwatch.engine.docker import NOBODY, DockerEngine
from eventwatch.settings.model import Settings
from tests.faults.harness import RECOVERY, Oracle, World, long
from tests.kit.eventwatch import Eventwatch
from tests.kit.mongod import PrivateMongo
from tests.kit.nodes import Node, Nodes
from tests.kit.podman import PODMANS, PodmanVersion, PrivatePodman
from tests.kit.waiting import NEVER, eventually
from tests.kit.world import World as KitWorld
from tests.kit.world import opened_world


@long
@pytest.mark.parametrize("version", PODMANS)
async def test_documents_of_podmans_containers_are_right_by_its_events_alone(
    version: PodmanVersion, mongo: PrivateMongo, tmp_path: Path
) -> None:
    # A log that is cut every few seconds: each time, Podman leaves out events that it has not read yet.
    async with (
        PrivatePodman(version, log_size=20_000) as podman,
        World(podman.url, mongo.url, seed=5) as world,
    ):
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
            assert "Podman has cut its log" in watcher.output


@long
@pytest.mark.parametrize("version", PODMANS)
async def test_what_podman_says_in_words_of_its_own_is_shown(
    version: PodmanVersion, mongo_url: str, database: str
) -> None:
    async with (
        PrivatePodman(version) as podman,
        Docker(url=podman.url) as docker,
        Nodes(docker, "words-", network="words") as nodes,
        opened_world(docker, nodes, mongo_url, database) as kit,
    ):
        node = await kit.start("one", healthcheck="flag", interval_s=NEVER)
        async with kit.watching(docker_host=podman.url, settle_delay=NEVER / 10):  # so that only events can tell
            await eventually(lambda: kit.says(node, status="running"))
            for health in ("unhealthy", "healthy", "unhealthy"):
                await node.set_healthy(health == "healthy")
                for _ in range(2 if version == "4.3" else 1):  # that one tells the result of the check before
                    await podman.probe(node.id)
                await eventually(partial(kit.says, node, health=health))
        async with kit.watching(docker_host=podman.url) as watched:
            network = await docker.networks.get("words")
            await network.disconnect({"Container": node.id})
            await eventually(lambda: kit.says(node, status="running", ip=""))
            await network.connect({"Container": node.id})
            await eventually(lambda: shows_an_address(kit, node))
            stubborn = await kit.start(
                "stubborn", command=["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"]
            )
            await kit.becomes_true()
            stopping = asyncio.create_task(stubborn.stop(grace_s=3))
            await eventually(lambda: says_stopping(docker, stubborn))
            watched.app.sweep_now()  # which inspects it, while Podman has a word of ours for it
            await stopping
            await kit.becomes_true()
        assert [change.new["status"] for change in watched.of(stubborn) if "status" in change.new] == [
            "running",
            "exited",
        ]


async def shows_an_address(kit: KitWorld, node: Node) -> bool:
    document = await kit.document(node)
    return document is not None and document["ip"] == await kit.ip(node) != ""


async def says_stopping(docker: Docker, node: Node) -> bool:
    shown = await docker.containers.container(node.id).show()
    return bool(shown["State"]["Status"] == "stopping")


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
