"""`python -m tests.takeover [--kills 50]`: how long documents are unattended after a SIGKILL of eventwatch.

Four ways: a process that is started again, a process with a hot standby, a container that its restart policy
starts again, and a container with a hot standby in another one. With each kill a node dies or starts, too. Prints
p50 and the longest time: from the kill (of a restart: from the start of the new process or container) until the
successor has the lease, and until all documents are right, by the database's clock (where the engine ends or
starts a container only after the successor has the lease, from then); and whether any write came from an older
epoch than the one before it.

Needs root on the engine's machine. The lease lasts five minutes, so that none expires meanwhile. What runs is
compiled once, as what is installed is; a kill of the first way counts from the `exec` of the new process.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from pymongo.asynchronous.change_stream import AsyncChangeStream

from tests.bench.report import percentile
from tests.faults.epochs import followed
from tests.faults.harness import Oracle, World
from tests.kit.eventwatch import Eventwatch
from tests.kit.mongod import PrivateMongo
from tests.kit.nodes import IMAGE, Node
from tests.kit.processes import ROOT
from tests.kit.truth import Document

ENGINE: Final = "unix:///var/run/docker.sock"
LEASE: Final = "5m"
PATIENCE: Final = 60.0
WRITES_OF_STATUS: Final = [{"$match": {"updateDescription.updatedFields.status": {"$exists": True}}}]
#: What a container needs of this machine to run what is checked out here.
MOUNTS: Final = (
    *("/usr:/usr:ro", "/usr/lib:/lib:ro", "/usr/lib64:/lib64:ro", "/var/run:/var/run"),
    *(f"{folder}:{folder}:ro" for folder in {str(ROOT), sys.prefix, sys.base_prefix} if folder != "/usr"),
)


@dataclass
class Took:
    """Seconds until the successor has the lease, and until documents are right."""

    lease: list[float] = field(default_factory=list)
    right: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [
            f"{name} p50 {percentile(took, 0.5):.2f} s, longest {max(took):.2f} s"
            for name, took in (("lease", self.lease), ("right", self.right))
        ]
        return f"{len(self.lease)} kills: " + "; ".join(parts)


class Contained:
    """`eventwatch run` in a container of the watched engine."""

    def __init__(self, world: World, name: str, **policy: str) -> None:
        self._world = world
        self._name = f"{world.network}-{name}"
        self._policy = policy or {"Name": "no"}

    async def start(self) -> None:
        settings = self._world.settings(lease_duration=LEASE, sweep_interval="10m")
        compiled = sys.pycache_prefix
        self._container = await self._world.docker.containers.create(
            {
                "Image": IMAGE,
                "Entrypoint": [sys.executable, "-m", "eventwatch", "run"],
                "WorkingDir": "/",
                "Env": [f"EVENTWATCH_{name.upper()}={value}" for name, value in settings.items()]
                + [
                    f"PYTHONPATH={ROOT}",
                    f"PYTHONPYCACHEPREFIX={compiled}" if compiled else "PYTHONDONTWRITEBYTECODE=1",
                ],
                "Labels": dict(self._world.maker.labels),
                "HostConfig": {
                    "NetworkMode": "host",
                    "Binds": [*MOUNTS, f"{compiled}:{compiled}"] if compiled else list(MOUNTS),
                    "RestartPolicy": self._policy,
                },
            },
            name=self._name,
        )
        await self._container.start()

    async def state(self) -> Document:
        return dict((await self._container.show())["State"])

    async def kill(self) -> None:
        """As the kernel does it when memory runs out: for the engine's own kill a restart policy does not hold."""
        os.kill((await self.state())["Pid"], signal.SIGKILL)

    async def log(self) -> str:
        return "".join(await self._container.log(stdout=True, stderr=True))

    async def remove(self) -> None:
        await self._container.delete(force=True)


async def holder(world: World) -> Document:
    """The holder's document, once there is one."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := await world.checkers.find_one():
            return found
        await asyncio.sleep(0.01)
    raise AssertionError("nobody leads")


async def succeeded(world: World, before: Document) -> None:
    """Wait until another has the lease."""
    deadline = time.monotonic() + PATIENCE
    while (await holder(world))["manager_id"] == before["manager_id"]:
        assert time.monotonic() < deadline, f"nobody took over from {before}"
        await asyncio.sleep(0.005)


async def disturb(world: World) -> Node:
    """Let a node die, or start."""
    node = world.random.choice(list(world.nodes.values()))
    running = (await node.inspect())["State"]["Running"]
    await (node.kill() if running else node.start())
    return node


async def measure_one(world: World, kill: Callable[[], Awaitable[float | None]], took: Took) -> None:
    """Kill the holder, and note how long its successor takes; `kill` says since when a new one is there."""
    before, killed = await holder(world), time.time()
    async with await world.documents.watch(WRITES_OF_STATUS) as writes:
        began = await kill() or killed
        disturbing = asyncio.create_task(disturb(world), name="disturb")
        await succeeded(world, before)
        leads = time.time()
        node = await disturbing
        await Oracle(world).recovered()
        state = (await node.inspect())["State"]
        changed = datetime.fromisoformat(state["StartedAt" if state["Running"] else "FinishedAt"]).timestamp()
        written = [
            write["wallTime"] async for write in until_now(writes) if write["documentKey"]["_id"] == node.id
        ]
    right = written[-1].replace(tzinfo=UTC).timestamp()
    took.lease.append(leads - began)
    took.right.append(max(leads - began, right - (began if changed < leads else changed)))


async def until_now(writes: AsyncChangeStream[Document]) -> AsyncIterator[Document]:
    """What a change stream holds by now."""
    while (write := await writes.try_next()) is not None:
        yield write


async def processes_again(world: World, folder: Path, kills: int) -> Took:
    """A process that is started again."""
    took = Took()
    with closing(Eventwatch(folder, world.settings(lease_duration=LEASE, sweep_interval="10m"))) as eventwatch:
        eventwatch.start()
        await eventwatch.says("checker started", within=PATIENCE)
        await Oracle(world).recovered()

        async def kill() -> float:
            await eventwatch.kill()
            began = time.time()
            eventwatch.start()
            return began

        for _ in range(kills):
            try:
                await measure_one(world, kill, took)
            except AssertionError as error:
                error.add_note(eventwatch.tail())
                raise
        assert eventwatch.output.count("Taking over at once") == kills
        assert "Standing by" not in eventwatch.output
    return took


async def processes_standing_by(world: World, folder: Path, kills: int) -> Took:
    """A process with a standby."""
    took, settings = Took(), world.settings(lease_duration=LEASE, sweep_interval="10m")
    one, two = (Eventwatch(folder, settings, name=name) for name in ("one", "two"))
    with closing(one), closing(two):
        one.start()
        await one.says("checker started", within=PATIENCE)
        await Oracle(world).recovered()
        for number in range(kills):
            two.start()
            await two.says("Standing by", times=number // 2 + 1, within=PATIENCE)
            await measure_one(world, one.kill, took)
            one, two = two, one
    return took


async def containers_again(world: World, kills: int) -> Took:
    """A container that its restart policy starts again."""
    took = Took()
    contained = Contained(world, "again", Name="always")
    await contained.start()
    await holder(world)
    await Oracle(world).recovered()

    async def kill() -> float:
        began = (await contained.state())["StartedAt"]
        await contained.kill()
        while True:
            state = await contained.state()
            if state["StartedAt"] != began and state["Running"]:
                return datetime.fromisoformat(state["StartedAt"]).timestamp()
            await asyncio.sleep(0.02)

    for _ in range(kills):
        # An engine waits longer after each end of a container that ran for less than ten seconds.
        if took.lease:
            await asyncio.sleep(10.5)
        await measure_one(world, kill, took)
    await contained.remove()
    return took


async def containers_standing_by(world: World, kills: int) -> Took:
    """A container with a standby in another."""
    took = Took()
    one = Contained(world, "0")
    await one.start()
    try:
        await holder(world)
    except AssertionError as error:
        error.add_note(f"{await one.state()}\n{await one.log()}")
        raise
    await Oracle(world).recovered()
    for number in range(kills):
        two = Contained(world, str(number + 1))
        await two.start()
        deadline = time.monotonic() + PATIENCE
        while "Standing by" not in await two.log():
            assert time.monotonic() < deadline, await two.log()
            await asyncio.sleep(0.1)
        await measure_one(world, one.kill, took)
        await one.remove()
        one = two
    await one.remove()
    return took


@asynccontextmanager
async def opened_world(mongo: PrivateMongo) -> AsyncIterator[World]:
    async with World(ENGINE, mongo.url) as world:
        await world.populate(5)
        yield world


async def run(way: str, world: World, folder: Path, kills: int) -> Took:
    match way:
        case "restart":
            return await processes_again(world, folder, kills)
        case "standby":
            return await processes_standing_by(world, folder, kills)
        case "container-restart":
            return await containers_again(world, kills)
        case _:
            return await containers_standing_by(world, kills)


async def measure(kills: int, ways: list[str]) -> None:
    async with PrivateMongo() as mongo:
        for way in ways:
            with tempfile.TemporaryDirectory() as folder:
                async with opened_world(mongo) as world, followed(world) as epochs:
                    took = await run(way, world, Path(folder), kills)
            wrong = "; ".join(epochs.went_back) or "no write of an older epoch"
            print(f"{way}: {took}; {len(epochs.all)} epochs, {wrong}", flush=True)  # noqa: T201 - a command


WAYS: Final = ("restart", "standby", "container-restart", "container-standby")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--only", action="append", choices=WAYS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.pycache_prefix = os.environ["PYTHONPYCACHEPREFIX"] = folder
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        asyncio.run(measure(arguments.kills, arguments.only or list(WAYS)))


if __name__ == "__main__":
    main()
