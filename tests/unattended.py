"""`python -m tests.unattended`: how long documents are unattended when a part of the stack fails or is replaced.

One node is paused and let go on, again and again; after each change its document is read until it says so. The
figure of a fault is the longest time that a change took meanwhile, which includes the time for which the part
itself was away. Where the engine itself is the fault, nothing can be changed meanwhile: there the time runs from
its first answer until eventwatch is ready again, on an engine of this run's own.

Not measured: an upgrade to another version (here the same image is put in place again), the kernel's out-of-memory
killer itself (a SIGKILL of the process is what it sends), other engines than the installed one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from aiodocker import Docker
from pymongo import AsyncMongoClient
from pymongo.errors import PyMongoError
from rich.console import Console
from rich.table import Table

from tests.container.sidecars import Project, project
from tests.kit.engines import PrivateEngine
from tests.kit.images import MONGO, PROXY, SIDECAR, build_sidecar, ensure_base, ensure_services
from tests.kit.mongod import free_port
from tests.kit.nodes import Node, Nodes
from tests.kit.processes import run
from tests.kit.truth import Document, manager_document

DATABASE: Final = "TSM"
GIVE_UP: Final = 90.0
PAUSE: Final = 0.05


class Prober:
    """Changes a node all the time, and knows how long each change took to its document."""

    def __init__(self, made: Project, node: Node) -> None:
        self._made = made
        self._node = node
        self.took: list[float] = []
        self.waiting_since: float | None = None

    async def run(self) -> None:
        paused = False
        while True:
            paused = not paused
            await (self._node.pause() if paused else self._node.unpause())
            self.waiting_since = time.monotonic()
            await self._until("paused" if paused else "running")
            self.took.append(time.monotonic() - self.waiting_since)
            self.waiting_since = None
            await asyncio.sleep(PAUSE)

    async def _until(self, status: str) -> None:
        while True:
            # A database that is replaced gets another address.
            with contextlib.suppress(PyMongoError, Exception):
                url = self._made.database_url() + "?serverSelectionTimeoutMS=300&socketTimeoutMS=500"
                async with AsyncMongoClient[Document](url) as client:
                    while True:
                        found = await client[DATABASE]["ToolServerNode"].find_one({"_id": self._node.id})
                        if found and found["status"] == status:
                            return
                        await asyncio.sleep(0.01)
            await asyncio.sleep(0.02)

    async def longest(self, fault: Callable[[], Awaitable[None]]) -> float:
        """The longest that a change took, from the fault until changes take their usual time again."""
        self.took.clear()
        await fault()
        deadline = time.monotonic() + GIVE_UP
        count = len(self.took)
        while time.monotonic() < deadline:
            await asyncio.sleep(0.2)
            if len(self.took) >= count + 20 and max(self.took[-15:]) < 0.5:
                return max(self.took)
        return float("inf")


async def measure(made: Project, prober: Prober, console: Console) -> dict[str, float]:
    async def compose(*command: str) -> None:
        await asyncio.to_thread(made.compose, *command)

    async def kill_eventwatch() -> None:
        os.kill(made.container("eventwatch").inspect()["State"]["Pid"], signal.SIGKILL)

    async def kill_database() -> None:
        os.kill(made.container("mongo").inspect()["State"]["Pid"], signal.SIGKILL)

    async def down_and_up() -> None:
        await compose("down")
        await compose("up", "-d", "--no-build")

    again = ("up", "-d", "--no-build", "--no-deps", "--force-recreate")
    faults: dict[str, Callable[[], Awaitable[None]]] = {
        "compose restart eventwatch": lambda: compose("restart", "eventwatch"),
        "eventwatch recreated (an upgrade)": lambda: compose(*again, "eventwatch"),
        "eventwatch killed (SIGKILL, out of memory)": kill_eventwatch,
        "proxy recreated (new rules)": lambda: compose(*again, "engine-proxy"),
        "proxy restarted": lambda: compose("restart", "engine-proxy"),
        "database killed": kill_database,
        "database recreated": lambda: compose(*again, "mongo"),
        "compose down and up": down_and_up,
    }
    found = {}
    for name, fault in faults.items():
        found[name] = await prober.longest(fault)
        console.print(f"{name}: {found[name]:.1f} s", highlight=False)
    return found


async def composed(console: Console) -> dict[str, float]:
    run, url = f"ew-unattended-{secrets.token_hex(3)}", "unix:///var/run/docker.sock"
    async with Docker(url=url) as docker, Nodes(docker, prefix=f"{run}-", network=run) as nodes:
        with tempfile.TemporaryDirectory(prefix="ew-unattended-") as folder:
            env = {"DB_COLLECTION": DATABASE, "EVENTWATCH_NODE_NETWORK": run}
            async with project(Path(folder), free_port(), url, **env) as made:
                made.up()
                await made.container("eventwatch").wait_ready()
                node = await nodes.start("changed")
                async with AsyncMongoClient[Document](made.database_url()) as client:
                    await client[DATABASE]["ToolServerNode"].insert_one(manager_document(node.id))
                prober = Prober(made, node)
                probing = asyncio.create_task(prober.run(), name="prober")
                try:
                    await asyncio.sleep(3)
                    return await measure(made, prober, console)
                finally:
                    probing.cancel()
                    await asyncio.gather(probing, return_exceptions=True)


async def engine_away(console: Console) -> dict[str, float]:
    found = {}
    async with PrivateEngine() as engine:
        load = f"docker save {SIDECAR} {PROXY} {MONGO} | docker -H {engine.url} load"
        await asyncio.to_thread(run, "sh", "-c", load, within=120)
        os.environ["DOCKER_HOST"] = engine.url
        try:
            with tempfile.TemporaryDirectory(prefix="ew-unattended-") as folder:
                async with project(Path(folder), free_port(), engine.url) as made:
                    made.up()
                    await ready(made)
                    faults = (("engine restarted", engine.stop), ("engine killed", engine.kill))
                    for name, end in faults:
                        await end()
                        await engine.start()
                        began = time.monotonic()
                        found[name] = await ready(made) - began
                        console.print(f"{name}: {found[name]:.1f} s after its first answer", highlight=False)
        finally:
            del os.environ["DOCKER_HOST"]
    return found


async def ready(made: Project) -> float:
    """When the health check of eventwatch says so."""
    deadline = time.monotonic() + GIVE_UP
    while time.monotonic() < deadline:
        name = made.container("eventwatch").name
        if name:
            checked = run("docker", "exec", name, "eventwatch", "healthcheck", check=False)
            if checked.code == 0 and checked.stdout.startswith("ready"):
                return time.monotonic()
        await asyncio.sleep(0.1)
    return float("inf")


def main() -> None:
    console = Console()
    ensure_base()
    build_sidecar()
    ensure_services()
    found = asyncio.run(composed(console)) | asyncio.run(engine_away(console))
    table = Table("fault", "unattended")
    for name, seconds in found.items():
        table.add_row(name, f"{seconds:.1f} s")
    console.print(table)


if __name__ == "__main__":
    main()
