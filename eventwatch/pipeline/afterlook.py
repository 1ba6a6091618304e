"""Sees what others write into our documents: a manager's stale whole-document write does not stand until a sweep.

Why: a manager that read a document before our write and replaces it after puts an old status back, and no event
tells. A manager may also insert a document, or put one back, long after its container has started.

How: after each change that we write, the document is read again at growing delays, in one query with all others
that are due; and all documents of containers that our engine has are read every `INTERVAL`, more rarely where
there are many engines or many containers, so that a fleet asks its database no more often than a few hosts do.
Only the database is asked, by `_id`, for the four fields. What differs from what we know is not corrected from
memory: the node is inspected, and the answer goes the way of every other (cause `look`), so that an event or an
inspection that is newer wins. Who writes the same thing again and again is not fought each time (disputes.py).

Not promised: that a stamp (`engine_id`, `epoch`) which a replace dropped is put back before the next write or
sweep; nor a look at all while the database does not answer, or more often than a sweep in a large fleet.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from loguru import logger

from eventwatch.core.clock import Clock
from eventwatch.core.errors import StoreError
from eventwatch.core.facts import Change
from eventwatch.pipeline.disputes import Disputes
from eventwatch.pipeline.orphans import Orphans
from eventwatch.pipeline.ownership import OwnerRecord
from eventwatch.pipeline.reconciler import Reconciler
from eventwatch.pipeline.roster import Roster
from eventwatch.store.nodes import BATCH, Store

#: Seconds after a change at which its document is read again.
DELAYS: Final = (0.1, 0.25, 1.0, 4.0)
#: Seconds between two thoughts about what is due, while a change waits for its look.
TICK: Final = 0.1
#: Seconds between two looks at all own documents, at least, and for each engine and each container on record.
INTERVAL: Final = 0.4
PER_ENGINE: Final = 0.1
PER_CONTAINER: Final = 0.0004
#: So many times as long as a look took is waited until the next one: a slow database is not asked to death.
REST: Final = 4.0
#: Seconds until the next attempt while the database does not answer.
RETRY: Final = 1.0
#: Seconds between two counts of the engines.
COUNT_INTERVAL: Final = 30.0


class Afterlook:
    """The looks of one watcher. `longest` (s) is the longest time between two looks at all own documents."""

    def __init__(
        self,
        *,
        store: Store,
        roster: Roster,
        owners: OwnerRecord,
        orphans: Orphans,
        reconciler: Reconciler,
        longest: float,
        clock: Clock,
    ) -> None:
        self._store = store
        self._roster = roster
        self._owners = owners
        self._orphans = orphans
        self._reconciler = reconciler
        self._longest = longest
        self._clock = clock
        self.disputes = Disputes(clock)
        #: For each delay the nodes that wait for their look, and when it is due (monotonic, s), in that order.
        self._due: tuple[OrderedDict[str, float], ...] = tuple(OrderedDict() for _ in DELAYS)
        #: What was found in documents that cannot be read as a whole: not tried again until it changes.
        self._unreadable: dict[str, object] = {}
        self._engines = 1
        self._counted_at = float("-inf")

    def remember(self, change: Change) -> None:
        """Have the document of a node that we changed, or deleted, looked at again."""
        self.disputes.note(change)
        if self.disputes.rests(change.node_id):
            return  # until a look at all of them
        now = self._clock.monotonic()
        for delay, due in zip(DELAYS, self._due, strict=True):
            due[change.node_id] = now + delay
            due.move_to_end(change.node_id)

    async def run(self) -> None:
        """Look again and again. Never ends."""
        rested = full_look = self._clock.monotonic()
        away = False
        while True:
            await self._clock.sleep(TICK if any(self._due) else INTERVAL)
            began = self._clock.monotonic()
            if began < rested:
                continue
            wanted = self._take_due(began)
            if everything := began >= full_look and self._roster.has_learned:
                wanted.update(self._owners.owned, self._roster.known, self._orphans.foreign)
            try:
                if wanted:
                    await self.look(wanted)
                if everything and began >= self._counted_at + COUNT_INTERVAL:
                    self._engines, self._counted_at = await self._store.count_engines(), began
            except StoreError as error:
                if not away:  # only once, and quietly: the lease's keeper warns of it
                    logger.debug("Looking at the documents failed: {}", error)
                away = True
                self._due[0].update(dict.fromkeys(wanted, began))
                rested = self._clock.monotonic() + RETRY
                continue
            away = False
            now = self._clock.monotonic()
            rested = now + min(REST * (now - began), self._longest)
            if everything:
                full_look = began + self._interval(len(wanted))

    def _interval(self, containers: int) -> float:
        wanted = max(INTERVAL, PER_ENGINE * self._engines, PER_CONTAINER * containers)
        # Half a tick less, or rounding would make it a whole one more.
        return min(wanted, self._longest) - TICK / 2

    def _take_due(self, now: float) -> set[str]:
        taken: set[str] = set()
        for due in self._due:
            while due and next(iter(due.values())) <= now:
                taken.add(due.popitem(last=False)[0])
        return taken

    async def look(self, node_ids: set[str]) -> None:
        """Compare these documents with what we know of them, once. Raises StoreError."""
        ids = list(node_ids)
        for first in range(0, len(ids), BATCH):
            await self._look_at(set(ids[first : first + BATCH]))

    async def _look_at(self, node_ids: set[str]) -> None:
        before = {node_id: self._roster.known.get(node_id) for node_id in node_ids}
        found = await self._store.look(node_ids)
        new = []
        for node_id, fields in found.items():
            if self.disputes.rests(node_id):
                continue
            if before[node_id] is not None:
                self._reconciler.check_document(before[node_id], fields)
            elif self._unreadable.get(node_id) != fields:
                new.append(node_id)
        for node_id in node_ids - found.keys():
            self._unreadable.pop(node_id, None)
            self._reconciler.check_document(before[node_id], None)
        if new:
            documents = await self._store.read(new)
            # What is known by now is newer.
            self._orphans.adopt({i: found for i, found in documents.items() if i not in self._roster.known})
            for node_id in new:
                self._unreadable.pop(node_id, None)
            self._unreadable |= {node_id: found[node_id] for node_id in new if node_id not in documents}
