"""The least that any program could do, as a process of its own, so that it is measured as eventwatch is.

- `events`: raw aiodocker events, one pymongo `update_one` each: no ODM, no queue, no bookkeeping, and so
  wrong wherever eventwatch takes care. On SIGHUP it does the sweep's floor: one find, an inspection of every node,
  ten at a time, and one bulk write of what changed.
- `merge`: for floods. A bare loop over the event stream that merges per node, and beside it one bulk write after
  the other of what has been merged.
- `replay FILE`: the same over a recording; prints the seconds that it took and the events that it read.

Started by the benchmark, which names the engine and the database as it does for eventwatch.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import time
from pathlib import Path
from typing import Any, Final

import aiohttp
from aiodocker import Docker
from pymongo import AsyncMongoClient, UpdateOne
from pymongo.asynchronous.collection import AsyncCollection

from tests.bench.programs import DATABASE_VARIABLE, ENGINE_VARIABLE, MONGO_VARIABLE, NETWORK_VARIABLE, required

Nodes = AsyncCollection[dict[str, Any]]

ACTIONS: Final = ("start", "die", "pause", "unpause", "health_status")
FILTERS: Final = json.dumps({"type": ["container"], "event": ACTIONS})
FIELDS: Final[dict[str, dict[str, str]]] = {
    "start": {"status": "running"},
    "unpause": {"status": "running"},
    "die": {"status": "exited", "ip": ""},
    "pause": {"status": "paused"},
}
CONCURRENCY: Final = 10
#: Lines of a file parsed between two looks at the rest of the process; a socket sees to that by itself.
SLICE: Final = 500


def fields_of(action: str) -> dict[str, str] | None:
    if action.startswith("health_status: "):
        return {"health": action.removeprefix("health_status: ")}
    return FIELDS.get(action)


async def events(docker: Docker, nodes: Nodes) -> None:
    subscriber = docker.events.subscribe(filters=FILTERS)  # type: ignore[no-untyped-call]
    sweeps: set[asyncio.Task[None]] = set()

    def on_hangup() -> None:
        task = asyncio.create_task(sweep(docker, nodes))
        sweeps.add(task)
        task.add_done_callback(sweeps.discard)

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, on_hangup)
    await nodes.find_one({})
    say_ready()
    while (event := await subscriber.get()) is not None:
        if fields := fields_of(event["Action"]):
            await nodes.update_one({"_id": event["Actor"]["ID"]}, {"$set": fields})


async def sweep(docker: Docker, nodes: Nodes) -> None:
    rows = await nodes.find({}, {"status": 1, "health": 1, "ip": 1, "port": 1}).to_list()
    changes: list[UpdateOne] = []
    remaining = iter(rows)
    network = required(NETWORK_VARIABLE)

    async def inspect_some() -> None:
        for row in remaining:
            seen = await docker.containers.container(row["_id"]).show()
            state = seen["State"]
            found = {
                "status": state["Status"],
                "health": (state.get("Health") or {}).get("Status", "none"),
                "ip": seen["NetworkSettings"]["Networks"][network]["IPAddress"],
            }
            if changed := {name: value for name, value in found.items() if row[name] != value}:
                changes.append(UpdateOne({"_id": row["_id"]}, {"$set": changed}))

    await asyncio.gather(*(inspect_some() for _ in range(CONCURRENCY)))
    if changes:
        await nodes.bulk_write(changes, ordered=False)


async def merge(docker: Docker, nodes: Nodes) -> None:
    await docker.version()
    await nodes.find_one({})
    merged: dict[str, dict[str, str]] = {}
    something = asyncio.Event()
    async with docker.session.get(
        f"{docker.docker_host}/{docker.api_version}/events",
        params={"filters": FILTERS},
        timeout=aiohttp.ClientTimeout(total=None),
    ) as response:
        writer = asyncio.create_task(write_merged(nodes, merged, something))
        say_ready()
        async for line in response.content:
            take(json.loads(line), merged)
            something.set()
        await writer


async def write_merged(nodes: Nodes, merged: dict[str, dict[str, str]], something: asyncio.Event) -> None:
    while True:
        await something.wait()
        something.clear()
        await write(nodes, merged)


def take(event: dict[str, Any], merged: dict[str, dict[str, str]]) -> None:
    if event["Type"] == "container" and (fields := fields_of(event["Action"])):
        node_id = event["Actor"]["ID"]
        if node_id in merged:
            merged[node_id].update(fields)
        else:
            merged[node_id] = dict(fields)


async def write(nodes: Nodes, merged: dict[str, dict[str, str]]) -> None:
    if not merged:
        return
    operations = [UpdateOne({"_id": node_id}, {"$set": fields}) for node_id, fields in merged.items()]
    merged.clear()
    await nodes.bulk_write(operations, ordered=False)


async def replay(nodes: Nodes, recording: Path) -> None:
    await nodes.find_one({})
    began, count = time.perf_counter(), 0
    merged: dict[str, dict[str, str]] = {}
    writing = asyncio.create_task(write(nodes, merged))
    with recording.open("rb") as file:
        for number, line in enumerate(file):
            record = json.loads(line)
            if record["kind"] == "event":
                count += 1
                take(record["event"], merged)
            if number % SLICE == 0:
                await asyncio.sleep(0)
                if writing.done():
                    writing = asyncio.create_task(write(nodes, merged))
    await writing
    await write(nodes, merged)
    print(json.dumps({"seconds": time.perf_counter() - began, "events": count}))  # noqa: T201 - its result


def say_ready() -> None:
    print("ready", flush=True)  # noqa: T201 - who started us waits for it


async def run(options: argparse.Namespace) -> None:
    async with (
        AsyncMongoClient[dict[str, Any]](required(MONGO_VARIABLE)) as client,
        Docker(url=required(ENGINE_VARIABLE)) as docker,
    ):
        nodes = client[required(DATABASE_VARIABLE)]["ToolServerNode"]
        if options.mode == "replay":
            await replay(nodes, options.recording)
        else:
            await {"events": events, "merge": merge}[options.mode](docker, nodes)


def main() -> None:
    parser = argparse.ArgumentParser(description="The least that any program could do.")
    parser.add_argument("mode", choices=("events", "merge", "replay"))
    parser.add_argument("recording", type=Path, nargs="?")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
