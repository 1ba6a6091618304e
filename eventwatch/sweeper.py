"""The full pass over all documents, and the checker functions that managers know.

A sweep reads every document, inspects every container ten at a time, and hands the answers that differ to the
one writer. It is what sees changes that no event tells (a kill while restarting, a crash of the daemon, events
lost) and what stops idle nodes. Whatever it corrects is drift.

`update_node_status`, `check_nodes_status` and `check_nodes_status_loop` do the same for a manager. Inside
`watch()` they go through the running watcher, so there is still one writer; elsewhere they build what they
need for the call from the engine and settings passed by name, or from the environment.

A 404 deletes only on the word of the engine that owns the node, and `Brake` keeps one sweep from deleting
many. Any other answer than 200 or 404 changes nothing.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from loguru import logger

from eventwatch.backoff import Pace
from eventwatch.clock import Clock, SystemClock
from eventwatch.documents import NodeChecker, ToolServerNode
from eventwatch.engine import DockerClient, DockerEngine, Engine, as_engine
from eventwatch.errors import EngineChangedError, EngineError, EventwatchError, LeaseLostError
from eventwatch.model import Cause, Observation, Recorded
from eventwatch.policy import delete_limit, may_delete
from eventwatch.reconciler import Reconciler
from eventwatch.settings import Settings, load_settings
from eventwatch.stopper import Stopper
from eventwatch.store import Store

#: Inspections in flight during a sweep.
CONCURRENCY = 10
#: Seconds that a watcher's pass waits for one inspection. An engine locks a container while it starts or stops,
#: and now and then for ever: that one is waited for beside the pass, so that the others need not wait.
PATIENCE = 1.0
#: Seconds for which the watcher of another engine is expected back, once it or a node of its own was seen.
RETURN = 60.0
#: Sweep intervals without a good sweep, after which the documents are not to be trusted.
SWEEPS_LATE = 3.0
#: Sweeps that must agree before more than `delete_limit` documents are deleted.
AGREEING_SWEEPS = 3


@dataclass(slots=True)
class SweepReport:
    """What one pass did. `failed` nodes could not be inspected and are unchanged."""

    checked: int = 0
    changed: int = 0
    deleted: int = 0
    stopping: int = 0
    failed: int = 0
    braked: int = 0

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
            )
            if count
        ]
        return ", ".join(parts)


@dataclass(slots=True)
class Brake:
    """Refuses mass deletion until three sweeps in a row agree on it."""

    agreed: set[str] = field(default_factory=set)
    sweeps: int = 0

    def release(self, doomed: set[str], limit: int) -> set[str]:
        """The ids of `doomed` that may be deleted now: all, none, or what three sweeps agreed on."""
        if len(doomed) <= limit:
            self.agreed, self.sweeps = set(), 0
            return doomed
        self.agreed = doomed & self.agreed if self.sweeps else doomed
        self.sweeps += 1
        if self.sweeps < AGREEING_SWEEPS:
            return set()
        allowed, self.agreed, self.sweeps = self.agreed, set(), 0
        return allowed

    @property
    def engaged(self) -> bool:
        """Whether deletions are being refused."""
        return self.sweeps > 0


@dataclass(slots=True)
class Company:
    """Whether another engine's watcher may own what no engine owns: one that is away may just be restarting."""

    seen: float | None = None

    def is_alone(self, others: bool, *, stamped: bool, now: float) -> bool:
        """Whether only we can own it; `others`: live watchers, `stamped`: nodes of theirs, `now` in seconds."""
        if others or (stamped and self.seen is None):
            self.seen = now
        return not others and (self.seen is None or now - self.seen >= RETURN)


class Sweeper:
    """Runs passes: on its timer, and whenever `request` is called.

    With a `brake`, a pass may leave it to later ones to delete what is gone; with `company`, what nobody owns;
    with `patience` (s), to the reconciler's inspectors to wait for what the engine is slow to tell of.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        store: Store,
        reconciler: Reconciler,
        stopper: Stopper,
        settings: Settings,
        brake: Brake | None = None,
        company: Company | None = None,
        patience: float | None = None,
    ) -> None:
        self._engine = engine
        self._store = store
        self._reconciler = reconciler
        self.stopper = stopper
        self._settings = settings
        self._clock: Clock = reconciler.clock
        self._metrics = reconciler.metrics
        self.brake = brake
        self.company = company
        self._patience = patience
        self._requested = asyncio.Event()
        self._after_connect = False
        #: Told the engine time (ns) of the latest start or end of a container that a pass saw.
        self.on_fact: Callable[[int], object] = lambda _: None
        self.last_success: float | None = None

    def request(self, *, after_connect: bool = False) -> None:
        """Ask for a pass as soon as possible. `after_connect`: for documents, too, that are still to come."""
        self._after_connect |= after_connect
        self._requested.set()

    async def run(self) -> None:
        """Sweep when asked and every `sweep_interval`; repeat a pass that failed, soon. Never ends."""
        backoff = Pace(base=0.1, cap=1.0).start()
        while True:
            timer = self._clock.call_later(self._settings.sweep_interval, self._requested.set)
            await self._requested.wait()
            timer.cancel()
            self._requested.clear()
            try:
                report = await self.sweep()
            except (LeaseLostError, EngineChangedError):
                raise
            except EventwatchError as error:
                if not backoff.failures:
                    logger.warning("Sweep failed: {}", error)
                await self._clock.sleep(backoff.next_delay())
                self._requested.set()
                continue
            if report.failed == report.checked > 0:
                await self._clock.sleep(backoff.next_delay())
                self._requested.set()
                continue
            backoff.succeeded_for(0)
            logger.debug("Sweep: {}", report)

    def doubts(self) -> list[str]:
        """Why what sweeps are for may be undone right now; empty when it is done."""
        reasons = []
        if self.last_success is None:
            reasons.append("sweep: none has ended well yet")
        elif (age := self._clock.monotonic() - self.last_success) > SWEEPS_LATE * self._settings.sweep_interval:
            reasons.append(f"sweep: the last one that ended well is {age:.0f} s old")
        if self.stopper.denied:
            reasons.append("stop: the engine denies it, idle nodes keep running")
        if self.brake and self.brake.engaged:
            reasons.append("brake: a sweep would delete more than delete_limit")
        return reasons

    async def sweep(self, *, force: bool = False) -> SweepReport:
        """One pass over all documents. `force` lifts the brake and the ownership of other engines.

        Raises StoreError when the database, EngineError when the engine cannot be reached at all.
        """
        began = self._clock.monotonic()
        known_before = dict(self._reconciler.known)
        engine_id = self._reconciler.engine_id or (await self._engine.identify()).id
        others = await self._store.other_live_engines(engine_id)
        documents = await self._store.read()
        if not force:  # what another live checker owns is its business
            documents = {i: node for i, node in documents.items() if node.engine_id not in others}
        self._reconciler.learn(documents, known_before=known_before)
        report = SweepReport(checked=len(documents))
        sole = self._is_sole(others, stamped=any(n.engine_id not in {None, engine_id} for n in documents.values()))
        answers = await self._inspect_all(documents, report)
        self.on_fact(max((seen.time_nano for seen, _ in answers.values()), default=0))
        if not force and not all(seen.found for seen, _ in answers.values()):
            # Asked afterwards: an engine that took over the address meanwhile is the one that answers now.
            await self._require_same_engine(engine_id)
        doomed = {
            node_id
            for node_id, (seen, _) in answers.items()
            if not seen.found and (force or may_delete(documents[node_id], engine_id=engine_id, sole_checker=sole))
        }
        if self.brake and not force:
            doomed = self._braked(doomed, self.brake, len(documents), report)
        for node_id, (seen, events_seen) in answers.items():
            if not seen.found:
                if node_id in doomed and self._reconciler.accept_sweep(seen, events_seen=events_seen):
                    report.deleted += 1
            elif self._reconciler.compare(documents[node_id], seen, Cause.SWEEP):
                report.changed += self._reconciler.accept_sweep(seen, events_seen=events_seen)
        await self._reconciler.flush()
        report.stopping = sum(
            self.stopper.consider(documents[node_id], seen) for node_id, (seen, _) in answers.items()
        )
        await self._look_further()
        self._metrics.sweep_duration.observe(self._clock.monotonic() - began)
        if not report.failed:
            self.last_success = self._clock.monotonic()
            self._metrics.sweep_success.set(self._clock.time_ns() / 1e9)
        return report

    async def unanswered(self, error: EngineError) -> SweepReport:
        """What a pass comes to when the engine does not even say who it is: a warning for every node."""
        documents = await self._store.read()
        for node_id in documents:
            _warn(node_id, error)
        return SweepReport(checked=len(documents), failed=len(documents))

    async def check(self, node: ToolServerNode) -> None:
        """The pass for one node; the object passed in is brought up to date too."""
        node_id = node.id
        events_seen = self._reconciler.events_seen(node_id)
        try:
            seen = await self._engine.inspect(node_id, as_of=self._reconciler.newest)
            if not seen.found and not await self._may_delete(node_id):
                return
        except EngineError as error:
            _warn(node_id, error)
            return
        recorded = (await self._store.read([node_id])).get(node_id)
        if recorded is None:
            return
        self._reconciler.known.setdefault(node_id, recorded)
        self._reconciler.accept_sweep(seen, events_seen=events_seen)
        await self._reconciler.flush()
        if seen.found:
            self.stopper.consider(recorded, seen)
            written = self._reconciler.known.get(node_id, recorded)
            node.status, node.health = written.status or node.status, written.health or node.health
            node.ip, node.port = written.ip or "", written.port or node.port

    async def _may_delete(self, node_id: str) -> bool:
        engine_id = (await self._engine.identify()).id
        if self._reconciler.engine_id not in {"", engine_id}:
            return False
        others = await self._store.other_live_engines(engine_id)
        sole = self._is_sole(others, stamped=await self._store.knows_nodes_of_others(engine_id))
        recorded = (await self._store.read([node_id])).get(node_id)
        return recorded is not None and may_delete(recorded, engine_id=engine_id, sole_checker=sole)

    def _is_sole(self, others: Collection[str], *, stamped: bool) -> bool:
        if self.company is None:
            return not others
        return self.company.is_alone(bool(others), stamped=stamped, now=self._clock.monotonic())

    async def _require_same_engine(self, engine_id: str) -> None:
        if (await self._engine.identify()).id != engine_id:
            raise EngineChangedError("another engine answers at the same address now")

    async def _inspect_all(
        self, documents: Mapping[str, Recorded], report: SweepReport
    ) -> dict[str, tuple[Observation, int]]:
        answers: dict[str, tuple[Observation, int]] = {}
        ids = iter(documents)
        async with asyncio.TaskGroup() as tasks:
            for number in range(min(CONCURRENCY, len(documents))):
                tasks.create_task(self._inspect_some(ids, answers), name=f"sweep-inspector-{number}")
        report.failed = len(documents) - len(answers)
        return answers

    async def _inspect_some(self, ids: Iterator[str], answers: dict[str, tuple[Observation, int]]) -> None:
        for node_id in ids:
            events_seen = self._reconciler.events_seen(node_id)
            try:
                async with asyncio.timeout(self._patience):
                    seen = await self._engine.inspect(node_id, as_of=self._reconciler.newest)
            except TimeoutError:
                self._reconciler.inspect_soon(node_id)
                continue
            except EngineError as error:
                _warn(node_id, error)
                if error.unreachable:
                    deque(ids, maxlen=0)  # nobody need ask for the rest
                self._reconciler.inspect_soon(node_id)
                continue
            answers[node_id] = (seen, events_seen)

    def _braked(self, doomed: set[str], brake: Brake, nodes: int, report: SweepReport) -> set[str]:
        limit = delete_limit(self._settings.delete_limit, nodes)
        allowed = brake.release(doomed, limit)
        report.braked = len(doomed) - len(allowed)
        self._metrics.brake.set(brake.engaged)
        if brake.engaged:
            logger.warning(
                "Brake: {} of {} nodes are gone from the engine, more than delete_limit ({}): nothing is deleted "
                "until {} sweeps in a row agree, or `eventwatch sweep --force`",
                len(doomed), nodes, limit, AGREEING_SWEEPS,
            )  # fmt: skip
        return allowed

    async def _look_further(self) -> None:
        """Turn to containers that have no document."""
        if self._after_connect:
            self._after_connect = False
            try:
                self._reconciler.expect(await self._engine.list_running())
            except EngineError as error:
                logger.warning("Containers whose documents may still come are not known: {}", error)
        if self._settings.register_label:
            await self._register_missing(self._settings.register_label)

    async def _register_missing(self, label: str) -> None:
        for node_id in await self._engine.list_running(label):
            if node_id not in self._reconciler.known:
                seen = await self._engine.inspect(node_id, as_of=self._reconciler.newest)
                if seen.found and seen.status in {"running", "paused"}:
                    await self._reconciler.register(seen)


def _warn(node_id: str, error: EngineError) -> None:
    logger.warning("Failed to get node info from docker: {}", node_id)
    logger.warning("{}", error)


# -- what managers call -------------------------------------------------------------------------------------

#: The sweeper of the `watch()` that runs in this process, and of a loop in this task.
_watching: Sweeper | None = None
_looping: ContextVar[Sweeper | None] = ContextVar("eventwatch_looping", default=None)


def set_watching(sweeper: Sweeper | None) -> None:
    """Let the checker functions of this process go through the running watcher (None: it stopped)."""
    global _watching  # noqa: PLW0603 - one watcher per process, as Beanie's documents are bound once per process
    _watching = sweeper


@asynccontextmanager
async def one_off_sweeper(
    engine: Engine | DockerClient | None = None, settings: Settings | None = None
) -> AsyncIterator[Sweeper]:
    """A sweeper of one's own, on the database that Beanie is initialised with; waits for its idle stops."""
    settings = settings or load_settings()
    own = DockerEngine(settings) if engine is None else None
    used = own or as_engine(engine, settings)  # type: ignore[arg-type]  # one of the two is there
    store = Store()
    reconciler = Reconciler(engine=used, store=store, settings=settings, engine_id="", clock=SystemClock())
    try:
        async with asyncio.TaskGroup() as tasks:
            stopper = Stopper(engine=used, store=store, reconciler=reconciler, settings=settings, tasks=tasks)
            yield Sweeper(engine=used, store=store, reconciler=reconciler, stopper=stopper, settings=settings)
    finally:
        if own:
            await own.close()


@asynccontextmanager
async def _sweeper(engine: Engine | DockerClient | None, settings: Settings | None) -> AsyncIterator[Sweeper]:
    running = _looping.get() or _watching
    if running is not None and engine is None and settings is None:
        yield running
    else:
        async with one_off_sweeper(engine, settings) as own:
            yield own


async def update_node_status(
    node: ToolServerNode,
    *,
    engine: Engine | DockerClient | None = None,
    settings: Settings | None = None,
) -> None:
    """Make one node's document equal to its container, delete it if that is gone, stop it if it sat idle.

    An engine that does not answer is logged as a warning and changes nothing. Raises StoreError when the
    database does not answer. Outside `watch()`, returns when a stop that it began has ended.
    """
    async with _sweeper(engine, settings) as sweeper:
        await sweeper.check(node)


async def check_nodes_status(
    *, engine: Engine | DockerClient | None = None, settings: Settings | None = None
) -> SweepReport:
    """`update_node_status` for every document: inspections ten at a time, the changes in one bulk write."""
    async with _sweeper(engine, settings) as sweeper:
        try:
            return await sweeper.sweep()
        except EngineError as error:
            return await sweeper.unanswered(error)


async def check_nodes_status_loop(
    checker: NodeChecker,
    *,
    engine: Engine | DockerClient | None = None,
    settings: Settings | None = None,
) -> None:
    """Repeat `check_nodes_status` every `checker.interval` seconds, until the checker's document is gone.

    A pass that fails is logged with its traceback, and the loop goes on.
    """
    logger.info("Nodes status checker started.")
    logger.info("Checker id: {}", checker.manager_id)
    store = Store()
    async with AsyncExitStack() as stack:
        if _watching is None or engine is not None or settings is not None:
            sweeper = await stack.enter_async_context(one_off_sweeper(engine, settings))
            sweeper.brake, sweeper.company = Brake(), Company()
            stack.callback(_looping.reset, _looping.set(sweeper))
        while True:
            try:
                if not await store.checker_exists(checker.manager_id):
                    break
                await check_nodes_status()
            except Exception:  # noqa: BLE001 - whatever it was, the next pass may do better
                logger.exception("Nodes status check failed, the next one is in {} s", checker.interval)
            await asyncio.sleep(checker.interval)
    logger.info("Nodes status checker stopped.")
