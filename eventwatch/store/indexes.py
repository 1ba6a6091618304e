"""The indexes, by which the cost of a query stays that of the own documents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from pymongo import (
    IndexModel,
)
from pymongo.errors import (
    OperationFailure,
)

from eventwatch.store.base import ENGINES, GONE_MEMORY, HISTORY, OWNERS, PASSING, Collections, first_line

HISTORY_SECONDS: Final = 30 * 86400

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
#: Server error codes of an index that is there with other options.
_INDEX_CONFLICTS: Final = {85, 86}


class Indexes(Collections):
    """The indexes by which the cost stays that of the own documents."""

    async def create_indexes(self, names: Iterable[str] = INDEXES) -> list[str]:
        """Create those of `INDEXES` that are not there, and say which cannot be. Raises StoreError."""
        missing = await self._lacking(names)
        if not missing:
            return []
        problems = []
        async with self.call("asking whether it is a replica set"):
            is_set = "setName" in await self._database.command("hello")
        # By default a member that is down holds it up for ever.
        quorum: dict[str, Any] = {"commitQuorum": "majority"} if is_set else {}
        for name, keys, options in missing:
            async with self.call(f"creating an index of {name}"):
                try:
                    wanted = IndexModel([*keys.items()], **options)
                    await self._database[name].create_indexes([wanted], **quorum)
                except OperationFailure as error:
                    if error.code in PASSING:
                        raise
                    if error.code not in _INDEX_CONFLICTS:  # somebody else was faster
                        problems.append(f"{name} ({', '.join(keys)}): {first_line(str(error))}")
        return problems

    async def missing_indexes(self) -> list[str]:
        """Those of `INDEXES` that are not there, in words. Raises StoreError."""
        return [f"{name} ({', '.join(keys)})" for name, keys, _ in await self._lacking(INDEXES)]

    async def _lacking(self, names: Iterable[str]) -> list[tuple[str, Mapping[str, int], Mapping[str, Any]]]:
        """The indexes that are not there: collection, fields and options. One with other options does as well."""
        lacking = []
        for name in names:
            async with self.call(f"looking for the indexes of {name}"):
                there = [list(index["key"].items()) async for index in await self._database[name].list_indexes()]
            lacking += [(name, keys, how) for keys, how in INDEXES[name] if list(keys.items()) not in there]
        return lacking

    async def may_create_indexes(self) -> bool:
        """Whether this login has the right to, as far as the server says. Raises StoreError."""
        async with self.call("asking for the rights of this login"):
            answer = await self._database.command("connectionStatus", showPrivileges=True)
        told = answer.get("authInfo", {})
        if not told.get("authenticatedUsers"):
            return True  # no login is asked for
        names = {self._database.name, ""}
        return any(
            "createIndex" in privilege.get("actions", ()) and privilege.get("resource", {}).get("db") in names
            for privilege in told.get("authenticatedUserPrivileges", ())
        )
