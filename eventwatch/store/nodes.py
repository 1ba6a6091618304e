"""MongoDB, and nothing about why: the only module that talks to the database.

Contract: every write to a node is a `$set` (or delete) of fields that eventwatch owns, filtered by `_id`, by the
lease's epoch and, where a decision was made on what was read, by what was read. Nothing here replaces a
document, and only `register` inserts a node. Each call has a deadline and raises `StoreError` with one line.
Reads never fail for one bad document: it is reported once and left out.

What must not be forgotten does not live in the node documents alone, which a manager may replace as a whole:
`NodeOwner` (one document per container, same `_id`) holds the engine that last had it and the claim on it,
`NodeEngine` (one per engine) since when idle nodes may be stopped. Whatever the URL says, reads are from the
primary, and leases, claims, owners and deletions are written with majority.

The hot path uses the driver's collections below Beanie's documents: same collections, same types, no object
per document. Not promised: that a write which raised `StoreError` did not happen. All writes are idempotent,
so the caller repeats them.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
import sys
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Final

from beanie import init_beanie
from bson import ObjectId
from bson.errors import BSONError
from loguru import logger
from pymongo import (
    AsyncMongoClient,
    DeleteOne,
    IndexModel,
    ReadPreference,
    ReturnDocument,
    UpdateOne,
    WriteConcern,
)
from pymongo.asynchronous import pool, topology
from pymongo.errors import (
    BulkWriteError,
    ConfigurationError,
    ConnectionFailure,
    InvalidURI,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
)
from pymongo.monitoring import (
    ServerClosedEvent,
    ServerDescriptionChangedEvent,
    ServerListener,
    ServerOpeningEvent,
)

from eventwatch.core.clock import Slices
from eventwatch.core.errors import ConfigError, DocumentError, StoreError
from eventwatch.core.facts import STOPPING, Claim, Owner, Recorded, Write, is_container_id
from eventwatch.core.policy import AT_WORK, as_utc
from eventwatch.settings.model import mask_url
from eventwatch.store.documents import NodeChecker, ToolServerNode, checker_collection, node_collection, tolerant

#: Where a status page may be.
_PAGE: Final = re.compile(r"https?://[A-Za-z0-9._:\[\]-]{1,270}/")
#: Seconds for any one call. Far above a healthy answer, below what an operator would call hanging.
DEADLINE: Final = 10.0
SERVER_SELECTION_MS: Final = 3000
#: Documents that come at once, so that no batch holds up the event loop for long.
BATCH: Final = 500
#: The server's code for a user that exists.
USER_EXISTS: Final = 51003

#: What outlives a replaced node document, and what is remembered of each engine.
OWNERS: Final = "NodeOwner"
ENGINES: Final = "NodeEngine"
#: No number of takeovers leads here: what is beyond was written by somebody else. It takes as many again from the
#: highest one that is counted on from to the first that is not believed.
MAX_EPOCH: Final = 2**48
MAX_FLOOR: Final = 2**47
#: Linux has no higher process ids.
MAX_PID: Final = 2**22
#: Seconds for which it is remembered whose a container was that is gone.
GONE_MEMORY: Final = 24 * 3600
#: Seconds that idle stops wait at most, whatever is on record.
MAX_GRACE: Final = 3600.0
#: Seconds after which a standby that has not asked for the lease again is gone.
STANDBY_GONE: Final = 10.0

#: Silent engines, of each kind, among which those are looked for that have documents.
SILENT: Final = 300
#: Documents of an engine that are forgotten at once.
FORGOTTEN: Final = 1000
#: The last changes of each node, one document a node; one whose last change is older than this (s) expires.
HISTORY: Final = "NodeChanges"
HISTORY_SECONDS: Final = 30 * 86400
#: Changes that are kept of a node.
HISTORY_CHANGES: Final = 50
#: The most histories that are removed at once.
HISTORY_REMOVED: Final = 1000
#: What earlier versions write, one row a change, into a capped collection. Only read.
OLD_HISTORY: Final = "NodeHistory"

#: The indexes without which a query would read the documents of every engine: by collection, the fields and the
#: options of each.
INDEXES: Final[Mapping[str, Sequence[tuple[Mapping[str, int], Mapping[str, Any]]]]] = {
    "ToolServerNode": [({"engine_id": 1, "_id": 1}, {}), ({"epoch": -1}, {}), ({"short_id": 1}, {})],
    "NodeChecker": [({"engine_id": 1}, {}), ({"manager_id": 1}, {}), ({"expires_at": 1}, {})],
    OWNERS: [
        ({"engine_id": 1, "claim.by": 1}, {}),
        ({"gone_at": 1}, {"expireAfterSeconds": GONE_MEMORY}),
    ],
    ENGINES: [({"engine_id": 1}, {}), ({"left_at": 1}, {"sparse": True})],
    HISTORY: [
        ({"at": 1}, {"expireAfterSeconds": HISTORY_SECONDS}),
        ({"engine_id": 1, "at": -1}, {}),
        ({"short_id": 1}, {}),
        ({"name": 1}, {}),
    ],
}

_FIELDS: Final = ("short_id", "status", "health", "ip", "port", "last_req_time", "engine_id", "epoch")
_PROJECTION: Final = dict.fromkeys((*_FIELDS, "idle_timeout"), 1)
#: What a look at a document compares.
LOOKED_AT: Final = ("status", "health", "ip", "port")
#: Server error codes of a refused login or missing rights: waiting does not help.
_REFUSED: Final = {13, 18}
_DUPLICATE: Final = 11000
#: Server error codes of an index that is there with other options.
_INDEX_CONFLICTS: Final = {85, 86}
#: Server error codes that concern the server, not the document: it is shutting down, or no primary any more.
_PASSING: Final = {91, 189, 10058, 10107, 11600, 11602, 13435, 13436, 14031}


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write for one engine, as granted by the database's clock."""

    manager_id: str
    engine_id: str
    epoch: int
    cursor: int | None = None


@dataclass(frozen=True, slots=True)
class Witness:
    """Containers that a process sees on its engine; `look` grows with each time that it looked.

    By these, another process that watches an engine with the same id finds out whether it is the same engine.
    """

    containers: tuple[str, ...] = ()
    look: int = 0


UNSEEN: Final = Witness()


@dataclass(frozen=True, slots=True)
class Life:
    """By what a process can be seen to have ended; each part is empty where it is not known for sure.

    `boot_id` is the machine's since it was booted, `namespaces`, `pid` and `started` (clock ticks since then) are
    the process's, `container` and `container_started` (ns) those of its container on the engine that it watches.
    """

    boot_id: str = ""
    namespaces: str = ""
    pid: int = 0
    started: int = 0
    container: str = ""
    container_started: int = 0


NO_LIFE: Final = Life()


@dataclass(slots=True)
class Entry:
    """A change in a node's history, and how often it has come again between `at` and `until`.

    `tried`: it may be in the database already, as it was at an earlier attempt to write it. `stored`: it is.
    `named` is what is kept of the node itself beside its changes, as last known.
    """

    id: str
    engine_id: str
    node_id: str
    short_id: str
    at: datetime
    until: datetime
    what: Mapping[str, Any]
    count: int = 1
    tried: bool = False
    stored: bool = False
    reason: str = ""
    named: Mapping[str, str] = field(default_factory=dict)
    #: Of an explained end: `end`, `asked` and `ended_at`.
    ending: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Peer:
    """Another live process that watches an engine with our engine's id: the holder of the lease, or a standby.

    Of a holder, also `life`, its `epoch`, when it last renewed its lease (naive UTC), and how long ago that
    was (s, by the database's clock) when a candidate asked.
    """

    manager_id: str
    host: str
    pid: int
    witness: Witness = UNSEEN
    holds: bool = False
    life: Life = NO_LIFE
    epoch: int = 0
    renewed_at: datetime | None = None
    renewed_ago: float | None = None
    #: The URL of its status page; empty: none that others could reach.
    page: str = ""


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """What is on record of an engine: who watches it, and what its watcher last told of itself.

    `alive`: it has a live lease; `watched`: somebody has or had it. `seen_at` (aware UTC) and `age` (s, by the
    database's clock) are of the last sign of life, None without any. `nodes` are counts by status; `sweep_age`,
    `p50` and `p99` (of the latency of events) are in seconds; `reasons` say why it was not ready, as of `seen_at`.
    """

    engine_id: str
    host: str = ""
    version: str = ""
    alive: bool = False
    watched: bool = False
    leader: str = ""
    standbys: tuple[str, ...] = ()
    seen_at: datetime | None = None
    age: float | None = None
    nodes: Mapping[str, int] = field(default_factory=dict)
    sweep_age: float | None = None
    drift: int | None = None
    p50: float | None = None
    p99: float | None = None
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Refused:
    """Changes that matched no document: it vanished, a later epoch owns it, or it no longer says what was read."""

    vanished: frozenset[str] = frozenset()
    fenced: frozenset[str] = frozenset()
    conflicting: frozenset[str] = frozenset()
    #: Refused by the server for what the document is like, whatever is tried.
    impossible: frozenset[str] = frozenset()

    def __contains__(self, node_id: object) -> bool:
        return any(node_id in ids for ids in (self.vanished, self.fenced, self.conflicting, self.impossible))


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


def checker_id(engine_id: str) -> ObjectId:
    """One NodeChecker document per engine, still with the ObjectId that a manager's own model expects."""
    return ObjectId(hashlib.sha256(engine_id.encode()).digest()[:12])


class Store:
    """The node and checker collections. Use `open_store`, or construct after your own `init_beanie`."""

    def __init__(self, *, on_return: Callable[[], object] = lambda: None) -> None:
        #: Called when the database accepts writes again after it did not: it may have lost what it acknowledged.
        self._on_return = on_return
        #: How often the database has come back so.
        self.returns = 0
        surely = WriteConcern("majority")
        self._nodes = tolerant(node_collection())
        self._nodes_surely = self._nodes.with_options(write_concern=surely)
        self._checkers = tolerant(checker_collection()).with_options(write_concern=surely)
        database = self._database = self._nodes.database
        self._owners, self._engines = (
            tolerant(database[name]).with_options(write_concern=surely) for name in (OWNERS, ENGINES)
        )
        self._history, self._old_history = (tolerant(database[name]) for name in (HISTORY, OLD_HISTORY))
        #: Documents that were told of, as they cannot be read, or not be written as they should be.
        self._reported: set[str] = set()
        self._unwritable: set[str] = set()

    def addresses(self) -> frozenset[tuple[str, int]]:
        """Host and port of each member of the database that the driver knows of; a Unix socket has no port."""
        return frozenset((host, port or 0) for host, port in self._nodes.database.client.nodes)

    def has_returned(self) -> None:
        """Tell, from the driver's monitor, that the database takes writes again."""
        self.returns += 1
        self._on_return()

    # -- indexes --------------------------------------------------------------------------------------

    async def create_indexes(self, names: Iterable[str] = INDEXES) -> list[str]:
        """Create those of `INDEXES` that are not there, and say which cannot be. Raises StoreError."""
        missing = await self._lacking(names)
        if not missing:
            return []
        problems = []
        async with _deadline("asking whether it is a replica set"):
            is_set = "setName" in await self._database.command("hello")
        # By default a member that is down holds it up for ever.
        quorum: dict[str, Any] = {"commitQuorum": "majority"} if is_set else {}
        for name, keys, options in missing:
            async with _deadline(f"creating an index of {name}"):
                try:
                    wanted = IndexModel([*keys.items()], **options)
                    await self._database[name].create_indexes([wanted], **quorum)
                except OperationFailure as error:
                    if error.code in _PASSING:
                        raise
                    if error.code not in _INDEX_CONFLICTS:  # somebody else was faster
                        problems.append(f"{name} ({', '.join(keys)}): {_first_line(str(error))}")
        return problems

    async def missing_indexes(self) -> list[str]:
        """Those of `INDEXES` that are not there, in words. Raises StoreError."""
        return [f"{name} ({', '.join(keys)})" for name, keys, _ in await self._lacking(INDEXES)]

    async def _lacking(self, names: Iterable[str]) -> list[tuple[str, Mapping[str, int], Mapping[str, Any]]]:
        """The indexes that are not there: collection, fields and options. One with other options does as well."""
        lacking = []
        for name in names:
            async with _deadline(f"looking for the indexes of {name}"):
                there = [list(index["key"].items()) async for index in await self._database[name].list_indexes()]
            lacking += [(name, keys, how) for keys, how in INDEXES[name] if list(keys.items()) not in there]
        return lacking

    async def may_create_indexes(self) -> bool:
        """Whether this login has the right to, as far as the server says. Raises StoreError."""
        async with _deadline("asking for the rights of this login"):
            answer = await self._database.command("connectionStatus", showPrivileges=True)
        told = answer.get("authInfo", {})
        if not told.get("authenticatedUsers"):
            return True  # no login is asked for
        names = {self._database.name, ""}
        return any(
            "createIndex" in privilege.get("actions", ()) and privilege.get("resource", {}).get("db") in names
            for privilege in told.get("authenticatedUserPrivileges", ())
        )

    # -- node documents -------------------------------------------------------------------------------

    async def read(self, node_ids: Collection[str], *, to_write: bool = False) -> dict[str, Recorded]:
        """What the documents of `node_ids` say now.

        With their claims, where it takes no further query to see that there can be none: those of documents that
        say `stopping`; `to_write`, also of those to which a manager has written something else.
        """
        found = await self._find_nodes({"_id": {"$in": list(node_ids)}})
        suspects = list(node_ids) if to_write else [i for i, node in found.items() if node.status == STOPPING]
        return _with_claims(found, await self._live_claims({"_id": {"$in": suspects}})) if suspects else found

    async def read_own(
        self, engine_id: str, node_ids: Collection[str], *, leftovers: bool = False
    ) -> dict[str, Recorded]:
        """The documents that bear this engine's id, and those of `node_ids` whatever they bear, with their claims.

        `leftovers`: also those that bear no engine's id. Each query has an index, and examines what it returns.
        """
        found = await self._find_nodes({"engine_id": engine_id})
        # Afterwards: what loses its stamp in between is found by its id.
        if rest := [node_id for node_id in node_ids if node_id not in found]:
            found |= await self._find_nodes({"_id": {"$in": rest}})
        if leftovers:
            found |= await self._find_nodes({"engine_id": None})
        return _with_claims(found, await self._live_claims({"engine_id": engine_id}))

    async def read_some(self, most: int) -> dict[str, Recorded]:
        """The documents with the lowest ids, whoever's they are."""
        async with _deadline("reading nodes"):
            rows = await self._nodes.find({}, _PROJECTION).sort("_id", 1).limit(most).to_list()
        return self._parse_all(rows)

    async def _find_nodes(self, query: Mapping[str, Any]) -> dict[str, Recorded]:
        found, slices = {}, Slices()
        async with _deadline("reading nodes"):
            async for row in self._nodes.find(query, _PROJECTION, batch_size=BATCH):
                if (node := self._parse(row)) is not None:
                    found[node.node_id] = node
                await slices.turn()
        return found

    async def look(self, node_ids: Collection[str]) -> dict[str, tuple[object, ...]]:
        """What the documents of these say in the fields `LOOKED_AT`, whatever that is; cheaper than `read`."""
        query = {"_id": {"$in": list(node_ids)}}
        async with _deadline("looking at nodes"):
            rows = await self._nodes.find(query, dict.fromkeys(LOOKED_AT, 1)).to_list()
        return {row["_id"]: tuple(row.get(name) for name in LOOKED_AT) for row in rows}

    async def count_engines(self) -> int:
        """How many engines this database has ever served."""
        async with _deadline("counting engines"):
            return await self._engines.estimated_document_count()

    def _parse_all(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Recorded]:
        return {node.node_id: node for row in rows if (node := self._parse(row)) is not None}

    async def count_others(self, node_ids: Collection[str]) -> int:
        """How many node documents there are besides these, sound or not."""
        async with _deadline("counting nodes"):
            return await self._nodes.count_documents({"_id": {"$nin": list(node_ids)}})

    def _parse(self, row: Mapping[str, Any]) -> Recorded | None:
        try:
            recorded = parse_recorded(row)
        except ValueError as error:
            name = str(row.get("_id"))
            if name not in self._reported:
                self._reported.add(name)
                logger.warning("Document {} is skipped: {}. Correct or delete it.", name, error)
            return None
        self._reported.discard(recorded.node_id)
        return recorded

    async def write(self, changes: Sequence[Write], *, lease: Lease | None) -> Refused:
        """Apply `changes` in one unordered bulk and say which of them matched no document."""
        stamp: dict[str, Any] = {"engine_id": lease.engine_id, "epoch": lease.epoch} if lease else {}
        operations: list[UpdateOne | DeleteOne] = []
        for change in changes:
            guard = {"_id": change.node_id, **_fence(lease), **(change.expected or {})}
            if change.delete:
                operations.append(DeleteOne(guard))
            else:
                operations.append(UpdateOne(guard, {"$set": {**change.fields, **stamp}}))
        nodes = self._nodes_surely if any(change.delete for change in changes) else self._nodes
        async with _deadline("writing nodes"):
            try:
                result = await nodes.bulk_write(operations, ordered=False)
            except BulkWriteError as error:
                return Refused(impossible=self._impossible(changes, error))
        if result.matched_count + result.deleted_count == len(changes):
            return Refused()
        return await self._why_refused(changes, lease)

    def _impossible(self, changes: Sequence[Write], error: BulkWriteError) -> frozenset[str]:
        """The documents that the server will not have written so, each told of once. Raises what concerns all."""
        failures = error.details.get("writeErrors", [])
        if error.details.get("writeConcernErrors") or any(f.get("code") in _PASSING for f in failures):
            raise error
        refused = {changes[failure["index"]].node_id: failure.get("errmsg") for failure in failures}
        for node_id in refused.keys() - self._unwritable:
            self._unwritable.add(node_id)
            logger.warning("Document {} cannot be written: {}", node_id, _first_line(str(refused[node_id])))
        return frozenset(refused)

    async def _why_refused(self, changes: Sequence[Write], lease: Lease | None) -> Refused:
        asked = {change.node_id: change for change in changes}
        present = await self.read(asked)
        vanished = {i for i, change in asked.items() if i not in present and not change.delete}
        fenced = {i for i, node in present.items() if lease and (node.epoch or 0) > lease.epoch}
        conflicting = {
            node_id
            for node_id, node in present.items()
            if node_id not in fenced
            and (
                asked[node_id].delete
                or any(getattr(node, name) != value for name, value in (asked[node_id].expected or {}).items())
            )
        }
        return Refused(frozenset(vanished), frozenset(fenced), frozenset(conflicting))

    async def register(self, node: ToolServerNode, *, lease: Lease | None) -> bool:
        """Insert a document for a node that has none (opt-in, the only insert). False if one is there."""
        fields = node.model_dump(exclude={"id", "revision_id"}, exclude_none=True)
        if lease:
            fields |= {"engine_id": lease.engine_id, "epoch": lease.epoch}
        async with _deadline("registering a node"):
            result = await self._nodes.update_one({"_id": node.id}, {"$setOnInsert": fields}, upsert=True)
        return result.upserted_id is not None

    # -- idle stop: the claim -------------------------------------------------------------------------

    async def claim(
        self,
        node_id: str,
        *,
        run: datetime | None,
        by: str,
        seconds: float,
        engine_id: str,
        idle_before: datetime,
        lease: Lease | None,
    ) -> bool:
        """Atomically turn a running node into a `stopping` one, if its last request is still that old.

        `idle_before` is naive UTC; the claim on this `run` of the container is `by`'s and lives for `seconds`
        unless it is ended. False: a request came in, the node is not running any more, or another process has a
        live claim on it.
        """
        # On record first: a document that says `stopping` without a live claim is taken for a leftover.
        until = {"$add": ["$$NOW", round(seconds * 1000)]}
        claim = {"by": {"$literal": by}, "leads": lease is not None, "run": run, "until": until, "stands": False}
        taken = {
            "$and": [
                _is_ahead("$claim.until"),
                {"$eq": [{"$type": "$claim.by"}, "string"]},
                {"$ne": ["$claim.by", {"$literal": by}]},
            ]
        }
        claimed = {
            "claim": {"$cond": [taken, "$claim", claim]},
            "engine_id": {"$ifNull": ["$engine_id", {"$literal": engine_id}]},
        }
        async with _deadline("claiming a node"):
            row = await self._owners.find_one_and_update(
                {"_id": node_id}, [{"$set": claimed}], upsert=True, return_document=ReturnDocument.AFTER
            )
        if row is None or not isinstance(row.get("claim"), dict) or row["claim"].get("by") != by:
            return False
        idle = {"status": {"$in": sorted(AT_WORK)}, "last_req_time": {"$lte": idle_before}}
        async with _deadline("claiming a node"):
            result = await self._nodes_surely.update_one(
                {"_id": node_id, **idle, **_fence(lease)}, {"$set": {"status": STOPPING}}
            )
        if result.matched_count == 0:
            await self.end_claim(node_id, by=by)
        return result.matched_count == 1

    async def confirm_claim(self, node_id: str, *, by: str, idle_before: datetime) -> bool:
        """Whether the claim survived a manager that wrote back what it had read before; if so, it stands now."""
        guard = {"_id": node_id, "status": STOPPING, "last_req_time": {"$lte": idle_before}}
        async with _deadline("checking a claim"):
            if await self._nodes.count_documents(guard, limit=1) == 0:
                return False
            ours = {"_id": node_id, "claim.by": by, "$expr": _is_ahead("$claim.until")}
            return (await self._owners.update_one(ours, {"$set": {"claim.stands": True}})).matched_count == 1

    async def end_claim(self, node_id: str, *, by: str) -> None:
        """Forget our claim on a node, whatever became of it."""
        async with _deadline("ending a claim"):
            await self._owners.update_one({"_id": node_id, "claim.by": by}, {"$unset": {"claim": 1}})

    async def _live_claims(self, which: Mapping[str, Any]) -> dict[str, Claim]:
        query = {**which, "claim.by": {"$type": "string"}, "$expr": _is_ahead("$claim.until")}
        async with _deadline("reading claims"):
            rows = await self._owners.find(query, {"claim": 1}).to_list()
        rows = [row for row in rows if isinstance(row["_id"], str) and isinstance(row["claim"], dict)]
        claims = {row["_id"]: row["claim"] for row in rows}
        return {i: Claim(claim.get("run"), claim.get("stands") is True) for i, claim in claims.items()}

    # -- which engine had a container -----------------------------------------------------------------

    async def read_owners(self, node_ids: Collection[str]) -> dict[str, Owner]:
        """What is on record of these containers, those that are gone for less than `GONE_MEMORY` included."""
        return await self._read_owners({"_id": {"$in": list(node_ids)}})

    async def read_owned(self, engine_id: str) -> tuple[dict[str, Owner], list[str]]:
        """What is on record of all containers that this engine has, and which of those went lately."""
        async with _deadline("reading owners"):
            rows = await self._owners.find({"engine_id": engine_id}, {"claim": 0}).to_list()
        rows = [row for row in rows if isinstance(row["_id"], str)]
        return (
            {row["_id"]: _parse_owner(row) for row in rows if "gone_at" not in row},
            [row["_id"] for row in rows if "gone_at" in row],
        )

    async def _read_owners(self, query: Mapping[str, Any]) -> dict[str, Owner]:
        async with _deadline("reading owners"):
            rows = await self._owners.find(query, {"claim": 0}).to_list()
        return {row["_id"]: _parse_owner(row) for row in rows if isinstance(row["_id"], str)}

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
        async with _deadline("recording owners"):
            await self._owners.bulk_write(operations, ordered=False)

    async def record_gone(self, node_ids: Collection[str], *, engine_id: str) -> None:
        """Put on record that these containers of this engine are gone.

        It is remembered for a while whose they were: a manager that saves what it read before brings a document
        back, and then it must be known who may delete it.
        """
        query = {"_id": {"$in": list(node_ids)}, "engine_id": engine_id}
        async with _deadline("recording what is gone"):
            await self._owners.update_many(query, [{"$set": {"gone_at": "$$NOW"}}])

    async def rename_host(self, engine_id: str, old: str, new: str) -> None:
        """Put on record that an engine's host is called otherwise than when it had some containers."""
        async with _deadline("recording a host's name"):
            await self._owners.update_many({"engine_id": engine_id, "host": old}, {"$set": {"host": new}})

    async def trace_of_others(self, engine_id: str) -> str | None:
        """The id of another engine that this database has ever served, alive or not; None without a trace."""
        other = {"engine_id": {"$nin": [None, engine_id]}}
        async with _deadline("looking for other engines"):
            for collection in (self._checkers, self._engines, self._owners, self._nodes):
                row = await collection.find_one(other, {"engine_id": 1})
                if row is not None:
                    return str(row["engine_id"])
        return None

    async def note_twin(self, engine_id: str, *, host: str) -> None:
        """Put on record that another engine, watched by `host`, has this id."""
        seen = {"engine_id": {"$literal": engine_id}, "twin": {"host": {"$literal": host}, "seen_at": "$$NOW"}}
        async with _deadline("recording another engine of one id"):
            await self._engines.update_one({"_id": checker_id(engine_id)}, [{"$set": seen}], upsert=True)

    async def twin_seen(self, engine_id: str, *, within: float) -> str | None:
        """The host that watched another engine of this id within the last so many seconds; None for none."""
        since = {"$subtract": ["$$NOW", round(within * 1000)]}
        recent = {"$and": [{"$gt": ["$twin.seen_at", since]}, {"$lte": ["$twin.seen_at", "$$NOW"]}]}
        query = {"_id": checker_id(engine_id), "twin.seen_at": {"$type": "date"}, "$expr": recent}
        async with _deadline("looking for other engines of one id"):
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
        async with _deadline("reading when idle stops begin"):
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

    async def announced_idle_stops(self, engine_id: str) -> bool:
        """Whether `idle_stops_begin` was ever asked for this engine."""
        query = {"_id": checker_id(engine_id), "idle_stops_from": {"$exists": True}}
        async with _deadline("reading when idle stops begin"):
            return await self._engines.count_documents(query, limit=1) == 1

    # -- the lease ------------------------------------------------------------------------------------

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
        reasons: list[dict[str, Any]] = [{"$not": ["$manager_id"]}, mine, {"$not": [_LEASE_HOLDS]}]
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
        standbys = _standbys_without(checker.manager_id)
        waiting = {
            "standbys": {
                "$concatArrays": [standbys, [{"$mergeObjects": [{"$literal": me}, {"seen_at": "$$NOW"}]}]]
            }
        }
        held = {"_id": checker_id(engine_id), "$expr": {"$not": [free]}}
        async with _deadline("asking for the lease"):
            row = await self._checkers.find_one_and_update(
                held, [{"$set": waiting}], return_document=ReturnDocument.AFTER
            )
        if row is not None:
            return _parse_holder(row)
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
        }
        update = [{"$replaceWith": {"$mergeObjects": ["$$ROOT", {"$cond": [free, taken, waiting]}]}}]
        async with _deadline("taking the lease"):
            row = await self._checkers.find_one_and_update(
                {"_id": checker_id(engine_id)}, update, upsert=True, return_document=ReturnDocument.AFTER
            )
        if row is None:
            raise StoreError("Database took the lease but did not say so")
        if row["manager_id"] != checker.manager_id:
            return _parse_holder(row)
        lease = Lease(checker.manager_id, engine_id, int(row["epoch"]), _sane_cursor(row.get("cursor")))
        # Before the first write: from here on, whatever an earlier holder still sends matches nothing.
        async with _deadline("stamping the epoch"):
            await self._nodes_surely.update_many(
                {"engine_id": engine_id, **_fence(lease)}, {"$set": {"epoch": lease.epoch}}
            )
            # An earlier holder has not decided these, and will not: it is fenced off.
            undecided = {"engine_id": engine_id, "claim.leads": True, "claim.stands": False}
            await self._owners.update_many(
                {**undecided, "claim.by": {"$ne": lease.manager_id}}, {"$unset": {"claim": 1}}
            )
            mark = {
                "engine_id": engine_id, "epoch": lease.epoch, "host": checker.host, "version": checker.version,
            }  # fmt: skip
            taken_over = {"$set": mark, "$unset": {"left_at": 1}}
            await self._engines.update_one({"_id": checker_id(engine_id)}, taken_over, upsert=True)
        return lease

    async def _highest_epoch(self, engine_id: str) -> int:
        # A released lease leaves no document behind, but the nodes remember its epoch, and the engine's record
        # does where no node is left. All engines' nodes: one that lost its id finds its own under the old id, and
        # must not be fenced off by their epoch for ever.
        async with _deadline("reading the epoch"):
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
            "standbys": _standbys_without(lease.manager_id),
        }
        if cursor is not None:
            fields["cursor"] = cursor
        if report is not None:
            fields["report"] = {"$literal": report}
        if life is not None:
            fields["life"] = _recorded_life(life, lease.manager_id)
        guard = {"_id": checker_id(lease.engine_id), "manager_id": lease.manager_id}
        async with _deadline("renewing the lease"):
            return (await self._checkers.update_one(guard, [{"$set": fields}])).matched_count == 1

    async def lease_is_gone(self, lease: Lease) -> bool:
        """Whether no checker document is left: an operator deleted it, or the database lost it."""
        async with _deadline("reading the lease"):
            return await self._checkers.count_documents({"_id": checker_id(lease.engine_id)}, limit=1) == 0

    async def remembers(self, lease: Lease) -> bool:
        """Whether the database still holds what was written, elsewhere, when this lease was taken.

        If not, its checker document is not gone because somebody deleted it: an older state was restored.
        """
        query = {"_id": checker_id(lease.engine_id), "epoch": lease.epoch}
        async with _deadline("reading the lease"):
            return await self._engines.count_documents(query, limit=1) == 1

    async def peers(self, engine_id: str, *, besides: str = "") -> list[Peer]:
        """The live processes that watch an engine with this id, the holder first; `besides` is who asks."""
        live = {
            "holds": _LEASE_HOLDS,
            "standbys": _standbys_without(besides),
            **dict.fromkeys(("manager_id", "host", "pid", "containers", "look"), 1),
        }
        async with _deadline("reading the checkers"):
            row = await self._checkers.find_one({"_id": checker_id(engine_id)}, live)
        if row is None:
            return []
        found = [_parse_peer(row, holds=True)] if row["holds"] and row.get("manager_id") != besides else []
        return found + [_parse_peer(standby, holds=False) for standby in row["standbys"]]

    async def settings_of_holder(self, engine_id: str) -> tuple[str, Mapping[str, Any]] | None:
        """The host of who holds the engine's lease, and the settings by which it judges; None without a holder."""
        query = {"_id": checker_id(engine_id), "$expr": _LEASE_HOLDS}
        async with _deadline("reading the checkers"):
            row = await self._checkers.find_one(query, {"host": 1, "settings": 1})
        settings = row.get("settings") if row else None
        return (str(row.get("host")), settings) if row and isinstance(settings, dict) else None

    async def release_lease(self, lease: Lease) -> None:
        """Remove our checker document, so that a standby need not wait for it to expire."""
        key = {"_id": checker_id(lease.engine_id)}
        async with _deadline("releasing the lease"):
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
        async with _deadline("reading the checkers"):
            rows = await self._checkers.find({**which, "$expr": _LEASE_HOLDS}, {"engine_id": 1}).to_list()
        return frozenset(str(row["engine_id"]) for row in rows)

    # -- the fleet ------------------------------------------------------------------------------------

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
        silent: dict[Any, Any] = {}
        async with _deadline("looking for engines that are gone"):
            for collection, name in ((self._checkers, "expires_at"), (self._engines, "left_at")):
                rows = collection.find({name: {"$lt": horizon}}, {"engine_id": 1}).sort(name, -1).limit(SILENT)
                silent |= {row["_id"]: row.get("engine_id") async for row in rows}
        if not silent:
            return []
        named = [each for each in silent.values() if isinstance(each, str)]
        async with _deadline("looking for engines' nodes"):
            with_nodes = set(await self._nodes.distinct("engine_id", {"engine_id": {"$in": named}}))
            without = [key for key, engine_id in silent.items() if engine_id not in with_nodes]
            left = {"_id": {"$in": without}, "left_at": {"$lt": horizon}}
            await self._engines.update_many(left, {"$unset": {"left_at": 1}})
        keys = [key for key, engine_id in silent.items() if engine_id in with_nodes]
        records = await self._read_engines({"_id": {"$in": keys}}, SILENT) if keys else []
        return [record for record in records if not record.alive and not record.standbys][:most]

    async def _read_engines(self, which: Mapping[str, Any], most: int) -> list[EngineRecord]:
        shown = {
            "holds": _LEASE_HOLDS,
            "standbys": _standbys_without(""),
            "now": "$$NOW",
            **dict.fromkeys(("manager_id", "engine_id", "host", "version", "renewed_at", "report"), 1),
        }
        names = ("engine_id", "host", "version", "seen_at", "ended_at", "report")
        kept = {"now": "$$NOW", **dict.fromkeys(names, 1)}
        async with _deadline("reading the engines"):
            checkers = await self._checkers.find(which, shown).sort("_id", 1).limit(most).to_list()
            engines = await self._engines.find(which, kept).sort("_id", 1).limit(most).to_list()
        rows = {row["_id"]: row for row in engines}
        for row in checkers:
            rows[row["_id"]] = {**rows.get(row["_id"], {}), **row}
        return [record for row in rows.values() if (record := _parse_engine(row)) is not None]

    async def read_page(self, engine_id: str, *, after: str, limit: int) -> tuple[list[Recorded], str | None]:
        """The documents of an engine in the order of their ids, `limit` of those after this one.

        With the id after which there are more, if there are. Documents that cannot be read are left out.
        """
        query = {"engine_id": engine_id, "_id": {"$gt": after}}
        async with _deadline("reading an engine's nodes"):
            rows = await self._nodes.find(query, _PROJECTION).sort("_id", 1).limit(limit + 1).to_list()
        more = len(rows) > limit
        return [*self._parse_all(rows[:limit]).values()], str(rows[limit - 1]["_id"]) if more else None

    async def count_to_forget(self, engine_id: str) -> int:
        """How many documents `forget_engine` would delete. Raises StoreError."""
        fence = await self._fence_of(engine_id)
        async with _deadline("counting an engine's nodes"):
            return sum(
                [
                    await self._nodes.count_documents(_forgettable(engine_id, ids, fence))
                    async for ids in self._ids_to_forget(engine_id)
                ]
            )

    async def forget_engine(self, engine_id: str) -> int:
        """Delete an engine's documents and all that is on record of it; how many documents went.

        Nothing that another engine owns, and nothing that a watcher of this one stamps meanwhile. Raises
        StoreError when such a watcher is there: what is left then stays.
        """
        fence, deleted = await self._fence_of(engine_id), 0
        async for ids in self._ids_to_forget(engine_id):
            if await self.live_among([engine_id]):
                raise StoreError(f"Its watcher is back: {deleted} documents are deleted, the rest stays")
            async with _deadline("deleting an engine's nodes"):
                result = await self._nodes_surely.delete_many(_forgettable(engine_id, ids, fence))
                deleted += result.deleted_count
                await self._owners.delete_many({"_id": {"$in": ids}, "engine_id": engine_id})
        async with _deadline("forgetting an engine"):
            key = {"_id": checker_id(engine_id)}
            await self._checkers.delete_one({**key, "$expr": {"$not": [_LEASE_HOLDS]}})
            if not await self.live_among([engine_id]):
                await self._engines.delete_one(key)
        return deleted

    async def _fence_of(self, engine_id: str) -> dict[str, Any]:
        """A filter that no document passes which a later holder of this engine's lease has stamped."""
        async with _deadline("reading an engine's epoch"):
            rows = [
                await collection.find_one({"_id": checker_id(engine_id)}, {"epoch": 1})
                for collection in (self._checkers, self._engines)
            ]
        epochs = [row["epoch"] for row in rows if row and type(row.get("epoch")) is int]
        return _fence(Lease("", engine_id, max(epochs))) if epochs else {}

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

    # -- history --------------------------------------------------------------------------------------

    async def write_history(self, entries: Sequence[Entry]) -> tuple[int, list[str]]:
        """Write to the nodes' histories in one unordered bulk. Returns how many histories are new, and refusals.

        A duplicate key is no refusal: the entry is there, and only its acknowledgement was lost.
        """
        operations = [operation for entry in entries for operation in _history_operations(entry)]
        async with _deadline("writing the history"):
            try:
                result = await self._history.bulk_write(operations, ordered=False)
            except BulkWriteError as error:
                failures = [f for f in error.details.get("writeErrors", []) if f.get("code") != _DUPLICATE]
                if error.details.get("writeConcernErrors") or any(f.get("code") in _PASSING for f in failures):
                    raise
                messages = [_first_line(str(failure.get("errmsg"))) for failure in failures]
                return int(error.details.get("nUpserted", 0)), messages
        return result.upserted_count, []

    async def tidy_history(self, most: int, *, engine_id: str) -> None:
        """Remove an engine's histories that changed longest ago, beyond `most`; old ones expire by their index."""
        own = {"engine_id": engine_id}
        problems = await self.create_indexes([HISTORY])  # somebody may have dropped the collection
        if problems and await self.may_create_indexes():
            raise StoreError(f"An index cannot be created: {problems[0]}")
        async with _deadline("tidying the history"):
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
        async with _deadline("reading the history"):
            rows = self._history.find(query, {"changes": 0}).sort("at", -1).limit(limit)
            return await rows.to_list()

    async def read_history(self, node_id: str = "", *, engine_id: str = "", limit: int) -> list[dict[str, Any]]:
        """Histories as they are kept, whatever they are like: of a node, or an engine's that changed last."""
        query = {"_id": node_id} if node_id else {"engine_id": engine_id}
        wanted = {"changes": {"$slice": -limit}}
        async with _deadline("reading the history"):
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
            {"$match": query}, {"$sort": {"at": -1}}, {"$limit": limit},
            {"$project": kept | {"changes": {"$concatArrays": last}}},
        ]  # fmt: skip
        rows, slices = [], Slices()
        async with _deadline("reading the history"):
            async for row in await self._history.aggregate(stages, batchSize=BATCH):
                rows.append(row)
                await slices.turn()
        return rows

    async def read_old_history(self, node_id: str | None = None, *, limit: int) -> list[dict[str, Any]]:
        """The newest rows that earlier versions wrote, one a change, whatever they are like."""
        query = {} if node_id is None else {"node_id": node_id}
        order = "$natural" if node_id is None else "_id"  # by the end of the collection, or the index on node_id
        async with _deadline("reading the history"):
            return await self._old_history.find(query).sort(order, -1).limit(limit).to_list()

    async def find(self, name: str) -> Recorded | None:
        """The node whose id or short id begins with `name`; ConfigError when there are several.

        Raises DocumentError when its document is one that everything skips.
        """
        if not name:
            return None  # and not all of them
        prefix = {"$regex": f"^{re.escape(name)}"}
        async with _deadline("looking for a node"):
            rows = await self._nodes.find({"$or": [{"_id": prefix}, {"short_id": prefix}]}, _PROJECTION).to_list(2)
        if len(rows) > 1:
            raise ConfigError(f"{name}: several nodes begin with it, give more of the id")
        recorded = self._parse(rows[0]) if rows else None
        if rows and recorded is None:
            raise DocumentError(f"{name}: it has a document, which is skipped until that is corrected or deleted")
        return recorded

    # -- for the doctor -------------------------------------------------------------------------------

    async def check_writable(self) -> None:
        """Raise StoreError unless this login may write nodes, checkers and what we record. Changes nothing."""
        nobody = {"_id": "nobody", "status": "nobody"}
        async with _deadline("checking the right to write"):
            await self._nodes.update_one(nobody, {"$set": {"status": "nobody"}})
            await self._nodes.delete_one(nobody)
            await self._checkers.update_one({"_id": checker_id("nobody"), "pid": -1}, {"$set": {"pid": -1}})
            await self._checkers.delete_one({"_id": checker_id("nobody"), "pid": -1})
            await self._owners.delete_one({"_id": "nobody"})
            await self._engines.delete_one({"_id": checker_id("nobody"), "pid": -1})

    async def system_time(self) -> datetime:
        """The database server's wall clock (aware UTC)."""
        async with _deadline("asking for the time"):
            answer = await self._nodes.database.command("hello")
        return as_utc(answer["localTime"])

    async def checker_exists(self, manager_id: str) -> bool:
        """Whether the checker's document is still there."""
        async with _deadline("reading the checker"):
            return await self._checkers.count_documents({"manager_id": manager_id}, limit=1) == 1


async def create_user(url: str, database: str, *, name: str, password: str) -> bool:
    """Make a user who may read and write this database, and nothing else; False if there is one already.

    `url` logs in as one who may do that. A user that exists is never changed: ConfigError unless it has this
    password and these rights. Raises ConfigError and StoreError as `open_store` does, too.
    """
    rights = [{"role": "readWrite", "db": database}]
    async with open_store(url, database), _deadline(f"creating the user {name}"):
        admin = node_collection().database.client.get_database("admin")
        try:
            await admin.command("createUser", name, pwd=password, roles=rights)
        except OperationFailure as error:
            if error.code != USER_EXISTS:
                raise
        else:
            return True
    login: dict[str, Any] = {"username": name, "password": password, "authSource": "admin"}
    unlike = "password"
    async with (
        _deadline(f"looking at the user {name}"),
        AsyncMongoClient[dict[str, Any]](url, serverSelectionTimeoutMS=SERVER_SELECTION_MS, **login) as client,
    ):
        try:
            status = await client.admin.command("connectionStatus")
        except OperationFailure as error:
            if error.code not in _REFUSED:
                raise
        else:
            unlike = "" if status["authInfo"]["authenticatedUserRoles"] == rights else "rights"
    if unlike:
        raise ConfigError(
            f"User {name} is there already, with other {unlike}, and is left as it is: give another name"
        )
    return False


@asynccontextmanager
async def open_store(
    url: str, database: str, *, on_return: Callable[[], object] = lambda: None
) -> AsyncIterator[Store]:
    """Connect, initialise the Beanie documents on `database` and close at the end.

    `on_return` is called when the database accepts writes again after it did not. Raises ConfigError for a URL or
    login that can never work, StoreError while the server cannot be reached.
    Beanie's documents are bound to one database at a time in a process: the last to initialise wins.
    """
    returns = _Returns()
    try:
        client: AsyncMongoClient[dict[str, Any]] = AsyncMongoClient(
            url,
            appname="eventwatch",
            event_listeners=[returns],
            serverSelectionTimeoutMS=SERVER_SELECTION_MS,
            connectTimeoutMS=SERVER_SELECTION_MS,
        )
    except (InvalidURI, ConfigurationError, ValueError) as error:
        raise ConfigError(
            f"EVENTWATCH_MONGO_URL: {mask_url(url)} is not usable: {_first_line(str(error))}"
        ) from None
    if not client.write_concern.acknowledged:
        await client.close()
        raise ConfigError(
            f"EVENTWATCH_MONGO_URL: {mask_url(url)} has w=0, with which no write is known to be done: remove it"
        )
    async with client:
        async with _deadline(f"connecting to {mask_url(url)}"):
            await init_beanie(
                database=client.get_database(database, read_preference=ReadPreference.PRIMARY),
                document_models=[ToolServerNode, NodeChecker],
                skip_indexes=True,
            )
            # init_beanie asks for the server's version only; reading proves that the login may do its work.
            await node_collection().find_one({}, {"_id": 1}, sort=[("_id", 1)])
        store = Store(on_return=on_return)
        returns.watch_for(store)
        yield store


class _Returns(ServerListener):
    """Notices that a server became writable again: it was restarted, or another member of the set took over.

    A mongod without a replica set may have lost what it acknowledged last, for good, and a primary that failed
    over may have rolled it back; only a sweep finds out. The driver tells up to a second late.
    """

    def __init__(self) -> None:
        self._store: Store | None = None
        self._was_writable = False
        self._loop = asyncio.get_running_loop()

    def watch_for(self, store: Store) -> None:
        """From now on, tell this store."""
        self._store = store

    def opened(self, event: ServerOpeningEvent) -> None:
        """Nothing is known of it yet."""

    def closed(self, event: ServerClosedEvent) -> None:
        """Another member will take over."""

    def description_changed(self, event: ServerDescriptionChangedEvent) -> None:
        """Tell when a server turned from anything else into one that takes writes, the first time excepted."""
        if not event.new_description.is_writable or event.previous_description.is_writable:
            return
        if self._store and self._was_writable:
            self._loop.call_soon_threadsafe(self._store.has_returned)
        self._was_writable = True


def parse_recorded(row: Mapping[str, Any]) -> Recorded:
    """Check the types of a projected document. Raises ValueError naming the first field that is wrong."""
    for name, kind, optional in (
        ("_id", str, False),
        ("short_id", str, True),
        ("status", str, True),
        ("health", str, True),
        ("ip", str, True),
        ("port", int, True),
        ("last_req_time", datetime, True),
        ("engine_id", str, True),
        ("epoch", int, True),
    ):
        value = row.get(name)
        if not (isinstance(value, kind) or (optional and value is None)):
            raise ValueError(f"{name} is {type(value).__name__}, not {kind.__name__}")
    if (row.get("epoch") or 0) >= MAX_EPOCH:
        raise ValueError("its epoch is beyond any takeover's")
    if not is_container_id(row["_id"]):
        raise ValueError("its _id is no container's full id (64 lower-case hex digits)")
    fields: dict[str, Any] = {name: row.get(name) for name in _FIELDS}
    fields["short_id"] = fields["short_id"] or row["_id"][:12]
    own = row.get("idle_timeout")
    if not (own is None or type(own) in {int, float, str}):
        own = f"a {type(own).__name__}"  # which is no duration, and so told
    return Recorded(node_id=row["_id"], **fields, idle_timeout=own)


def _with_claims(nodes: dict[str, Recorded], claims: Mapping[str, Claim]) -> dict[str, Recorded]:
    return {i: replace(node, claim=claims[i]) if i in claims else node for i, node in nodes.items()}


def naive_utc(moment: datetime) -> datetime:
    """As the manager stores it, in whole milliseconds as the database keeps it."""
    return moment.replace(tzinfo=None, microsecond=moment.microsecond // 1000 * 1000)


def _parse_owner(row: Mapping[str, Any]) -> Owner:
    engine_id, host, registered = (row.get(name) for name in ("engine_id", "host", "registered"))
    return Owner(
        engine_id if isinstance(engine_id, str) else None,
        host if isinstance(host, str) else None,
        registered if isinstance(registered, datetime) else None,
    )


def _parse_peer(row: Mapping[str, Any], *, holds: bool) -> Peer:
    containers, look, pid = row.get("containers"), row.get("look"), row.get("pid")
    ids = (i for i in containers if isinstance(i, str)) if isinstance(containers, list) else ()
    return Peer(
        str(row.get("manager_id")),
        str(row.get("host")),
        pid if isinstance(pid, int) else 0,
        Witness(tuple(i for i in ids if is_container_id(i)), look if isinstance(look, int) else 0),
        holds,
        _parse_life(row),
        _whole(row.get("epoch")) or 0,
        row["renewed_at"] if isinstance(row.get("renewed_at"), datetime) else None,
        page=_parse_page(row),
    )


def _parse_page(row: Mapping[str, Any]) -> str:
    """The URL of the holder's status page; empty where it is odd, or another's."""
    told = row.get("page")
    if not isinstance(told, dict) or told.get("manager_id") != row.get("manager_id"):
        return ""
    url = told.get("url")
    return url if isinstance(url, str) and _PAGE.fullmatch(url) else ""


def _parse_holder(row: Mapping[str, Any]) -> Peer:
    """The holder of a lease, as it was when a candidate asked, which is the last on record of those that wait."""
    holder, asked_at = _parse_peer(row, holds=True), row["standbys"][-1]["seen_at"]
    if holder.renewed_at is None:
        return holder
    return replace(holder, renewed_ago=(asked_at - holder.renewed_at).total_seconds())


def _recorded_life(life: Life, manager_id: str) -> dict[str, Any]:
    # With the name of whose it is: an older version that takes the lease leaves this as it finds it.
    return {"$literal": {**asdict(life), "manager_id": manager_id}}


def _parse_life(row: Mapping[str, Any]) -> Life:
    """What the holder has left of itself; nothing at all where any of it is odd, or another's."""
    told = row.get("life")
    if not isinstance(told, dict) or told.get("manager_id") != row.get("manager_id"):
        return NO_LIFE
    texts = [told.get(name) for name in ("boot_id", "namespaces", "container")]
    numbers = [_whole(told.get(name)) for name in ("pid", "started", "container_started")]
    boot_id, namespaces, container = (text if isinstance(text, str) else None for text in texts)
    pid, started, container_started = (
        number if number is not None and number >= 0 else None for number in numbers
    )
    if boot_id is None or namespaces is None or container is None:
        return NO_LIFE
    if pid is None or pid > MAX_PID or started is None or container_started is None:
        return NO_LIFE
    if container and not is_container_id(container):
        return NO_LIFE
    return Life(boot_id, namespaces, pid, started, container, container_started)


def _parse_engine(row: Mapping[str, Any]) -> EngineRecord | None:
    engine_id, report, now = row.get("engine_id"), row.get("report"), row.get("now")
    if not isinstance(engine_id, str):
        return None
    report = report if isinstance(report, dict) else {}
    nodes, reasons = report.get("nodes"), report.get("reasons")
    moments = [row.get(name) for name in ("renewed_at", "seen_at", "ended_at")]
    seen_at = max((each for each in moments if isinstance(each, datetime)), default=None)
    age = (now - seen_at).total_seconds() if seen_at is not None and isinstance(now, datetime) else None
    standbys = row.get("standbys")
    return EngineRecord(
        engine_id=_short(engine_id),
        host=_short(row.get("host")),
        version=_short(row.get("version")),
        alive=row.get("holds") is True,
        watched="renewed_at" in row or "ended_at" in row,
        leader=_short(row.get("manager_id")),
        standbys=tuple(_short(each.get("host")) for each in standbys or () if isinstance(each, dict)),
        seen_at=as_utc(seen_at) if seen_at is not None else None,
        age=None if age is None else max(0.0, age),
        nodes=_counts(nodes) if isinstance(nodes, dict) else {},
        sweep_age=_number(report.get("sweep_age")),
        drift=drift if type(drift := report.get("drift")) is int else None,
        p50=_number(report.get("p50")),
        p99=_number(report.get("p99")),
        reasons=tuple(_short(each) for each in reasons[:20]) if isinstance(reasons, list) else (),
    )


def _counts(found: Mapping[object, object]) -> dict[str, int]:
    return {_short(name): count for name, count in list(found.items())[:20] if type(count) is int}


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _short(value: object) -> str:
    return value[:200] if isinstance(value, str) else ""


def _forgettable(engine_id: str, ids: list[str], fence: Mapping[str, Any]) -> dict[str, Any]:
    return {"_id": {"$in": ids}, "engine_id": {"$in": [engine_id, None]}, **fence}


def _standbys_without(manager_id: str) -> dict[str, Any]:
    """An expression: the standbys on record, without this one and without those that are gone."""
    alive = {
        "$and": [
            {"$gt": ["$$this.seen_at", {"$subtract": ["$$NOW", round(STANDBY_GONE * 1000)]}]},
            {"$lte": ["$$this.seen_at", {"$add": ["$$NOW", round(STANDBY_GONE * 1000)]}]},
        ]
    }
    other = {"$ne": ["$$this.manager_id", {"$literal": manager_id}]}
    known = {"$cond": [{"$isArray": "$standbys"}, "$standbys", []]}
    return {"$filter": {"input": known, "as": "this", "cond": {"$and": [alive, other]}}}


#: ns: the year 2200.
_FARTHEST_CURSOR: Final = 7_258_118_400_000_000_000
#: Milliseconds. No moment of ours lies further ahead; one that does is somebody else's, and counts as past.
_HORIZON: Final = 24 * 3600 * 1000
#: Milliseconds. A lease lasts no longer than `settings.LONGEST_LEASE`, which is half of it.
_LEASE_HORIZON: Final = 3600 * 1000


#: An expression: the epoch on record, 0 for what is none.
_SANE_EPOCH: Final = {
    "$cond": [
        {"$and": [{"$isNumber": "$epoch"}, {"$gte": ["$epoch", 0]}, {"$lt": ["$epoch", MAX_FLOOR]}]},
        {"$toLong": "$epoch"},
        0,
    ]
}


def _whole(value: object) -> int | None:
    """A whole number as the driver reads it, which makes a type of its own of those with 64 bits; else None."""
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else None


def _sane_cursor(value: object) -> int | None:
    """The cursor on record; None for what is none, or what an engine would not be asked for."""
    cursor = _whole(value)
    return cursor if cursor is not None and 0 < cursor < _FARTHEST_CURSOR else None


def _is_ahead(field: str, *, horizon: int = _HORIZON) -> dict[str, Any]:
    """An expression: whether a date lies in the future, by the database's clock, but within reason."""
    return {"$and": [{"$gt": [field, "$$NOW"]}, {"$lt": [field, {"$add": ["$$NOW", horizon]}]}]}


#: An expression: whether the lease on record is one that holds.
_LEASE_HOLDS: Final = _is_ahead("$expires_at", horizon=_LEASE_HORIZON)


def _fence(lease: Lease | None) -> dict[str, Any]:
    # Absent or not greater: a manager that replaces whole documents drops the stamp, and that must do no harm.
    return {"epoch": {"$not": {"$gt": lease.epoch}}} if lease else {}


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0].partition(", full error:")[0] if text.strip() else "no reason given"


async def _wait_for_condition(condition: asyncio.Condition, timeout: float | None) -> bool:  # noqa: ASYNC109
    """What the driver waits with, without a task of its own: as `asyncio.wait_for` does it from Python 3.12 on.

    On 3.11 a call that is cancelled at the wrong moment of a server selection would leave the driver's lock
    locked for ever, and with it every later call of this client.
    """
    try:
        async with asyncio.timeout(timeout):
            return await condition.wait()
    except TimeoutError:
        return False


if sys.version_info < (3, 12):
    topology._async_cond_wait = pool._async_cond_wait = _wait_for_condition  # type: ignore[attr-defined,assignment]  # noqa: SLF001


@asynccontextmanager
async def _deadline(doing: str) -> AsyncIterator[None]:
    """Bound one database call and turn whatever it raises into one line.

    On Python 3.11 the driver now and then swallows a cancellation (10 of 300 in a test), which would leave a
    task of ours running for ever: it is raised again here.
    """
    task = asyncio.current_task()
    cancelled_before = task.cancelling() if task else 0
    try:
        async with asyncio.timeout(DEADLINE):
            yield
    except TimeoutError:
        raise StoreError(
            f"Database did not answer within {DEADLINE:.0f} s while {doing}", timed_out=True
        ) from None
    except OperationFailure as error:
        if error.code in _REFUSED:
            raise StoreError(
                f"Database refused the login while {doing}: {_first_line(str(error))}. "
                "Check the user, password and authSource in EVENTWATCH_MONGO_URL, and its readWrite role",
                permanent=True,
            ) from None
        raise StoreError(f"Database failed while {doing}: {_first_line(str(error))}") from None
    except ServerSelectionTimeoutError as error:
        raise StoreError(f"Database unreachable while {doing}: {_reason(error)}") from None
    except ConnectionFailure as error:
        raise StoreError(f"Database connection lost while {doing}: {_reason(error)}") from None
    except (PyMongoError, BSONError, UnicodeError, OverflowError) as error:
        raise StoreError(f"Database failed while {doing}: {_first_line(str(error))}") from None
    finally:
        if task and task.cancelling() > cancelled_before:
            raise asyncio.CancelledError


def _reason(error: ConnectionFailure) -> str:
    if "No replica set members match selector" in str(error):
        return "the replica set has no primary: start a majority of its members"
    return _first_line(str(error)).split(" (configured timeouts")[0].split(", Timeout:")[0]
