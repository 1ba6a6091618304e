"""The collections, and what every call to the database has in common.

Each call has a deadline and raises `StoreError` with one line. Whatever the URL says, reads are from the primary,
and leases, claims, owners and deletions are written with majority.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import datetime
from typing import Any, Final

from bson import ObjectId
from bson.errors import BSONError
from pymongo import (
    WriteConcern,
)
from pymongo.errors import (
    ConnectionFailure,
    OperationFailure,
    PyMongoError,
    ServerSelectionTimeoutError,
)

from eventwatch.core.errors import StoreError
from eventwatch.core.policy import as_utc
from eventwatch.store.documents import checker_collection, node_collection, tolerant
from eventwatch.store.rows import Lease

#: Seconds for any one call. Far above a healthy answer, below what an operator would call hanging.
DEADLINE: Final = 10.0
#: Documents that come at once, so that no batch holds up the event loop for long.
BATCH: Final = 500

#: What outlives a replaced node document, and what is remembered of each engine.
OWNERS: Final = "NodeOwner"
ENGINES: Final = "NodeEngine"
#: Seconds for which it is remembered whose a container was that is gone.
GONE_MEMORY: Final = 24 * 3600
#: Seconds after which a standby that has not asked for the lease again is gone.
STANDBY_GONE: Final = 10.0
#: The last changes of each node, one document a node; one whose last change is older than this (s) expires.
HISTORY: Final = "NodeChanges"
#: What earlier versions write, one row a change, into a capped collection. Only read.
OLD_HISTORY: Final = "NodeHistory"

#: The format of what is on record of an engine, and a filter for what says that it is of a later one, which this
#: version would misread. It grows only with a change that an earlier version would misread or damage; fields that
#: are added are none. Beyond the range, it was no eventwatch that wrote it, and it counts for nothing.
FORMAT: Final = 1
LATER_FORMAT: Final = {"$type": ["int", "long"], "$gt": FORMAT, "$lt": 1000}

#: Server error codes of a refused login or missing rights: waiting does not help.
REFUSED: Final = {13, 18}
#: Server error codes that concern the server, not the document: it is shutting down, or no primary any more.
PASSING: Final = {91, 189, 10058, 10107, 11600, 11602, 13435, 13436, 14031}
#: Milliseconds. No moment of ours lies further ahead; one that does is somebody else's, and counts as past.
HORIZON: Final = 24 * 3600 * 1000
#: Milliseconds. A lease lasts no longer than `settings.LONGEST_LEASE`, which is half of it.
LEASE_HORIZON: Final = 3600 * 1000


class Collections:
    """The collections, and what every call to the database has: a deadline, and one line about its failure."""

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

    def call(self, doing: str) -> AbstractAsyncContextManager[None]:
        """What every call to the database is made within: `deadline`."""
        return deadline(doing)

    async def check_writable(self) -> None:
        """Raise StoreError unless this login may write nodes, checkers and what we record. Changes nothing."""
        nobody = {"_id": "nobody", "status": "nobody"}
        async with self.call("checking the right to write"):
            await self._nodes.update_one(nobody, {"$set": {"status": "nobody"}})
            await self._nodes.delete_one(nobody)
            await self._checkers.update_one({"_id": checker_id("nobody"), "pid": -1}, {"$set": {"pid": -1}})
            await self._checkers.delete_one({"_id": checker_id("nobody"), "pid": -1})
            await self._owners.delete_one({"_id": "nobody"})
            await self._engines.delete_one({"_id": checker_id("nobody"), "pid": -1})

    async def system_time(self) -> datetime:
        """The database server's wall clock (aware UTC)."""
        async with self.call("asking for the time"):
            answer = await self._nodes.database.command("hello")
        return as_utc(answer["localTime"])

    async def checker_exists(self, manager_id: str) -> bool:
        """Whether the checker's document is still there."""
        async with self.call("reading the checker"):
            return await self._checkers.count_documents({"manager_id": manager_id}, limit=1) == 1


def checker_id(engine_id: str) -> ObjectId:
    """One NodeChecker document per engine, still with the ObjectId that a manager's own model expects."""
    return ObjectId(hashlib.sha256(engine_id.encode()).digest()[:12])


def standbys_without(manager_id: str) -> dict[str, Any]:
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


def is_ahead(field: str, *, horizon: int = HORIZON) -> dict[str, Any]:
    """An expression: whether a date lies in the future, by the database's clock, but within reason."""
    return {"$and": [{"$gt": [field, "$$NOW"]}, {"$lt": [field, {"$add": ["$$NOW", horizon]}]}]}


#: An expression: whether the lease on record is one that holds.
LEASE_HOLDS: Final = is_ahead("$expires_at", horizon=LEASE_HORIZON)


def fence(lease: Lease | None) -> dict[str, Any]:
    """What a document must say for the holder of this lease to write to it."""
    # Absent or not greater: a manager that replaces whole documents drops the stamp, and that must do no harm.
    return {"epoch": {"$not": {"$gt": lease.epoch}}} if lease else {}


def first_line(text: str) -> str:
    """The first line of what the driver says."""
    return text.strip().splitlines()[0].partition(", full error:")[0] if text.strip() else "no reason given"


@asynccontextmanager
async def deadline(doing: str) -> AsyncIterator[None]:
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
        if error.code in REFUSED:
            raise StoreError(
                f"Database refused the login while {doing}: {first_line(str(error))}. "
                "Check the user, password and authSource in EVENTWATCH_MONGO_URL, and its readWrite role",
                permanent=True,
            ) from None
        raise StoreError(f"Database failed while {doing}: {first_line(str(error))}") from None
    except ServerSelectionTimeoutError as error:
        raise StoreError(f"Database unreachable while {doing}: {reason(error)}") from None
    except ConnectionFailure as error:
        raise StoreError(f"Database connection lost while {doing}: {reason(error)}") from None
    except (PyMongoError, BSONError, UnicodeError, OverflowError) as error:
        raise StoreError(f"Database failed while {doing}: {first_line(str(error))}") from None
    finally:
        if task and task.cancelling() > cancelled_before:
            raise asyncio.CancelledError


def reason(error: ConnectionFailure) -> str:
    """Why there is no connection, in few words."""
    if "No replica set members match selector" in str(error):
        return "the replica set has no primary: start a majority of its members"
    return first_line(str(error)).split(" (configured timeouts")[0].split(", Timeout:")[0]
