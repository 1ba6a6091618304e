"""A fleet on one machine: `python -m tests.bench.thousand --engines 100 --nodes 200`, about two minutes.

Watchers run many to a process, beside as many fake engines in processes of their own, on one mongod. What is
counted is the database's share, which depends on what all of them ask: so a tenth of a fleet asks a tenth.
Measured are the CPU of mongod and its queries over whole sweep intervals, and how long it takes until all are
ready again after mongod was away, as long as a failover and longer. The last line scales up to a thousand engines.

Not told by this: memory of a watcher (those of one process share it; the benchmark measures one alone), and what
a thousand hosts' connections cost a database beyond their queries.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from aiohttp import web
from loguru import logger
from pymongo import AsyncMongoClient

from eventwatch.app import Application
from eventwatch.settings.model import Settings
from tests.bench.fake_engine import NETWORK, FakeEngine
from tests.bench.programs import Launcher, Program, usage
from tests.kit.mongod import PrivateMongo

DATABASE: Final = "thousand"
SWEEP_INTERVAL: Final = 30.0
AWAY: Final = 20.0
GIVE_UP: Final = 300.0
THOUSAND: Final = 1000


# -- the processes ------------------------------------------------------------------------------------------


async def serve_engines(folder: Path, first: int, count: int, nodes: int) -> None:
    """Be so many engines, each on a socket of its own, for ever."""
    for number in range(first, first + count):
        engine = FakeEngine(nodes, name=f"engine {number}")
        runner = web.AppRunner(engine.application(), access_log=None, handler_cancellation=True)
        await runner.setup()
        await web.UnixSite(runner, str(folder / f"{number}.sock")).start()
    say("ready")
    await asyncio.Event().wait()


async def watch_engines(folder: Path, first: int, count: int, mongo_url: str) -> None:
    """Be so many watchers; tell, whenever a line is read from standard input, how many of them are ready."""
    logger.remove()
    apps = [
        Application(
            Settings(
                _env_file=None,
                mongo_url=mongo_url,
                mongo_database=DATABASE,
                node_network=NETWORK,
                docker_host=f"unix://{folder / f'{number}.sock'}",
                http_listen="",
                sweep_interval=SWEEP_INTERVAL,
            )
        )
        for number in range(first, first + count)
    ]
    running = [asyncio.create_task(app.run(), name=f"watcher-{first + n}") for n, app in enumerate(apps)]
    loop, asked = asyncio.get_running_loop(), asyncio.Event()

    def hear() -> None:
        sys.stdin.readline()
        asked.set()

    loop.add_reader(sys.stdin.fileno(), hear)
    say("ready")
    while True:
        await asked.wait()
        asked.clear()
        failed = [task for task in running if task.done()]
        say(json.dumps({"ready": sum(not app.doubts() for app in apps), "failed": len(failed)}))


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - who started us reads it


# -- the measurement ----------------------------------------------------------------------------------------


class Fleet:
    """The watchers' processes."""

    def __init__(self, watchers: list[Program], engines: int) -> None:
        self._watchers = watchers
        self.engines = engines

    async def ready(self) -> int:
        total = 0
        for watcher in self._watchers:
            assert watcher.process.stdin is not None
            watcher.process.stdin.write(b"?\n")
        for watcher in self._watchers:
            row = json.loads(await watcher.line())
            assert not row["failed"], watcher.last_words()
            total += row["ready"]
        return total

    async def until_ready(self) -> float:
        began = time.monotonic()
        while await self.ready() < self.engines:
            if time.monotonic() - began > GIVE_UP:
                raise TimeoutError(f"only {await self.ready()} of {self.engines} are ready")
            await asyncio.sleep(0.1)
        return time.monotonic() - began


async def fill(url: str, engines: int, nodes: int) -> None:
    now = datetime.now(UTC).replace(tzinfo=None)
    async with AsyncMongoClient[dict[str, Any]](url) as client:
        for number in range(engines):
            rows = [
                {
                    "_id": node.node_id,
                    "short_id": node.node_id[:12],
                    "port": 31942,
                    "last_req_time": now,
                    **node.truth,
                }
                | {"engine_id": f"engine {number}", "epoch": 1}
                for node in FakeEngine(nodes, name=f"engine {number}").nodes
            ]
            await client[DATABASE]["ToolServerNode"].insert_many(rows, ordered=False)


async def counts(url: str) -> dict[str, float]:
    async with AsyncMongoClient[dict[str, Any]](url) as client:
        status = await client.admin.command("serverStatus")
    executor = status["metrics"]["queryExecutor"]
    return {
        "documents examined": executor["scannedObjects"],
        "collection scans": executor["collectionScans"]["total"],
        "requests": status["network"]["numRequests"],
        "MB sent": status["network"]["bytesOut"] / 1e6,
    }


async def measure(options: argparse.Namespace) -> None:
    engines, nodes, processes = options.engines, options.nodes, options.processes
    size = -(-engines // processes)
    shares = [range(first, min(first + size, engines)) for first in range(0, engines, size)]
    folder = Path(tempfile.mkdtemp(prefix="ew-fleet-"))
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        mongo = await stack.enter_async_context(PrivateMongo())
        await fill(mongo.url, engines, nodes)
        launcher = Launcher(folder)
        for share in shares:
            words = ("--serve", str(folder), str(share.start), str(len(share)), str(nodes))
            await stack.enter_async_context(launcher.module("thousand", *words))
        watchers = []
        for share in shares:
            words = ("--watch", str(folder), str(share.start), str(len(share)), mongo.url)
            watchers.append(await stack.enter_async_context(launcher.module("thousand", *words, stdin=True)))
        fleet = Fleet(watchers, engines)
        say(f"{engines} engines x {nodes} nodes, started: all ready after {await fleet.until_ready():.1f} s")
        await asyncio.sleep(options.settle)
        pid = mongo.members[0].pid
        before, cpu = await counts(mongo.url), usage(pid)
        await asyncio.sleep(options.window)
        after, used = await counts(mongo.url), usage(pid)
        share_of_core = (used.cpu - cpu.cpu) / (used.at - cpu.at)
        rates = {name: (after[name] - before[name]) / (used.at - cpu.at) for name in before}
        say(f"mongod: {share_of_core:.1%} of a core; a second: " + told(rates))
        await mongo.kill()
        await asyncio.sleep(AWAY)
        await mongo.start()
        away = await fleet.until_ready()
        say(f"mongod was away for {AWAY:.0f} s: all ready {away:.1f} s after its return")
        scale = THOUSAND / engines
        thousand = told({name: scale * rate for name, rate in rates.items()})
        say(f"times {scale:.3g}, {THOUSAND} engines: mongod {scale * share_of_core:.1%} of a core; {thousand}")


def told(rates: dict[str, float]) -> str:
    return ", ".join(f"{rate:,.1f} {name}" for name, rate in rates.items())


def main() -> None:
    parser = argparse.ArgumentParser(description="A fleet on one machine.")
    parser.add_argument("--engines", type=int, default=100)
    parser.add_argument("--nodes", type=int, default=200)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--window", type=float, default=2 * SWEEP_INTERVAL)
    parser.add_argument("--settle", type=float, default=SWEEP_INTERVAL)
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--watch", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        folder, first, count, nodes = options.serve
        asyncio.run(serve_engines(Path(folder), int(first), int(count), int(nodes)))
    elif options.watch:
        folder, first, count, url = options.watch
        asyncio.run(watch_engines(Path(folder), int(first), int(count), url))
    else:
        asyncio.run(measure(options))


if __name__ == "__main__":
    main()
