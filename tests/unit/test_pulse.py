"""Whether the engine answers, as it is asked every few seconds."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from eventwatch.core.clock import VirtualClock
from eventwatch.core.errors import EngineError
from eventwatch.pipeline.pulse import Pulse


class FrozenAtTimes:
    """Answers, refuses or says nothing, as it is told to."""

    def __init__(self) -> None:
        self.says = "yes"
        self.thawed = asyncio.Event()

    async def ask(self) -> None:
        if self.says == "no":
            raise EngineError("refused")
        if self.says == "nothing":
            await self.thawed.wait()


async def test_an_engine_that_says_nothing_is_doubted_until_it_answers() -> None:
    engine, clock = FrozenAtTimes(), VirtualClock()
    pulse = Pulse(engine.ask, clock)
    running = asyncio.create_task(pulse.run())

    async def pass_seconds(count: int) -> None:
        for _ in range(count):
            for _ in range(5):
                await asyncio.sleep(0)
            clock.advance(1)
        for _ in range(5):
            await asyncio.sleep(0)

    await pass_seconds(30)
    assert pulse.unready_reasons() == []
    assert clock.monotonic() - pulse.answered_at <= 3
    for trouble in ("nothing", "no"):
        engine.says = trouble
        await pass_seconds(6)
        assert pulse.unready_reasons() == []
        await pass_seconds(6)
        assert "has not answered for" in pulse.unready_reasons()[0]
        engine.says = "yes"
        engine.thawed.set()
        await pass_seconds(4)
        assert pulse.unready_reasons() == []
        engine.thawed.clear()
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
