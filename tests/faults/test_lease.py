"""Two watchers on one engine: only one writes, whatever is done to the other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.faults.harness import Eventwatch, Oracle, World

LEADS = "Nodes status checker started."


@pytest.fixture
async def pair(world: World, tmp_path: Path) -> AsyncIterator[tuple[Eventwatch, Eventwatch]]:
    """A holder and a standby, with a lease of 2 s."""
    both = tuple(Eventwatch(tmp_path, world.settings(lease_duration="2s"), name=name) for name in ("one", "two"))
    one, two = both
    one.start()
    await one.logged(LEADS)
    two.start()
    await two.logged("Standing by")
    yield one, two
    for process in both:
        process.close()


async def test_a_holder_that_slept_through_a_takeover_and_its_release_watches_again(
    world: World, pair: tuple[Eventwatch, Eventwatch]
) -> None:
    one, two = pair
    await Oracle(world).recovered()
    one.freeze()
    await two.logged(LEADS)
    assert await two.terminate() == 0
    one.thaw()
    await one.logged(LEADS, times=2)
    await next(iter(world.nodes.values())).kill()
    await Oracle(world).recovered()
    assert one.running
