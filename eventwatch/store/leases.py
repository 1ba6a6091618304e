"""The leases: who watches an engine, who stands by, and the epoch that fences off whoever was before.

One `NodeChecker` document per engine. All times are the database's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any, Final

from pymongo import (
    ReturnDocument,
)

from eventwatch.core.errors import StoreError
from eventwatch.core.text import printable
from eventwatch.core.version import eventwatch_version
from eventwatch.store.base import (
    FORMAT,
    LATER_FORMAT,
    LEASE_HOLDS,
    Collections,
    checker_id,
    fence,
    standbys_without,
)
from eventwatch.store.documents import NodeChecker
from eventwatch.store.rows import (
    NO_LIFE,
    UNSEEN,
    Lease,
    Life,
    Peer,
    Witness,
    parse_holder,
    parse_peer,
    whole,
)

MAX_FLOOR: Final = 2**47


#: ns: the year 2200.
_FARTHEST_CURSOR: Final = 7_258_118_400_000_000_000


#: An expression: the epoch on record, 0 for what is none.
_SANE_EPOCH: Final = {
    "$cond": [
        {"$and": [{"$isNumber": "$epoch"}, {"$gte": ["$epoch", 0]}, {"$lt": ["$epoch", MAX_FLOOR]}]},
        {"$toLong": "$epoch"},
        0,
    ]
}


class Leases(Collections):
    """Who watches an engine, and who stands by."""

    async def acquire_lease(
        self,
        checker: NodeChecker,
        *,
        engine_id: str,
        duration: float,
        witness: Witness = UNSEEN,
        life: Life = NO_LIFE,
        dead: Peer | None = None,
    ) -> Lease | Peer:
        """Take the engine's lease if it is free, expired or ours; else say who holds it, and that we wait for it.

        One atomic update on the database's clock, so clocks of the hosts do not matter; where the lease is held,
        no other document is looked at. `duration` in seconds; `life` is ours; a lease that is still `dead`'s, and
        of the same epoch, counts as free.
        """
        mine = {"$eq": ["$manager_id", {"$literal": checker.manager_id}]}
        reasons: list[dict[str, Any]] = [{"$not": ["$manager_id"]}, mine, {"$not": [LEASE_HOLDS]}]
        if dead is not None:
            theirs = (("$manager_id", dead.manager_id), ("$epoch", dead.epoch))
            reasons.append({"$and": [{"$eq": [name, {"$literal": value}]} for name, value in theirs]})
        free = {"$or": reasons}
        me = {
            "manager_id": checker.manager_id,
            "host": checker.host,
            "pid": checker.pid,
            "containers": list(witness.containers),
            "look": witness.look,
        }
        standbys = standbys_without(checker.manager_id)
        waiting = {
            "standbys": {
                "$concatArrays": [standbys, [{"$mergeObjects": [{"$literal": me}, {"seen_at": "$$NOW"}]}]]
            }
        }
        # Nobody waits for what it could not take over.
        ours = {"format": {"$not": LATER_FORMAT}}
        held = {"_id": checker_id(engine_id), **ours, "$expr": {"$not": [free]}}
        async with self.call("asking for the lease"):
            row = await self._checkers.find_one_and_update(
                held, [{"$set": waiting}], return_document=ReturnDocument.AFTER
            )
        if row is not None:
            return parse_holder(row)
        await self.refuse_later_format(engine_id)
        floor = await self._highest_epoch(engine_id)
        known_epoch = {"$max": [_SANE_EPOCH, floor]}
        taken: dict[str, Any] = {
            "manager_id": {"$literal": checker.manager_id},
            "interval": checker.interval,
            "pid": checker.pid,
            "engine_id": {"$literal": engine_id},
            "host": {"$literal": checker.host},
            "version": {"$literal": checker.version},
            "renewed_at": "$$NOW",
            "expires_at": {"$add": ["$$NOW", round(duration * 1000)]},
            "epoch": {
                "$cond": [{"$and": [mine, {"$gt": [_SANE_EPOCH, 0]}]}, "$epoch", {"$add": [known_epoch, 1]}]
            },
            "containers": list(witness.containers),
            "look": witness.look,
            "life": _recorded_life(life, checker.manager_id),
            "standbys": standbys,
            "settings": {"$literal": checker.settings or {}},
            "page": {"$literal": checker.page or {}},
            "format": FORMAT,
        }
        update = [{"$replaceWith": {"$mergeObjects": ["$$ROOT", {"$cond": [free, taken, waiting]}]}}]
        async with self.call("taking the lease"):
            row = await self._checkers.find_one_and_update(
                {"_id": checker_id(engine_id)}, update, upsert=True, return_document=ReturnDocument.AFTER
            )
        if row is None:
            raise StoreError("Database took the lease but did not say so")
        if row["manager_id"] != checker.manager_id:
            return parse_holder(row)
        lease = Lease(checker.manager_id, engine_id, int(row["epoch"]), _sane_cursor(row.get("cursor")))
        mark = {
            "engine_id": engine_id,
            "epoch": lease.epoch,
            "host": checker.host,
            "version": checker.version,
            "format": FORMAT,
        }
        # Before the first write: from here on, whatever an earlier holder still sends matches nothing.
        async with self.call("stamping the epoch"):
            # First, as it fails where a later version had the lease since we asked.
            taken_over = {"$set": mark, "$unset": {"left_at": 1}}
            await self._engines.update_one({"_id": checker_id(engine_id), **ours}, taken_over, upsert=True)
            await self._nodes_surely.update_many(
                {"engine_id": engine_id, **fence(lease)}, {"$set": {"epoch": lease.epoch}}
            )
            # An earlier holder has not decided these, and will not: it is fenced off.
            undecided = {"engine_id": engine_id, "claim.leads": True, "claim.stands": False}
            await self._owners.update_many(
                {**undecided, "claim.by": {"$ne": lease.manager_id}}, {"$unset": {"claim": 1}}
            )
        return lease

    async def refuse_later_format(self, engine_id: str) -> None:
        """Raise StoreError where the records of this engine are of a format that only a later version knows."""
        later = {"_id": checker_id(engine_id), "format": LATER_FORMAT}
        async with self.call("reading the format"):
            row = await self._engines.find_one(later, {"format": 1, "version": 1})
        if row is not None:
            raise StoreError(
                f"Database has records of this engine in format {row['format']} (NodeEngine.format), written by"
                f" eventwatch {printable(row.get('version') or 'of a later version', 40)}; this one,"
                f" {eventwatch_version()}, knows no later format than {FORMAT}: install that version again",
                permanent=True,
            )

    async def _highest_epoch(self, engine_id: str) -> int:
        # A released lease leaves no document behind, but the nodes remember its epoch, and the engine's record
        # does where no node is left. All engines' nodes: one that lost its id finds its own under the old id, and
        # must not be fenced off by their epoch for ever.
        async with self.call("reading the epoch"):
            sane = {"epoch": {"$type": ["int", "long"], "$lt": MAX_FLOOR}}
            node = await self._nodes.find_one(sane, {"epoch": 1}, sort=[("epoch", -1)])
            engine = await self._engines.find_one({"_id": checker_id(engine_id), **sane}, {"epoch": 1})
        return max(int(row["epoch"]) if row else 0 for row in (node, engine))

    async def renew_lease(
        self,
        lease: Lease,
        *,
        duration: float,
        cursor: int | None,
        witness: Witness = UNSEEN,
        report: Mapping[str, Any] | None = None,
        life: Life | None = None,
    ) -> bool:
        """Extend a lease that is still ours. False when its document is gone or another's.

        `report` is what the watcher tells of itself, for others to read (see `EngineRecord`); `life` is ours, if
        more is known of it than when the lease was taken.
        """
        fields: dict[str, Any] = {
            "renewed_at": "$$NOW",
            "expires_at": {"$add": ["$$NOW", round(duration * 1000)]},
            "containers": list(witness.containers),
            "look": witness.look,
            "standbys": standbys_without(lease.manager_id),
        }
        if cursor is not None:
            fields["cursor"] = cursor
        if report is not None:
            fields["report"] = {"$literal": report}
        if life is not None:
            fields["life"] = _recorded_life(life, lease.manager_id)
        guard = {"_id": checker_id(lease.engine_id), "manager_id": lease.manager_id}
        async with self.call("renewing the lease"):
            return (await self._checkers.update_one(guard, [{"$set": fields}])).matched_count == 1

    async def lease_is_gone(self, lease: Lease) -> bool:
        """Whether no checker document is left: an operator deleted it, or the database lost it."""
        async with self.call("reading the lease"):
            return await self._checkers.count_documents({"_id": checker_id(lease.engine_id)}, limit=1) == 0

    async def remembers(self, lease: Lease) -> bool:
        """Whether the database still holds what was written, elsewhere, when this lease was taken.

        If not, its checker document is not gone because somebody deleted it: an older state was restored.
        """
        query = {"_id": checker_id(lease.engine_id), "epoch": lease.epoch}
        async with self.call("reading the lease"):
            return await self._engines.count_documents(query, limit=1) == 1

    async def peers(self, engine_id: str, *, besides: str = "") -> list[Peer]:
        """The live processes that watch an engine with this id, the holder first; `besides` is who asks."""
        live = {
            "holds": LEASE_HOLDS,
            "standbys": standbys_without(besides),
            **dict.fromkeys(("manager_id", "host", "pid", "containers", "look"), 1),
        }
        async with self.call("reading the checkers"):
            row = await self._checkers.find_one({"_id": checker_id(engine_id)}, live)
        if row is None:
            return []
        found = [parse_peer(row, holds=True)] if row["holds"] and row.get("manager_id") != besides else []
        return found + [parse_peer(standby, holds=False) for standby in row["standbys"]]

    async def settings_of_holder(self, engine_id: str) -> tuple[str, Mapping[str, Any]] | None:
        """The host of who holds the engine's lease, and the settings by which it judges; None without a holder."""
        query = {"_id": checker_id(engine_id), "$expr": LEASE_HOLDS}
        async with self.call("reading the checkers"):
            row = await self._checkers.find_one(query, {"host": 1, "settings": 1})
        settings = row.get("settings") if row else None
        return (str(row.get("host")), settings) if row and isinstance(settings, dict) else None

    async def release_lease(self, lease: Lease) -> None:
        """Remove our checker document, so that a standby need not wait for it to expire."""
        key = {"_id": checker_id(lease.engine_id)}
        async with self.call("releasing the lease"):
            row = await self._checkers.find_one_and_delete({**key, "manager_id": lease.manager_id})
            if row is not None:
                left = {"left_at": "$$NOW", "ended_at": "$$NOW", "report": {"$literal": row.get("report")}}
                await self._engines.update_one(key, [{"$set": left}])

    async def other_live_engines(self, engine_id: str) -> frozenset[str]:
        """The other engines that have a live checker of their own."""
        return await self._live_engines({"engine_id": {"$nin": [None, engine_id]}})

    async def live_among(self, engine_ids: Collection[str]) -> frozenset[str]:
        """Those of these engines that have a live checker."""
        return await self._live_engines({"_id": {"$in": [checker_id(each) for each in engine_ids]}})

    async def _live_engines(self, which: Mapping[str, Any]) -> frozenset[str]:
        async with self.call("reading the checkers"):
            rows = await self._checkers.find({**which, "$expr": LEASE_HOLDS}, {"engine_id": 1}).to_list()
        return frozenset(str(row["engine_id"]) for row in rows)


def _recorded_life(life: Life, manager_id: str) -> dict[str, Any]:
    # With the name of whose it is: an older version that takes the lease leaves this as it finds it.
    return {"$literal": {**asdict(life), "manager_id": manager_id}}


def _sane_cursor(value: object) -> int | None:
    """The cursor on record; None for what is none, or what an engine would not be asked for."""
    cursor = whole(value)
    return cursor if cursor is not None and 0 < cursor < _FARTHEST_CURSOR else None
