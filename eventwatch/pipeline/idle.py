"""Stops nodes that sat idle, without ever stopping one that is in use, or anything that is no node.

Only a container on the node network, or with the register label, is a node; eventwatch's own, its database's and
its proxy's never are (essentials.py). A node is judged anew, on a fresh inspection, before anything is done.
Then it is claimed: one atomic write that turns `running` into `stopping` only if its `last_req_time` is still old
enough. A manager refuses to route to a node that does not say `running`, so from then on no request can start.
The claim is on record where every process sees it, so that nobody takes `stopping` for a leftover. After
`settle_delay` both are looked at again, because a manager that read the document before the claim may have
written it back, and somebody may have restarted the container. Only then is it stopped; if that fails, the claim
is taken back.

In a sweep, many at once are held by the brake (deletion.py), and the first time that a database is seen with idle
nodes, they are announced and given `FIRST_CONTACT_GRACE`. Stops run beside everything else, `stop_concurrency` at
once, each with a deadline.

Not promised: that a request which begins between the second look and the engine's SIGTERM survives; a manager
that honours `status` sends none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final

from loguru import logger

from eventwatch.core.clock import Clock, KindestClock, Slices
from eventwatch.core.details import idle_reason
from eventwatch.core.errors import EngineError, EventwatchError
from eventwatch.core.facts import Cause, Observation, Owner, Recorded
from eventwatch.core.metrics import Metrics
from eventwatch.core.policy import (
    AT_WORK,
    Activity,
    Idleness,
    Timeout,
    activity,
    as_utc,
    idle_timeout_of,
    idleness,
    mass_limit,
    stop_timeout_of,
    why_not_to_stop,
)
from eventwatch.engine.docker import CALL_DEADLINE, DENIED, NOBODY
from eventwatch.engine.protocol import Engine
from eventwatch.pipeline.deletion import AGREEING_SECONDS, AGREEING_SWEEPS, MassBrake
from eventwatch.pipeline.essentials import Essentials, find_essentials
from eventwatch.pipeline.ownership import OwnerRecord
from eventwatch.pipeline.reconciler import Reconciler
from eventwatch.pipeline.roster import Roster
from eventwatch.pipeline.writer import Writer
from eventwatch.settings.model import Settings
from eventwatch.store.connection import Store

#: Seconds between the first look at a database with idle nodes and the first stop.
FIRST_CONTACT_GRACE: Final = 180.0
#: Seconds that a claim outlives its stop's deadline: what writes its end may have to wait for the database.
CLAIM_RESERVE: Final = 30.0
#: Seconds between two looks at what a node uses, and nodes that are looked at at once.
ACTIVITY_GAP: Final = 3.0
ACTIVITY_LOOKS: Final = 10
AT_EXIT: Final = "stopped by eventwatch as it ended (setting EVENTWATCH_STOP_NODES_ON_EXIT)"
#: Problems of nodes that are remembered, so that they are told once.
MOST_PROBLEMS: Final = 1000


@dataclass(slots=True)
class Stop:
    """One stop under way; `claimed` ends when it is decided whether the node is stopped."""

    recorded: Recorded
    claimed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class IdleStopper:
    """Background stops of idle nodes, owned by `tasks`. `brake`: hold mass stops, and announce the first ones."""

    def __init__(
        self,
        *,
        engine: Engine,
        store: Store,
        roster: Roster,
        owners: OwnerRecord,
        writer: Writer,
        reconciler: Reconciler,
        settings: Settings,
        tasks: asyncio.TaskGroup,
        clock: Clock,
        time: KindestClock,
        metrics: Metrics,
        brake: MassBrake | None = None,
    ) -> None:
        self._engine = engine
        self._store = store
        self._roster = roster
        self._owners = owners
        self._writer = writer
        self._reconciler = reconciler
        self._clock = clock
        self._metrics = metrics
        self._settings = settings
        self._tasks = tasks
        self._time = time
        self.brake = brake
        self._slots = asyncio.Semaphore(settings.stop_concurrency)
        self._looks = asyncio.Semaphore(ACTIVITY_LOOKS)
        self._under_way: dict[str, Stop] = {}
        self._essentials = Essentials()
        #: What is wrong with a node, by its id and the kind of problem, as told.
        self._problems: dict[tuple[str, str], str] = {}
        #: When idle stops begin (monotonic, s), once that is known.
        self._begin_at: float | None = None
        #: Whether the engine (a socket proxy, rather) refused to stop a container. Nothing is claimed then: a
        #: claim that must be taken back each time would cost the node its requests for nothing.
        self.denied = False

    # -- judging ---------------------------------------------------------------------------------------

    def idleness_of(self, recorded: Recorded, seen: Observation, owner: Owner | None) -> Idleness:
        """Whether the node is idle and may be stopped, as of now."""
        verdict = idleness(
            recorded,
            seen,
            now=self._time.now(),
            timeout=self._timeout(recorded, seen),
            used_at=self._roster.used_at(recorded.node_id),
            owner=owner,
        )
        reason = self.why_not_to_stop(seen) if verdict.idle else ""
        return Idleness(idle=False, left=None, reason=reason) if reason else verdict

    def _timeout(self, recorded: Recorded, seen: Observation) -> float:
        own = self._limit(recorded, seen)
        self._tell(seen.node_id, "idle timeout", own.problem)
        return own.seconds

    def _limit(self, recorded: Recorded, seen: Observation) -> Timeout:
        return idle_timeout_of(recorded.idle_timeout, seen.labels, self._settings.idle_timeout)

    def _why(self, recorded: Recorded, seen: Observation) -> str:
        """Why an idle node is stopped, for people."""
        limit, used_at = self._limit(recorded, seen), self._roster.used_at(recorded.node_id)
        last = as_utc(recorded.last_req_time) if recorded.last_req_time else None
        since = max((moment for moment in (last, used_at) if moment), default=None)
        idle = (self._time.now() - since).total_seconds() if since else limit.seconds
        return idle_reason(idle, limit=limit.seconds, source=limit.source)

    def _grace(self, seen: Observation) -> float:
        own = stop_timeout_of(seen.labels, self._settings.stop_timeout)
        self._tell(seen.node_id, "stop timeout", own.problem)
        return own.seconds

    def _tell(self, node_id: str, kind: str, problem: str) -> None:
        """Tell what is wrong with a node; of each kind once, and again only when it is something else."""
        if not problem or self._problems.get((node_id, kind)) == problem:
            return
        if len(self._problems) >= MOST_PROBLEMS:
            known = self._roster.known
            self._problems = {key: text for key, text in self._problems.items() if key[0] in known}
        if len(self._problems) < MOST_PROBLEMS:
            self._problems[node_id, kind] = problem
            logger.warning("Node {}: {}", node_id[:12], problem)

    def why_not_to_stop(self, seen: Observation) -> str:
        """Why this container may not be stopped at all; empty when it may be."""
        network, label = self._settings.node_network, self._settings.register_label
        return self._essentials.why_not_to_stop(seen) or why_not_to_stop(seen, network=network, label=label)

    async def _recognise_essentials(self) -> None:
        self._essentials = await find_essentials(self._settings.docker_host, self._store.addresses())

    async def _judge_anew(self, node_id: str) -> tuple[Recorded, Observation] | None:
        """The idle node as it is now: what the sweep saw may be a while ago, and a start since then is a use."""
        seen = await self._engine.inspect(node_id, as_of=self._roster.newest)
        if not seen.found:
            return None
        self._roster.note_start(seen)
        recorded = (await self._store.read([node_id])).get(node_id)
        owner = (await self._store.read_owners([node_id])).get(node_id)
        return (recorded, seen) if recorded and self.idleness_of(recorded, seen, owner).idle else None

    # -- a sweep's idle nodes --------------------------------------------------------------------------

    async def stop_idle(
        self, documents: Mapping[str, Recorded], seen: Mapping[str, Observation], *, force: bool = False
    ) -> int:
        """Begin to stop the idle ones of the nodes that a sweep saw; how many. `force` lifts the brake."""
        owners, idle, slices = self._owners.owned, [], Slices()
        for node_id, observed in seen.items():
            await slices.turn()
            verdict = self.idleness_of(documents[node_id], observed, owners.get(node_id))
            if verdict.idle and node_id not in self._under_way:
                idle.append(node_id)
        if idle:
            await self._recognise_essentials()
            fresh = await self._store.read_owners(idle)
            idle = [i for i in idle if self.idleness_of(documents[i], seen[i], fresh.get(i)).idle]
        stops = self._settings.idle_timeout > 0 or idle
        if stops and self.brake is not None and not await self._is_announced(len(idle)):
            return 0
        running = sum(observed.status in AT_WORK for observed in seen.values())
        allowed = self._braked(set(idle), running, force=force)
        return sum(self.stop_if_idle(documents[i], seen[i]) is not None for i in idle if i in allowed)

    async def _is_announced(self, idle: int) -> bool:
        """Whether idle stops have begun; at the first contact with a database that has idle nodes, they wait."""
        now = self._clock.monotonic()
        if self._begin_at is None and not self._settings.dry_run:
            engine_id, host = self._roster.engine_id, self._roster.host
            left = await self._store.idle_stops_begin(
                engine_id, host=host, grace=FIRST_CONTACT_GRACE if idle else 0.0
            )
            self._begin_at = now + left
            if idle and left > 0:
                logger.warning(
                    "First contact with this database: {} nodes have used up their idle time; they are stopped in "
                    "{:.0f} s unless requests come in (EVENTWATCH_IDLE_TIMEOUT=0 turns idle stops off)",
                    idle,
                    left,
                )
        return self._begin_at is None or now >= self._begin_at

    def _braked(self, idle: set[str], running: int, *, force: bool) -> set[str]:
        if self.brake is None or force:
            return idle
        limit = mass_limit(self._settings.stop_limit, running)
        allowed = self.brake.release(idle, limit, now=self._clock.monotonic())
        if self.brake.engaged:
            logger.warning(
                "Brake: {} of {} running nodes are idle, more than stop_limit ({}): none is stopped until {} "
                "sweeps in a row and {:.0f} s agree, or `eventwatch sweep --force`",
                len(idle),
                running,
                limit,
                AGREEING_SWEEPS,
                AGREEING_SECONDS,
            )
        return allowed

    # -- one node --------------------------------------------------------------------------------------

    def stop_if_idle(self, recorded: Recorded, seen: Observation) -> Stop | None:
        """Begin to stop the node if it is idle and no stop is under way. Returns at once."""
        node_id = recorded.node_id
        owner = self._owners.owned.get(node_id)
        if node_id in self._under_way or not self.idleness_of(recorded, seen, owner).idle:
            return None
        if self._settings.dry_run:
            logger.info("Dry run: would stop node {} due to idling time used up", node_id)
            return None
        stop = self._under_way[node_id] = Stop(recorded)
        stop.task = self._tasks.create_task(self._stop(stop), name=f"stop-{recorded.short_id}")
        stop.task.add_done_callback(lambda _: self._ended(stop))
        return stop

    def _ended(self, stop: Stop) -> None:
        self._under_way.pop(stop.recorded.node_id, None)
        stop.claimed.set()

    async def drain(self) -> None:
        """Wait for the stops that are under way."""
        if tasks := {stop.task for stop in self._under_way.values() if stop.task}:
            await asyncio.wait(tasks)

    def cancel_all(self) -> None:
        """Wait no longer for the stops under way: the engine ends them, the next start's sweep records it."""
        for stop in self._under_way.values():
            if stop.task:
                stop.task.cancel()

    async def _stop(self, stop: Stop) -> None:
        node_id = stop.recorded.node_id
        if self._settings.idle_activity and not await self._is_at_rest(node_id):
            self._metrics.stops.labels("idle", "works").inc()
            return
        async with self._slots:
            try:
                if self.denied and not await self._is_allowed():
                    return
                await self._recognise_essentials()
                result = await self._stop_claimed(stop)
            except EventwatchError as error:
                self.denied = isinstance(error, EngineError) and error.status == DENIED
                logger.warning("Stopping node {} failed: {}", node_id, error)
                if self.denied:
                    logger.warning("Idle nodes are not stopped until the engine (or its proxy) allows it")
                result = "failed"
            finally:
                self._writer.claims.pop(node_id, None)
        self._metrics.stops.labels("idle", result).inc()

    async def _is_at_rest(self, node_id: str) -> bool:
        """Whether a node that is past its idle time does nothing; work counts as a request now."""
        settings, clock = self._settings, self._clock
        async with self._looks:
            try:
                first, began = await self._engine.usage(node_id), clock.monotonic()
                await clock.sleep(ACTIVITY_GAP)
                second, ended = await self._engine.usage(node_id), clock.monotonic()
            except EngineError as error:
                found = Activity(works=None, reason=f"its usage cannot be read: {error}")
            else:
                found = activity(
                    first,
                    second,
                    seconds=ended - began,
                    thresholds=settings.activities,
                )
        if found.works is None:
            self._tell(node_id, "usage", f"past its idle time, and not stopped, as {found.reason}")
        elif found.works:
            self._roster.note_work(node_id, self._time.now())
            logger.info("Node {} is past its idle time, but works: {}", node_id[:12], found.reason)
        return found.works is False

    async def _is_allowed(self) -> bool:
        try:
            await self._engine.stop(NOBODY, grace=0)
        except EngineError as error:
            self.denied = error.status == DENIED
            return False
        self.denied = False
        return True

    async def _stop_claimed(self, stop: Stop) -> str:
        short_id = stop.recorded.short_id
        now_idle = await self._judge_anew(stop.recorded.node_id)
        if now_idle is None:
            logger.debug("Node {} had a request just now and is left running", short_id)
            return "withdrawn"
        recorded, seen = now_idle
        grace = self._grace(seen)
        idle_before = self._time.now() - timedelta(seconds=self._timeout(recorded, seen))
        lasts = self._settings.settle_delay + grace + CALL_DEADLINE + CLAIM_RESERVE
        why = self._why(recorded, seen)
        used_at = self._roster.used_at(recorded.node_id)
        self._roster.reasons.will_stop(recorded.node_id, why)
        if not await self._writer.claim(recorded, seen, idle_before=idle_before, seconds=lasts):
            self._roster.reasons.will_stop(recorded.node_id, "")
            logger.debug("Node {} had a request just now and is left running", short_id)
            return "withdrawn"
        node_id = recorded.node_id
        stop.claimed.set()
        try:
            await self._clock.sleep(self._settings.settle_delay)
            # First the engine, then the document: what the claim keeps away are requests, not restarts.
            seen = await self._engine.inspect(node_id, as_of=self._roster.newest)
            self._roster.note_start(seen)
            unused = seen.status in AT_WORK and self._roster.used_at(node_id) == used_at
            if not (unused and await self._writer.confirm_claim(node_id, idle_before=idle_before)):
                logger.info("Node {} had a request just now and is left running", short_id)
                await self._writer.withdraw_claim(node_id)
                return "withdrawn"
            logger.info("Stopping node: {} due to idling time used up", node_id)
            logger.info("Node {} is {}", short_id, why)
            await self._engine.stop(node_id, grace=grace)
        except EventwatchError:
            await self._writer.withdraw_claim(node_id)
            raise
        await self._record_end(node_id)
        await self._writer.end_claim(node_id)
        return "stopped"

    async def _record_end(self, node_id: str) -> None:
        # The events of the stop tell the same, where somebody listens to them.
        self._writer.claims.pop(node_id, None)
        events_seen = self._roster.events_seen(node_id)
        try:
            seen = await self._engine.inspect(node_id, as_of=self._roster.newest)
        except EngineError as error:
            logger.debug("After stopping {}: {}", node_id, error)
            return
        if self._reconciler.accept_if_unchanged(seen, since=events_seen, cause=Cause.IDLE):
            await self._writer.flush()

    # -- at exit ---------------------------------------------------------------------------------------

    async def stop_all(self) -> None:
        """Stop every running node of ours and record its end (`stop_nodes_on_exit`)."""
        running = [node for node in self._roster.known.values() if node.status in {"running", "paused"}]
        if self._settings.dry_run:
            for node in running:
                logger.info("Dry run: would stop node {} at exit", node.node_id)
            return
        logger.info("Stopping all {} running nodes", len(running))
        await self._recognise_essentials()
        async with asyncio.TaskGroup() as tasks:
            for node in running:
                tasks.create_task(self._stop_at_exit(node), name=f"stop-{node.short_id}")

    async def _stop_at_exit(self, recorded: Recorded) -> None:
        node_id = recorded.node_id
        async with self._slots:
            try:
                seen = await self._engine.inspect(node_id)
                if not seen.found:
                    return  # another engine's, or gone: not for us to judge on the way out
                if reason := self.why_not_to_stop(seen):
                    logger.info("Node {} is not stopped: {}", recorded.short_id, reason)
                    return
                self._roster.reasons.will_stop(node_id, AT_EXIT)
                await self._engine.stop(node_id, grace=self._grace(seen))
                await self._record_end(node_id)
                result = "stopped"
            except EventwatchError as error:
                logger.warning("Stopping node {} failed: {}", node_id, error)
                result = "failed"
        self._metrics.stops.labels("exit", result).inc()
