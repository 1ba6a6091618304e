"""The one writer of node documents: facts are merged per node, and written in bulk, one batch at a time.

Why one: a hint (what an event proves), an observation (an inspection once the node is quiet, or a sweep's) and a
node's end may all be about the same node within a millisecond. While one batch is written, what becomes ready is
the next.

A `Hint` is written without reading (one round trip). What was `Seen` is compared with the document read anew, and
written only where it differs and only if the document still says what was read. `Gone` deletes the document.

Contract: nothing is written without the lease, and each write carries its epoch. What was refused, because the
document says something else by now, is inspected again. What cannot be written while the database is away stays
pending.

Not promised: that every state a node passed through is written; the last one is.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final, TypeAlias

from loguru import logger

from eventwatch.core.backoff import WRITES
from eventwatch.core.clock import Clock
from eventwatch.core.errors import LeaseLostError, StoreError
from eventwatch.core.facts import STOPPING, Cause, Change, Claim, Observation, Owner, Recorded, Write
from eventwatch.core.metrics import Metrics
from eventwatch.core.policy import Fields, as_run, claim_on, complete_hint, desired_fields, difference
from eventwatch.pipeline.inspections import Inspections
from eventwatch.pipeline.ownership import OwnerRecord
from eventwatch.pipeline.roster import Roster
from eventwatch.settings.model import Settings
from eventwatch.store.connection import Store
from eventwatch.store.documents import ToolServerNode
from eventwatch.store.fleet import naive_utc
from eventwatch.store.rows import Lease, Refused

#: Fields that say whose a node is. To take a node over is no change of it.
STAMP: Final = frozenset({"engine_id", "epoch"})
#: Nodes that are written at once.
MOST_AT_ONCE: Final = 500


@dataclass(frozen=True, slots=True)
class Hint:
    """Fields as an event, or an inspection that it called for, proves them. `times`: `timeNano` of its events."""

    cause: Cause
    fields: Fields
    times: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Seen:
    """All that an inspection says."""

    cause: Cause
    observation: Observation
    times: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Gone:
    """The container's end: an id never comes back."""

    cause: Cause
    times: list[int] = field(default_factory=list)


Fact: TypeAlias = Hint | Seen | Gone


class Writer:
    """Owns every write to node documents of one engine. See the module's docstring for the contract."""

    def __init__(
        self,
        *,
        store: Store,
        roster: Roster,
        owners: OwnerRecord,
        inspections: Inspections,
        settings: Settings,
        clock: Clock,
        metrics: Metrics,
        lease: Lease | None = None,
        holds_lease: Callable[[], bool] = lambda: True,
    ) -> None:
        self.listeners: list[Callable[[Change], object]] = []
        #: Our own claims under way.
        self.claims: dict[str, Claim] = {}
        #: `timeNano` of the newest event of which all that it led to is written.
        self.cursor: int | None = None
        self._store = store
        self._roster = roster
        self._owners = owners
        self._inspections = inspections
        self._settings = settings
        self._clock = clock
        self._metrics = metrics
        self._lease = lease
        self._holds_lease = holds_lease
        #: Whether what a sweep corrects is drift: not where nobody has watched before.
        self._counts_drift = lease is None or lease.epoch > 1
        self._claimant = lease.manager_id if lease else secrets.token_hex(16)
        self._pending: dict[str, Fact] = {}
        self._has_pending = asyncio.Event()
        self._writing = asyncio.Lock()

    def __len__(self) -> int:
        """How many nodes wait for a write."""
        return len(self._pending)

    def put(self, node_id: str, fact: Fact) -> None:
        """Have a fact written."""
        older = self._pending.get(node_id)
        self._pending[node_id] = fact if older is None else merge(older, fact)
        self._has_pending.set()

    def swept(self) -> None:
        """A sweep has ended: from now on, what one corrects is drift."""
        self._counts_drift = True

    async def run(self) -> None:
        """Write what is pending, batch after batch, through outages of the database. Never ends."""
        backoff = WRITES.start()
        while True:
            await self._has_pending.wait()
            try:
                await self.flush()
            except StoreError as error:
                if not backoff.failures:
                    logger.warning("{}; {} changes wait for it", error, len(self._pending))
                await self._clock.sleep(backoff.next_delay())
            else:
                if backoff.failures:
                    logger.info("Database is back, what waited is written")
                backoff.succeeded_for(0)

    async def flush(self) -> None:
        """Write everything that is pending now. Raises StoreError and keeps it pending when it cannot."""
        async with self._writing:
            while self._pending:
                batch = self._take_batch()
                try:
                    await self._write(batch)
                except BaseException:
                    for node_id, fact in batch.items():
                        newer = self._pending.get(node_id)
                        self._pending[node_id] = merge(fact, newer) if newer else fact
                    raise
            self._has_pending.clear()
            if self._inspections.idle:
                self.cursor = self._roster.newest or None

    def _take_batch(self) -> dict[str, Fact]:
        """All that is pending; of very many, the hints first, and no more than holds up no event that comes."""
        batch, self._pending = self._pending, {}
        if len(batch) <= MOST_AT_ONCE:
            return batch
        order = sorted(batch, key=lambda node_id: isinstance(batch[node_id], Seen))
        self._pending = {node_id: batch.pop(node_id) for node_id in order[MOST_AT_ONCE:]}
        return batch

    # -- a batch -------------------------------------------------------------------------------------

    async def _write(self, batch: dict[str, Fact]) -> None:
        # Hints first: they need no reading, and nobody waits for an observation as one waits for them.
        changes, observed = [], {}
        for node_id, fact in batch.items():
            match fact:
                case Hint():
                    changes.append(self._hinted(node_id, fact))
                case Gone():
                    changes.append(Write(node_id, {}, fact.cause, delete=True))
                case Seen():
                    observed[node_id] = fact
        await self._send(changes, batch)
        if observed:
            documents = await self._store.read(observed, to_write=True)
            for node_id in observed.keys() - documents.keys():
                self._roster.forget(node_id)
            self._roster.known.update(documents)
            seen = ((document, observed[node_id]) for node_id, document in documents.items())
            compared = (self.compare(document, fact.observation, fact.cause) for document, fact in seen)
            await self._send([change for change in compared if change], batch)

    def _hinted(self, node_id: str, hint: Hint) -> Write:
        known = self._roster.known.get(node_id)
        fields = complete_hint(hint.fields, known, health_check=self._settings.health_check)
        return Write(node_id, fields, hint.cause)

    def compare(self, recorded: Recorded, seen: Observation, cause: Cause) -> Write | None:
        """The write that makes a document just read equal to what was seen; None when it is already."""
        settings = self._settings
        wanted: dict[str, str | int] = dict(
            desired_fields(seen, node_port=settings.node_port, health_check=settings.health_check)
        )
        if self._lease:  # adopt the node, or put back a stamp that a manager's replace dropped
            wanted |= {"engine_id": self._lease.engine_id, "epoch": self._lease.epoch}
        self._owners.own(recorded.node_id)
        claim = claim_on(seen, self.claims.get(recorded.node_id), recorded.claim)
        changed = difference(recorded, wanted, claim=claim)
        if not changed:
            return None
        expected = {name: getattr(recorded, name) for name in changed.keys() - STAMP}
        return Write(recorded.node_id, changed, cause, expected=expected)

    def _require_lease(self) -> None:
        if not self._holds_lease():
            raise LeaseLostError("The lease ran out before it could be renewed: nothing is written")

    async def _send(self, changes: list[Write], batch: dict[str, Fact]) -> None:
        if not changes:
            return
        if self._settings.dry_run:
            for change in changes:
                logger.info("Dry run: would {}", _describe(change))
            return
        self._require_lease()
        refused = await self._store.write(changes, lease=self._lease)
        now = self._clock.time_ns()
        for change in changes:
            done = batch.pop(change.node_id)  # what stays in the batch is put back when the rest of it fails
            if change.node_id not in refused:
                self._acknowledge(change, done.times, now)
        self._follow_up(refused)

    def _follow_up(self, refused: Refused) -> None:
        for node_id in refused.vanished:
            self._roster.forget(node_id)
        for node_id in refused.conflicting:
            self._inspections.soon(node_id)
        if refused.fenced:
            raise LeaseLostError("A later holder of the lease owns the nodes: nothing more is written")

    # -- what was acknowledged -----------------------------------------------------------------------

    def _acknowledge(self, change: Write, times: Iterable[int], now: int) -> None:
        node_id, roster = change.node_id, self._roster
        old = roster.known.get(node_id) or Recorded(node_id, node_id[:12])
        latency = event_ns = None
        for time_nano in times:
            event_ns = time_nano
            latency = max(0.0, (now - time_nano) / 1e9)
            self._metrics.latency.observe(latency)
        kind = "delete" if change.delete else "hint" if change.cause is Cause.EVENT else change.cause.value
        self._metrics.writes.labels(kind).inc()
        status = change.fields.get("status")
        reason, details = roster.reasons.of_change(change, status), roster.reasons.details(node_id)
        if change.delete:
            roster.forget(node_id)
            self._owners.disown(node_id)
            told = logger.bind(node=node_id, cause=str(change.cause))
            told.info("Node deleted from db: {}(not in docker)", node_id)
        else:
            self._owners.own(node_id)
            roster.known[node_id] = replace(old, **change.fields)  # type: ignore[arg-type]
        new = {name: value for name, value in change.fields.items() if getattr(old, name) != value}
        self._log(old, new, change.cause)
        if change.cause is Cause.SWEEP and self._counts_drift:
            drifted = ["deleted"] if change.delete else new.keys() - STAMP
            for name in drifted:
                self._metrics.drift.labels(name).inc()
        if self.listeners and (new.keys() - STAMP or change.delete):
            written = Change(
                node_id,
                old.short_id,
                {name: getattr(old, name) for name in new},
                new,
                change.delete,
                change.cause,
                now,
                latency,
                event_ns,
                reason,
                details.name,
                details.image,
            )
            self._tell(written)
        roster.reasons.on_written(node_id, new, change.cause)

    def _log(self, old: Recorded, new: Fields, cause: Cause) -> None:
        for name in ("status", "health", "ip", "port"):
            if name in new:
                said = {"field": name, "old": getattr(old, name), "new": new[name], "cause": str(cause)}
                told = logger.bind(node=old.node_id, **said)
                told.info("Node {} {} updated: {} -> {}", old.short_id, name, said["old"], said["new"])

    def _tell(self, written: Change) -> None:
        for listener in self.listeners:
            listener(written)

    # -- registration --------------------------------------------------------------------------------

    async def register(self, seen: Observation) -> dict[str, Recorded]:
        """Give a labelled container a document, which is returned; its start counts as its first request.

        There is none in a dry run. Raises StoreError.
        """
        settings = self._settings
        wanted = desired_fields(seen, node_port=settings.node_port, health_check=settings.health_check)
        node = ToolServerNode(
            id=seen.node_id,
            short_id=seen.node_id[:12],
            status=seen.status,
            health=str(wanted.get("health", "none")),
            ip=seen.ip,
            port=int(wanted.get("port", settings.node_port)),
            last_req_time=naive_utc(seen.started_at) if seen.started_at else None,
        )
        async with self._writing:
            self._require_lease()
            if settings.dry_run:
                logger.info("Dry run: would register node {}", node.short_id)
                return {}
            # On record first: registered, but not known to be, it would look like a node that was used once.
            roster = self._roster
            owner = Owner(roster.engine_id, roster.host, registered=node.last_req_time)
            await self._owners.register(node.id, owner)
            registered = await self._store.register(node, lease=self._lease)
            documents = await self._store.read([node.id])
            roster.known.update(documents)
        if registered:
            self._metrics.writes.labels("register").inc()
            logger.info("Node {} registered: {} at {}:{}", node.short_id, seen.name, node.ip, node.port)
            new: dict[str, str | int] = {"status": node.status, "health": node.health}
            new |= {"ip": node.ip, "port": node.port}
            now = self._clock.time_ns()
            self._tell(Change(node.id, node.short_id, dict.fromkeys(new), new, False, Cause.REGISTER, now, None))
        return documents

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
                engine_id=self._roster.engine_id,
                idle_before=naive_utc(idle_before),
                lease=self._lease,
            )
            if claimed:
                self.claims[node_id] = Claim(run)
                change = Write(node_id, {"status": STOPPING}, Cause.IDLE)
                self._acknowledge(change, (), self._clock.time_ns())
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
        self._roster.reasons.will_stop(node_id, "")
        change = Write(node_id, {"status": "running"}, Cause.IDLE, expected={"status": STOPPING})
        try:
            await self.end_claim(node_id)  # first: while it is on record, others put `stopping` back
        finally:
            async with self._writing:
                await self._send([change], {node_id: Hint(Cause.IDLE, {})})
            self._inspections.soon(node_id)

    async def end_claim(self, node_id: str) -> None:
        """Take our claim off the record."""
        await self._store.end_claim(node_id, by=self._claimant)


def merge(older: Fact, newer: Fact) -> Fact:
    """One pending fact from two, the newer one winning where they overlap."""
    times = older.times + newer.times
    match older, newer:
        case (_, Gone()):
            return replace(newer, times=times)
        case (Gone(), _):
            return replace(older, times=times)
        case (Hint(), Hint()):
            return replace(newer, fields={**older.fields, **newer.fields}, times=times)
    # An observation says everything; a hint after one leaves the rest to the settle that it armed.
    return replace(newer, times=times)


def _describe(change: Write) -> str:
    if change.delete:
        return f"delete node {change.node_id}"
    return f"set {dict(change.fields)} on node {change.node_id}"
