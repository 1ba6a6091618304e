"""Finds out that two engines have one id, which happens when a machine is cloned after Docker was installed.

Why: everything that is owned is owned by an engine's id. With two engines of one id, one watcher stands by for
ever while the other takes the first one's containers for gone, and deletes their documents.

How: each process that watches, leader or standby, publishes a few containers that it sees on its engine. Who
finds none of them on its own engine has met a twin, or was too slow: so it waits for the other's next look
before it says so. Until then, as soon as there is a doubt, nothing is deleted.

Not promised: to tell two engines apart that both have no container, which have nothing to lose either; nor
while the other engine's watcher is away (the owner's host name on record helps then, see deletion.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from loguru import logger

from eventwatch.engine import Engine
from eventwatch.errors import EngineError
from eventwatch.store import Peer, Witness

#: Containers that a process publishes.
PUBLISHED: Final = 8

FIX: Final = (
    "give one of them an id of its own: stop its Docker, remove /var/lib/docker/engine-id "
    "(before Engine 23: /etc/docker/key.json), start it"
)


class TwinWatch:
    """One process's knowledge of other engines with its engine's id."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        #: The look of a peer at which none of its containers was found here, and whether an earlier one was too.
        self._doubted: dict[str, tuple[int, bool]] = {}
        self._twins: dict[str, Peer] = {}

    @property
    def doubtful(self) -> bool:
        """Whether any peer may watch another engine: then nothing is deleted."""
        return bool(self._doubted)

    def unready_reasons(self) -> list[str]:
        """The engines that have our engine's id, with the fix; empty when there is none."""
        return [
            f"twin: the engine that checker {peer.manager_id} (host {peer.host}) watches has the id of ours, "
            f"nothing is deleted: {FIX}"
            for peer in self._twins.values()
        ]

    async def meet(self, peers: Sequence[Peer]) -> None:
        """Compare what the live peers see with our engine."""
        present = {peer.manager_id for peer in peers}
        for manager_id in self._doubted.keys() - present:
            self._believe(manager_id)
        for peer in peers:
            if peer.witness.containers:
                await self._compare(peer)

    async def _compare(self, peer: Peer) -> None:
        before = self._doubted.get(peer.manager_id)
        if before and before[0] == peer.witness.look:
            return
        answers = await asyncio.gather(
            *(self._is_here(node_id) for node_id in peer.witness.containers[:PUBLISHED])
        )
        if any(answers):
            self._believe(peer.manager_id)
        elif not all(answer is None for answer in answers):
            self._doubted[peer.manager_id] = (peer.witness.look, before is not None)
            if before is not None and peer.manager_id not in self._twins:
                self._twins[peer.manager_id] = peer
                logger.error("{}", self.unready_reasons()[-1])

    def _believe(self, manager_id: str) -> None:
        self._doubted.pop(manager_id, None)
        if self._twins.pop(manager_id, None):
            logger.info("Checker {} does not watch another engine with our engine's id any more", manager_id)

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
            self._seen = Witness(tuple(await self._engine.list_newest(PUBLISHED)), self._seen.look + 1)
        return self._seen
