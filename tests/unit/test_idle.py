"""An idle stop and a restart that comes in between, where the database is slow to take writes."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from eventwatch.core.clock import KindestClock
from eventwatch.core.facts import STOPPING, Event, Observation, Recorded
from eventwatch.engine.protocol import Engine
from eventwatch.pipeline.essentials import Essentials
from eventwatch.pipeline.idle import Stop
from eventwatch.pipeline.pipeline import Pipeline
from eventwatch.replay.timeline import Busy, Simulation
from tests.unit.simulated import ENGINE_ID, MS, NETWORK, START, MemoryStore, Stream, UnaskedEngine, World

NODE = "a" * 64
BEGAN = datetime.fromtimestamp(START / 1e9, UTC)


class OneNode(UnaskedEngine):
    def __init__(self) -> None:
        self.started = BEGAN - timedelta(hours=2)
        self.stopped: list[str] = []

    async def inspect(self, node_id: str, *, as_of: int = 0) -> Observation:
        return Observation(
            node_id, status="running", ip="10.0.0.1", networks=(NETWORK,), started_at=self.started, time_nano=as_of
        )

    async def stop(self, node_id: str, *, grace: float) -> None:  # noqa: ARG002
        self.stopped.append(node_id)


@pytest.mark.parametrize("restarts", [False, True])
async def test_a_node_that_is_restarted_before_the_second_look_is_not_stopped(
    monkeypatch: pytest.MonkeyPatch, *, restarts: bool
) -> None:
    async with asyncio.TaskGroup() as tasks:
        time, engine = Simulation(START, Busy()), OneNode()
        store = MemoryStore(random.Random(0), time.clock)
        pipeline = Pipeline(
            engine=cast("Engine", engine),
            store=store,
            clock=time.clock,
            time=KindestClock(time.clock, 0.0),
            tasks=tasks,
            settings=World([], Stream(), 0).settings.model_copy(update={"idle_timeout": 60.0}),
            engine_id=ENGINE_ID,
            sweeps=False,
            looks=False,
        )
        used = (BEGAN - timedelta(hours=1)).replace(tzinfo=None)
        document = Recorded(NODE, NODE[:12], "running", "none", "10.0.0.1", 1, last_req_time=used)
        store.put(document)
        pipeline.reconciler.replace_known({NODE: document}, known_before={})

        async def claim(*_: Any, **__: Any) -> bool:
            await time.clock.sleep(1.0)
            store.put(replace(document, status=STOPPING))
            return True

        async def confirm(*_: Any, **__: Any) -> bool:
            return store.documents[NODE].status == STOPPING  # as no writer runs, a start does not show there

        async def nothing(*_: Any, **__: Any) -> Essentials:
            return Essentials()

        monkeypatch.setattr(pipeline.writer, "claim", claim)
        monkeypatch.setattr(pipeline.writer, "confirm_claim", confirm)
        monkeypatch.setattr(pipeline.writer, "end_claim", nothing)
        monkeypatch.setattr(pipeline.writer, "withdraw_claim", nothing)
        inspecting = tasks.create_task(pipeline.reconciler.run_inspector())
        stopping = tasks.create_task(pipeline.stopper._stop_claimed(Stop(document)))
        await time.run_until(START + 100 * MS)
        if restarts:
            engine.started = BEGAN + timedelta(milliseconds=110)
            pipeline.reconciler.on_event(Event("die", NODE, START + 105 * MS))
            pipeline.reconciler.on_event(Event("start", NODE, START + 110 * MS))
        await time.run_until(START + 3000 * MS)
        assert stopping.done()
        assert engine.stopped == ([] if restarts else [NODE])
        inspecting.cancel()
