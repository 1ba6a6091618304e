"""Sees from outside when documents change: `python -m tests.bench.observer URL DATABASE`.

Reads the change stream of the node documents and prints one JSON line per change: when it arrived (ns), the
document and the fields that it says anew. A process of its own, so that what drives the benchmark never delays it.

What it measures is when another client can know, not when the server wrote: about a millisecond lies between.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from pymongo import MongoClient


def observe(url: str, database: str) -> None:
    pipeline = [{"$project": {"documentKey": 1, "updateDescription.updatedFields": 1, "fullDocument": 1}}]
    with (
        MongoClient[dict[str, Any]](url) as client,
        client[database]["ToolServerNode"].watch(pipeline, max_await_time_ms=1000) as stream,
    ):
        print("ready", flush=True)  # noqa: T201 - who started us waits for it
        while True:
            change = stream.try_next()
            if change is not None:
                at = time.time_ns()
                fields = change.get("fullDocument") or change.get("updateDescription", {}).get("updatedFields", {})
                said = {name: fields[name] for name in ("status", "health", "ip") if name in fields}
                print(json.dumps({"at": at, "id": change["documentKey"]["_id"], "fields": said}), flush=True)  # noqa: T201


if __name__ == "__main__":
    observe(*sys.argv[1:])
