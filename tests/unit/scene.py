"""One node, and an engine that answers each inspection when, and as, the test says."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace

from eventwatch.core.clock import KindestClock
from eventwatch.core.facts import Event, Observation, Recorded
from eventwatch.pipeline.pipeline import Pipeline
from eventwatch.replay.timeline import Busy, Simulation
from tests.unit.simulated import ENGINE_ID, MS, NETWORK, START, MemoryStore, SimulatedEngine, Stream, World

NODE = "a" * 64
RUNNING = Observation(NODE, status="running", health="starting", ip="10.0.0.1", time_nano=START)


class ScriptedEngine(SimulatedEngine):
    """Holds each inspection, and each question for an address, until the test answers it."""

    def __init__(self) -> None:
        self.looks: list[asyncio.Future[Mapping[str, str]]] = []
        self.asked: list[asyncio.Future[Observation]] = []
        self.asked_about: list[str] = []

    async def inspect(self, node_id: str, *, as_of: int = 0) -> Observation:
        self.asked_about.append(node_id)
        self.asked.append(asyncio.get_running_loop().create_future())
        seen = await self.asked[-1]
        return replace(seen, time_nano=max(seen.time_nano, as_of))

    async def addresses(self, network_id: str) -> Mapping[str, str]:  # noqa: ARG002 - as an engine is asked
        self.looks.append(asyncio.get_running_loop().create_future())
        return await self.looks[-1]


class Scene:
    def __init__(self, tasks: asyncio.TaskGroup, *, status: str) -> None:
        self.time = Simulation(START, Busy())
        self.engine = ScriptedEngine()
        self.store = MemoryStore(random.Random(0), self.time.clock)
        settings = World([], Stream(), 0).settings
        pipeline = Pipeline(
            engine=self.engine,
            store=self.store,
            settings=settings,
            clock=self.time.clock,
            time=KindestClock(self.time.clock, 0.0),
            tasks=tasks,
            engine_id=ENGINE_ID,
            sweeps=False,
            looks=False,
        )
        self.roster, self.reconciler, self.writer = pipeline.roster, pipeline.reconciler, pipeline.writer
        self.inspections = pipeline.inspections
        self.store.put(Recorded(NODE, NODE[:12], status, "none", "", 1))
        self.reconciler.replace_known(dict(self.store.documents), known_before={})
        self.running = [tasks.create_task(pipeline.writer.run())]
        self.running += [tasks.create_task(self.reconciler.run_inspector()) for _ in range(2)]

    @property
    def document(self) -> Recorded:
        return self.store.documents[NODE]

    def on_event(
        self, action: str, at_ms: int, health: str | None = None, *, node: str = NODE, network: str = NETWORK
    ) -> None:
        named = ("n", network) if action in {"connect", "disconnect"} else ("", "")
        self.reconciler.on_event(Event(action, node, START + at_ms * MS, health, *named))

    async def pass_ms(self, ms: int) -> None:
        await self.time.run_until(self.time.clock.time_ns() + ms * MS)


@asynccontextmanager
async def opened(*, status: str = "running") -> AsyncIterator[Scene]:
    async with asyncio.TaskGroup() as tasks:
        scene = Scene(tasks, status=status)
        yield scene
        scene.reconciler.foresight.drop_all()
        for task in scene.running:
            task.cancel()
