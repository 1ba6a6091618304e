"""Eventwatch itself is killed, or told to end, in the middle of its work."""

from __future__ import annotations

import asyncio

from tests.faults.harness import RECOVERY, Oracle, Row, World, endure, times
from tests.kit.eventwatch import Eventwatch

LEASE = 2.0


async def test_all_is_right_after_eventwatch_was_killed_in_the_middle_of_writing(
    world: World, eventwatch: Eventwatch
) -> None:
    await eventwatch.stop()
    short = f"{LEASE:.0f}s"
    eventwatch.start(lease_duration=short)

    async def inject() -> None:
        node = world.random.choice(list(world.nodes.values()))
        burst = asyncio.gather(*(each.restart(grace_s=0) for each in world.nodes.values()), return_exceptions=True)
        await eventwatch.says(f"Node {node.id[:12]} status updated")
        await eventwatch.kill()
        await asyncio.sleep(0.5)
        eventwatch.start(lease_duration=short)
        await burst

    await endure(
        "eventwatch SIGKILL in mid-write and restart", world, eventwatch, inject, recovery=LEASE + RECOVERY
    )


async def test_it_ends_with_0_under_load_with_everything_written_and_its_lease_released(
    world: World, eventwatch: Eventwatch
) -> None:
    oracle, row = Oracle(world), Row("eventwatch SIGTERM under load")
    for number in range(times()):
        await eventwatch.says("Nodes status checker started.", times=number + 1)
        async with world.busy(workers=6, replaces=False):
            await asyncio.sleep(2)
            assert await eventwatch.stop() == 0
            assert await world.checkers.count_documents({}) == 0
        assert "Not everything" not in eventwatch.output, eventwatch.tail()
        eventwatch.start()
        row.longest_recovery = max(row.longest_recovery, await oracle.recovered())
        row.times += 1
        row.documents += len(world.inserted)
        assert not await oracle.lost_requests()
    row.save()
