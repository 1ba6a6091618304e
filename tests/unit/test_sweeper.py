"""What a pass is spared: how many there are when the database comes back."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.unit.simulated import START, Container, Stream, World

SECOND = 1_000_000_000


def counted_passes(world: World, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many passes have read the documents so far."""
    read_own, passes = world.store.read_own, 0

    async def read(*arguments: object, **named: object) -> object:
        nonlocal passes
        passes += 1
        return await read_own(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(world.store, "read_own", read)
    return lambda: passes


@pytest.mark.parametrize("others", [0, 1])
async def test_the_databases_return_asks_for_one_pass_unless_one_began_since(
    others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    container = Container(1, random.Random(0), checked=True, starts_at=START)
    container.do("start", 100)
    world = World([container], Stream(), 0)
    world.settings = world.settings.model_copy(update={"sweep_interval": 1e6})
    passes, before = counted_passes(world, monkeypatch), 0

    def back() -> None:
        nonlocal before
        before = passes()
        world.requests.database_returned()

    def ask_besides() -> None:
        for _ in range(others):
            world.requests.ask()

    after: list[int] = []
    back_at = START + 10 * SECOND
    acts: dict[int, Callable[[], object]] = {back_at: back, back_at + 1000: ask_besides}
    acts[back_at + 5 * SECOND] = lambda: after.append(passes() - before)
    await world.run(meanwhile=acts)
    assert after == [1]
