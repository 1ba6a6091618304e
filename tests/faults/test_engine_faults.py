"""The engine goes away in every way that it can, and comes back; nobody touches eventwatch."""

from __future__ import annotations

import asyncio

from tests.faults.harness import World, endure, freeze_for
from tests.kit.engines import PrivateEngine
from tests.kit.eventwatch import Eventwatch


async def test_all_is_right_after_dockerd_was_terminated_and_started_again(
    engine: PrivateEngine, world: World, eventwatch: Eventwatch
) -> None:
    async def inject() -> None:
        await engine.stop()
        await asyncio.sleep(1)
        await engine.start()

    await endure("dockerd SIGTERM and restart", world, eventwatch, inject)


async def test_all_is_right_after_dockerd_was_killed_and_a_node_died_meanwhile(
    engine: PrivateEngine, world: World, eventwatch: Eventwatch
) -> None:
    async def inject() -> None:
        node = await world.add()
        pid = (await node.inspect())["State"]["Pid"]
        await engine.kill()
        engine.kill_container_process(pid)
        await asyncio.sleep(1)
        await engine.start()

    await endure("dockerd SIGKILL, a node dies meanwhile", world, eventwatch, inject)


async def test_all_is_right_after_dockerd_was_frozen_for_10_s(
    engine: PrivateEngine, world: World, eventwatch: Eventwatch
) -> None:
    await endure("dockerd SIGSTOP for 10 s", world, eventwatch, lambda: freeze_for(10, engine))
