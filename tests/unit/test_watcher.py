"""The watcher against a scripted engine: resumption, duplicates, gaps, rotation, and no hot loops."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from eventwatch.core.clock import VirtualClock
from eventwatch.core.errors import EngineError
from eventwatch.core.facts import Event
from eventwatch.core.metrics import Metrics
from eventwatch.pipeline.watcher import LIFETIME, OVERLAP_NS, Watcher
from tests.kit.seen import logged, texts
from tests.unit.simulated import UnaskedEngine

T0 = 1_795_492_000_000_000_000


class ScriptedEngine(UnaskedEngine):
    """Each connection is one queue: events, an exception to break with, or None for a clean end."""

    def __init__(self) -> None:
        self.connections: list[asyncio.Queue[Event | EngineError | None]] = []
        self.since: list[int | None] = []
        self.refusing = False
        self.closed = 0

    @asynccontextmanager
    async def events(
        self,
        since: int | None,
        on_malformed: Callable[[str], object],  # noqa: ARG002
    ) -> AsyncIterator[AsyncIterator[Event]]:
        self.since.append(since)
        if self.refusing:
            raise EngineError("refused", unreachable=True)
        queue: asyncio.Queue[Event | EngineError | None] = asyncio.Queue()
        self.connections.append(queue)

        async def read() -> AsyncIterator[Event]:
            while (item := await queue.get()) is not None:
                if isinstance(item, EngineError):
                    raise item
                yield item

        try:
            yield read()
        finally:
            self.closed += 1


class Scene:
    """A running watcher, its engine, and what reached the reconciler."""

    def __init__(self, tasks: asyncio.TaskGroup, *, cursor: int | None = None) -> None:
        self.engine = ScriptedEngine()
        self.clock = VirtualClock()
        self.metrics = Metrics()
        self.noticed: list[Event] = []
        self.sweeps = 0
        #: What the engine's clock says when it is asked on a connect (ns).
        self.engine_time: int | None = T0
        self.watcher = watcher = Watcher(
            engine=self.engine,
            on_event=self.noticed.append,
            on_connect=self.on_connect,
            clock=self.clock,
            metrics=self.metrics,
            tasks=tasks,
            cursor=cursor,
        )
        self.task = tasks.create_task(watcher.run())

    async def on_connect(self) -> int | None:
        self.sweeps += 1
        return self.engine_time

    async def settle(self) -> None:
        for _ in range(30):
            await asyncio.sleep(0)

    async def pass_seconds(self, count: int) -> None:
        for _ in range(count):
            self.clock.advance(1)
            await self.settle()

    async def say(self, *items: Event | EngineError | None, connection: int = -1) -> None:
        for item in items:
            self.engine.connections[connection].put_nowait(item)
        await self.settle()

    def counted(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture
async def scene() -> AsyncIterator[Scene]:
    async with asyncio.TaskGroup() as tasks:
        scene = Scene(tasks)
        await scene.settle()
        yield scene
        scene.task.cancel()


def event(offset_ns: int, action: str = "start", node: str = "n") -> Event:
    return Event(action, node, T0 + offset_ns)


async def test_the_first_connection_asks_for_no_history_and_a_sweep(scene: Scene) -> None:
    assert scene.engine.since == [None]
    assert scene.sweeps == 1
    assert scene.counted("eventwatch_stream_connected") == 1


async def test_a_cursor_from_an_earlier_life_is_where_it_resumes() -> None:
    async with asyncio.TaskGroup() as tasks:
        scene = Scene(tasks, cursor=T0)
        await scene.settle()
        assert scene.engine.since == [T0 - OVERLAP_NS]
        scene.task.cancel()


@pytest.mark.parametrize("end", [None, EngineError("cut")])
async def test_after_any_end_it_resumes_with_overlap_drops_duplicates_and_asks_for_a_sweep(
    scene: Scene, end: EngineError | None
) -> None:
    first, newest, late = event(0), event(500), event(200)
    await scene.say(first, newest, late, end)
    assert scene.counted("eventwatch_stream_connected") == 0
    scene.clock.advance(1)
    await scene.settle()
    assert scene.engine.since == [None, newest.time_nano - OVERLAP_NS]
    assert scene.sweeps == 2
    await scene.say(first, late, newest, event(900))
    assert scene.noticed == [first, newest, late, event(900)]
    assert scene.counted("eventwatch_stream_gaps_total") == 0


async def test_a_newest_event_that_is_not_replayed_is_a_gap(scene: Scene) -> None:
    await scene.say(event(0), None)
    scene.clock.advance(0.5)
    await scene.settle()
    await scene.say(event(700))
    assert scene.counted("eventwatch_stream_gaps_total") == 1


async def test_a_gap_is_noticed_on_a_stream_that_stays_silent(scene: Scene) -> None:
    await scene.say(event(0), None)
    scene.clock.advance(0.5)
    await scene.settle()
    scene.clock.advance(2)
    assert scene.counted("eventwatch_stream_gaps_total") == 1


async def test_an_engine_that_ends_every_stream_at_once_is_no_hot_loop(scene: Scene) -> None:
    for _ in range(600):
        if scene.engine.connections and scene.counted("eventwatch_stream_connected"):
            await scene.say(None)
        scene.clock.advance(0.1)
        await scene.settle()
    # One minute, at most one connection per half a second once backed off.
    assert 50 < len(scene.engine.connections) < 135


async def test_a_refusing_engine_is_asked_again_for_ever_and_within_a_second_of_its_return(scene: Scene) -> None:
    scene.engine.refusing = True
    await scene.say(EngineError("gone"))
    await scene.pass_seconds(3600)
    scene.engine.refusing = False
    scene.clock.advance(1.01)
    await scene.settle()
    assert scene.counted("eventwatch_stream_connected") == 1


async def test_an_outage_is_one_line_when_it_begins_and_one_when_it_is_over(scene: Scene) -> None:
    with logged("INFO") as lines:
        scene.engine.refusing = True
        await scene.say(EngineError("broke"))
        await scene.pass_seconds(700)
        scene.engine.refusing = False
        await scene.pass_seconds(2)
    first, second = texts(lines)
    assert first == "refused. Retrying until it is back"
    assert re.fullmatch(r"The engine is back after 70[0-2]\.\d s, event stream open", second)


async def test_a_break_that_is_mended_at_once_is_one_line(scene: Scene) -> None:
    with logged("INFO") as lines:
        await scene.say(EngineError("broke"))
        scene.clock.advance(1)
        await scene.settle()
    assert texts(lines) == ["Reconnecting to the engine took 1.0 s: broke"]


async def test_a_connection_is_renewed_before_the_old_one_is_dropped(scene: Scene) -> None:
    await scene.say(event(0))
    scene.clock.advance(LIFETIME[1])
    await scene.settle()
    assert len(scene.engine.connections) == 2
    assert scene.engine.closed == 1
    assert scene.counted("eventwatch_stream_connected") == 1
    assert scene.counted("eventwatch_stream_reconnects_total", reason="rotated") == 1
    await scene.say(event(0), event(1))
    assert scene.noticed == [event(0), event(1)]


async def test_a_renewal_that_fails_keeps_the_connection(scene: Scene) -> None:
    scene.engine.refusing = True
    scene.clock.advance(LIFETIME[1])
    await scene.settle()
    assert scene.engine.closed == 0
    await scene.say(event(3))
    assert scene.noticed == [event(3)]


async def test_a_stream_that_did_not_tell_what_a_sweep_saw_is_deaf_and_renewed(
    scene: Scene,
) -> None:
    await scene.say(event(10))
    scene.watcher.expect_events_up_to(T0 + 500)
    assert not scene.watcher.deaf  # the event may be on its way
    scene.clock.advance(1.1)
    await scene.settle()
    assert scene.watcher.deaf
    assert len(scene.engine.connections) == 2
    assert scene.engine.closed == 1
    assert scene.counted("eventwatch_stream_reconnects_total", reason="deaf") == 1
    scene.engine_time = T0 + 600
    scene.watcher.expect_events_up_to(T0 + 700)
    scene.clock.advance(1.1)
    await scene.settle()
    assert len(scene.engine.connections) == 3
    await scene.say(event(500), event(700))
    assert not scene.watcher.deaf
    assert scene.noticed == [event(10), event(500), event(700)]


@pytest.mark.parametrize(
    "fact",
    [pytest.param(400, id="the stream told later"), pytest.param(-1, id="before the stream was opened")],
)
async def test_what_the_stream_need_not_tell_proves_nothing(scene: Scene, fact: int) -> None:
    scene.watcher.expect_events_up_to(T0 + fact)
    await scene.say(event(450))
    scene.clock.advance(2)
    await scene.settle()
    assert not scene.watcher.deaf
    assert len(scene.engine.connections) == 1


async def test_an_engine_that_does_not_tell_its_time_is_not_taken_for_deaf() -> None:
    async with asyncio.TaskGroup() as tasks:
        scene = Scene(tasks)
        scene.engine_time = None
        await scene.settle()
        scene.watcher.expect_events_up_to(T0 + 1)
        scene.clock.advance(2)
        await scene.settle()
        assert not scene.watcher.deaf
        scene.task.cancel()
