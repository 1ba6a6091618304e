"""Containers that have no document: those whose document may still come, and those that are no nodes (foreign).

A manager inserts a document after it started the container, so the container's events come first. Each unknown
container is an orphan for `orphan_grace`, and its document is looked for; then it is foreign, until its end or
until a start that comes long after it was made.

Not promised: that more than `REMEMBERED` of either are known; a sweep finds what is lost so.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Final

from loguru import logger

from eventwatch.core.backoff import TIMED_OUT
from eventwatch.core.clock import Clock
from eventwatch.core.errors import StoreError
from eventwatch.core.facts import Event, Recorded
from eventwatch.pipeline.inspections import Inspections
from eventwatch.pipeline.ownership import OwnerRecord
from eventwatch.pipeline.roster import Roster
from eventwatch.store.nodes import Store

#: Orphans are looked for after an eighth of their age, between these bounds (seconds).
POLL: Final = (0.01, 0.25)
#: Foreign containers remembered, and orphans waiting: bounds on memory.
REMEMBERED: Final = 10_000


class Orphans:
    """`grace` (s) is how long a document is looked for."""

    def __init__(
        self,
        *,
        store: Store,
        roster: Roster,
        owners: OwnerRecord,
        inspections: Inspections,
        clock: Clock,
        grace: float,
        request_sweep: Callable[[], object],
    ) -> None:
        self._store = store
        self._roster = roster
        self._owners = owners
        self._inspections = inspections
        self._clock = clock
        self._grace = grace
        self._request_sweep = request_sweep
        #: Since when each is looked for (monotonic, s).
        self._waiting: dict[str, float] = {}
        self._is_waiting = asyncio.Event()
        #: Containers that are no nodes, and whether their start was told while their documents were waited for.
        self.foreign: OrderedDict[str, bool] = OrderedDict()
        self._started: set[str] = set()

    def __contains__(self, node_id: object) -> bool:
        """Whether the document of this container is looked for."""
        return node_id in self._waiting

    def on_event(self, event: Event) -> None:
        """Take in an event of a container that has no document."""
        node_id = event.node_id
        if event.action == "destroy":
            self._owners.disown(
                node_id
            )  # a manager deletes the document by itself, as a rule before the container
        started = self.foreign.get(node_id)
        if started is not None:
            if event.action == "destroy":
                del self.foreign[node_id]
            if event.action != "start" or started:
                return
            del self.foreign[node_id]  # made long ago: its document may come only now
        self.wait_for(node_id)
        if event.action == "start" and node_id in self._waiting:
            self._started.add(node_id)

    def expect(self, node_ids: Iterable[str]) -> None:
        """Wait for documents of these containers, too: what started them was told before anybody listened."""
        for node_id in node_ids:
            if node_id not in self._roster.known and node_id not in self.foreign:
                self.wait_for(node_id)

    def wait_for(self, node_id: str) -> None:
        """Look for the document of this container."""
        if node_id not in self._waiting:
            if len(self._waiting) >= REMEMBERED:
                self._request_sweep()
                return
            self._waiting[node_id] = self._clock.monotonic()
            self._is_waiting.set()

    def drop(self, node_ids: Collection[str]) -> None:
        """These have documents, as somebody found who takes them over."""
        for node_id in node_ids:
            self._waiting.pop(node_id, None)
            self.foreign.pop(node_id, None)

    async def run(self) -> None:
        """Look for the documents, more and more rarely. Never ends."""
        shortest, longest = POLL
        away, slow = False, TIMED_OUT.start()
        while True:
            await self._is_waiting.wait()
            youngest = self._clock.monotonic() - max(self._waiting.values(), default=0.0)
            await self._clock.sleep(min(longest, max(shortest, youngest / 8)))
            try:
                found = await self._store.read(self._waiting)
            except StoreError as error:
                logger.log("DEBUG" if away else "WARNING", "Looking for orphans' documents failed: {}", error)
                away = True
                await self._clock.sleep(slow.next_delay() if error.timed_out else longest)
                continue
            away = False
            slow.succeeded_for(0)
            self.adopt(found)
            self._give_up()

    def adopt(self, documents: Mapping[str, Recorded]) -> None:
        """Take over documents of containers that had none."""
        for node_id, recorded in documents.items():
            self._roster.known[node_id] = recorded
            self.foreign.pop(node_id, None)
            self._started.discard(node_id)
            if self._waiting.pop(node_id, None) is not None:
                self._owners.own(node_id)  # the engine told of it, though it may be gone by now
                self._roster.state(node_id).events += 1
            self._inspections.soon(node_id, urgent=True)

    def _give_up(self) -> None:
        """Count those that were looked for long enough as foreign."""
        horizon = self._clock.monotonic() - self._grace
        for node_id in [i for i, since in self._waiting.items() if since <= horizon]:
            del self._waiting[node_id]
            self._roster.drop_state(node_id)
            self.foreign[node_id] = node_id in self._started
            self._started.discard(node_id)
        while len(self.foreign) > REMEMBERED:
            self.foreign.popitem(last=False)
        if not self._waiting:
            self._is_waiting.clear()
