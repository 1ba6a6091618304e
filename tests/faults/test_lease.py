"""Two watchers on one engine: only one writes, whatever is done to the other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.faults.epochs import followed
from tests.faults.harness import CALL, Oracle, Row, World, times
from tests.faults.proxies import Wire
from tests.kit.eventwatch import Eventwatch
from tests.kit.mongod import PrivateMongo

LEADS = "Nodes status checker started."
STANDS_BY = "Standing by"
STOPPED = "Nodes status checker stopped."
LEASE = 2.0


@pytest.fixture
async def pair(world: World, tmp_path: Path) -> AsyncIterator[tuple[Eventwatch, Eventwatch]]:
    """A holder and a standby, with a lease of 2 s."""
    settings = world.settings(lease_duration=f"{LEASE:.0f}s")
    one, two = (Eventwatch(tmp_path, settings, name=name) for name in ("one", "two"))
    with closing(one), closing(two):
        one.start()
        await one.says(LEADS)
        two.start()
        await two.says(STANDS_BY)
        yield one, two


async def holder_pid(world: World) -> int | None:
    checker = await world.checkers.find_one()
    return int(checker["pid"]) if checker else None


async def test_of_two_watchers_on_one_engine_only_the_holder_of_the_lease_writes(
    world: World, pair: tuple[Eventwatch, Eventwatch]
) -> None:
    one, two = pair
    async with followed(world) as epochs, world.busy(workers=4):
        await asyncio.sleep(3 * LEASE)
    await Oracle(world).recovered(within=10)
    assert epochs.all == {1}
    assert await world.checkers.count_documents({}) == 1
    assert await holder_pid(world) == one.pid
    assert LEADS not in two.output
    assert " updated: " not in two.output


async def test_a_holder_that_is_frozen_beyond_its_lease_is_replaced_and_its_late_writes_are_refused(
    world: World, pair: tuple[Eventwatch, Eventwatch]
) -> None:
    oracle, row = Oracle(world), Row("eventwatch SIGSTOP beyond its lease, another takes over")
    await oracle.recovered()
    holder, standby = pair
    for number in range(times()):
        async with followed(world) as epochs, world.busy(workers=4, replaces=False):
            # In the middle of a burst, so that it wakes up with work in its hands.
            burst = asyncio.gather(
                *(node.restart(grace_s=0) for node in list(world.nodes.values())), return_exceptions=True
            )
            await asyncio.sleep(0.2)
            holder.freeze()
            await standby.says(LEADS, times=number // 2 + 1, within=3 * LEASE)
            await burst
            await asyncio.sleep(1)
            holder.thaw()
            await holder.says(STANDS_BY, times=(number + 1) // 2 + 1, within=CALL)
            ended = time.monotonic()
        took = await oracle.recovered(since=ended)
        row.times += 1
        row.documents += len(world.inserted)
        row.longest_recovery = max(row.longest_recovery, took)
        lost = await oracle.lost_requests()
        row.lost_requests += len(lost)
        assert not lost, "\n".join(lost)
        assert not epochs.went_back, "\n".join(epochs.went_back)
        assert await holder_pid(world) == standby.pid
        assert holder.running
        holder, standby = standby, holder
    row.save()


async def test_a_write_that_arrives_only_after_another_took_over_matches_nothing(
    world: World, mongo: PrivateMongo, tmp_path: Path
) -> None:
    """The write is under way, past every check of the holder's, when its lease runs out."""
    lease = f"{LEASE:.0f}s"
    async with Wire(mongo.ports[0]) as wire:
        through_wire = f"mongodb://127.0.0.1:{wire.port}/?directConnection=true"
        one = Eventwatch(tmp_path, world.settings(lease_duration=lease, mongo_url=through_wire), name="one")
        two = Eventwatch(tmp_path, world.settings(lease_duration=lease), name="two")
        with closing(one), closing(two):
            one.start()
            await one.says(LEADS)
            await Oracle(world).recovered()
            two.start()
            await two.says(STANDS_BY)
            node = next(iter(world.nodes.values()))
            async with followed(world) as epochs:
                wire.hold(b"exited")
                await node.kill()
                await wire.has_held()
                one.freeze()
                await two.says(LEADS, within=3 * LEASE)
                await node.start()
                await Oracle(world).recovered(within=10)
                assert node.id.encode() in wire.held
                written = epochs.writes
                wire.release()
                await asyncio.sleep(0.5)
                assert epochs.writes == written, "the late write has landed"
                one.thaw()
                await one.says(STANDS_BY, within=2 * CALL)
            assert not epochs.went_back, "\n".join(epochs.went_back)
            await Oracle(world).recovered(within=10)
            assert await holder_pid(world) == two.pid


async def test_a_holder_that_slept_through_a_takeover_and_its_release_watches_again(
    world: World, pair: tuple[Eventwatch, Eventwatch]
) -> None:
    one, two = pair
    await Oracle(world).recovered()
    one.freeze()
    await two.says(LEADS)
    assert await two.stop() == 0
    one.thaw()
    await one.says(LEADS, times=2)
    await next(iter(world.nodes.values())).kill()
    await Oracle(world).recovered()
    assert one.running


async def test_a_holder_that_is_told_to_end_releases_its_lease_and_the_standby_takes_over_at_once(
    world: World, pair: tuple[Eventwatch, Eventwatch]
) -> None:
    one, two = pair
    await Oracle(world).recovered()
    one_ended = asyncio.create_task(one.stop())
    await one.says(STOPPED)
    began = time.monotonic()
    await two.says(LEADS, within=1.5)
    took = time.monotonic() - began
    assert await one_ended == 0
    await next(iter(world.nodes.values())).kill()
    await Oracle(world).recovered(within=10)
    assert took < LEASE / 2 + 0.5, f"{took:.2f} s"
    assert await holder_pid(world) == two.pid
