"""Which documents are one engine's business, found from that engine and from what it owns.

Why: one database serves many engines. A pass that reads everybody's documents to find its own costs as much as
there are documents of others, in each of their watchers, and what a manager's replace made nobody's would be
everybody's business.

Contract: the members are the documents of the containers that the engine lists, of those that it owns by our
own record (`NodeOwner`, which no replace touches), and those that bear its id; without those that another engine
with a live checker has stamped. What bears no engine's id at all is a member only where no other engine has left a
trace in the database. Every document is found by its id or by an index on the engine's.

An engine that does not list its containers leaves the rest of that. Not promised: that a document which nobody
ever owned, of a container that no engine has, is found by any engine of several.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Final

from loguru import logger

from eventwatch.core.errors import EngineError
from eventwatch.core.facts import Recorded
from eventwatch.core.listing import Listed
from eventwatch.engine.protocol import Engine
from eventwatch.store.nodes import Store

#: Containers that went lately, whose documents a manager's stale save may bring back: looked for by each pass, the
#: newest of them and as many of the others in turn.
LATELY_GONE: Final = 500


class Members:
    """Finds the members of one engine, again and again."""

    def __init__(self, engine: Engine, store: Store) -> None:
        self._engine = engine
        self._store = store
        #: Another engine that this database serves, once one was found: a trace does not go away by itself.
        self._other: str | None = None
        self._turn = 0
        #: What the engine listed last, by id; empty when it did not.
        self.listed: dict[str, Listed] = {}

    async def find(self, engine_id: str, *, owned: Iterable[str], gone: Iterable[str] = ()) -> dict[str, Recorded]:
        """The documents by id. `owned` are containers that the engine has or had, `gone` those that went, by age.

        Raises StoreError, and EngineError when the engine cannot be reached at all.
        """
        self.listed = await self._list()
        node_ids = dict.fromkeys([*self.listed, *owned, *self._some_of(list(gone))])
        documents = await self._store.read_own(engine_id, node_ids, leftovers=await self._is_sole(engine_id))
        strangers = {node.engine_id for node in documents.values() if node.engine_id} - {engine_id}
        live = await self._store.live_among(strangers) if strangers else frozenset()
        return {i: node for i, node in documents.items() if node.engine_id not in live}

    async def _list(self) -> dict[str, Listed]:
        try:
            return {row.node_id: row for row in await self._engine.list_rows()}
        except EngineError as error:
            if error.unreachable:
                raise
            logger.debug("Going on without the engine's list of containers: {}", error)
            return {}

    async def _is_sole(self, engine_id: str) -> bool:
        if self._other is None or self._other == engine_id:
            self._other = await self._store.trace_of_others(engine_id)
        return self._other is None

    def _some_of(self, gone: list[str]) -> list[str]:
        newest, older = gone[-LATELY_GONE:], gone[:-LATELY_GONE]
        self._turn = self._turn + LATELY_GONE if self._turn + LATELY_GONE < len(older) else 0
        return [*newest, *islice(older, self._turn, self._turn + LATELY_GONE)]
