"""The composition root: builds the parts, runs them as named tasks, and ends them in the right order.

`Application.run` is the whole life of a watcher: database, engine, lease, then the pipeline for as long as
the lease is ours, again and again. Nothing that happens to the engine, the database or the pipeline itself
ends it; only `stop`, the deletion of its checker document, or a setting that can never work does.

The end, in order: stop intake, finish what is pending within `drain_timeout`, stop the nodes if so told,
release the lease.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import asdict
from enum import Enum, auto
from functools import partial
from types import FrameType
from typing import Any, Final, TypeVar

from loguru import logger

from eventwatch.calls.changes import ChangeReader, Changes
from eventwatch.calls.here import Here, enter, leave
from eventwatch.calls.waiting import find_ids
from eventwatch.checks import set_watching
from eventwatch.core.backoff import Pace
from eventwatch.core.clock import Clock, KindestClock, SystemClock, Timer
from eventwatch.core.errors import (
    FAILURES,
    CheckerDeletedError,
    ConfigError,
    EngineError,
    EventwatchError,
    StoreError,
)
from eventwatch.core.facts import Change
from eventwatch.core.metrics import Metrics
from eventwatch.core.policy import (
    KNOWN_ACTIONS,
)
from eventwatch.core.readiness import is_standby
from eventwatch.core.version import eventwatch_version
from eventwatch.engine.docker import DockerEngine
from eventwatch.engine.protocol import Engine, EngineInfo
from eventwatch.http.access import Access, page_url
from eventwatch.http.feed import KEPT_CHANGES, ChangeFeed
from eventwatch.http.probe import identity
from eventwatch.http.rows import Rows
from eventwatch.http.series import Series
from eventwatch.http.server import Pages, serve
from eventwatch.pipeline.deletion import LEFTOVER_GRACE
from eventwatch.pipeline.elector import LeaderElector
from eventwatch.pipeline.fleet import DeadEngines, LastLatencies, as_json, ordered, report
from eventwatch.pipeline.indexes import keep_indexes
from eventwatch.pipeline.pipeline import Brakes, Care, Pipeline, is_cancelled
from eventwatch.pipeline.proof import DeathWatch
from eventwatch.pipeline.pulse import Pulse
from eventwatch.pipeline.requests import SweepRequests
from eventwatch.pipeline.sweeper import PATIENCE
from eventwatch.pipeline.twins import Lookout, TwinWatch
from eventwatch.pipeline.undocumented import Undocumented
from eventwatch.settings.model import EMBEDDED, Settings, load_settings
from eventwatch.store.changes import HISTORY_CHANGES
from eventwatch.store.connection import Store, open_store
from eventwatch.store.documents import NodeChecker
from eventwatch.store.embedded import EmbeddedMongo
from eventwatch.store.history import History, read_changes
from eventwatch.store.rows import Lease
from eventwatch.view import RECORDED, NodeView

T = TypeVar("T")

#: Seconds between looks at our own wall clock, and the skew (s) against another's from which on it is told of.
CLOCK_LOOK: Final = 1.0
SKEW: Final = 5.0
#: Seconds that a host's start waits for the database.
START_TIMEOUT: Final = 60.0
#: Nodes that are named where they cannot be vouched for.
NAMED: Final = 100
#: Engines that are listed.
MOST_ENGINES: Final = 2000
#: Seconds between attempts to reach the database or the engine at the start.
RETRY: Final = Pace(base=0.2, cap=2.0)


class _Stopped(Exception):  # noqa: N818 - not an error: somebody asked us to stop while we waited
    """Ends a wait that `stop` interrupted."""


class _Outcome(Enum):
    """Why a pipeline ended."""

    STOPPED = auto()
    AGAIN = auto()


class Application:
    """One watcher for one engine. `run` it once; `stop` and `sweep_now` may be called from signal handlers.

    `embedded`: nobody would notice its end, so once the database was reached, nothing but `stop` and the deletion
    of its checker document ends it: what waiting cannot mend is logged as an error, and tried again all the same.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        engine: Engine | None = None,
        clock: Clock | None = None,
        embedded: bool = False,
    ) -> None:
        self.settings = settings
        self.metrics = Metrics(KNOWN_ACTIONS | {"other", "malformed"})
        # Of the nodes that it leads; one that stands by has none.
        self.metrics.crash_looping.set_function(
            lambda: self.pipeline.roster.reasons.crash_looping() if self.pipeline else 0
        )
        self.metrics.longest_unhealthy.set_function(
            lambda: self.pipeline.roster.reasons.longest_unhealthy() if self.pipeline else 0.0
        )
        self.checker = NodeChecker.model_construct(
            manager_id=os.urandom(16).hex(),
            interval=settings.sweep_interval,
            pid=os.getpid(),
            host=socket.gethostname(),
            version=eventwatch_version(),
            settings=settings.judging(),
        )
        self.checker.page = {"url": self._page_url(), "manager_id": self.checker.manager_id}
        #: Set once the database is set up: from then on the Beanie documents can be used.
        self.ready = asyncio.Event()
        #: While we lead.
        self.pipeline: Pipeline | None = None
        self.feed = ChangeFeed()
        self.pages: Pages | None = None
        self._changes = Changes()
        self._elector: LeaderElector | None = None
        self._engine = engine
        self._clock = clock or SystemClock()
        self._requests = SweepRequests(self._clock)
        self.series = Series(self.metrics, self._clock)
        self._time = KindestClock(self._clock, settings.idle_timeout)
        self.view = view = NodeView(settings, self._time, lambda: self.pipeline)
        self.rows = Rows(node_ids=view.ids, facts=view.facts, more=view.idle_at, whole=self._knows_all)
        self._clock_timer: Timer | None = None
        self._twins: TwinWatch | None = None
        self._undocumented: Undocumented | None = None
        self._pulse: Pulse | None = None
        #: When what is known of the nodes was last certainly true, and the last full pass (monotonic, s).
        self._true_at: float | None = None
        self._swept_at: float | None = None
        self._dead: DeadEngines | None = None
        self._latencies = LastLatencies()
        self._engine_id = ""
        self._store: Store | None = None
        self._stopping = asyncio.Event()
        self._embedded = embedded
        #: Where the documents are, once `ready` is set: also that of the embedded database. May hold a password.
        self.mongo_url = ""
        self._info: EngineInfo | None = None
        #: What it is waiting to be over, if it waits for the engine or the database.
        self.trouble = ""

    def stop(self) -> None:
        """Ask `run` to drain and return."""
        self._stopping.set()

    def sweep_now(self) -> None:
        """Ask for a full pass as soon as possible."""
        self._requests.ask()

    def changes(self) -> ChangeReader:
        """Every change that this watcher writes from now on, for `async for`; ends with the watcher.

        Raises ChangesLostError to a reader that is thousands of changes behind.
        """
        return self._changes.read()

    def on(self, callback: Callable[[Change], object]) -> Callable[[], None]:
        """Call `callback` with each change that this watcher writes; returns what ends that.

        It is called in the event loop, so it must not block; what it raises is logged. Raises TypeError for a
        coroutine function.
        """
        return self._changes.on(callback)

    def overview(self) -> dict[str, Any]:
        """The head of the status page: who watches what, and how well. Ages and times in s."""
        settings, info, pipeline = self.settings, self._info, self.pipeline
        connected_at = pipeline.watcher.connected_at if pipeline else None
        now = self._clock.monotonic()
        holder = self._elector.holder if self._elector else None
        reasons = self.doubts()
        self._note_truth()
        return {
            "now": self._clock.time_ns() / 1e9,
            "version": eventwatch_version(),
            "host": socket.gethostname(),
            "engine": info and {"name": info.name, "version": info.version, "api_version": info.api_version},
            "database": settings.mongo_database,
            "role": "leader" if self.pipeline else "standby" if holder else "starting",
            "leader": holder
            and {"checker": holder.manager_id, "host": holder.host, "pid": holder.pid, "page": holder.page},
            "ready": not reasons,
            "reasons": reasons,
            "notes": self.notes(),
            "stream_age": None if connected_at is None else now - connected_at,
            "sweep_age": None if self._swept_at is None else now - self._swept_at,
            "listed": self._true_at is not None,
            "as_of": self.as_of(),
            "sweep_interval": settings.sweep_interval,
            "drift": self.metrics.corrections(),
            "idle_timeout": settings.idle_timeout,
            "dry_run": settings.dry_run,
            "register_label": settings.register_label,
            "network": settings.node_network,
        }

    def as_of(self) -> float | None:
        """When what is known of the nodes was last certainly true (Unix time, s); None: now, or never yet."""
        if self._is_kept_true() or self._true_at is None or self._stands_by():
            return None
        return self._clock.time_ns() / 1e9 - (self._clock.monotonic() - self._true_at)

    def _note_truth(self) -> None:
        if self.pipeline and self.pipeline.sweeper.last_success is not None:
            self._swept_at = self.pipeline.sweeper.last_success
        if self._stands_by():
            self._true_at = None  # its rows are gone
        elif self._is_kept_true() and self._elector and self._pulse:
            self._true_at = min(self._elector.renewed_at, self._pulse.answered_at)

    def _is_kept_true(self) -> bool:
        """Whether engine and database answer, and each change is written as it comes."""
        elector, pipeline, pulse = self._elector, self.pipeline, self._pulse
        if not (elector and pipeline and pulse and self._knows_all()):
            return False
        return elector.holds() and not (
            elector.database_away or pipeline.watcher.unready_reasons() or pulse.unready_reasons()
        )

    def _stands_by(self) -> bool:
        return self.pipeline is None and self._elector is not None and self._elector.holder is not None

    def _knows_all(self) -> bool:
        """Whether the nodes that are known are all that there are to know of; a term begins with none."""
        return self._stands_by() or (self.pipeline is not None and self.pipeline.sweeper.last_success is not None)

    async def read_changes(self, node_id: str) -> list[dict[str, Any]]:
        """The changes of a node on record, newest first, whether or not it has a document. Raises StoreError."""
        if not self.ready.is_set():
            raise StoreError("Database not reached yet")
        return [asdict(change) for change in await read_changes(Store(), node_id, limit=HISTORY_CHANGES)]

    def doubts(self) -> list[str]:
        """Why the documents cannot be trusted right now; empty when they can."""
        if not self.ready.is_set():
            return ["database: not reached yet"]
        reasons = self._elector.unready_reasons() if self._elector else []
        reasons += self._twins.unready_reasons() if self._twins else []
        if self.pipeline is None:
            waiting = f"engine: not watched{': ' + self.trouble if self.trouble else ' yet'}"
            return reasons if is_standby(reasons) else [*reasons, waiting]
        stream = self.pipeline.watcher.unready_reasons() or (self._pulse.unready_reasons() if self._pulse else [])
        return [*reasons, *stream, *self.pipeline.sweeper.unready_reasons()]

    def notes(self) -> list[str]:
        """What an operator should know although the documents can be trusted; empty when there is nothing."""
        unanswered = list(self.pipeline.inspections.unanswered) if self.pipeline else []
        names = ", ".join(node_id[:12] for node_id in unanswered[:NAMED])
        more = ", ..." if len(unanswered) > NAMED else ""
        exceptions = f"nodes: {len(unanswered)} cannot be vouched for, as they cannot be inspected: {names}{more}"
        unknown = self._undocumented.notes if self._undocumented and self.pipeline else []
        clocks = [
            (
                f"clock: the {whose}'s is {abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} ours: "
                "synchronise them (NTP); until then idle times are judged by the kindest"
            )
            for whose, seconds in self._time.skews().items()
            if abs(seconds) > SKEW
        ]
        dead = self._dead.notes if self._dead and self.pipeline else []
        disputes = self.pipeline.afterlook.disputes.notes() if self.pipeline else []
        shared = [f"engine: {self._info.warning}"] if self._info and self._info.warning else []
        return ([exceptions] if unanswered else []) + unknown + clocks + dead + disputes + shared

    def report(self) -> dict[str, Any]:
        """What this watcher tells of itself to its fleet."""
        success = self.pipeline.sweeper.last_success if self.pipeline else None
        return report(
            statuses=(status for status, _ in self.view.states()),
            sweep_age=None if success is None else self._clock.monotonic() - success,
            drift=self.metrics.corrections(),
            latencies=self._latencies,
            reasons=self.doubts(),
        )

    async def read_engines(self) -> list[dict[str, Any]]:
        """The engines on record, those that need somebody first; none before the database is set up.

        Raises StoreError.
        """
        records = await self._store.read_engines(MOST_ENGINES) if self._store else []
        return [as_json(record) for record in ordered(records)]

    async def read_page(self, engine_id: str, after: str, limit: int) -> tuple[list[dict[str, Any]], str | None]:
        """The documents of any engine by id, `limit` of those after this one, and after which id there are more.

        Raises StoreError.
        """
        if not self._store:
            return [], None
        nodes, last = await self._store.read_page(engine_id, after=after, limit=limit)
        beside = {"claim": None, "idle_left": None}
        return [{name: getattr(node, name) for name in RECORDED} | beside for node in nodes], last

    async def run(self) -> None:
        """Watch until `stop` is called or the checker's document is deleted. Raises ConfigError, nothing else."""
        failure = None
        async with AsyncExitStack() as stack:
            stack.callback(self._changes.close)
            try:
                await self._run(stack)
            except _Stopped:
                pass
            except ConfigError as error:
                failure = error  # raised below: on its way through the task group it would be wrapped
        if failure:
            raise failure

    async def _run(self, stack: AsyncExitStack) -> None:
        engine = self._engine
        if engine is None:
            engine = DockerEngine(self.settings)
            stack.push_async_callback(engine.close)
        if self.settings.http_address:
            self.pages = Pages(
                metrics=self.metrics, feed=self.feed, node_ids=self.view.ids, node=self.view.node,
                states=self.view.states, doubts=self.doubts, notes=self.notes, find=find_ids,
                engines=self.read_engines, engine_id=lambda: self._engine_id, read_page=self.read_page,
                read=self.view.read, wait=self.view.wait, changes=self.read_changes,
                rows=self.rows, overview=self.overview, series=self.series.as_json,
                identity=f"{os.getpid()} {identity(self.settings.watched)}", access=self._http_access(),
            )  # fmt: skip
            await stack.enter_async_context(serve(*self.settings.http_address, self.pages))
        self._watch_clock()
        stack.callback(self._unwatch_clock)
        store = await self._open_store(stack)
        self._twins, self._store = TwinWatch(engine, store), store
        self.ready.set()
        here = Here(self.settings, engine, self._changes, self.view.keeps, self.view.idle_timeout)
        enter(here)
        stack.callback(leave, here)
        await self._run_terms(engine, store)

    def _page_url(self) -> str:
        settings = self.settings
        host, port = settings.http_address or ("", 0)
        return page_url(host, port, names=settings.http_hosts, tls=bool(settings.http_tls_cert_file))

    def _http_access(self) -> Access:
        settings = self.settings
        return Access.load(
            hosts=settings.http_hosts, token_file=settings.http_token_file,
            cert_file=settings.http_tls_cert_file, key_file=settings.http_tls_key_file,
        )  # fmt: skip

    def _watch_clock(self) -> None:
        """Look at our own clock now and then, standing by as well: a leap must be seen before it is judged by."""
        self._time.sample()
        self.series.tick()
        self._note_truth()
        self._clock_timer = self._clock.call_later(CLOCK_LOOK, self._watch_clock)

    def _unwatch_clock(self) -> None:
        if self._clock_timer:
            self._clock_timer.cancel()

    # -- the parts that may have to be waited for ----------------------------------------------------

    async def _open_store(self, stack: AsyncExitStack) -> Store:
        url = self.settings.mongo_url.get_secret_value()
        if url == EMBEDDED:
            mongo = await stack.enter_async_context(EmbeddedMongo())
            url = mongo.url
            logger.info("Embedded MongoDB answers at {}, data in {}", url, mongo.data_dir)
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            supervisor = tasks.create_task(mongo.supervise(), name="mongod-supervisor")
            stack.callback(supervisor.cancel)
        self.mongo_url = url

        async def connect() -> Store:
            opening = open_store(url, self.settings.mongo_database, on_return=self._requests.database_returned)
            return await stack.enter_async_context(opening)

        return await self._retry(connect)

    async def _retry(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Repeat until it works; a cause that waiting cannot mend is a ConfigError, unless nobody would see it."""
        backoff, away_since = RETRY.start(), 0.0
        while True:
            began = self._clock.monotonic()
            try:
                done = await self._unless_stopped(attempt())
            except (StoreError, EngineError, ConfigError) as error:
                self._fail(error, again=backoff.failures > 0)
                away_since = away_since or began
                delay = backoff.next_delay(took=self._clock.monotonic() - began)
                await self._unless_stopped(self._clock.sleep(delay))
            else:
                if backoff.failures:
                    logger.info("It is there again after {:.1f} s", began - away_since)
                self.trouble = ""
                return done

    def _fail(self, error: EventwatchError, *, again: bool) -> None:
        self.trouble = str(error)
        lasting = isinstance(error, ConfigError) or getattr(error, "permanent", False)
        if lasting and not (self._embedded and self.ready.is_set()):
            raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from None
        if not again:
            logger.log("ERROR" if lasting else "WARNING", "{}. Retrying until it is there", error)

    async def _unless_stopped(self, awaitable: Awaitable[T]) -> T:
        work = asyncio.ensure_future(awaitable)
        stopping = asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({work, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            raise _Stopped
        finally:
            work.cancel()
            stopping.cancel()
            await asyncio.gather(work, stopping, return_exceptions=True)

    # -- the pipeline --------------------------------------------------------------------------------

    async def _run_terms(self, engine: Engine, store: Store) -> None:
        elector = self._elector = LeaderElector(
            store=store, checker=self.checker, duration=self.settings.lease_duration, clock=self._clock,
            deaths=DeathWatch(engine, self._clock), lookout=Lookout(engine), twins=self._twins,
        )  # fmt: skip
        self.metrics.lease_left.set_function(elector.seconds_left)
        backoff = Pace(base=0.1, cap=1.0, stable=60.0).start()

        async def lead_once() -> _Outcome:
            info = self._info = await self._retry(engine.identify)
            self.metrics.show_engine(info.id)
            self._engine_id = info.id
            lease = await self._retry(partial(elector.acquire, info.id))
            try:
                return await self._lead(engine, store, elector, info, lease)
            finally:
                # Last of all, and shielded: a cancelled host must not leave a lease that others wait for.
                await asyncio.shield(elector.release(lease))

        while True:
            began = self._clock.monotonic()
            try:
                if await lead_once() is _Outcome.STOPPED:
                    return
            except (EventwatchError, _Stopped):
                raise
            # A bug must not end the watching, nor a cancellation that nobody asked for.
            except (Exception, asyncio.CancelledError) as error:
                if is_cancelled(error):
                    raise
                _tell_bug(error)
            backoff.succeeded_for(self._clock.monotonic() - began)
            await self._unless_stopped(self._clock.sleep(backoff.next_delay()))

    async def _lead(
        self, engine: Engine, store: Store, elector: LeaderElector, info: EngineInfo, lease: Lease
    ) -> _Outcome:
        """Run the pipeline until it is told to stop or cannot go on."""
        logger.info("Nodes status checker started.")
        logger.info(
            "Checker id: {}; engine {} {} (API {}), database {}",
            lease.manager_id, info.name, info.version, info.api_version, self.settings.mongo_database,
        )  # fmt: skip
        if info.warning:
            logger.warning("{}", info.warning)
        outcome = _Outcome.AGAIN
        try:
            async with asyncio.TaskGroup() as tasks:
                await self._run_pipeline(tasks, engine, store, elector, lease=lease, host=info.name)
                outcome = _Outcome.STOPPED
        except* EventwatchError as group:
            logger.warning("Starting over: {}", "; ".join(dict.fromkeys(str(error) for error in _leaves(group))))
        except* Exception as group:  # noqa: BLE001 - a bug must not end the watching
            for error in _leaves(group):
                _tell_bug(error)
        finally:
            set_watching(None)
            self._note_truth()
            self.pipeline = self._pulse = None
            self.metrics.leader.set(0)
            self.metrics.engines_dead.set(0)
            self.metrics.connected.set(0)
        logger.info("Nodes status checker stopped.")
        return outcome

    async def _run_pipeline(
        self,
        tasks: asyncio.TaskGroup,
        engine: Engine,
        store: Store,
        elector: LeaderElector,
        *,
        lease: Lease,
        host: str,
    ) -> None:
        settings, clock = self.settings, self._clock
        pipeline = Pipeline(
            engine=engine, store=store, settings=settings, clock=clock, time=self._time, tasks=tasks,
            requests=self._requests, metrics=self.metrics, engine_id=lease.engine_id, host=host,
            manager_id=lease.manager_id, lease=lease, holds_lease=elector.holds, twins=self._twins,
            care=Care(Brakes(), grace=LEFTOVER_GRACE, patience=PATIENCE), stopping=self._stopping,
        )  # fmt: skip
        roster, writer, sweeper = pipeline.roster, pipeline.writer, pipeline.sweeper
        await pipeline.owners.load()
        writer.listeners += self.feed.publish, self._changes.publish, self._latencies.note
        writer.listeners += self.rows.publish, self.series.publish
        self.metrics.queue_depth.set_function(pipeline.reconciler.depth)
        self.metrics.unvouched.set_function(lambda: len(pipeline.inspections.unanswered))
        history = History(store, clock, engine_id=lease.engine_id)
        if settings.history:
            writer.listeners.append(history.remember)
            roster.reasons.on_end.append(history.explain)
            roster.reasons.on_unhealthy.append(history.explain_health)
            tasks.create_task(history.recall_reasons(roster.reasons.recall), name="reasons-recall")
            if not self.feed.recent:
                tasks.create_task(history.recall(self.feed.recall, limit=KEPT_CHANGES), name="history-recall")

        async def keep_lease() -> None:
            try:
                await elector.renew_until_lost(lease, lambda: writer.cursor, lambda: sweeper.witness, self.report)
            except CheckerDeletedError as error:
                logger.info("{}: stopping", error)
                self.stop()

        undocumented = self._undocumented = Undocumented(
            engine,
            settings,
            lambda: [i for i, node in roster.known.items() if node.status == "running"],
            clock,
        )
        pulse = self._pulse = Pulse(partial(engine.list_newest, 1), clock)
        dead = self._dead = DeadEngines(store, clock, self.metrics)
        self.pipeline = pipeline
        self.metrics.leader.set(1)
        set_watching(sweeper)
        pipeline.start(
            intake={
                "undocumented": undocumented.run,
                "pulse": pulse.run,
                "dead-engines": dead.run,
                "indexes": partial(keep_indexes, store, clock),
            },
            workers={"lease-keeper": keep_lease, "history": history.run},
        )
        await self._stopping.wait()
        await pipeline.drain()
        if settings.stop_nodes_on_exit and not await self._is_handed_over(store, lease):
            await pipeline.stopper.stop_all()
        await history.finish()
        pipeline.end()

    async def _is_handed_over(self, store: Store, lease: Lease) -> bool:
        """Whether a standby takes the nodes over, so that they need not be stopped."""
        try:
            standbys = await store.peers(lease.engine_id, besides=lease.manager_id)
        except StoreError as error:
            logger.warning("Whether a standby waits is not known, the nodes are left running: {}", error)
            return True
        if standbys:
            logger.info("Checker {} (host {}) takes the nodes over", standbys[0].manager_id, standbys[0].host)
        return bool(standbys)


@contextmanager
def _interruptions() -> Iterator[asyncio.Event]:
    """An event that is set by SIGINT and SIGTERM, which the host's own handlers get as well.

    Hosts such as uvicorn take note of a signal and end once their start is over: until then nothing else would.
    """
    event, loop = asyncio.Event(), asyncio.get_running_loop()
    before: dict[signal.Signals, Any] = {}

    def handle(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(event.set)
        handler = before[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if callable(handler):  # else the process ends at once, or ignores it
                before[number] = handler
                signal.signal(number, handle)
    try:
        yield event
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is handle:
                signal.signal(number, handler)


@asynccontextmanager
async def watch(
    settings: Settings | None = None, *, start_timeout: float | None = START_TIMEOUT
) -> AsyncIterator[Application]:
    """Run a whole watcher inside a host application, for instance a FastAPI lifespan.

    Entered once the database is set up (so the Beanie documents can be used), even while the engine is away
    or another checker leads. Raises ConfigError for a setting that can never work, StoreError when the database
    cannot be reached within `start_timeout` seconds (None: wait for ever), or SIGINT or SIGTERM comes first. Once
    entered, nothing but the host ends it, or the deletion of its checker document: what it cannot get over by
    itself it logs as an error, and goes on trying. Left when everything is drained; what the host's own code
    raises passes through unchanged.
    """
    app = Application(settings or load_settings(), embedded=True)
    # Not a TaskGroup: one must not be held open across the yield of a context manager (PEP 789), and a host's
    # exception must not come back wrapped in a group.
    # And of no context: a deadline that the host set for itself (`pymongo.timeout`) is not the watcher's.
    running = asyncio.create_task(app.run(), name="eventwatch", context=contextvars.Context())
    ready = asyncio.create_task(app.ready.wait(), name="eventwatch-ready")
    try:
        with _interruptions() as interrupted:
            interruption = asyncio.create_task(interrupted.wait(), name="eventwatch-interrupted")
            try:
                begun = {running, ready, interruption}
                await asyncio.wait(begun, timeout=start_timeout, return_when=asyncio.FIRST_COMPLETED)
            finally:
                interruption.cancel()
        if running.done():
            await running
        if interrupted.is_set() and not app.ready.is_set():
            raise StoreError(f"Told to stop before it was started: {app.trouble or 'no answer yet'}")
        if not app.ready.is_set():
            raise StoreError(f"Not started within {start_timeout:.0f} s: {app.trouble or 'no answer'}")
        yield app
    finally:
        ready.cancel()
        app.stop()
        await running


def _tell_bug(error: BaseException) -> None:
    FAILURES["internal"] += 1
    logger.opt(exception=error).error("Starting over after an unexpected error: {!r}", error)


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return leaves
