"""What must not be forgotten although a manager may replace the node documents as a whole.

`NodeOwner` (one document per container, same `_id`) holds the engine that last had it and the claim on it,
`NodeEngine` (one per engine) since when idle nodes may be stopped, and whether a twin of the engine was seen.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any, Final

from pymongo import (
    ReturnDocument,
    UpdateOne,
)

from eventwatch.core.errors import StoreError
from eventwatch.core.facts import Owner
from eventwatch.store.base import Collections, checker_id
from eventwatch.store.rows import parse_owner

#: Seconds that idle stops wait at most, whatever is on record.
MAX_GRACE: Final = 3600.0


class Owners(Collections):
    """Which engine had a container, whether an engine has a twin, and since when idle nodes may be stopped."""

    async def read_owners(self, node_ids: Collection[str]) -> dict[str, Owner]:
        """What is on record of these containers, those that are gone for less than `GONE_MEMORY` included."""
        return await self._read_owners({"_id": {"$in": list(node_ids)}})

    async def read_owned(self, engine_id: str) -> tuple[dict[str, Owner], list[str]]:
        """What is on record of all containers that this engine has, and which of those went lately."""
        async with self.call("reading owners"):
            rows = await self._owners.find({"engine_id": engine_id}, {"claim": 0}).to_list()
        rows = [row for row in rows if isinstance(row["_id"], str)]
        return (
            {row["_id"]: parse_owner(row) for row in rows if "gone_at" not in row},
            [row["_id"] for row in rows if "gone_at" in row],
        )

    async def _read_owners(self, query: Mapping[str, Any]) -> dict[str, Owner]:
        async with self.call("reading owners"):
            rows = await self._owners.find(query, {"claim": 0}).to_list()
        return {row["_id"]: parse_owner(row) for row in rows if isinstance(row["_id"], str)}

    async def record_owners(self, owners: Mapping[str, Owner]) -> None:
        """Put on record which engine has these containers; what is known of them besides stays."""
        operations = []
        for node_id, owner in owners.items():
            fields: dict[str, Any] = {"engine_id": owner.engine_id, "host": owner.host}
            if owner.registered is not None:
                fields["registered"] = owner.registered
            update = {"$set": fields, "$unset": {"gone_at": 1}}
            operations.append(UpdateOne({"_id": node_id}, update, upsert=True))
        if not operations:
            return
        async with self.call("recording owners"):
            await self._owners.bulk_write(operations, ordered=False)

    async def record_gone(self, node_ids: Collection[str], *, engine_id: str) -> None:
        """Put on record that these containers of this engine are gone.

        It is remembered for a while whose they were: a manager that saves what it read before brings a document
        back, and then it must be known who may delete it.
        """
        query = {"_id": {"$in": list(node_ids)}, "engine_id": engine_id}
        async with self.call("recording what is gone"):
            await self._owners.update_many(query, [{"$set": {"gone_at": "$$NOW"}}])

    async def rename_host(self, engine_id: str, old: str, new: str) -> None:
        """Put on record that an engine's host is called otherwise than when it had some containers."""
        async with self.call("recording a host's name"):
            await self._owners.update_many({"engine_id": engine_id, "host": old}, {"$set": {"host": new}})

    async def trace_of_others(self, engine_id: str) -> str | None:
        """The id of another engine that this database has ever served, alive or not; None without a trace."""
        other = {"engine_id": {"$nin": [None, engine_id]}}
        async with self.call("looking for other engines"):
            for collection in (self._checkers, self._engines, self._owners, self._nodes):
                row = await collection.find_one(other, {"engine_id": 1})
                if row is not None:
                    return str(row["engine_id"])
        return None

    async def note_twin(self, engine_id: str, *, host: str) -> None:
        """Put on record that another engine, watched by `host`, has this id."""
        seen = {"engine_id": {"$literal": engine_id}, "twin": {"host": {"$literal": host}, "seen_at": "$$NOW"}}
        async with self.call("recording another engine of one id"):
            await self._engines.update_one({"_id": checker_id(engine_id)}, [{"$set": seen}], upsert=True)

    async def twin_seen(self, engine_id: str, *, within: float) -> str | None:
        """The host that watched another engine of this id within the last so many seconds; None for none."""
        since = {"$subtract": ["$$NOW", round(within * 1000)]}
        recent = {"$and": [{"$gt": ["$twin.seen_at", since]}, {"$lte": ["$twin.seen_at", "$$NOW"]}]}
        query = {"_id": checker_id(engine_id), "twin.seen_at": {"$type": "date"}, "$expr": recent}
        async with self.call("looking for other engines of one id"):
            row = await self._engines.find_one(query, {"twin": 1})
        return str(row["twin"].get("host")) if row and isinstance(row["twin"], dict) else None

    async def idle_stops_begin(self, engine_id: str, *, host: str, grace: float) -> float:
        """Seconds until this engine's idle nodes may be stopped; `grace` from the first time that it is asked."""
        update = {
            "engine_id": {"$literal": engine_id},
            "host": {"$literal": host},
            "idle_stops_from": {"$ifNull": ["$idle_stops_from", {"$add": ["$$NOW", round(grace * 1000)]}]},
            "seen_at": "$$NOW",
        }
        async with self.call("reading when idle stops begin"):
            row = await self._engines.find_one_and_update(
                {"_id": checker_id(engine_id)},
                [{"$set": update}],
                upsert=True,
                return_document=ReturnDocument.AFTER,
            )
        if row is None:
            raise StoreError("Database does not say when idle stops begin")
        begin, now = row["idle_stops_from"], row["seen_at"]
        return min((begin - now).total_seconds(), MAX_GRACE) if isinstance(begin, datetime) else 0.0
