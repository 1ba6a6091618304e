"""The full pass over all documents.

A sweep reads its engine's documents (see pipeline/members.py), inspects their containers ten at a time, and hands
the answers that differ to the one writer. Asked for by its timer alone, it leaves out those of which the engine's
list shows no sign of a change (see core/listing.py), but for a tenth in turn. It is what sees changes that no
event tells (a kill while restarting, a crash of the daemon, events lost) and what stops idle nodes. Whatever it
corrects is drift.

Which documents of vanished containers may go is decided in pipeline/deletion.py, which idle nodes are stopped in
pipeline/idle.py. Any other answer than 200 or the engine's own 404 changes nothing.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta

from loguru import logger

from eventwatch.core.backoff import TIMED_OUT, Pace
from eventwatch.core.clock import Clock, KindestClock, Slices
from eventwatch.core.errors import (
    ConfigError,
    EngineChangedError,
    EngineError,
    EventwatchError,
    LeaseLostError,
)
from eventwatch.core.facts import Cause, Observation, Owner, Recorded
from eventwatch.core.listing import shows_no_change
from eventwatch.core.metrics import Metrics
from eventwatch.engine.protocol import Engine, EngineInfo
from eventwatch.pipeline.deletion import Deletions, Verdict
from eventwatch.pipeline.idle import IdleStopper
from eventwatch.pipeline.indexes import create_indexes
from eventwatch.pipeline.inspections import RETRIED, Inspections
from eventwatch.pipeline.members import Members
from eventwatch.pipeline.orphans import Orphans
from eventwatch.pipeline.ownership import OwnerRecord
from eventwatch.pipeline.reconciler import Reconciler
from eventwatch.pipeline.requests import SweepRequests
from eventwatch.pipeline.roster import Roster
from eventwatch.pipeline.twins import PUBLISHED, some_of
from eventwatch.pipeline.writer import STAMP, Writer
from eventwatch.settings.model import Settings
from eventwatch.store.connection import Store
from eventwatch.store.documents import ToolServerNode
from eventwatch.store.rows import UNSEEN, Witness

#: Inspections in flight during a sweep.
CONCURRENCY = 10
#: Seconds that a watcher's pass waits for one inspection. An engine locks a container while it starts or stops,
#: and now and then for ever: that one is waited for beside the pass, so that the others need not wait.
PATIENCE = 1.0
#: Seconds. Where the engine is slow to tell of most nodes, the next pass waits twice as long, up to this.
MOST_PATIENCE = 30.0
#: Seconds until a sweep that was in doubt about another engine is repeated: standbys look every 5 s.
SECOND_THOUGHT = 6.0
#: Passes in which each node is inspected once, at least.
TURNS = 10
#: Moments (s) that a sweep waits at most before an inspection while events are being written.
GIVEN_WAY = 20
MOMENT = 0.001
#: Nodes that are told of when no engine answers.
UNANSWERED = 1000
#: The part of a sweep's interval by which it is varied: watchers that began together are not to ask together for
#: ever.
JITTER = 0.2
#: Sweep intervals without a good sweep, after which the documents are not to be trusted.
SWEEPS_LATE = 3.0

#: What was found out of a node, and how many facts it had had when it was asked for.
Answer = tuple[Observation, int]


@dataclass(slots=True)
class SweepReport:
    """What one pass did.

    `failed` nodes could not be inspected and are unchanged; the containers of `braked` and `spared` ones are gone,
    but their documents may not be deleted now, or not by us.
    """

    checked: int = 0
    changed: int = 0
    deleted: int = 0
    stopping: int = 0
    failed: int = 0
    braked: int = 0
    spared: int = 0

    def __str__(self) -> str:
        parts = [f"{self.checked} nodes checked"]
        parts += [
            f"{count} {word}"
            for count, word in (
                (self.changed, "changed"),
                (self.deleted, "deleted"),
                (self.stopping, "being stopped"),
                (self.failed, "not answered for"),
                (self.braked, "not deleted (brake)"),
                (self.spared, "gone from this engine, but not its to delete"),
            )
            if count
        ]
        return ", ".join(parts)


class Sweeper:
    """Runs passes: on its timer, and whenever `requests` asks for one.

    `on_newest_change` is told the engine time (ns) of the latest start or end of a container that a pass saw.
    `patience` (s): with it, a pass leaves it to the reconciler's inspectors to wait for what the engine is slow to
    tell of, unless that is most of the nodes: only a pass deletes and stops. `manager_id`: of the checker that we
    are, if any.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        store: Store,
        roster: Roster,
        owners: OwnerRecord,
        inspections: Inspections,
        orphans: Orphans,
        writer: Writer,
        reconciler: Reconciler,
        stopper: IdleStopper,
        deletions: Deletions,
        requests: SweepRequests,
        on_newest_change: Callable[[int], object],
        clock: Clock,
        time: KindestClock,
        settings: Settings,
        metrics: Metrics,
        manager_id: str = "",
        patience: float | None = None,
        rng: Callable[[], float] = random.random,
    ) -> None:
        self._engine = engine
        self._store = store
        self._roster = roster
        self._owners = owners
        self._inspections = inspections
        self._orphans = orphans
        self._writer = writer
        self._reconciler = reconciler
        self.stopper = stopper
        self.deletions = deletions
        self._requests = requests
        self._on_newest_change = on_newest_change
        self._time = time
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._manager_id = manager_id
        self._members = Members(engine, store)
        self._indexed = False
        self._rng = rng
        self._patience = self._least_patience = patience
        self._timeouts = 0
        #: Seconds that the last pass took to find its documents: where all is slow, no single node is to blame.
        self._begun_after = 0.0
        #: What is known of each node since it was inspected last, unless something happened to it since.
        self._known: dict[str, Answer] = {}
        self._turn = 0
        self.last_success: float | None = None
        self._silences = 0
        #: Some of the containers that the last pass found.
        self.witness = UNSEEN

    async def run(self) -> None:
        """Sweep when asked and every `sweep_interval`; repeat a pass that failed, soon. Never ends."""
        backoff, silence = Pace(base=0.1, cap=1.0).start(), Pace(base=0.5, cap=10.0).start()
        slow = TIMED_OUT.start()
        while True:
            interval = self._settings.sweep_interval * (1 - JITTER * self._rng())
            asked = await self._requests.wait(interval)
            try:
                report = await self.sweep(thorough=asked)
            except (LeaseLostError, EngineChangedError):
                raise
            except EventwatchError as error:
                # Of an engine that is away the watcher tells.
                failures = backoff.failures + slow.failures
                if not failures & (failures + 1) and not getattr(error, "unreachable", False):
                    times = f" ({failures + 1} times by now)" if failures else ""
                    logger.warning("Sweep failed: {}{}", error, times)
                pace = slow if getattr(error, "timed_out", False) else backoff
                await self._requests.pause(pace.next_delay())
                self._requests.ask()
                continue
            backoff.succeeded_for(0)
            slow.succeeded_for(0)
            self._tell_of_silence(report)
            if report.failed == report.checked > 0:
                await self._clock.sleep(silence.next_delay())
                self._requests.ask()
                continue
            silence.succeeded_for(0)
            logger.debug("Sweep: {}", report)

    def _tell_of_silence(self, report: SweepReport) -> None:
        """Tell of many nodes that cannot be inspected in one line, the 1st, 2nd, 4th ... time in a row."""
        if report.failed <= RETRIED:
            self._silences = 0
            return
        self._silences += 1
        if self._silences & (self._silences - 1) == 0:
            logger.warning("{} of {} nodes cannot be inspected: the engine fails", report.failed, report.checked)

    def unready_reasons(self) -> list[str]:
        """Why what sweeps are for may be undone right now; empty when it is done."""
        reasons = []
        if self.last_success is None:
            reasons.append("sweep: none has ended well yet")
        elif (age := self._clock.monotonic() - self.last_success) > SWEEPS_LATE * self._settings.sweep_interval:
            reasons.append(f"sweep: the last one that ended well is {age:.0f} s old")
        if self.stopper.denied:
            reasons.append("stop: the engine denies it, idle nodes keep running")
        if self.deletions.brake and self.deletions.brake.engaged:
            reasons.append("brake: a sweep would delete more than delete_limit")
        if self.stopper.brake and self.stopper.brake.engaged:
            reasons.append("brake: a sweep would stop more than stop_limit")
        return reasons

    async def sweep(self, *, force: bool = False, thorough: bool = True) -> SweepReport:
        """One pass over all documents. `force` lifts the brakes for the engine's own nodes, and nothing else.

        Without `thorough`, nodes that show no sign of a change are not all inspected anew. Raises StoreError when
        the database, EngineError when the engine cannot be reached at all.
        """
        began = self._clock.monotonic()
        known_before = dict(self._roster.known)
        engine = await self._identify_if_it_says()
        await self._look_at_clocks()
        documents = await self._read_members()
        self._reconciler.replace_known(documents, known_before=known_before)
        report = SweepReport(checked=len(documents))
        self._begun_after = self._clock.monotonic() - began
        answers = {} if thorough else await self._still_known(documents, self._engine_now(engine, asked_at=began))
        answers |= await self._inspect_all([node_id for node_id in documents if node_id not in answers])
        report.failed = len(documents) - len(answers)
        self._on_newest_change(max((seen.time_nano for seen, _ in answers.values()), default=0))
        found = {i: seen for i, (seen, _) in answers.items() if seen.found}
        missing = {i: documents[i] for i in answers.keys() - found.keys()}
        verdict = await self._judge(missing, engine, found=found, force=force)
        report.braked, report.spared = verdict.braked, verdict.spared
        slices = Slices()
        known: dict[str, Answer] = {}
        for node_id, (seen, events_seen) in answers.items():
            await slices.turn()
            if not seen.found:
                if node_id in verdict.allowed and self._reconciler.accept_if_unchanged(seen, since=events_seen):
                    report.deleted += 1
                continue
            if node_id in self._roster.known and self._roster.events_seen(node_id) == events_seen:
                self._reconciler.note(seen)
            if change := self._writer.compare(documents[node_id], seen, Cause.SWEEP):
                if not self._reconciler.accept_if_unchanged(seen, since=events_seen):
                    continue
                events_seen = self._roster.events_seen(node_id)  # noqa: PLW2901 - that one was ours
                report.changed += not change.fields.keys() <= STAMP
            known[node_id] = seen, events_seen
        self._known = known
        await self._writer.flush()
        if engine:
            await self._put_on_record(found, engine)
        report.stopping = await self.stopper.stop_idle(documents, found, force=force)
        brakes = (self.deletions.brake, self.stopper.brake)
        self._metrics.show_brakes(*(brake is not None and brake.engaged for brake in brakes))
        await self._look_further()
        await self._disown_some(documents)
        await self._testify(found)
        self._metrics.sweep_duration.observe(self._clock.monotonic() - began)
        if report.failed < report.checked or not report.checked:
            self.last_success = self._clock.monotonic()
            self._writer.swept()
            self._metrics.sweep_success.set(self._clock.time_ns() / 1e9)
        return report

    async def _read_members(self) -> dict[str, Recorded]:
        if self.is_one_off:
            if not (self._indexed or self._settings.dry_run):
                await create_indexes(self._store)
                self._indexed = True
            await self._owners.load()
        owned = [*self._owners.owned, *self._roster.known]
        return await self._members.find(self._roster.engine_id, owned=owned, gone=self._owners.gone)

    @property
    def is_one_off(self) -> bool:
        """Whether this is no watcher's sweeper."""
        return not self._manager_id

    async def _identify(self, *, anew: bool = False) -> EngineInfo:
        """Who the engine is, and its clock. Raises EngineChangedError when it is not the one we work for.

        `anew`: outside a watcher, that is the one which answers now. StoreError when what is on record of that
        one is of a later version, which a watcher asks when it takes the lease.
        """
        asked = self._clock.monotonic()
        engine = await self._engine.identify()
        if anew and self.is_one_off:
            await self._store.refuse_later_format(engine.id)
            self._roster.engine_id, self._roster.host = engine.id, engine.name
        if self._roster.engine_id != engine.id:
            raise EngineChangedError("another engine answers at the same address now")
        if engine.system_time:
            self._time.hear("engine", engine.system_time, asked=asked)
        return engine

    async def _identify_if_it_says(self) -> EngineInfo | None:
        """As `_identify`; None in a watcher when the engine answers, but not to that: who it was, it still is.

        Telling who it is makes an engine look at all that it has, which may take it long.
        """
        try:
            return await self._identify(anew=True)
        except EngineError as error:
            if self.is_one_off or error.unreachable:
                raise
            logger.debug("Sweeping without deletions: {}", error)
            return None

    async def _judge(
        self, missing: Mapping[str, Recorded], engine: EngineInfo | None, *, found: Collection[str], force: bool
    ) -> Verdict:
        """Which documents of missing containers may go: none when it is not sure which engine misses them."""
        if engine is None:
            return Verdict(spared=len(missing))
        if missing:
            # Asked afterwards: an engine that took over the address meanwhile is the one that answers now.
            await self._identify()
        verdict = await self.deletions.judge(
            missing,
            engine=engine,
            found=found,
            owned=self._owners.owned,
            manager_id=self._manager_id,
            force=force,
        )
        if self.deletions.twins.doubtful:
            self._clock.call_later(SECOND_THOUGHT, self._requests.ask)
        return verdict

    async def _look_at_clocks(self) -> None:
        asked = self._clock.monotonic()
        self._time.hear("database", await self._store.system_time(), asked=asked)
        for whose, seconds in self._time.skews().items():
            self._metrics.clock_skew.labels(whose).set(seconds)

    async def _put_on_record(self, found: Collection[str], engine: EngineInfo) -> None:
        """Outside a watcher, whose writer does it: leave a trace of which engine has these containers."""
        if found and self.is_one_off and not self._settings.dry_run:
            await self._owners.confirm(found, Owner(engine.id, engine.name))

    async def _disown_some(self, documents: Collection[str]) -> None:
        """Take off the record some of the containers that went together with their documents, while nobody saw."""
        if self.is_one_off:
            return  # which has nobody who would keep the record
        without = [node_id for node_id in self._owners.owned if node_id not in documents]
        for node_id in random.sample(without, min(len(without), CONCURRENCY)):
            with suppress(EngineError):
                if not (await self._engine.inspect(node_id)).found:
                    self._owners.disown(node_id)

    async def _testify(self, found: Collection[str]) -> None:
        """Name some of the engine's containers."""
        ids = [*found]
        try:
            ids = ids or await self._engine.list_newest(PUBLISHED)
        except EngineError:
            return
        self.witness = Witness(some_of(ids), self.witness.look + 1)

    async def unanswered(self, error: EventwatchError) -> SweepReport:
        """What a pass comes to when the engine does not even say who it is: a warning for every node.

        Whose nodes are meant is not known then; of all there are, `UNANSWERED` are told of.
        """
        documents = await self._store.read_some(UNANSWERED)
        for node_id in documents:
            warn_of(node_id, error)
        return SweepReport(checked=len(documents), failed=len(documents))

    async def check(self, node: ToolServerNode) -> None:
        """The pass for one node; the object passed in is brought up to date too.

        Inside a watcher, a stop that it begins goes on after the return, once it is decided.
        """
        node_id = node.id
        events_seen = self._roster.events_seen(node_id)
        try:
            seen = await self._engine.inspect(node_id, as_of=self._roster.newest)
            recorded = (await self._store.read([node_id])).get(node_id)
            if recorded is None or not (seen.found or await self._may_delete(recorded)):
                return
            idle = seen.found and self.stopper.idleness_of(recorded, seen, None).idle
            if self.is_one_off and seen.found:
                await self._put_on_record([node_id], await self._identify(anew=True))
            if idle:
                await self._look_at_clocks()
        except (EngineError, EngineChangedError, ConfigError) as error:
            warn_of(node_id, error)
            return
        self._roster.known.setdefault(node_id, recorded)
        self._reconciler.accept_if_unchanged(seen, since=events_seen)
        await self._writer.flush()
        if idle and (stop := self.stopper.stop_if_idle(recorded, seen)):
            await stop.claimed.wait()
        written = (await self._store.read([node_id])).get(node_id)
        if written:
            bring_up_to_date(node, written)

    async def _may_delete(self, recorded: Recorded) -> bool:
        verdict = await self.deletions.judge(
            {recorded.node_id: recorded},
            engine=await self._identify(anew=True),
            found=self._owners.owned,
            owned=self._owners.owned,
            manager_id=self._manager_id,
            asked=True,
        )
        return bool(verdict.allowed)

    def _engine_now(self, engine: EngineInfo | None, *, asked_at: float) -> datetime | None:
        """What the engine's clock shows by now, as nearly as asking tells; None if it did not say."""
        told = engine.system_time if engine else None
        return told and told + timedelta(seconds=self._clock.monotonic() - asked_at)

    async def _still_known(self, documents: Mapping[str, Recorded], now: datetime | None) -> dict[str, Answer]:
        """What the last passes found out, of nodes of which nothing tells that they are otherwise by now.

        Not of a tenth of them, another one each time; nor where a document says something else: what is written
        has just been inspected.
        """
        listed, network, slices = self._members.listed, self._settings.node_network, Slices()
        self._turn = (self._turn + 1) % TURNS
        found: dict[str, Answer] = {}
        if now is None:
            return found
        # A copy: another pass, such as a manager's, may end meanwhile.
        for node_id, (seen, events_seen) in list(self._known.items()):
            await slices.turn()
            row, document = listed.get(node_id), documents.get(node_id)
            if row is None or document is None or int(node_id[-8:], 16) % TURNS == self._turn:
                continue
            if node_id in self._inspections.unanswered or self._roster.events_seen(node_id) != events_seen:
                continue
            if not shows_no_change(row, seen, network=network, now=now):
                continue
            if self._writer.compare(document, seen, Cause.SWEEP):
                continue
            found[node_id] = seen, events_seen
        return found

    async def _inspect_all(self, node_ids: Collection[str]) -> dict[str, Answer]:
        answers: dict[str, Answer] = {}
        self._timeouts = 0
        ids = iter(node_ids)
        async with asyncio.TaskGroup() as tasks:
            for number in range(min(CONCURRENCY, len(node_ids))):
                tasks.create_task(self._inspect_some(ids, answers), name=f"sweep-inspector-{number}")
        if self._patience is not None:
            slow = 2 * self._timeouts >= len(node_ids) > 0
            self._patience = min(2 * self._patience, MOST_PATIENCE) if slow else self._least_patience
        return answers

    async def _inspect_some(self, ids: Iterator[str], answers: dict[str, Answer]) -> None:
        for node_id in ids:
            await self._give_way()
            events_seen = self._roster.events_seen(node_id)
            try:
                async with asyncio.timeout(self._patience and max(self._patience, self._begun_after)):
                    seen = await self._engine.inspect(node_id, as_of=self._roster.newest)
            except TimeoutError:
                self._timeouts += 1
                self._inspections.soon(node_id)
                continue
            except EngineError as error:
                if self.is_one_off:
                    warn_of(node_id, error)
                self._inspections.failed(node_id, error)
                if error.unreachable:
                    return  # nobody need ask for the rest
                continue
            self._inspections.succeeded(node_id)
            answers[node_id] = (seen, events_seen)

    async def _give_way(self) -> None:
        """Let events go first, for a while: what they led to is to be written, or inspected, before more."""
        for _ in range(GIVEN_WAY):
            if self.is_one_off or not self._reconciler.depth():
                return
            await self._clock.sleep(MOMENT)

    async def _look_further(self) -> None:
        """Turn to containers that have no document."""
        if self._requests.take_after_connect():
            try:
                self._orphans.expect(await self._engine.list_running())
            except EngineError as error:
                logger.warning("Containers whose documents may still come are not known: {}", error)
        if self._settings.register_label:
            await self._register_missing(self._settings.register_label)

    async def _register_missing(self, label: str) -> None:
        for node_id in await self._engine.list_running(label):
            if node_id not in self._roster.known:
                try:
                    seen = await self._engine.inspect(node_id, as_of=self._roster.newest)
                except EngineError as error:
                    self._inspections.failed(node_id, error)
                    continue
                if seen.found and seen.status in {"running", "paused"}:
                    await self._reconciler.register(seen)


def bring_up_to_date(node: ToolServerNode, written: Recorded) -> None:
    """Let a manager's object say what the document says now, in the fields that are ours."""
    node.status, node.health = written.status or node.status, written.health or node.health
    node.ip, node.port = written.ip or "", written.port or node.port


def warn_of(node_id: str, error: EventwatchError) -> None:
    """Tell of a node that could not be inspected."""
    logger.warning("Failed to get node info from docker: {}", node_id)
    logger.warning("{}", error)
