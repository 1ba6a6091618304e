"""Everything between an engine and a store for as long as one lease lasts: here the parts meet, and nowhere else.

The application, a replay, a pass by hand and the tests' simulation run this. They differ in the engine, the store,
the clock, and in how careful they are (`Care`); none of them wires parts by itself.

Each part gets what it calls through its constructor, in the order of imports. `start` creates every task, `drain`
and `end` end them. Not promised: that a pipeline can be started twice.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from loguru import logger

from eventwatch.core.clock import Clock, KindestClock
from eventwatch.core.errors import EngineChangedError, LeaseLostError, StoreError
from eventwatch.core.facts import nanos
from eventwatch.core.metrics import Metrics
from eventwatch.core.reasons import Reasons
from eventwatch.engine.protocol import Engine
from eventwatch.pipeline.afterlook import Afterlook
from eventwatch.pipeline.deletion import Deletions, MassBrake
from eventwatch.pipeline.idle import IdleStopper
from eventwatch.pipeline.inspections import INSPECTORS, Inspections
from eventwatch.pipeline.orphans import Orphans
from eventwatch.pipeline.ownership import OwnerRecord
from eventwatch.pipeline.reconciler import Reconciler
from eventwatch.pipeline.requests import SweepRequests
from eventwatch.pipeline.roster import Roster
from eventwatch.pipeline.sweeper import Sweeper
from eventwatch.pipeline.twins import TwinWatch
from eventwatch.pipeline.watcher import Watcher
from eventwatch.pipeline.writer import Writer
from eventwatch.settings.model import Settings
from eventwatch.store.connection import Store
from eventwatch.store.rows import Lease

#: What a task runs.
Part = Callable[[], Awaitable[None]]
_NOTHING: Final[Mapping[str, Part]] = {}


@dataclass(frozen=True, slots=True)
class Brakes:
    """The brakes of one who sweeps again and again: passes must agree before many nodes are acted on."""

    deletions: MassBrake = field(default_factory=MassBrake)
    stops: MassBrake = field(default_factory=MassBrake)


@dataclass(frozen=True, slots=True)
class Care:
    """How careful a pipeline is with what concerns many nodes, or nobody's.

    `grace` (s; see `Deletions`) is for documents that nobody owns, `patience` (s; see `Sweeper`) for an engine
    that is slow to tell of one node.
    """

    brakes: Brakes | None = None
    grace: float | None = 0.0
    patience: float | None = None


class Pipeline:
    """The parts, and their tasks once it is started.

    `sweeps` and `looks`: whether passes, and looks at what others may have written, are made by themselves.
    `stopping` is set when the end of a part is no fault any more.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        store: Store,
        settings: Settings,
        clock: Clock,
        time: KindestClock,
        tasks: asyncio.TaskGroup,
        requests: SweepRequests | None = None,
        metrics: Metrics | None = None,
        engine_id: str = "",
        host: str = "",
        manager_id: str = "",
        lease: Lease | None = None,
        holds_lease: Callable[[], bool] = lambda: True,
        twins: TwinWatch | None = None,
        care: Care = Care(),
        rng: random.Random | None = None,
        stopping: asyncio.Event | None = None,
        sweeps: bool = True,
        looks: bool = True,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._tasks = tasks
        self._stopping = stopping or asyncio.Event()
        self._sweeps = sweeps
        self._looks = looks
        self._engine_id = engine_id
        #: What runs, by name.
        self.running: dict[str, asyncio.Task[None]] = {}
        self._intake: list[asyncio.Task[None]] = []
        rng = rng or random.Random()  # noqa: S311 - spreads load
        brakes = care.brakes
        requests = self.requests = requests or SweepRequests(clock, rng.random)
        metrics = self.metrics = metrics or Metrics()
        request_sweep: Callable[[], object] = requests.ask if sweeps else lambda: None
        self.inspections = Inspections(clock, request_sweep)
        self.roster = Roster(
            reasons=Reasons(clock=clock, metrics=metrics, health_check=settings.health_check),
            inspections=self.inspections, engine_id=engine_id, host=host,
        )  # fmt: skip
        self.owners = OwnerRecord(
            store=store, roster=self.roster, clock=clock, keeps=lease is not None and not settings.dry_run
        )
        self.orphans = Orphans(
            store=store, roster=self.roster, owners=self.owners, inspections=self.inspections, clock=clock,
            grace=settings.orphan_grace, request_sweep=request_sweep,
        )  # fmt: skip
        self.writer = Writer(
            store=store, roster=self.roster, owners=self.owners, inspections=self.inspections, settings=settings,
            clock=clock, metrics=metrics, lease=lease, holds_lease=holds_lease,
        )  # fmt: skip
        self.reconciler = Reconciler(
            engine=engine, settings=settings, roster=self.roster, inspections=self.inspections,
            orphans=self.orphans, writer=self.writer, request_sweep=request_sweep, clock=clock, metrics=metrics,
            tasks=tasks,
        )  # fmt: skip
        self.afterlook = Afterlook(
            store=store, roster=self.roster, owners=self.owners, orphans=self.orphans,
            reconciler=self.reconciler, longest=settings.sweep_interval, clock=clock,
        )  # fmt: skip
        self.watcher = Watcher(
            engine=engine, on_event=self.reconciler.on_event, on_connect=self._on_connect, clock=clock,
            metrics=metrics, tasks=tasks, cursor=lease.cursor if lease else None, rng=rng,
        )  # fmt: skip
        self.stopper = IdleStopper(
            engine=engine, store=store, roster=self.roster, owners=self.owners, writer=self.writer,
            reconciler=self.reconciler, settings=settings, tasks=tasks, clock=clock, time=time, metrics=metrics,
            brake=brakes.stops if brakes else None,
        )  # fmt: skip
        self.sweeper = Sweeper(
            engine=engine, store=store, roster=self.roster, owners=self.owners, inspections=self.inspections,
            orphans=self.orphans, writer=self.writer, reconciler=self.reconciler, stopper=self.stopper,
            deletions=Deletions(
                store=store, clock=clock, twins=twins or TwinWatch(engine, store),
                delete_limit=settings.delete_limit, brake=brakes.deletions if brakes else None, grace=care.grace,
            ),
            requests=requests, on_newest_change=self.watcher.expect_events_up_to, clock=clock, time=time,
            settings=settings, metrics=metrics, manager_id=manager_id, patience=care.patience, rng=rng.random,
        )  # fmt: skip
        if looks:
            self.writer.listeners.append(self.afterlook.remember)

    async def _on_connect(self) -> int | None:
        info = await self._engine.identify()
        if info.id != self._engine_id:
            raise EngineChangedError("another engine answers at the same address now")
        self.reconciler.foresight.drop_all()  # what was told in between may never be told again
        self.requests.ask(after_connect=True)
        return nanos(info.system_time) or None

    def start(self, *, intake: Mapping[str, Part] = _NOTHING, workers: Mapping[str, Part] = _NOTHING) -> None:
        """Create every task: what takes in, and with it `intake`, what writes, and with it `workers`."""
        takers: dict[str, Part] = {"watcher": self.watcher.run}
        if self._sweeps:
            takers["sweeper"] = self.sweeper.run
        takers["orphanage"] = self.orphans.run
        if self._looks:
            takers["afterlook"] = self.afterlook.run
        writers: dict[str, Part] = {
            "writer": self.writer.run,
            "owner-recorder": self.owners.run,
            **{f"inspector-{number}": self.reconciler.run_inspector for number in range(INSPECTORS)},
        }
        self._intake = [self._start(*part) for part in {**takers, **intake}.items()]
        for part in {**writers, **workers}.items():
            self._start(*part)

    def _start(self, name: str, part: Part) -> asyncio.Task[None]:
        task = self.running[name] = self._tasks.create_task(self._last(name, part), name=name)
        return task

    async def _last(self, name: str, part: Part) -> None:
        """Run a part that lasts as long as the pipeline does: its end, whatever its cause, ends the pipeline.

        A part that is missing, and that nobody misses, leaves documents wrong for ever.
        """
        try:
            await part()
        except asyncio.CancelledError as error:
            if is_cancelled(error):
                raise
            cause: BaseException | None = error
        else:
            cause = None
        if not self._stopping.is_set():  # else it must not take the time to finish from the others
            raise RuntimeError(f"{name} ended by itself") from cause

    async def drain(self) -> None:
        """Take in nothing more, and finish what is pending within `drain_timeout`."""
        for task in self._intake:
            task.cancel()
        try:
            async with asyncio.timeout(self._settings.drain_timeout):
                await self.stopper.drain()
                await self.reconciler.drain()
                await self.owners.write()
        except TimeoutError:
            self.stopper.cancel_all()
            logger.warning("Not everything was finished within drain_timeout; the next start makes it right")
        except (StoreError, LeaseLostError) as error:
            logger.warning("Not everything could be written: {}; the next start makes it right", error)

    def end(self) -> None:
        """End every task wherever it is."""
        self.reconciler.foresight.drop_all()
        for task in self.running.values():
            task.cancel()


def is_cancelled(error: BaseException) -> bool:
    """Whether this is the cancellation of the task that runs, rather than one that some code made up."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0
