"""The last changes of each node, as they are on record: one document per node, that is bounded and expires."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any, Final

from pymongo import (
    UpdateOne,
)
from pymongo.errors import (
    BulkWriteError,
)

from eventwatch.core.clock import Slices
from eventwatch.core.errors import ConfigError, DocumentError, StoreError
from eventwatch.core.facts import Recorded
from eventwatch.store.base import BATCH, HISTORY, PASSING, deadline, first_line
from eventwatch.store.indexes import Indexes
from eventwatch.store.nodes import Nodes
from eventwatch.store.rows import PROJECTION, Entry

#: Changes that are kept of a node.
HISTORY_CHANGES: Final = 50
#: The most histories that are removed at once.
HISTORY_REMOVED: Final = 1000
_DUPLICATE: Final = 11000


class RecordedChanges(Indexes, Nodes):
    """The last changes of each node, as they are on record."""

    async def write_history(self, entries: Sequence[Entry]) -> tuple[int, list[str]]:
        """Write to the nodes' histories in one unordered bulk. Returns how many histories are new, and refusals.

        A duplicate key is no refusal: the entry is there, and only its acknowledgement was lost.
        """
        operations = [operation for entry in entries for operation in _history_operations(entry)]
        async with deadline("writing the history"):
            try:
                result = await self._history.bulk_write(operations, ordered=False)
            except BulkWriteError as error:
                failures = [f for f in error.details.get("writeErrors", []) if f.get("code") != _DUPLICATE]
                if error.details.get("writeConcernErrors") or any(f.get("code") in PASSING for f in failures):
                    raise
                messages = [first_line(str(failure.get("errmsg"))) for failure in failures]
                return int(error.details.get("nUpserted", 0)), messages
        return result.upserted_count, []

    async def tidy_history(self, most: int, *, engine_id: str) -> None:
        """Remove an engine's histories that changed longest ago, beyond `most`; old ones expire by their index."""
        own = {"engine_id": engine_id}
        problems = await self.create_indexes([HISTORY])  # somebody may have dropped the collection
        if problems and await self.may_create_indexes():
            raise StoreError(f"An index cannot be created: {problems[0]}")
        async with deadline("tidying the history"):
            surplus = await self._history.count_documents(own) - most
            if surplus > 0:
                oldest = self._history.find(own, {"at": 1}).sort("at", 1).limit(min(surplus, HISTORY_REMOVED))
                rows = await oldest.to_list()
                await self._history.delete_many({"_id": {"$in": [row["_id"] for row in rows]}})

    async def find_history(self, name: str, *, limit: int) -> list[dict[str, Any]]:
        """Whose histories there are by an id's beginning, or a container's name; those that changed last first.

        Rows have `_id`, `short_id`, `name`, `image` and `at`, whatever they are like.
        """
        prefix = {"$regex": f"^{re.escape(name)}"}
        query = {"$or": [{"_id": prefix}, {"short_id": prefix}, {"name": name}]}
        async with deadline("reading the history"):
            rows = self._history.find(query, {"changes": 0}).sort("at", -1).limit(limit)
            return await rows.to_list()

    async def read_history(self, node_id: str = "", *, engine_id: str = "", limit: int) -> list[dict[str, Any]]:
        """Histories as they are kept, whatever they are like: of a node, or an engine's that changed last."""
        query = {"_id": node_id} if node_id else {"engine_id": engine_id}
        wanted = {"changes": {"$slice": -limit}}
        async with deadline("reading the history"):
            return await self._history.find(query, wanted).sort("at", -1).limit(limit).to_list()

    async def read_last_states(
        self, node_ids: Collection[str] = (), *, engine_id: str = "", limit: int
    ) -> list[dict[str, Any]]:
        """Of the histories of these nodes, or an engine's, that changed last: only what tells how the node is now.

        `changes` are the last one of the status (or the deletion), and the last one of the health.
        """
        query = {"engine_id": engine_id} if engine_id else {"_id": {"$in": list(node_ids)}}
        kept = {"short_id": 1, "name": 1, "image": 1}
        last = [_last_change_of("status"), _last_change_of("health")]
        stages: list[dict[str, Any]] = [
            {"$match": query},
            {"$sort": {"at": -1}},
            {"$limit": limit},
            {"$project": kept | {"changes": {"$concatArrays": last}}},
        ]
        rows, slices = [], Slices()
        async with deadline("reading the history"):
            async for row in await self._history.aggregate(stages, batchSize=BATCH):
                rows.append(row)
                await slices.turn()
        return rows

    async def read_old_history(self, node_id: str | None = None, *, limit: int) -> list[dict[str, Any]]:
        """The newest rows that earlier versions wrote, one a change, whatever they are like."""
        query = {} if node_id is None else {"node_id": node_id}
        order = "$natural" if node_id is None else "_id"  # by the end of the collection, or the index on node_id
        async with deadline("reading the history"):
            return await self._old_history.find(query).sort(order, -1).limit(limit).to_list()

    async def find(self, name: str) -> Recorded | None:
        """The node whose id or short id begins with `name`; ConfigError when there are several.

        Raises DocumentError when its document is one that everything skips.
        """
        if not name:
            return None  # and not all of them
        prefix = {"$regex": f"^{re.escape(name)}"}
        async with deadline("looking for a node"):
            rows = await self._nodes.find({"$or": [{"_id": prefix}, {"short_id": prefix}]}, PROJECTION).to_list(2)
        if len(rows) > 1:
            raise ConfigError(f"{name}: several nodes begin with it, give more of the id")
        recorded = self._parse(rows[0]) if rows else None
        if rows and recorded is None:
            raise DocumentError(f"{name}: it has a document, which is skipped until that is corrected or deleted")
        return recorded


def _history_operations(entry: Entry) -> list[UpdateOne]:
    """What makes the database hold this entry, once, whatever came of an earlier attempt."""
    found: dict[str, Any] = {"_id": entry.node_id, "changes.id": entry.id}
    news = {"count": entry.count, "until": entry.until, "reason": entry.reason, **entry.ending}
    renewed = UpdateOne(
        found,
        {
            "$set": {**{f"changes.$.{name}": value for name, value in news.items()}, **entry.named},
            "$max": {"at": entry.until},
        },
    )
    if entry.stored:
        return [renewed]
    row = {"id": entry.id, "at": entry.at, **news, **entry.what}
    # One that is there makes the filter match nothing, and the upsert a duplicate key.
    added = UpdateOne(
        {"_id": entry.node_id, "changes.id": {"$ne": entry.id}},
        {
            "$push": {"changes": {"$each": [row], "$sort": {"at": 1, "id": 1}, "$slice": -HISTORY_CHANGES}},
            "$set": {"short_id": entry.short_id, "engine_id": entry.engine_id, **entry.named},
            "$max": {"at": entry.until},
        },
        upsert=True,
    )
    return [renewed, added] if entry.tried else [added]


def _last_change_of(name: str) -> dict[str, Any]:
    """What gives a history's last change of this field, or the deletion, in a list."""
    changes = {"$cond": [{"$isArray": "$changes"}, "$changes", []]}
    told = {"$ne": [{"$type": f"$$this.new.{name}"}, "missing"]}
    chosen = {"$filter": {"input": changes, "cond": {"$or": [told, {"$eq": ["$$this.deleted", True]}]}}}
    return {"$slice": [chosen, -1]}
