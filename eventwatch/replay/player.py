"""Replays a recording through the real pipeline: only the engine is replaced, everything behind it is itself.

Why: what an engine once did, at any speed, as often as wanted, with a known truth at the end. `open_replay`
runs watcher, reconciler, sweeper and store against a `ReplayEngine` and a real MongoDB, and plays the manager
too: it inserts the document of each container when the recording first speaks of it.

At speed 0 time is virtual (see timeline.py): 90 recorded seconds take a fraction of one, with the same result
each time. In a `hurry` it does not wait for the writer either, which then takes larger batches: the end is the
same, what the documents say on the way there is not. At speed N the clock is real, N times as fast; what the
database takes then counts N times.

Contract: the recording is known to be sound before the database is looked at, and the database to hold
nothing else before it is written to. Documents of other nodes are neither read nor written, even with `force`.

Not promised: that a replay passes through the same states as the recorded system did; it ends at the same truth.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import statistics
import time
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import groupby
from typing import Any, Final

from eventwatch.core.clock import Clock, KindestClock, SystemClock
from eventwatch.core.errors import ConfigError, EventwatchError
from eventwatch.core.facts import Cause, Change, Event, Owner, Recorded, Write
from eventwatch.core.metrics import Metrics
from eventwatch.core.policy import KNOWN_ACTIONS
from eventwatch.pipeline.elector import LeaderElector
from eventwatch.pipeline.pipeline import Pipeline
from eventwatch.pipeline.reconciler import SETTLE_LIMIT
from eventwatch.replay.engine import ENGINE_ID, ReplayEngine
from eventwatch.replay.recording import TRUTH, Recording, Truth
from eventwatch.replay.timeline import Busy, RealTime, Simulation, Timeline
from eventwatch.settings.model import Settings
from eventwatch.store.connection import Store, open_store
from eventwatch.store.documents import NodeChecker, ToolServerNode
from eventwatch.store.rows import Lease

#: A settle delay that no recording outlives.
NEVER: Final = 1e9


class Tier(IntEnum):
    """How many of the three tiers work: hints alone, settling too, sweeps too."""

    HINTS = 1
    SETTLE = 2
    SWEEP = 3


# -- the database -------------------------------------------------------------------------------------------


class ReplayStore(Store):
    """The real store, confined to the nodes of one recording, that tells while a call is under way."""

    def __init__(self, node_ids: Collection[str], busy: Busy, behind: Busy) -> None:
        super().__init__()
        self._ids = frozenset(node_ids)
        self._busy = busy
        self._behind = behind
        #: Whose calls time does not wait for.
        self.writer: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def call(self, doing: str) -> AsyncIterator[None]:
        """Let virtual time not pass beneath a call, whichever the pipeline may come to make."""
        is_behind = self.writer is not None and asyncio.current_task() is self.writer
        with self._behind if is_behind else self._busy:
            async with super().call(doing):
                yield

    async def read(self, node_ids: Collection[str], *, to_write: bool = False) -> dict[str, Recorded]:
        """Read documents of this recording only."""
        return await super().read(self._ids.intersection(node_ids), to_write=to_write)

    async def read_all(self) -> dict[str, Recorded]:
        """Read the documents of this recording."""
        return await super().read(self._ids)

    async def read_own(
        self, engine_id: str, node_ids: Collection[str], *, leftovers: bool = False
    ) -> dict[str, Recorded]:
        """Read the documents of this recording, which are all of its engine's."""
        del engine_id, node_ids, leftovers
        return await super().read(self._ids, to_write=True)

    async def make_ready(self, database: str, *, force: bool) -> None:
        """Remove what an earlier replay left. Raises ConfigError when the database serves something else."""
        if others := await self.other_live_engines(ENGINE_ID):
            raise ConfigError(
                f"Database {database} is in use: a live checker watches engine {min(others)}. "
                "Set EVENTWATCH_MONGO_DATABASE to one for replays"
            )
        foreign = await self.count_others(self._ids)
        if foreign and not force:
            raise ConfigError(
                f"Database {database} holds {foreign} nodes that are not of this recording: "
                "set EVENTWATCH_MONGO_DATABASE to another one, or use --force (they are left alone)"
            )
        left = await self.read_all()
        owners = await self.read_owners(left)
        live = [i for i, node in left.items() if not _is_replayed(node, owners.get(i))]
        if live and not force:
            raise ConfigError(
                f"Database {database} holds documents of {len(live)} nodes of this recording, made by no replay "
                f"({live[0][:12]}): set EVENTWATCH_MONGO_DATABASE to another, or use --force (they are deleted)"
            )
        if left:
            await self.write([Write(i, {}, Cause.EVENT, delete=True) for i in left], lease=None)
        await self.record_gone(self._ids, engine_id=ENGINE_ID)

    async def insert(self, node_ids: Iterable[str]) -> None:
        """Be the manager: give each of these containers a document."""
        for node_id in node_ids:
            node = ToolServerNode(id=node_id, short_id=node_id[:12], engine_id=ENGINE_ID)
            await self.register(node, lease=None)


def _is_replayed(node: Recorded, owner: Owner | None) -> bool:
    """Whether an earlier replay made this document."""
    return ENGINE_ID in {node.engine_id, owner.engine_id if owner else None}


# -- what comes of it ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Divergence:
    """A document that does not say the truth. A field named `document` is about its being there at all."""

    node_id: str
    field: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.node_id} {self.field}: expected {self.expected!r}, found {self.found!r}"


def compare(expected: Truth, documents: Mapping[str, Recorded], node_ids: Iterable[str]) -> list[Divergence]:
    """Compare the documents of these containers with the truth; one without an expectation must have none."""
    found: list[Divergence] = []
    for node_id in sorted(node_ids):
        wanted, document = expected.get(node_id), documents.get(node_id)
        if wanted is None and document is not None:
            found.append(Divergence(node_id, "document", "none", document.status or ""))
        elif wanted is not None and document is None:
            found.append(Divergence(node_id, "document", wanted["status"], "none"))
        elif wanted is not None and document is not None:
            pairs = ((name, wanted[name], getattr(document, name) or "") for name in TRUTH)
            found += [Divergence(node_id, *pair) for pair in pairs if pair[1] != pair[2]]
    return found


@dataclass(slots=True)
class Report:
    """How a replay went. `latencies` (s, real time) run from an event's delivery to its acknowledged write.

    `before_sweep` and `divergences` are None when there was no truth to compare with; `drift` are the documents
    that only the final sweep put right, `sweep_corrections` the fields that any sweep did.
    """

    containers: int
    recorded_seconds: float
    events: int = 0
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    before_sweep: list[Divergence] | None = None
    divergences: list[Divergence] | None = None
    drift: list[str] = field(default_factory=list)
    sweep_corrections: dict[str, int] = field(default_factory=dict)

    @property
    def wrong(self) -> int:
        """How many documents do not say the truth at the end."""
        return len({divergence.node_id for divergence in self.divergences or ()})

    @property
    def events_per_second(self) -> float:
        """Events delivered, by real time."""
        return self.events / self.seconds if self.seconds else 0.0

    def percentile(self, percent: int) -> float | None:
        """A percentile of the latencies, in seconds."""
        if len(self.latencies) < 2:  # noqa: PLR2004 - one value has no distribution
            return self.latencies[0] if self.latencies else None
        return statistics.quantiles(self.latencies, n=100, method="inclusive")[percent - 1]


# -- the replay ---------------------------------------------------------------------------------------------


def replay_settings(settings: Settings, recording: Recording, tiers: Tier) -> Settings:
    """The settings under which a recording is replayed: its network, and nothing that acts on an engine."""
    return settings.model_copy(
        update={
            "node_network": recording.header.network or settings.node_network,
            "health_check": True,
            "idle_timeout": 0.0,
            "dry_run": False,
            "register_label": None,
            "settle_delay": settings.settle_delay if tiers >= Tier.SETTLE else NEVER,
        }
    )


class Replay:
    """One replay under way; made by `open_replay`. Seconds are those of the recording, from its start."""

    def __init__(
        self,
        recording: Recording,
        settings: Settings,
        *,
        truth: Truth | None,
        speed: float,
        tiers: Tier,
        hurry: bool = False,
    ) -> None:
        self.recording = recording
        self.truth = truth
        self.settings = replay_settings(settings, recording, tiers)
        self.tiers = tiers
        busy, behind = Busy(), Busy()
        start = recording.started_at
        timeline: Timeline = RealTime(start, speed) if speed else Simulation(start, busy, behind)
        self._timeline = timeline
        self._hurry = hurry
        self.clock: Clock = timeline.clock
        self.engine = ReplayEngine(recording, self.clock, network=self.settings.node_network)
        self.store = ReplayStore(recording.first_seen, busy, behind)
        self.report = Report(len(recording.first_seen), (recording.ended_at - start) / 1e9)
        self._delivered: dict[int, float] = {}
        self._in_last_sweep = False
        self.parts: Pipeline | None = None
        self._running = asyncio.Event()
        self._stopping = asyncio.Event()
        self._pipeline: asyncio.Task[None] | None = None
        self.engine.listeners.append(self._count)

    async def until(self, seconds: float) -> None:
        """Let the recording run until then; at speed 0 all that it leads to is written on return."""
        await self._let_pass(self.recording.started_at + round(seconds * 1e9))

    async def finish(self) -> Report:
        """Run to the end, let everything settle, sweep once more, and compare with the truth."""
        settling = SETTLE_LIMIT * self.settings.settle_delay if self.tiers >= Tier.SETTLE else 0.0
        await self._let_pass(self.recording.ended_at + round((settling + self._timeline.aftermath) * 1e9))
        self.report.before_sweep = await self.divergences()
        if self.tiers >= Tier.SWEEP:
            await self._sweep()
        self.report.divergences = await self.divergences()
        return self.report

    async def divergences(self) -> list[Divergence] | None:
        """Compare the documents, as they are now, with the truth at the end; None without one."""
        if self.truth is None:
            return None
        return compare(self.truth, await self.store.read_all(), self.recording.first_seen)

    async def _let_pass(self, time_ns: int) -> None:
        began = time.perf_counter()
        passing = asyncio.ensure_future(self._timeline.run_until(time_ns))
        await self._unless_it_failed(passing)
        self.report.seconds += time.perf_counter() - began

    async def _sweep(self) -> None:
        if self.parts is None:
            raise RuntimeError("not started")
        self._in_last_sweep = True
        await self._unless_it_failed(asyncio.ensure_future(self.parts.sweeper.sweep()))

    async def _unless_it_failed(self, work: asyncio.Future[Any]) -> None:
        """Wait for `work`, or for the pipeline to fail, and raise what it failed with."""
        if self._pipeline is None:
            raise RuntimeError("not started")
        try:
            await asyncio.wait({work, self._pipeline}, return_when=asyncio.FIRST_COMPLETED)
            if self._pipeline.done():
                await self._pipeline
                raise EventwatchError("The replay was stopped")
            await work
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    # -- bookkeeping ---------------------------------------------------------------------------------

    def _count(self, event: Event) -> None:
        self.report.events += 1
        self._delivered.setdefault(event.time_nano, time.perf_counter())

    def _note(self, written: Change) -> None:
        if written.latency is not None:
            event_time = written.at_ns - round(written.latency * 1e9)
            if event_time in self._delivered:
                self.report.latencies.append(time.perf_counter() - self._delivered[event_time])
        if written.cause is Cause.SWEEP:
            names = ["document"] if written.deleted else [name for name in TRUTH if name in written.new]
            for name in names:
                self.report.sweep_corrections[name] = self.report.sweep_corrections.get(name, 0) + 1
            if names and self._in_last_sweep and written.node_id not in self.report.drift:
                self.report.drift.append(written.node_id)

    # -- the pipeline --------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take the lease and start the pipeline; time stands still until `until` or `finish`."""
        self._pipeline = asyncio.create_task(self._run(), name="replay")
        await self._unless_it_failed(asyncio.ensure_future(self._running.wait()))

    async def stop(self) -> None:
        """End the pipeline wherever it is, and give back the lease."""
        self._stopping.set()
        if self._pipeline is not None:
            await self._pipeline

    async def _run(self) -> None:
        checker = NodeChecker.model_construct(
            manager_id=os.urandom(16).hex(),
            interval=self.settings.sweep_interval,
            pid=os.getpid(),
            host=socket.gethostname(),
            version=None,
        )
        # On a store and a clock of its own: the lease is real, whatever time the recording says it is.
        elector = LeaderElector(
            store=Store(), checker=checker, duration=self.settings.lease_duration, clock=SystemClock()
        )
        lease = await elector.acquire(ENGINE_ID)
        try:
            async with asyncio.TaskGroup() as tasks:
                manager = tasks.create_task(self._play_manager(), name="manager")
                pipeline = self._start_pipeline(tasks, elector, lease)
                self._running.set()
                await self._stopping.wait()
                manager.cancel()
                pipeline.end()
        except* EventwatchError as group:
            raise _first(group) from None
        finally:
            await asyncio.shield(elector.release(lease))

    def _start_pipeline(self, tasks: asyncio.TaskGroup, elector: LeaderElector, lease: Lease) -> Pipeline:
        # Without a brake or grace: what a recording makes vanish is gone. And nobody else writes there.
        pipeline = Pipeline(
            engine=self.engine,
            store=self.store,
            settings=self.settings,
            clock=self.clock,
            time=KindestClock(self.clock, self.settings.idle_timeout),
            tasks=tasks,
            metrics=Metrics(KNOWN_ACTIONS),
            engine_id=lease.engine_id,
            manager_id=lease.manager_id,
            lease=lease,
            holds_lease=elector.holds,
            stopping=self._stopping,
            sweeps=self.tiers >= Tier.SWEEP,
            looks=False,
            rng=random.Random(0),  # noqa: S311 - the same each time
        )
        self.parts = pipeline
        pipeline.writer.listeners.append(self._note)
        pipeline.start(
            workers={"lease-keeper": lambda: elector.renew_until_lost(lease, lambda: pipeline.writer.cursor)}
        )
        if self._hurry:
            self.store.writer = pipeline.running["writer"]
        return pipeline

    async def _play_manager(self) -> None:
        by_time = sorted(self.recording.first_seen.items(), key=lambda item: item[1])
        for at, group in groupby(by_time, key=lambda item: item[1]):
            await self.clock.sleep(max(0.0, (at - self.clock.time_ns()) / 1e9))
            await self.store.insert(node_id for node_id, _ in group)


@asynccontextmanager
async def open_replay(
    recording: Recording,
    settings: Settings,
    *,
    url: str,
    truth: Truth | None = None,
    speed: float = 0.0,
    tiers: Tier = Tier.SWEEP,
    force: bool = False,
    hurry: bool = False,
) -> AsyncIterator[Replay]:
    """Replay `recording` into `settings.mongo_database` at `url`; Beanie's documents can be used meanwhile.

    Raises ConfigError when the database serves something else, StoreError when it does not answer.
    """
    async with open_store(url, settings.mongo_database):
        replay = Replay(recording, settings, truth=truth, speed=speed, tiers=tiers, hurry=hurry)
        await replay.store.make_ready(settings.mongo_database, force=force)
        try:
            await replay.start()
            yield replay
        finally:
            await replay.stop()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
