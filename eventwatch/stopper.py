"""Stops nodes that sat idle, without ever stopping one that is in use.

A node is claimed first: one atomic write that turns `running` into `stopping` only if its `last_req_time` is
still old enough. A manager refuses to route to a node that does not say `running`, so from then on no request
can start. After `settle_delay` the claim is looked at again, because a manager that read the document before
the claim may have written it back since. Only then is the container stopped; if that fails, the claim is
taken back.

Stops run beside everything else, `stop_concurrency` at once, each with a deadline.

Not promised: that a request which begins between the second look and the engine's SIGTERM survives; a manager
that honours `status` sends none.
"""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta

from loguru import logger

from eventwatch.clock import JumpGuard
from eventwatch.engine import DENIED, NOBODY, Engine
from eventwatch.errors import EngineError, EventwatchError
from eventwatch.model import Cause, Observation, Recorded
from eventwatch.policy import Idleness, idleness
from eventwatch.reconciler import Reconciler
from eventwatch.settings import Settings
from eventwatch.store import Store, naive_utc


class Stopper:
    """Background stops of idle nodes, owned by `tasks`."""

    def __init__(
        self,
        *,
        engine: Engine,
        store: Store,
        reconciler: Reconciler,
        settings: Settings,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._engine = engine
        self._store = store
        self._reconciler = reconciler
        self._settings = settings
        self._tasks = tasks
        self._slots = asyncio.Semaphore(settings.stop_concurrency)
        self._under_way: dict[str, asyncio.Task[None]] = {}
        #: Whether the engine (a socket proxy, rather) refused to stop a container. Nothing is claimed then: a
        #: claim that must be taken back each time would cost the node its requests for nothing.
        self.denied = False
        self._guard = JumpGuard(reconciler.clock, settings.idle_timeout)

    def judge(self, recorded: Recorded, seen: Observation) -> Idleness:
        """Whether the node is idle, as of now."""
        return idleness(recorded, seen, now=self._guard.now(), timeout=self._settings.idle_timeout)

    def consider(self, recorded: Recorded, seen: Observation) -> bool:
        """Begin to stop the node if it is idle and no stop is under way. Returns at once."""
        node_id = recorded.node_id
        if node_id in self._under_way or not self.judge(recorded, seen).idle:
            return False
        if self._settings.dry_run:
            logger.info("Dry run: would stop node {} due to idling time used up", node_id)
            return False
        task = self._tasks.create_task(self._stop(recorded), name=f"stop-{recorded.short_id}")
        self._under_way[node_id] = task
        task.add_done_callback(lambda _: self._under_way.pop(node_id, None))
        return True

    async def drain(self) -> None:
        """Wait for the stops that are under way."""
        if self._under_way:
            await asyncio.wait(set(self._under_way.values()))

    def abandon(self) -> None:
        """Wait no longer for the stops under way: the engine ends them, the next start's sweep records it."""
        for task in self._under_way.values():
            task.cancel()

    async def stop_all(self) -> None:
        """Stop every running node of ours and record its end (`stop_nodes_on_exit`)."""
        running = [node for node in self._reconciler.known.values() if node.status in {"running", "paused"}]
        if self._settings.dry_run:
            for node in running:
                logger.info("Dry run: would stop node {} at exit", node.node_id)
            return
        logger.info("Stopping all {} running nodes", len(running))
        async with asyncio.TaskGroup() as tasks:
            for node in running:
                tasks.create_task(self._stop_at_exit(node), name=f"stop-{node.short_id}")

    async def _stop_at_exit(self, recorded: Recorded) -> None:
        node_id = recorded.node_id
        async with self._slots:
            try:
                if not (await self._engine.inspect(node_id)).found:
                    return  # another engine's, or gone: not for us to judge on the way out
                await self._engine.stop(node_id, grace=self._settings.stop_timeout)
                await self._record_end(node_id)
                result = "stopped"
            except EventwatchError as error:
                logger.warning("Stopping node {} failed: {}", node_id, error)
                result = "failed"
        self._reconciler.metrics.stops.labels("exit", result).inc()

    async def _stop(self, recorded: Recorded) -> None:
        waited = self._slots.locked()
        async with self._slots:
            if self.denied and not await self._is_allowed():
                return
            idle_before = self._guard.now() - timedelta(seconds=self._settings.idle_timeout)
            try:
                if waited and not await self._is_still_idle(recorded.node_id):
                    result = "withdrawn"
                else:
                    result = await self._stop_claimed(recorded, idle_before)
            except EventwatchError as error:
                self.denied = isinstance(error, EngineError) and error.status == DENIED
                logger.warning("Stopping node {} failed: {}", recorded.node_id, error)
                if self.denied:
                    logger.warning("Idle nodes are not stopped until the engine (or its proxy) allows it")
                result = "failed"
            finally:
                self._reconciler.claims.discard(recorded.node_id)
        self._reconciler.metrics.stops.labels("idle", result).inc()

    async def _is_allowed(self) -> bool:
        try:
            await self._engine.stop(NOBODY, grace=0)
        except EngineError as error:
            self.denied = error.status == DENIED
            return False
        self.denied = False
        return True

    async def _is_still_idle(self, node_id: str) -> bool:
        """Judge anew: the wait for a slot may have been long, and a start since then counts like a request."""
        seen = await self._engine.inspect(node_id, as_of=self._reconciler.newest)
        recorded = (await self._store.read([node_id])).get(node_id)
        return recorded is not None and seen.found and self.judge(recorded, seen).idle

    async def _stop_claimed(self, recorded: Recorded, idle_before: datetime) -> str:
        node_id = recorded.node_id
        if not await self._reconciler.claim(recorded, idle_before=idle_before):
            logger.debug("Node {} had a request just now and is left running", recorded.short_id)
            return "withdrawn"
        try:
            await self._reconciler.clock.sleep(self._settings.settle_delay)
            if not await self._store.claim_stands(node_id, idle_before=naive_utc(idle_before)):
                logger.info("Node {} had a request just now and is left running", recorded.short_id)
                await self._reconciler.withdraw_claim(node_id)
                return "withdrawn"
            logger.info("Stopping node: {} due to idling time used up", node_id)
            await self._engine.stop(node_id, grace=self._settings.stop_timeout)
        except EventwatchError:
            await self._reconciler.withdraw_claim(node_id)
            raise
        await self._record_end(node_id)
        return "stopped"

    async def _record_end(self, node_id: str) -> None:
        # The events of the stop tell the same, where somebody listens to them.
        self._reconciler.claims.discard(node_id)
        events_seen = self._reconciler.events_seen(node_id)
        try:
            seen = await self._engine.inspect(node_id, as_of=self._reconciler.newest)
        except EngineError as error:
            logger.debug("After stopping {}: {}", node_id, error)
            return
        if self._reconciler.accept_sweep(seen, events_seen=events_seen, cause=Cause.IDLE):
            await self._reconciler.flush()
