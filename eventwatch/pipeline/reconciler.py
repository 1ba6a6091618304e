"""Which fact about a node counts: hints and inspections, in an order that never goes back in time.

A hint (what an event proves), a settle (an inspection once the node is quiet) and a sweep (an inspection of every
node) may all speak about the same node within a millisecond. Here they meet, and per node a fact is handed to the
writer only if no newer one is known.

How an event travels: `on_event` (called by the watcher, never waits) hands the hint to the writer and arms the
settle timer; the writer takes all that is pending, merged per node, as one bulk write; `run_inspector` workers ask
the engine about nodes whose event calls for it or whose settle timer fired, and hand their answers to the writer
too.

What orders the facts of a node:
- two hints: the engine's `timeNano`;
- a hint after an observation: the observation's `time_nano`, a lower bound of when it was true;
- an observation after a hint: it is dropped when a hint arrived after the inspection was asked for, save for what
  was asked for before a start, so as to be there with it (foresight.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import partial
from operator import attrgetter
from typing import Final

from loguru import logger

from eventwatch.core.backoff import WRITES
from eventwatch.core.clock import Clock
from eventwatch.core.details import details_of, end_reason
from eventwatch.core.errors import EngineError, StoreError
from eventwatch.core.facts import ENDED, Cause, Event, Observation, Recorded
from eventwatch.core.metrics import Metrics
from eventwatch.core.policy import (
    KNOWN_ACTIONS,
    desired_fields,
    hint_of,
    is_elsewhere,
    is_older,
    label_matches,
    started_fields,
    where_it_is,
)
from eventwatch.engine.protocol import Engine
from eventwatch.pipeline.foresight import Foresight
from eventwatch.pipeline.inspections import Inspections
from eventwatch.pipeline.orphans import Orphans
from eventwatch.pipeline.roster import NodeState, Roster
from eventwatch.pipeline.writer import Gone, Hint, Seen, Writer
from eventwatch.settings.model import Settings
from eventwatch.store.nodes import LOOKED_AT

#: A settle is put off while events keep coming, to at most this many times `settle_delay` after the first.
SETTLE_LIMIT: Final = 4
_looked_at: Final = attrgetter(*LOOKED_AT)


class Reconciler:
    """Orders the facts of one engine's nodes. See the module's docstring for the contract."""

    def __init__(
        self,
        *,
        engine: Engine,
        settings: Settings,
        roster: Roster,
        inspections: Inspections,
        orphans: Orphans,
        writer: Writer,
        request_sweep: Callable[[], object],
        clock: Clock,
        metrics: Metrics,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self.foresight = Foresight(
            engine=engine,
            roster=roster,
            network=settings.node_network,
            on_answer=self._accept_foreseen,
            on_none=partial(inspections.soon, urgent=True),
            clock=clock,
            tasks=tasks,
        )
        self._engine = engine
        self._settings = settings
        self._roster = roster
        self._inspections = inspections
        self._orphans = orphans
        self._writer = writer
        self._request_sweep = request_sweep
        self._clock = clock
        self._metrics = metrics

    # -- intake: from the watcher, synchronous -------------------------------------------------------

    def on_event(self, event: Event) -> None:
        """Take in one event: at most dictionary work, so that the stream's reader never waits."""
        self._metrics.events.labels(event.action if event.action in KNOWN_ACTIONS else "other").inc()
        if event.action not in KNOWN_ACTIONS:
            return
        roster, node_id = self._roster, event.node_id
        if not is_older(event.time_nano, roster.newest):
            roster.newest = event.time_nano
        if node_id not in roster.known:
            if event.action == "start" and self._settings.register_label:
                self._inspections.soon(node_id, urgent=True)
            self._orphans.on_event(event)
            return
        node = roster.state(node_id)
        node.events += 1
        node.observed = None
        roster.reasons.on_event(event)
        hint = hint_of(event, health_check=self._settings.health_check)
        stale = is_older(event.time_nano, node.as_of)
        self.foresight.on_event(event, stale=stale)
        if hint.delete:  # final whatever came before or after: an id never comes back
            node.status_hints += 1
            self._writer.put(node_id, Gone(Cause.EVENT, [event.time_nano]))
        elif hint.fields is not None and not stale:
            if event.action == "health_status":
                node.health_hints += 1
                node.health = event.health or ""
            else:
                node.status_hints += 1
            node.as_of = event.time_nano
            self._writer.put(node_id, Hint(Cause.EVENT, dict(hint.fields), [event.time_nano]))
        elif hint.inspect:
            node.status_hints += 1
            node.waiting.append(event.time_nano)
            if not self.foresight.expect(event):
                self._inspections.soon(node_id, urgent=True)
        self._settle_later(node_id, node)

    def _settle_later(self, node_id: str, node: NodeState) -> None:
        node.last_event = self._clock.monotonic()
        if node.settle is None:
            node.first_event = node.last_event
            self._arm_settle(node_id, node, self._settings.settle_delay)

    def _arm_settle(self, node_id: str, node: NodeState, delay: float) -> None:
        # One timer per node that re-arms itself when due, instead of one cancelled and set per event.
        node.settle = self._clock.call_later(delay, lambda: self._settle_due(node_id, node))

    def _settle_due(self, node_id: str, node: NodeState) -> None:
        node.settle = None
        if node.first_event is None or node_id not in self._roster.known:
            return
        delay = self._settings.settle_delay
        due = min(node.last_event + delay, node.first_event + SETTLE_LIMIT * delay)
        left = due - self._clock.monotonic()
        if left > 0.0005:  # noqa: PLR2004 - below a timer's resolution
            self._arm_settle(node_id, node, left)
            return
        if self.foresight.awaits(node_id):  # its start is about to come, and begins this anew
            self._arm_settle(node_id, node, delay)
            return
        node.first_event = None
        self._inspections.soon(node_id)

    # -- inspections: from the workers, and from the sweeper -----------------------------------------

    async def run_inspector(self) -> None:
        """Inspect what the queue asks for, one node at a time; run `INSPECTORS` of these. Never ends."""
        while True:
            node_id, urgent = await self._inspections.get()
            try:
                await self._inspect(node_id, urgent=urgent)
            finally:
                self._inspections.done(node_id)

    async def _inspect(self, node_id: str, *, urgent: bool) -> None:
        node = self._roster.state(node_id)
        before = (node.status_hints, node.health_hints, node.answers)
        try:
            seen = await self._engine.inspect(node_id, as_of=self._roster.newest)
        except EngineError as error:
            self._inspections.failed(node_id, error, urgent=urgent)
            return
        self._inspections.succeeded(node_id)
        if node.status_hints != before[0]:
            return  # a newer fact is on its way: a hint, or the inspection that it asked for
        if node_id not in self._roster.known:
            await self._consider_registering(seen)
            return
        if seen.found and node.answers != before[2]:
            # A sweep's answer was taken meanwhile; which of the two is newer, only a third can tell.
            self._inspections.soon(node_id, urgent=urgent)
            return
        if not urgent:
            cause, node.looked = Cause.LOOK if node.looked else Cause.SETTLE, False
            if node.health_hints == before[1]:
                self._accept(seen, cause)
            return
        if not seen.found or node_id in self._writer.claims:
            self._accept(seen, Cause.EVENT)
            return
        fields = self.note(seen)
        if node.health_hints != before[1]:
            # The newer word, said again: a document that was not `running` yet did not take it as it was.
            fields["health"] = node.health
        self._writer.put(node_id, Hint(Cause.EVENT, fields, self._answered(node, seen)))

    def _accept_foreseen(self, node_id: str, told: Observation | str, started: int) -> None:
        """Take what was asked for before a start and proves it. Whatever came in between has dropped it."""
        node = self._roster.state(node_id)
        unknown = node_id not in self._roster.known or (isinstance(told, str) and node.checked is None)
        if unknown or node_id in self._writer.claims:
            self._inspections.soon(node_id, urgent=True)
            return
        node.as_of = max(node.as_of, started)
        if isinstance(told, str):
            fields = started_fields(told, checked=bool(node.checked), health_check=self._settings.health_check)
            times, node.waiting = node.waiting, []
        else:
            self._inspections.succeeded(node_id)
            fields, times = self.note(told), self._answered(node, told)
        self._writer.put(node_id, Hint(Cause.EVENT, fields, times))

    def note(self, seen: Observation) -> dict[str, str | int]:
        """Take note of what an inspection says; the document's fields as they should be."""
        settings, node = self._settings, self._roster.note_start(seen)
        if not node.elsewhere and is_elsewhere(seen, settings.node_network):
            node.elsewhere = True
            logger.warning(
                "Node {} {}, so it gets no ip: attach it to {}, or set EVENTWATCH_NODE_NETWORK",
                seen.node_id[:12],
                where_it_is(seen),
                settings.node_network,
            )
        wanted = desired_fields(seen, node_port=settings.node_port, health_check=settings.health_check)
        if node.observed != wanted:
            node.observed, node.observed_at = wanted, self._clock.time_ns()
        return dict(wanted)

    def _answered(self, node: NodeState, seen: Observation) -> list[int]:
        """Count an answer that is taken; `timeNano` of the events that waited for it."""
        self.foresight.drop(seen.node_id)
        node.as_of = max(node.as_of, seen.time_nano)
        node.answers += 1
        times, node.waiting = node.waiting, []
        return times

    def _accept(self, seen: Observation, cause: Cause) -> None:
        if not seen.found and cause is not Cause.SWEEP and self._roster.engine_id:
            self._request_sweep()  # it asks which engine says so, whose the node is, and how many are gone
            return
        if seen.found:
            self.note(seen)
        times = self._answered(self._roster.state(seen.node_id), seen)
        self._writer.put(seen.node_id, Seen(cause, seen, times) if seen.found else Gone(cause, times))

    def accept_if_unchanged(self, seen: Observation, *, since: int, cause: Cause = Cause.SWEEP) -> bool:
        """Take a sweep's observation, unless the node has had a fact since: an event settles by itself.

        `since` is what `Roster.events_seen` said before the inspection was asked for.
        """
        if self._roster.events_seen(seen.node_id) != since:
            return False
        self._accept(seen, cause)
        return True

    def depth(self) -> float:
        """How many nodes wait for an inspection or a write."""
        return len(self._inspections) + len(self._writer)

    async def drain(self) -> None:
        """Settle every node that waits for it now, and write what comes of it. For when intake has stopped."""
        for node_id in self._roster.take_settling():
            self._inspections.soon(node_id)
        await self._inspections.wait_idle()
        await self._writer.flush()

    # -- which containers are nodes ------------------------------------------------------------------

    def replace_known(self, documents: Mapping[str, Recorded], *, known_before: Mapping[str, Recorded]) -> None:
        """Take over a read of all members; see `Roster.replace_known`."""
        self._roster.replace_known(documents, known_before=known_before)
        self._orphans.drop(documents.keys())

    def check_document(self, before: Recorded | None, fields: tuple[object, ...] | None) -> None:
        """Take in what a look at a document found (`LOOKED_AT`; None: no document).

        `before` is what we knew when the look began; what was read or written since is newer.
        """
        if before is None or self._roster.known.get(before.node_id) is not before:
            return
        node_id = before.node_id
        if fields is None:
            self._roster.forget(node_id)
            self._orphans.wait_for(node_id)  # a manager may put it back
        elif fields != _looked_at(before) and node_id not in self._inspections.unanswered:
            self._roster.state(node_id).looked = True
            self._inspections.soon(node_id)

    async def _consider_registering(self, seen: Observation) -> None:
        label = self._settings.register_label
        if label and seen.status in {"running", "paused"} and label_matches(label, seen.labels):
            try:
                await self.register(seen)
            except StoreError as error:
                logger.warning("Node {} could not be registered, trying again: {}", seen.node_id[:12], error)
                self._clock.call_later(WRITES.cap, partial(self._inspections.soon, seen.node_id, urgent=True))
            return
        if label and seen.ending and seen.status in ENDED and label_matches(label, seen.labels):
            named = (seen.node_id[:12], details_of(seen).name, end_reason(seen.ending))
            logger.info("Container {} ({}) has the register label, and ended before it had a document: {}", *named)
        if seen.node_id not in self._orphans:
            self._roster.drop_state(seen.node_id)

    async def register(self, seen: Observation) -> None:
        """Give a labelled container a document (opt-in). Raises StoreError."""
        self.note(seen)
        self._orphans.adopt(await self._writer.register(seen))
