"""The record of which engine has which containers, kept beside the writer, in whose way it must not be.

What a manager's replace drops from a document is still here, and so is a container whose document was deleted.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Collection
from typing import Final

from loguru import logger

from eventwatch.core.backoff import WRITES
from eventwatch.core.clock import Clock
from eventwatch.core.errors import StoreError
from eventwatch.core.facts import Owner
from eventwatch.pipeline.roster import Roster
from eventwatch.store.connection import Store

#: Containers that are gone and remembered: a bound on memory.
REMEMBERED: Final = 10_000


class OwnerRecord:
    """What is on record of the containers that the roster's engine has. `keeps`: whether we may put any on it."""

    def __init__(self, *, store: Store, roster: Roster, clock: Clock, keeps: bool) -> None:
        self._store = store
        self._roster = roster
        self._clock = clock
        self._keeps = keeps
        self.owned: dict[str, Owner] = {}
        #: Those that it had lately and that are gone, by age: a stale save may bring their documents back.
        self.gone: OrderedDict[str, None] = OrderedDict()
        self._to_own: dict[str, Owner] = {}
        self._to_disown: set[str] = set()
        self._changed = asyncio.Event()

    async def load(self) -> None:
        """Read what is on record. Raises StoreError."""
        self.owned, gone = await self._store.read_owned(self._roster.engine_id)
        self.gone.clear()
        self.gone.update(dict.fromkeys(gone[-REMEMBERED:]))

    def own(self, node_id: str) -> None:
        """Have it put on record that our engine has this container, unless it is: no replace can drop that."""
        if self._keeps and node_id not in self.owned:
            self.gone.pop(node_id, None)
            self.owned[node_id] = self._to_own[node_id] = Owner(self._roster.engine_id, self._roster.host)
            self._changed.set()

    def disown(self, node_id: str) -> None:
        """Have it put on record that a container is gone, and its document with it."""
        self._to_own.pop(node_id, None)
        if self.owned.pop(node_id, None):
            self._to_disown.add(node_id)
            self._changed.set()
            self.gone[node_id] = None
            if len(self.gone) > REMEMBERED:
                self.gone.popitem(last=False)

    async def register(self, node_id: str, owner: Owner) -> None:
        """Put a container on record now. Raises StoreError."""
        await self._store.record_owners({node_id: owner})
        self.owned[node_id] = owner

    async def confirm(self, node_ids: Collection[str], owner: Owner) -> None:
        """Put on record those of these containers that are not on it for this engine. Raises StoreError."""
        owners = await self._store.read_owners(node_ids)
        new = {i: owner for i in node_ids if i not in owners or owners[i].engine_id != owner.engine_id}
        await self._store.record_owners(new)

    async def run(self) -> None:
        """Keep the record. Never ends."""
        backoff = WRITES.start()
        while True:
            await self._changed.wait()
            try:
                await self.write()
            except StoreError as error:
                if not backoff.failures:
                    logger.warning("Which engine has which nodes is not put on record: {}", error)
                await self._clock.sleep(backoff.next_delay())
            else:
                backoff.succeeded_for(0)

    async def write(self) -> None:
        """Write what is to be put on or off the record. StoreError: it cannot, and keeps it."""
        self._changed.clear()
        own, disown = dict(self._to_own), set(self._to_disown)
        try:
            if own:
                await self._store.record_owners(own)
                self._to_own = {i: owner for i, owner in self._to_own.items() if own.get(i) is not owner}
            if disown:
                await self._store.record_gone(disown, engine_id=self._roster.engine_id)
                self._to_disown -= disown
        except StoreError:
            self._changed.set()
            raise
