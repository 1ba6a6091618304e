"""The one writer: turns hints and observations into guarded writes, in an order that never goes back in time.

Why one: a hint (what an event proves), a settle (an inspection once the node is quiet) and a sweep (an
inspection of every node) may all speak about the same node within a millisecond. Here they meet, and per node
a fact is written only if no newer one is known.

How an event travels: `notice` (called by the watcher, never waits) puts the hint into `_pending` and arms the
settle timer; `run_writer` takes all that is pending, merged per node, as one bulk write, while what becomes
ready meanwhile is the next batch; `run_inspector` workers ask the engine about nodes whose event calls for it
or whose settle timer fired, and put their answers into `_pending` too.

What orders the facts of a node:
- two hints: the engine's `timeNano`;
- a hint after an observation: the observation's `time_nano`, a lower bound of when it was true;
- an observation after a hint: it is dropped when a hint arrived after the inspection was asked for.

A hint is written without reading (one round trip). An observation from a settle or a sweep is compared with
the document read anew, and written only where it differs and only if the document still says what was read.
`known` remembers documents for three purposes only: to tell nodes from other containers without a query, to
log the old value, and to count. No decision about a settle or a sweep relies on it.

Not promised: that every state a node passed through is written; the last one is.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from operator import attrgetter
from typing import Final

from loguru import logger

from eventwatch.core.backoff import TIMED_OUT, Backoff, Pace
from eventwatch.core.clock import Clock, SystemClock, Timer
from eventwatch.core.details import details_of, end_reason
from eventwatch.core.errors import EngineError, LeaseLostError, StoreError
from eventwatch.core.facts import ENDED, STOPPING, Cause, Change, Claim, Event, Observation, Owner, Recorded, Write
from eventwatch.core.metrics import Metrics
from eventwatch.core.policy import (
    IDLE_LABEL,
    KNOWN_ACTIONS,
    Fields,
    as_run,
    claim_on,
    complete_hint,
    desired_fields,
    difference,
    hint_of,
    is_elsewhere,
    is_older,
    label_matches,
    start_as_use,
    where_it_is,
)
from eventwatch.core.reasons import Reasons
from eventwatch.core.workqueue import WorkQueue
from eventwatch.engine.docker import Engine
from eventwatch.settings.model import Settings
from eventwatch.store.documents import ToolServerNode
from eventwatch.store.nodes import LOOKED_AT, Lease, Refused, Store, naive_utc

#: A settle is put off while events keep coming, to at most this many times `settle_delay` after the first.
SETTLE_LIMIT: Final = 4
#: Inspections in flight. An inspection may block for seconds on one container's lock; others must not wait.
INSPECTORS: Final = 32
#: Nodes that are inspected again and again while their inspections fail; of more, the sweeps ask.
RETRIED: Final = 16
#: Orphans are looked for after an eighth of their age, between these bounds (seconds).
ORPHAN_POLL: Final = (0.01, 0.25)
#: Containers remembered as no nodes, and orphans waiting: bounds on memory, the sweep finds what they lose.
REMEMBERED: Final = 10_000
_looked_at: Final = attrgetter(*LOOKED_AT)
#: Fields that say whose a node is. To take a node over is no change of it.
STAMP: Final = frozenset({"engine_id", "epoch"})
#: Seconds between attempts to write while the database is away.
WRITE_RETRY: Final = Pace(base=0.05, cap=0.5)


@dataclass(slots=True)
class _Node:
    """What orders the facts of one container. Counters grow, so that a later look can tell what came between."""

    as_of: int = 0
    events: int = 0
    status_hints: int = 0
    health_hints: int = 0
    answers: int = 0
    health: str = ""
    first_event: float | None = None
    last_event: float = 0.0
    settle: Timer | None = None
    retry: Timer | None = None
    failed: int = 0
    elsewhere: bool = False
    looked: bool = False
    started_at: datetime | None = None
    used_at: datetime | None = None
    worked_at: datetime | None = None
    idle_label: str | None = None
    #: What the last inspections say of the document's fields, unless an event came since; and since when.
    observed: Fields | None = None
    observed_at: int = 0
    waiting: list[int] = field(default_factory=list)
    failures: Backoff = field(default_factory=lambda: Pace(base=0.1, cap=5.0).start())


@dataclass(slots=True)
class _Pending:
    """What is to be written for one node: `fields` as they are, or `seen`, to be compared first; or its end."""

    cause: Cause
    fields: dict[str, str | int] | None = None
    seen: Observation | None = None
    delete: bool = False
    times: list[int] = field(default_factory=list)


class Reconciler:
    """Owns every write to node documents of one engine. See the module's docstring for the contract."""

    def __init__(
        self,
        *,
        engine: Engine,
        store: Store,
        settings: Settings,
        engine_id: str,
        host: str = "",
        clock: Clock | None = None,
        metrics: Metrics | None = None,
        lease: Lease | None = None,
        holds_lease: Callable[[], bool] = lambda: True,
        request_sweep: Callable[[], object] = lambda: None,
    ) -> None:
        self.engine_id = engine_id
        #: The engine's name.
        self.host = host
        self.clock = clock or SystemClock()
        self.metrics = metrics or Metrics()
        self.known: dict[str, Recorded] = {}
        #: Whether a pass has told which documents there are; until then, one that is not known proves nothing.
        self.has_learned = False
        #: Whether what a sweep corrects is drift: not where nobody has watched before.
        self._counts_drift = lease is None or lease.epoch > 1
        #: Why the nodes are as they are.
        self.reasons = Reasons(clock=self.clock, metrics=self.metrics, health_check=settings.health_check)
        #: Our own claims under way.
        self.claims: dict[str, Claim] = {}
        #: What is on record of the containers that our engine has; `run_owner_recorder` keeps the record.
        self.owned: dict[str, Owner] = {}
        #: Those that it had lately and that are gone, by age: a stale save may bring their documents back.
        self.gone: OrderedDict[str, None] = OrderedDict()
        self.listeners: list[Callable[[Change], object]] = []
        self.inspections: WorkQueue[str] = WorkQueue()
        #: `timeNano` of the newest event of which all that it led to is written.
        self.cursor: int | None = None
        self._engine = engine
        self._store = store
        self._settings = settings
        self._lease = lease
        self._holds_lease = holds_lease
        #: Called when only a sweep can find or decide something.
        self._request_sweep = request_sweep
        self._newest = 0
        self._nodes: dict[str, _Node] = {}
        self._orphans: dict[str, float] = {}
        #: Containers that are no nodes, and whether their start was told while their documents were waited for.
        self._strangers: OrderedDict[str, bool] = OrderedDict()
        self._started: set[str] = set()
        self._pending: dict[str, _Pending] = {}
        self._has_pending = asyncio.Event()
        self._has_orphans = asyncio.Event()
        self._writing = asyncio.Lock()
        #: Nodes whose last inspection failed, the longest first.
        self.unanswered: dict[str, None] = {}
        self._retrying: set[str] = set()
        self._claimant = lease.manager_id if lease else secrets.token_hex(16)
        self._to_own: dict[str, Owner] = {}
        self._to_disown: set[str] = set()
        self._has_ownership = asyncio.Event()

    # -- intake: from the watcher, synchronous -------------------------------------------------------

    def notice(self, event: Event) -> None:
        """Take in one event: at most dictionary work, so that the stream's reader never waits."""
        self.metrics.events.labels(event.action if event.action in KNOWN_ACTIONS else "other").inc()
        if event.action not in KNOWN_ACTIONS:
            return
        if not is_older(event.time_nano, self._newest):
            self._newest = event.time_nano
        if event.node_id not in self.known:
            self._notice_unknown(event)
            return
        node = self._node(event.node_id)
        node.events += 1
        node.observed = None
        self.reasons.on_event(event)
        hint = hint_of(event, health_check=self._settings.health_check)
        stale = is_older(event.time_nano, node.as_of)
        if hint.delete:  # final whatever came before or after: an id never comes back
            node.status_hints += 1
            self._put(event.node_id, _Pending(Cause.EVENT, delete=True, times=[event.time_nano]))
        elif hint.fields is not None and not stale:
            if event.action == "health_status":
                node.health_hints += 1
                node.health = event.health or ""
            else:
                node.status_hints += 1
            node.as_of = event.time_nano
            self._put_fields(event.node_id, hint.fields, Cause.EVENT, [event.time_nano])
        elif hint.inspect:
            node.status_hints += 1
            node.waiting.append(event.time_nano)
            self.inspect_soon(event.node_id, urgent=True)
        self._settle_later(event.node_id, node)

    def _notice_unknown(self, event: Event) -> None:
        node_id = event.node_id
        if event.action == "start" and self._settings.register_label:
            self.inspect_soon(node_id, urgent=True)
        if event.action == "destroy":
            self.disown(node_id)  # a manager deletes the document by itself, as a rule before the container
        started = self._strangers.get(node_id)
        if started is not None:
            if event.action == "destroy":
                del self._strangers[node_id]
            if event.action != "start" or started:
                return
            del self._strangers[node_id]  # made long ago: its document may come only now
        self._wait_for_document(node_id)
        if event.action == "start" and node_id in self._orphans:
            self._started.add(node_id)

    def expect(self, node_ids: Iterable[str]) -> None:
        """Wait for documents of these containers, too: what started them was told before anybody listened."""
        for node_id in node_ids:
            if node_id not in self.known and node_id not in self._strangers:
                self._wait_for_document(node_id)

    def _wait_for_document(self, node_id: str) -> None:
        if node_id not in self._orphans:
            if len(self._orphans) >= REMEMBERED:
                self._request_sweep()
                return
            self._orphans[node_id] = self.clock.monotonic()
            self._has_orphans.set()

    def _node(self, node_id: str) -> _Node:
        node = self._nodes.get(node_id)
        if node is None:
            node = self._nodes[node_id] = _Node()
        return node

    def _settle_later(self, node_id: str, node: _Node) -> None:
        node.last_event = self.clock.monotonic()
        if node.settle is None:
            node.first_event = node.last_event
            self._arm_settle(node_id, node, self._settings.settle_delay)

    def _arm_settle(self, node_id: str, node: _Node, delay: float) -> None:
        # One timer per node that re-arms itself when due, instead of one cancelled and set per event.
        node.settle = self.clock.call_later(delay, lambda: self._settle_due(node_id, node))

    def _settle_due(self, node_id: str, node: _Node) -> None:
        node.settle = None
        if node.first_event is None or node_id not in self.known:
            return
        delay = self._settings.settle_delay
        due = min(node.last_event + delay, node.first_event + SETTLE_LIMIT * delay)
        left = due - self.clock.monotonic()
        if left > 0.0005:  # noqa: PLR2004 - below a timer's resolution
            self._arm_settle(node_id, node, left)
            return
        node.first_event = None
        self.inspect_soon(node_id)

    def inspect_soon(self, node_id: str, *, urgent: bool = False) -> None:
        """Queue an inspection of this node, before all that are not urgent if it is."""
        if not self.inspections.add(node_id, urgent=urgent):
            self._request_sweep()

    # -- pending facts -------------------------------------------------------------------------------

    def _put(self, node_id: str, pending: _Pending) -> None:
        older = self._pending.get(node_id)
        self._pending[node_id] = pending if older is None else _merge(older, pending)
        self._has_pending.set()

    def _put_fields(self, node_id: str, fields: Fields, cause: Cause, times: list[int]) -> None:
        self._put(node_id, _Pending(cause, fields=dict(fields), times=times))

    # -- inspections: from the workers, and from the sweeper -----------------------------------------

    async def run_inspector(self) -> None:
        """Inspect what the queue asks for, one node at a time; run `INSPECTORS` of these. Never ends."""
        while True:
            node_id, urgent = await self.inspections.get()
            try:
                await self._inspect(node_id, urgent=urgent)
            finally:
                self.inspections.done(node_id)

    async def _inspect(self, node_id: str, *, urgent: bool) -> None:
        node = self._node(node_id)
        before = (node.status_hints, node.health_hints, node.answers)
        try:
            seen = await self._engine.inspect(node_id, as_of=self._newest)
        except EngineError as error:
            self.inspection_failed(node_id, error, urgent=urgent)
            return
        self.inspection_succeeded(node_id)
        if node.status_hints != before[0]:
            return  # a newer fact is on its way: a hint, or the inspection that it asked for
        if node_id not in self.known:
            await self._consider_registering(seen)
            return
        if seen.found and node.answers != before[2]:
            # A sweep's answer was taken meanwhile; which of the two is newer, only a third can tell.
            self.inspect_soon(node_id, urgent=urgent)
            return
        if not urgent:
            cause, node.looked = Cause.LOOK if node.looked else Cause.SETTLE, False
            if node.health_hints == before[1]:
                self._accept(seen, cause, node)
            return
        fields = self._desired(seen)
        if node.health_hints != before[1]:
            # The newer word, said again: a document that was not `running` yet did not take it as it was.
            fields["health"] = node.health
        if not seen.found or node_id in self.claims:
            self._accept(seen, Cause.EVENT, node)
        else:
            node.as_of = max(node.as_of, seen.time_nano)
            node.answers += 1
            times, node.waiting = node.waiting, []
            self._put_fields(node_id, fields, Cause.EVENT, times)

    def _desired(self, seen: Observation) -> dict[str, str | int]:
        node = self.note_start(seen)
        if not node.elsewhere and is_elsewhere(seen, self._settings.node_network):
            node.elsewhere = True
            logger.warning(
                "Node {} {}, so it gets no ip: attach it to {}, or set EVENTWATCH_NODE_NETWORK",
                seen.node_id[:12], where_it_is(seen), self._settings.node_network,
            )  # fmt: skip
        wanted = desired_fields(seen, node_port=self._settings.node_port, health_check=self._settings.health_check)
        if node.observed != wanted:
            node.observed, node.observed_at = wanted, self.clock.time_ns()
        return dict(wanted)

    def _accept(self, seen: Observation, cause: Cause, node: _Node) -> None:
        if not seen.found and cause is not Cause.SWEEP and self.engine_id:
            self._request_sweep()  # it asks which engine says so, whose the node is, and how many are gone
            return
        node.as_of = max(node.as_of, seen.time_nano)
        node.answers += 1
        times, node.waiting = node.waiting, []
        self._put(seen.node_id, _Pending(cause, seen=seen, delete=not seen.found, times=times))

    def events_seen(self, node_id: str) -> int:
        """How many facts (events, answers taken) this node has had; a sweep remembers it before it inspects."""
        node = self._nodes.get(node_id)
        return node.events + node.answers if node else 0

    def accept_sweep(self, seen: Observation, *, events_seen: int, cause: Cause = Cause.SWEEP) -> bool:
        """Take a sweep's observation, unless the node has had a fact since: an event settles by itself."""
        if self.events_seen(seen.node_id) != events_seen:
            return False
        self._accept(seen, cause, self._node(seen.node_id))
        return True

    @property
    def newest(self) -> int:
        """Engine time (ns) of the newest event received: whatever is asked now is at least as new."""
        return self._newest

    def started_at(self, node_id: str) -> datetime | None:
        """When the container started, by the last inspection of it."""
        node = self._nodes.get(node_id)
        return node.started_at if node else None

    def swept(self) -> None:
        """A sweep has ended: from now on, what one corrects is drift."""
        self._counts_drift = True

    def inspection_failed(self, node_id: str, error: EngineError, *, urgent: bool = False) -> None:
        """Have the node inspected again later: by one timer each, and of many that fail at once only some.

        The rest of them is inspected when one succeeds again, or by the next sweep.
        """
        node = self._node(node_id)
        self.unanswered[node_id] = None
        if node_id not in self._retrying and len(self._retrying) >= RETRIED:
            return
        self._retrying.add(node_id)
        node.failed += 1
        # An engine that is away is the watcher's to tell of. Else: the 1st, 2nd, 4th, 8th ... time.
        if not error.unreachable and node.failed & (node.failed - 1) == 0:
            logger.warning("Failed to get node info from docker: {}", node_id)
            logger.warning("{}{}", error, f" ({node.failed} times by now)" if node.failed > 1 else "")
        if node.retry is None:
            delay = node.failures.next_delay()
            node.retry = self.clock.call_later(delay, lambda: self._retry(node_id, node, urgent=urgent))

    def _retry(self, node_id: str, node: _Node, *, urgent: bool) -> None:
        node.retry = None
        self.inspect_soon(node_id, urgent=urgent)

    def inspection_succeeded(self, node_id: str) -> None:
        """The engine has answered for the node, and maybe does again for those that wait for that."""
        node = self._node(node_id)
        node.failures.succeeded_for(0)
        node.failed = 0
        if self.unanswered.pop(node_id, self) is self:
            return
        self._retrying.discard(node_id)
        for waiting in [i for i in self.unanswered if i not in self._retrying][:INSPECTORS]:
            self.inspect_soon(waiting)

    def note_start(self, seen: Observation) -> _Node:
        """Remember when the container started, and whether that start was a use of the node."""
        node = self._node(seen.node_id)
        node.started_at = seen.started_at
        node.used_at = start_as_use(seen, node.used_at)
        node.idle_label = seen.labels.get(IDLE_LABEL)
        self.reasons.on_inspection(seen)
        return node

    def idle_label(self, node_id: str) -> dict[str, str]:
        """The container's label about its idle time, as far as inspections told; empty without one."""
        node = self._nodes.get(node_id)
        return {IDLE_LABEL: node.idle_label} if node and node.idle_label is not None else {}

    def used_at(self, node_id: str) -> datetime | None:
        """The container's last start by a person or a manager, or work of its own, as far as we were told."""
        node = self._nodes.get(node_id)
        if node is None or node.worked_at is None:
            return node.used_at if node else None
        return max(node.used_at, node.worked_at) if node.used_at else node.worked_at

    def observed(self, node_id: str) -> tuple[Fields | None, int]:
        """What inspections say the document should hold, unless an event came since; since when (Unix, ns)."""
        node = self._nodes.get(node_id)
        return (node.observed, node.observed_at) if node else (None, 0)

    def note_work(self, node_id: str, moment: datetime) -> None:
        """Count what the node did as a use of it (aware UTC)."""
        self._node(node_id).worked_at = moment

    def depth(self) -> float:
        """How many nodes wait for an inspection or a write."""
        return len(self.inspections) + len(self._pending)

    # -- which containers are nodes ------------------------------------------------------------------

    def learn(self, documents: Mapping[str, Recorded], *, known_before: Mapping[str, Recorded]) -> None:
        """Take over a read of all members; `known_before` is a copy of `known` from when it began.

        What was written or deleted since is newer than the read.
        """
        self.has_learned = True
        for node_id in known_before.keys() - documents.keys():
            self._forget(node_id)
        for node_id, recorded in documents.items():
            if self.known.get(node_id) is known_before.get(node_id):
                self.known[node_id] = recorded
            self._orphans.pop(node_id, None)
            self._strangers.pop(node_id, None)

    def _forget(self, node_id: str) -> None:
        self.known.pop(node_id, None)
        self._drop_state(node_id)

    def _drop_state(self, node_id: str) -> None:
        self.unanswered.pop(node_id, None)
        self._retrying.discard(node_id)
        self.reasons.forget(node_id)
        node = self._nodes.pop(node_id, None)
        for timer in (node.settle, node.retry) if node else ():
            if timer:
                timer.cancel()

    def own_ids(self) -> list[str]:
        """The containers that our engine has, as far as we were told, whether or not they have documents."""
        return [*(self.owned if self._lease else self.known), *self._strangers]

    def check_document(self, before: Recorded | None, fields: tuple[object, ...] | None) -> None:
        """Take in what a look at a document found (`LOOKED_AT`; None: no document).

        `before` is what we knew when the look began; what was read or written since is newer.
        """
        if before is None or self.known.get(before.node_id) is not before:
            return
        node_id = before.node_id
        if fields is None:
            self._forget(node_id)
            self._wait_for_document(node_id)  # a manager may put it back
        elif fields != _looked_at(before) and node_id not in self.unanswered:
            self._node(node_id).looked = True
            self.inspect_soon(node_id)

    def adopt(self, documents: Mapping[str, Recorded]) -> None:
        """Take over documents of containers that had none; what is known by now is newer."""
        if new := {i: recorded for i, recorded in documents.items() if i not in self.known}:
            self._adopt(new)

    async def run_orphanage(self) -> None:
        """Look for the documents of unknown containers, more and more rarely, for `orphan_grace`. Never ends."""
        shortest, longest = ORPHAN_POLL
        away, slow = False, TIMED_OUT.start()
        while True:
            await self._has_orphans.wait()
            youngest = self.clock.monotonic() - max(self._orphans.values(), default=0.0)
            await self.clock.sleep(min(longest, max(shortest, youngest / 8)))
            try:
                found = await self._store.read(self._orphans)
            except StoreError as error:
                logger.log("DEBUG" if away else "WARNING", "Looking for orphans' documents failed: {}", error)
                away = True
                await self.clock.sleep(slow.next_delay() if error.timed_out else longest)
                continue
            away = False
            slow.succeeded_for(0)
            self._adopt(found)

    def _adopt(self, found: Mapping[str, Recorded]) -> None:
        for node_id, recorded in found.items():
            self.known[node_id] = recorded
            self._strangers.pop(node_id, None)
            self._started.discard(node_id)
            if self._orphans.pop(node_id, None) is not None:
                self._own(node_id)  # the engine told of it, though it may be gone by now
                self._node(node_id).events += 1
            self.inspect_soon(node_id, urgent=True)
        horizon = self.clock.monotonic() - self._settings.orphan_grace
        for node_id in [i for i, since in self._orphans.items() if since <= horizon]:
            del self._orphans[node_id]
            self._drop_state(node_id)
            self._strangers[node_id] = node_id in self._started
            self._started.discard(node_id)
        while len(self._strangers) > REMEMBERED:
            self._strangers.popitem(last=False)
        if not self._orphans:
            self._has_orphans.clear()

    async def _consider_registering(self, seen: Observation) -> None:
        label = self._settings.register_label
        if label and seen.status in {"running", "paused"} and label_matches(label, seen.labels):
            try:
                await self.register(seen)
            except StoreError as error:
                logger.warning("Node {} could not be registered, trying again: {}", seen.node_id[:12], error)
                self.clock.call_later(WRITE_RETRY.cap, lambda: self.inspect_soon(seen.node_id, urgent=True))
            return
        if label and seen.ending and seen.status in ENDED and label_matches(label, seen.labels):
            named = (seen.node_id[:12], details_of(seen).name, end_reason(seen.ending))
            logger.info("Container {} ({}) has the register label, and ended before it had a document: {}", *named)
        if seen.node_id not in self._orphans:
            self._drop_state(seen.node_id)

    async def register(self, seen: Observation) -> None:
        """Give a labelled container a document (opt-in); its start counts as its first request."""
        wanted = self._desired(seen)
        node = ToolServerNode(
            id=seen.node_id,
            short_id=seen.node_id[:12],
            status=seen.status,
            health=str(wanted.get("health", "none")),
            ip=seen.ip,
            port=int(wanted.get("port", self._settings.node_port)),
            last_req_time=naive_utc(seen.started_at) if seen.started_at else None,
        )
        async with self._writing:
            self._require_lease()
            if self._settings.dry_run:
                logger.info("Dry run: would register node {}", node.short_id)
                return
            # On record first: registered, but not known to be, it would look like a node that was used once.
            owner = Owner(self.engine_id, self.host, registered=node.last_req_time)
            await self._store.record_owners({node.id: owner})
            self.owned[node.id] = owner
            registered = await self._store.register(node, lease=self._lease)
            self._adopt(await self._store.read([node.id]))
        if registered:
            self.metrics.writes.labels("register").inc()
            logger.info("Node {} registered: {} at {}:{}", node.short_id, seen.name, node.ip, node.port)
            new: dict[str, str | int] = {"status": node.status, "health": node.health}
            new |= {"ip": node.ip, "port": node.port}
            now = self.clock.time_ns()
            self._tell(Change(node.id, node.short_id, dict.fromkeys(new), new, False, Cause.REGISTER, now, None))

    # -- writing -------------------------------------------------------------------------------------

    async def run_writer(self) -> None:
        """Write what is pending, batch after batch, through outages of the database. Never ends."""
        backoff = WRITE_RETRY.start()
        while True:
            await self._has_pending.wait()
            try:
                await self.flush()
            except StoreError as error:
                if not backoff.failures:
                    logger.warning("{}; {} changes wait for it", error, len(self._pending))
                await self.clock.sleep(backoff.next_delay())
            else:
                if backoff.failures:
                    logger.info("Database is back, what waited is written")
                backoff.succeeded_for(0)

    async def drain(self) -> None:
        """Settle every node that waits for it now, and write what comes of it. For when intake has stopped."""
        for node_id, node in list(self._nodes.items()):
            if node.settle:
                node.settle.cancel()
                node.settle = None
                self.inspect_soon(node_id)
        await self.inspections.wait_idle()
        await self.flush()

    async def flush(self) -> None:
        """Write everything that is pending now. Raises StoreError and keeps it pending when it cannot."""
        async with self._writing:
            while self._pending:
                batch, self._pending = self._pending, {}
                try:
                    await self._write(batch)
                except BaseException:
                    for node_id, pending in batch.items():
                        newer = self._pending.get(node_id)
                        self._pending[node_id] = _merge(pending, newer) if newer else pending
                    raise
            self._has_pending.clear()
            if self.inspections.idle:
                self.cursor = self._newest or None

    async def _write(self, batch: dict[str, _Pending]) -> None:
        # Hints first: they need no reading, and nobody waits for an observation as one waits for them.
        hints = [self._hint_change(i, p) for i, p in batch.items() if p.seen is None or p.delete]
        await self._send(hints, batch)
        if observed := {i: p.seen for i, p in batch.items() if p.seen is not None and not p.delete}:
            documents = await self._store.read(observed, to_write=True)
            for node_id in observed.keys() - documents.keys():
                self._forget(node_id)
            self.known.update(documents)
            compared = (self.compare(doc, observed[i], batch[i].cause) for i, doc in documents.items())
            await self._send([change for change in compared if change], batch)

    def _hint_change(self, node_id: str, pending: _Pending) -> Write:
        fields = complete_hint(
            pending.fields or {}, self.known.get(node_id), health_check=self._settings.health_check
        )
        return Write(node_id, fields, pending.cause, delete=pending.delete)

    def compare(self, recorded: Recorded, seen: Observation, cause: Cause) -> Write | None:
        """The write that makes a document just read equal to what was seen; None when it is already."""
        wanted = dict(self._desired(seen))
        if self._lease:  # adopt the node, or put back a stamp that a manager's replace dropped
            wanted |= {"engine_id": self._lease.engine_id, "epoch": self._lease.epoch}
        self._own(recorded.node_id)
        claim = claim_on(seen, self.claims.get(recorded.node_id), recorded.claim)
        changed = difference(recorded, wanted, claim=claim)
        if not changed:
            return None
        expected = {name: getattr(recorded, name) for name in changed.keys() - STAMP}
        return Write(recorded.node_id, changed, cause, expected=expected)

    def _require_lease(self) -> None:
        if not self._holds_lease():
            raise LeaseLostError("The lease ran out before it could be renewed: nothing is written")

    async def _send(self, changes: list[Write], batch: dict[str, _Pending]) -> None:
        if not changes:
            return
        if self._settings.dry_run:
            for change in changes:
                logger.info("Dry run: would {}", _describe(change))
            return
        self._require_lease()
        refused = await self._store.write(changes, lease=self._lease)
        now = self.clock.time_ns()
        for change in changes:
            done = batch.pop(change.node_id)  # what stays in the batch is put back when the rest of it fails
            if change.node_id not in refused:
                self._acknowledge(change, done.times, now)
        self._follow_up(refused)

    def _acknowledge(self, change: Write, times: Iterable[int], now: int) -> None:
        node_id = change.node_id
        old = self.known.get(node_id) or Recorded(node_id, node_id[:12])
        latency = event_ns = None
        for time_nano in times:
            event_ns = time_nano
            latency = max(0.0, (now - time_nano) / 1e9)
            self.metrics.latency.observe(latency)
        kind = "delete" if change.delete else "hint" if change.cause is Cause.EVENT else change.cause.value
        self.metrics.writes.labels(kind).inc()
        status = change.fields.get("status")
        reason, details = self.reasons.of_change(change, status), self.reasons.details(node_id)
        if change.delete:
            self._forget(node_id)
            self.disown(node_id)
            told = logger.bind(node=node_id, cause=str(change.cause))
            told.info("Node deleted from db: {}(not in docker)", node_id)
        else:
            self._own(node_id)
            self.known[node_id] = replace(old, **change.fields)  # type: ignore[arg-type]
        new = {name: value for name, value in change.fields.items() if getattr(old, name) != value}
        for name in ("status", "health", "ip", "port"):
            if name in new:
                said = {"field": name, "old": getattr(old, name), "new": new[name], "cause": str(change.cause)}
                told = logger.bind(node=node_id, **said)
                told.info("Node {} {} updated: {} -> {}", old.short_id, name, said["old"], said["new"])
                if change.cause is Cause.SWEEP and self._counts_drift:
                    self.metrics.drift.labels(name).inc()
        if change.delete and change.cause is Cause.SWEEP and self._counts_drift:
            self.metrics.drift.labels("deleted").inc()
        if self.listeners and (new.keys() - STAMP or change.delete):
            written = Change(
                node_id, old.short_id, {name: getattr(old, name) for name in new}, new, change.delete,
                change.cause, now, latency, event_ns, reason, details.name, details.image,
            )  # fmt: skip
            self._tell(written)
        self.reasons.on_written(node_id, new, change.cause)

    def _tell(self, written: Change) -> None:
        for listener in self.listeners:
            listener(written)

    def _follow_up(self, refused: Refused) -> None:
        for node_id in refused.vanished:
            self._forget(node_id)
        for node_id in refused.conflicting:
            self.inspect_soon(node_id)
        if refused.fenced:
            raise LeaseLostError("A later holder of the lease owns the nodes: nothing more is written")

    # -- the record of owners ------------------------------------------------------------------------

    async def load_owned(self) -> None:
        """Read what is on record of this engine's containers. Raises StoreError."""
        self.owned, gone = await self._store.read_owned(self.engine_id)
        self.gone.clear()
        self.gone.update(dict.fromkeys(gone[-REMEMBERED:]))

    def _own(self, node_id: str) -> None:
        """Have it put on record that our engine has this container, unless it is: no replace can drop that."""
        if self._lease and not self._settings.dry_run and node_id not in self.owned:
            self.gone.pop(node_id, None)
            self.owned[node_id] = self._to_own[node_id] = Owner(self.engine_id, self.host)
            self._has_ownership.set()

    def disown(self, node_id: str) -> None:
        """Have it put on record that a container is gone, and its document with it."""
        self._to_own.pop(node_id, None)
        if self.owned.pop(node_id, None):
            self._to_disown.add(node_id)
            self._has_ownership.set()
            self.gone[node_id] = None
            if len(self.gone) > REMEMBERED:
                self.gone.popitem(last=False)

    async def run_owner_recorder(self) -> None:
        """Keep the record of owners beside the writer, in whose way it must not be. Never ends."""
        backoff = WRITE_RETRY.start()
        while True:
            await self._has_ownership.wait()
            try:
                await self.record_ownership()
            except StoreError as error:
                if not backoff.failures:
                    logger.warning("Which engine has which nodes is not put on record: {}", error)
                await self.clock.sleep(backoff.next_delay())
            else:
                backoff.succeeded_for(0)

    async def record_ownership(self) -> None:
        """Write what is to be put on or off the record of owners. StoreError: it cannot, and keeps it."""
        self._has_ownership.clear()
        own, disown = dict(self._to_own), set(self._to_disown)
        try:
            if own:
                await self._store.record_owners(own)
                self._to_own = {i: owner for i, owner in self._to_own.items() if own.get(i) is not owner}
            if disown:
                await self._store.record_gone(disown, engine_id=self.engine_id)
                self._to_disown -= disown
        except StoreError:
            self._has_ownership.set()
            raise

    # -- idle stop: the claim ------------------------------------------------------------------------

    async def claim(self, recorded: Recorded, seen: Observation, *, idle_before: datetime, seconds: float) -> bool:
        """Mark a running node as `stopping`, for `seconds` at most, unless it was used since `idle_before`."""
        node_id, run = recorded.node_id, as_run(seen)
        async with self._writing:
            self._require_lease()
            claimed = await self._store.claim(
                node_id,
                run=run,
                by=self._claimant,
                seconds=seconds,
                engine_id=self.engine_id,
                idle_before=naive_utc(idle_before),
                lease=self._lease,
            )
            if claimed:
                self.claims[node_id] = Claim(run)
                change = Write(node_id, {"status": STOPPING}, Cause.IDLE)
                self._acknowledge(change, (), self.clock.time_ns())
        return claimed

    async def confirm_claim(self, node_id: str, *, idle_before: datetime) -> bool:
        """Whether the claim is still what the document says; if so, it stands from now on."""
        self._require_lease()
        stands = await self._store.confirm_claim(node_id, by=self._claimant, idle_before=naive_utc(idle_before))
        if stands and (claim := self.claims.get(node_id)):
            self.claims[node_id] = replace(claim, stands=True)
        return stands

    async def withdraw_claim(self, node_id: str) -> None:
        """Take a claim back: the document says `running` again unless it says something newer by now."""
        self.claims.pop(node_id, None)
        self.reasons.will_stop(node_id, "")
        change = Write(node_id, {"status": "running"}, Cause.IDLE, expected={"status": STOPPING})
        try:
            await self.end_claim(node_id)  # first: while it is on record, others put `stopping` back
        finally:
            async with self._writing:
                await self._send([change], {node_id: _Pending(Cause.IDLE)})
            self.inspect_soon(node_id)

    async def end_claim(self, node_id: str) -> None:
        """Take our claim off the record."""
        await self._store.end_claim(node_id, by=self._claimant)


def _merge(older: _Pending, newer: _Pending) -> _Pending:
    """One pending fact from two, the newer one winning where they overlap."""
    times = older.times + newer.times
    if older.delete or newer.delete:
        return replace(newer if newer.delete else older, times=times)
    if newer.seen is not None or older.fields is None or newer.fields is None:
        # An observation says everything; a hint after one leaves the rest to the settle that it armed.
        return replace(newer, times=times)
    return replace(newer, fields={**older.fields, **newer.fields}, times=times)


def _describe(change: Write) -> str:
    if change.delete:
        return f"delete node {change.node_id}"
    return f"set {dict(change.fields)} on node {change.node_id}"
