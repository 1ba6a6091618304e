"""What the watchers of many other engines leave in a database: documents, owners, and checkers, alive or dead."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Final

from pymongo.asynchronous.database import AsyncDatabase

from eventwatch.store.base import ENGINES, OWNERS, checker_id

Document = dict[str, Any]
#: Documents of each of them.
EACH: Final = 100
#: Engines that are inserted at once: 200,000 documents in one list take half a gigabyte.
AT_ONCE: Final = 100


async def crowd(database: AsyncDatabase[Document], engines: int, *, alive: float = 0.5) -> None:
    """Insert so many engines with their documents; that share of them is alive, the others are dead for an hour.

    Every tenth document was replaced by its manager since, which knows no engines.
    """
    now = datetime.now(UTC).replace(tzinfo=None, microsecond=0)
    for first in range(0, engines, AT_ONCE):
        rows: dict[str, list[Document]] = {"ToolServerNode": [], "NodeChecker": [], OWNERS: [], ENGINES: []}
        for engine in range(first, min(first + AT_ONCE, engines)):
            name = f"engine {engine}"
            for number in range(EACH):
                node_id = f"{engine:08x}{number:056x}"
                rows["ToolServerNode"].append(
                    {
                        "_id": node_id,
                        "short_id": node_id[:12],
                        "status": "running",
                        "health": "healthy",
                        "ip": "10.0.0.1",
                        "port": 31942,
                        "last_req_time": now,
                        "session_id": node_id[20:52],
                        **({"engine_id": name, "epoch": 1} if number % 10 else {}),
                    }
                )
                rows[OWNERS].append({"_id": node_id, "engine_id": name, "host": name})
            expires = now + timedelta(hours=1 if engine < alive * engines else -1)
            row = {"_id": checker_id(name), "engine_id": name, "host": name, "epoch": 1}
            rows[ENGINES].append(row)
            rows["NodeChecker"].append({**row, "manager_id": name, "expires_at": expires})
        for collection, documents in rows.items():
            await database[collection].insert_many(documents, ordered=False)
