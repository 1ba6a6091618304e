"""The engines on record, what their watchers tell of them, and what is forgotten with one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from eventwatch.core.errors import StoreError
from eventwatch.core.facts import Recorded
from eventwatch.store.base import LEASE_HOLDS, checker_id, fence, standbys_without
from eventwatch.store.leases import Leases
from eventwatch.store.nodes import Nodes
from eventwatch.store.rows import PROJECTION, EngineRecord, Lease, parse_engine

#: Silent engines, of each kind, among which those are looked for that have documents; so many at once.
SILENT: Final = 300
PAGE: Final = 20
#: Documents of an engine that are forgotten at once.
FORGOTTEN: Final = 1000


class Fleet(Nodes, Leases):
    """The engines on record, and what is forgotten with one."""

    async def read_engines(self, most: int) -> list[EngineRecord]:
        """What is on record of all engines, at most so many, in no order. Raises StoreError."""
        return await self._read_engines({}, most)

    async def read_engine(self, engine_id: str) -> EngineRecord | None:
        """What is on record of this engine. Raises StoreError."""
        found = await self._read_engines({"_id": checker_id(engine_id)}, 1)
        return found[0] if found else None

    async def read_dead(self, *, after: float, most: int) -> list[EngineRecord]:
        """Engines without a sign of life for `after` seconds that still have documents, `most` at most.

        Those whose watcher ended as it should, and has left no document, are not looked at again. Raises
        StoreError.
        """
        horizon = naive_utc(await self.system_time() - timedelta(seconds=after))
        dead: dict[Any, EngineRecord] = {}
        for collection, name in ((self._checkers, "expires_at"), (self._engines, "left_at")):
            async with self.call("looking for engines that are gone"):
                silent = collection.find({name: {"$lt": horizon}}, {"engine_id": 1}).sort(name, -1).limit(SILENT)
                async with silent.batch_size(PAGE):
                    while len(dead) < most and (rows := await silent.to_list(PAGE)):
                        dead |= await self._dead_among(rows, horizon)
        return [*dead.values()][:most]

    async def _dead_among(self, silent: Sequence[Mapping[str, Any]], horizon: datetime) -> dict[Any, EngineRecord]:
        told = ((row["_id"], row.get("engine_id")) for row in silent)
        named = [(key, engine_id) for key, engine_id in told if isinstance(engine_id, str)]
        ids = [engine_id for _, engine_id in named]
        with_nodes = set(await self._nodes.distinct("engine_id", {"engine_id": {"$in": ids}}))
        keys = [key for key, engine_id in named if engine_id in with_nodes]
        without = [row["_id"] for row in silent if row["_id"] not in keys]
        left = {"_id": {"$in": without}, "left_at": {"$lt": horizon}}
        await self._engines.update_many(left, {"$unset": {"left_at": 1}})
        records = await self._read_engines({"_id": {"$in": keys}}, PAGE) if keys else []
        return {record.engine_id: record for record in records if not record.alive and not record.standbys}

    async def _read_engines(self, which: Mapping[str, Any], most: int) -> list[EngineRecord]:
        shown = {
            "holds": LEASE_HOLDS,
            "standbys": standbys_without(""),
            "now": "$$NOW",
            **dict.fromkeys(("manager_id", "engine_id", "host", "version", "renewed_at", "report"), 1),
        }
        names = ("engine_id", "host", "version", "seen_at", "ended_at", "report")
        kept = {"now": "$$NOW", **dict.fromkeys(names, 1)}
        async with self.call("reading the engines"):
            checkers = await self._checkers.find(which, shown).sort("_id", 1).limit(most).to_list()
            engines = await self._engines.find(which, kept).sort("_id", 1).limit(most).to_list()
        rows = {row["_id"]: row for row in engines}
        for row in checkers:
            rows[row["_id"]] = {**rows.get(row["_id"], {}), **row}
        return [record for row in rows.values() if (record := parse_engine(row)) is not None]

    async def read_page(self, engine_id: str, *, after: str, limit: int) -> tuple[list[Recorded], str | None]:
        """The documents of an engine in the order of their ids, `limit` of those after this one.

        With the id after which there are more, if there are. Documents that cannot be read are left out.
        """
        query = {"engine_id": engine_id, "_id": {"$gt": after}}
        async with self.call("reading an engine's nodes"):
            rows = await self._nodes.find(query, PROJECTION).sort("_id", 1).limit(limit + 1).to_list()
        more = len(rows) > limit
        return [*self._parse_all(rows[:limit]).values()], str(rows[limit - 1]["_id"]) if more else None

    async def count_to_forget(self, engine_id: str) -> int:
        """How many documents `forget_engine` would delete. Raises StoreError."""
        fence = await self._fence_of(engine_id)
        async with self.call("counting an engine's nodes"):
            return sum(
                [
                    await self._nodes.count_documents(_forgettable(engine_id, ids, fence))
                    async for ids in self._ids_to_forget(engine_id)
                ]
            )

    async def forget_engine(self, engine_id: str) -> int:
        """Delete an engine's documents and all that is on record of it; how many documents went.

        Nothing that another engine owns, and nothing that a watcher of this one stamps meanwhile. Raises
        StoreError when such a watcher is there: what is left then stays; and for records of a later version.
        """
        await self.refuse_later_format(engine_id)
        fence, deleted = await self._fence_of(engine_id), 0
        async for ids in self._ids_to_forget(engine_id):
            if await self.live_among([engine_id]):
                raise StoreError(f"Its watcher is back: {deleted} documents are deleted, the rest stays")
            async with self.call("deleting an engine's nodes"):
                result = await self._nodes_surely.delete_many(_forgettable(engine_id, ids, fence))
                deleted += result.deleted_count
                await self._owners.delete_many({"_id": {"$in": ids}, "engine_id": engine_id})
        async with self.call("forgetting an engine"):
            key = {"_id": checker_id(engine_id)}
            # By findAndModify: MongoDB 4.4 knows no $$NOW in the filter of a delete.
            await self._checkers.find_one_and_delete({**key, "$expr": {"$not": [LEASE_HOLDS]}})
            if not await self.live_among([engine_id]):
                await self._engines.delete_one(key)
        return deleted

    async def _fence_of(self, engine_id: str) -> dict[str, Any]:
        """A filter that no document passes which a later holder of this engine's lease has stamped."""
        async with self.call("reading an engine's epoch"):
            rows = [
                await collection.find_one({"_id": checker_id(engine_id)}, {"epoch": 1})
                for collection in (self._checkers, self._engines)
            ]
        epochs = [row["epoch"] for row in rows if row and type(row.get("epoch")) is int]
        return fence(Lease("", engine_id, max(epochs))) if epochs else {}

    async def _ids_to_forget(self, engine_id: str) -> AsyncIterator[list[str]]:
        """The ids of what an engine owns, by the record of owners or else by the stamp, some at a time."""
        own = {"engine_id": engine_id}
        ids = [row["_id"] async for row in self._owners.find(own, {"_id": 1})]
        owned = set(ids)
        stamped = [row["_id"] async for row in self._nodes.find(own, {"_id": 1}) if row["_id"] not in owned]
        others = {"_id": {"$in": stamped}, "engine_id": {"$nin": [None, engine_id]}}
        foreign = {row["_id"] async for row in self._owners.find(others, {"_id": 1})} if stamped else set()
        ids += [node_id for node_id in stamped if node_id not in foreign]
        for first in range(0, len(ids), FORGOTTEN):
            yield ids[first : first + FORGOTTEN]


def naive_utc(moment: datetime) -> datetime:
    """As the manager stores it, in whole milliseconds as the database keeps it."""
    return moment.replace(tzinfo=None, microsecond=moment.microsecond // 1000 * 1000)


def _forgettable(engine_id: str, ids: list[str], fence: Mapping[str, Any]) -> dict[str, Any]:
    return {"_id": {"$in": ids}, "engine_id": {"$in": [engine_id, None]}, **fence}
