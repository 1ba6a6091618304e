"""Finds out that two engines have one id, which happens when a machine is cloned after Docker was installed.

Why: everything that is owned is owned by an engine's id. With two engines of one id, one watcher stands by for
ever while the other takes the first one's containers for gone, and deletes their documents.

How: each process that watches, leader or standby, publishes a few containers that it sees on its engine. Who
finds none of them on its own engine has met a twin, or was too slow: so it waits for the other's next look
before it says so. Until then, as soon as there is a doubt, nothing is deleted. A twin is remembered in the
database for `TWIN_MEMORY`: its watcher may just be restarting. Two Podmans on hosts that nobody named have the
name of the host in common, too, and nothing else tells them apart: there it is for `COMMON_ID_MEMORY`, in which
both are to be named, and so get other ids.

Not promised: to tell two engines apart that both have no container, which have nothing to lose either; nor
while the other engine's watcher is away for longer (the owner's host name on record helps then, see deletion.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from loguru import logger

from eventwatch.core.errors import EngineError
from eventwatch.engine.protocol import ID_FIX, Engine, has_common_id, id_fix
from eventwatch.store.connection import Store
from eventwatch.store.rows import Peer, Witness

#: Containers that a process publishes.
PUBLISHED: Final = 8

#: Seconds for which a twin that was seen counts after its watcher has gone.
TWIN_MEMORY: Final = 3600.0
COMMON_ID_MEMORY: Final = 30 * 24 * 3600.0


class TwinWatch:
    """One process's knowledge of other engines with its engine's id."""

    def __init__(self, engine: Engine, store: Store) -> None:
        self._engine = engine
        self._store = store
        #: The look of each peer at which none of its containers was found here.
        self._doubted: dict[str, int] = {}
        self._twins: dict[str, Peer] = {}
        #: The host of a twin that is on record, though its watcher may be away.
        self._remembered: str | None = None
        self._fix = ID_FIX

    @property
    def doubtful(self) -> bool:
        """Whether any peer may watch another engine."""
        return bool(self._doubted)

    def unready_reasons(self) -> list[str]:
        """The engines that have our engine's id, with the fix; empty when there is none."""
        hosts = {peer.host for peer in self._twins.values()} or {self._remembered} - {None}
        return [
            f"twin: the engine that host {host} watches has the id of ours, no sweep deletes anything: {self._fix}"
            for host in sorted(map(str, hosts))
        ]

    async def may_delete(self, engine_id: str) -> bool:
        """Whether no twin is known, doubted or remembered. Raises StoreError."""
        self._fix = id_fix(engine_id)
        memory = COMMON_ID_MEMORY if has_common_id(engine_id) else TWIN_MEMORY
        self._remembered = await self._store.twin_seen(engine_id, within=memory)
        return not self._doubted and self._remembered is None

    async def meet(self, peers: Sequence[Peer], *, engine_id: str) -> None:
        """Compare what the live peers see with our engine. Raises StoreError."""
        self._fix = id_fix(engine_id)
        for manager_id in self._doubted.keys() - {peer.manager_id for peer in peers}:
            self._believe(manager_id)
        for peer in peers:
            if peer.witness.containers and self._doubted.get(peer.manager_id) != peer.witness.look:
                await self._compare(peer, engine_id)

    async def _compare(self, peer: Peer, engine_id: str) -> None:
        answers = await asyncio.gather(
            *(self._is_here(node_id) for node_id in peer.witness.containers[:PUBLISHED])
        )
        if any(answers):
            self._believe(peer.manager_id)
        elif not all(answer is None for answer in answers):
            doubted_before = peer.manager_id in self._doubted
            self._doubted[peer.manager_id] = peer.witness.look
            if not doubted_before:
                return
            if peer.manager_id not in self._twins:
                self._twins[peer.manager_id] = peer
                logger.error("{}", self.unready_reasons()[-1])
            await self._store.note_twin(engine_id, host=peer.host)

    def _believe(self, manager_id: str) -> None:
        self._doubted.pop(manager_id, None)
        self._twins.pop(manager_id, None)

    async def _is_here(self, node_id: str) -> bool | None:
        """Whether our engine has this container; None when it does not say."""
        try:
            return (await self._engine.inspect(node_id)).found
        except EngineError:
            return None


class Lookout:
    """What a standby publishes: the newest containers of its engine, looked at now and then."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._seen = Witness()

    async def look(self) -> Witness:
        """Look again; what was seen last when the engine does not answer."""
        with suppress(EngineError):
            ids = await self._engine.list_newest(PUBLISHED)
            self._seen = Witness(some_of(ids), self._seen.look + 1)
        return self._seen


def some_of(node_ids: Sequence[str]) -> tuple[str, ...]:
    """From both ends: of a long list, the oldest stay, and the newest are such as no clone has."""
    half = PUBLISHED // 2
    return tuple(node_ids if len(node_ids) <= PUBLISHED else [*node_ids[:half], *node_ids[-half:]])
