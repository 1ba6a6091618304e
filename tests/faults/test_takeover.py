"""A holder that was killed is succeeded at once by who can prove it, with a lease of five minutes; others wait.

`python -m tests.takeover` measures it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.faults.epochs import followed
from tests.faults.harness import Oracle, World
from tests.kit.eventwatch import Eventwatch
from tests.kit.truth import ago
from tests.takeover import (
    LEASE,
    containers_again,
    containers_standing_by,
    holder,
    processes_again,
    processes_standing_by,
    succeeded,
)

LEADS, STANDS_BY, WAITS = "Nodes status checker started.", "Standing by", "nothing was seen of it yet"


@pytest.fixture
async def shared_world(docker_url: str, mongo: object) -> AsyncIterator[World]:
    """On the engine that the other tests share: what runs in its containers reaches this machine's database."""
    async with World(docker_url, mongo.url) as made:  # type: ignore[attr-defined]
        await made.populate(3)
        yield made


async def test_a_process_that_was_killed_is_succeeded_by_the_next_one_and_by_its_standby(
    world: World, tmp_path: Path
) -> None:
    async with followed(world) as epochs:
        await processes_again(world, tmp_path, kills=1)
        await processes_standing_by(world, tmp_path, kills=2)
    assert not epochs.went_back


async def test_a_container_that_was_killed_is_succeeded_by_its_next_run_and_by_its_standby(
    shared_world: World,
) -> None:
    async with followed(shared_world) as epochs:
        await containers_again(shared_world, kills=1)
        await shared_world.checkers.delete_many({})
        await containers_standing_by(shared_world, kills=1)
    assert not epochs.went_back


async def test_a_holder_that_is_frozen_is_waited_for_and_one_that_was_taken_for_dead_writes_nothing(
    world: World, tmp_path: Path
) -> None:
    settings = world.settings(lease_duration=LEASE, sweep_interval="10m")
    one, two = (Eventwatch(tmp_path, settings, name=name) for name in ("one", "two"))
    with closing(one), closing(two):
        one.start()
        await Oracle(world).recovered()
        two.start()
        await two.says(STANDS_BY)
        async with followed(world) as epochs:
            # In the middle of a burst, so that it wakes up with work in its hands.
            burst = asyncio.gather(*(node.restart(grace_s=0) for node in list(world.nodes.values())))
            await asyncio.sleep(0.2)
            one.freeze()
            await burst
            await asyncio.sleep(3)
            assert LEADS not in two.output
            before = await holder(world)
            # A record that lies: such a process has never been.
            await world.checkers.update_one({}, {"$set": {"life.started": 1}})
            await succeeded(world, before)
            await two.says(LEADS)
            one.thaw()
            await one.says(STANDS_BY)
            await next(iter(world.nodes.values())).kill()
            await Oracle(world).recovered()
        assert not epochs.went_back, "\n".join(epochs.went_back)
        assert (await holder(world))["pid"] == two.pid
        assert one.running


async def test_a_predecessor_that_cannot_be_proven_dead_is_waited_for_and_not_called_a_leader(
    world: World, tmp_path: Path
) -> None:
    one = Eventwatch(tmp_path, world.settings(lease_duration=LEASE))
    with closing(one):
        one.start()
        await one.says(LEADS)
        await one.kill()
        # As from another machine of the same name, or before a boot.
        await world.checkers.update_one({}, {"$set": {"life.boot_id": "00000000-0000-0000-0000-000000000000"}})
        one.start()
        await one.says(WAITS, within=60)
        await world.checkers.update_one({}, {"$set": {"expires_at": ago(1)}})
        await one.says(LEADS, times=2, within=60)
    assert STANDS_BY not in one.output
    assert "Taking over" not in one.output
