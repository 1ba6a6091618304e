"""A randomized soak: `python -m tests.faults.soak --seconds N --seed S`, or `make soak`.

One engine and one database of its own, two watchers that share a lease, nodes that live at random, a manager
that writes at random, and random faults, now and then two at once. After each fault the world falls silent;
2 s after the engine and the database are back every document must equal its inspection (4 s where the holder of
a lease of 2 s was lost). Between the faults a monitor compares without a rest, and keeps the longest time that a
document was wrong about a container that did not change. An engine that has locked a container for ever (20.10
does, rarely, when one is paused while it is probed) cannot be compared with: it is killed, and counted.

The seed decides what is done and when; what comes of it, the machine decides. The figures go to
`.cache/soak.json`; the exit code is 1 when a document was divergent or a request was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from pymongo.errors import PyMongoError

import eventwatch.store  # noqa: F401 - it mends the driver
from tests.e2e.watching import true_fields
from tests.engines import PrivateEngine, PrivateMongo
from tests.faults.harness import (
    EXPECTED_ERRORS,
    RECOVERY,
    ROOT,
    Eventwatch,
    Oracle,
    StillWrongError,
    World,
    freeze_for,
)

TABLE: Final = ROOT / ".cache" / "soak.json"
LEASE: Final = 2.0
NODES: Final = 8
#: Seconds after which a document that is still wrong ends the soak: it will not heal.
PATIENCE: Final = 45.0

Fault = Callable[[], Awaitable[None]]


@dataclass
class Figures:
    """What the soak is for."""

    seed: int
    seconds: float = 0.0
    cycles: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    operations: int = 0
    #: Comparisons of a document with an inspection, by the oracle after each cycle.
    documents: int = 0
    divergent: list[str] = field(default_factory=list)
    #: Cycles after which the engine itself did not answer about a container any more, and was killed for it.
    locked: int = 0
    lost_requests: list[str] = field(default_factory=list)
    #: Seconds from the end of a fault and of all life to the last wrong document.
    longest_recovery: float = 0.0
    slowest_fault: str = ""
    #: Seconds from the end of a fault to the last wrong document, or to the end of all life if that came later.
    longest_since_return: float = 0.0
    #: Seconds that a document was wrong with no fault about.
    longest_wrong: float = 0.0
    longest_wrong_about: str = ""
    looks: int = 0
    resident_mb: float = 0.0

    @property
    def good(self) -> bool:
        return not self.divergent and not self.lost_requests

    def save(self) -> None:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(json.dumps(asdict(self), indent=1))

    def __str__(self) -> str:
        faults = ", ".join(f"{count} x {name}" for name, count in sorted(self.faults.items()))
        return (
            f"seed {self.seed}: {self.cycles} fault cycles in {self.seconds:.0f} s ({faults}); "
            f"{self.operations} things happened to nodes; {self.documents} documents checked, "
            f"{len(self.divergent)} divergent, {len(self.lost_requests)} requests lost; {self.locked} x the "
            f"engine had locked a container for ever and was killed; longest recovery "
            f"{self.longest_recovery:.2f} s ({self.slowest_fault}), at most {self.longest_since_return:.2f} s "
            f"since the fault's end; longest wrong without a fault "
            f"{self.longest_wrong:.2f} s in {self.looks} looks ({self.longest_wrong_about}); "
            f"resident memory at most {self.resident_mb:.0f} MB"
        )


class Monitor:
    """Looks at all documents again and again while no fault is about."""

    def __init__(self, world: World, figures: Figures) -> None:
        self._world = world
        self._oracle = Oracle(world)
        self._figures = figures
        self._watching = False
        #: What was true each time that a document was found wrong, in which life of its container, and since when.
        self._wrong_since: dict[str, tuple[object, float]] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        self._wrong_since.clear()
        self._watching = True
        try:
            yield
        finally:
            self._watching = False

    async def run(self) -> None:
        while True:
            await asyncio.sleep(0.02)
            for node_id in list(self._world.inserted) if self._watching else ():
                try:
                    await self._look(node_id)
                except (*EXPECTED_ERRORS, PyMongoError):
                    self._wrong_since.pop(node_id, None)

    async def _look(self, node_id: str) -> None:
        container = await self._oracle.inspect(node_id)
        document = await self._world.documents.find_one({"_id": node_id})
        if not self._watching:
            return
        self._figures.looks += 1
        truth = true_fields(container, network=self._world.network) if container else None
        said = {name: document.get(name) for name in truth or ()} if document else None
        if said == truth:
            self._wrong_since.pop(node_id, None)
            return
        now = time.monotonic()
        life = [container["State"][name] for name in ("StartedAt", "FinishedAt")] if container else None
        known, since = self._wrong_since.get(node_id, (None, now))
        if known != (truth, life):
            since = now
        self._wrong_since[node_id] = ((truth, life), since)
        if now - since > self._figures.longest_wrong:
            self._figures.longest_wrong = now - since
            self._figures.longest_wrong_about = f"{node_id[:12]} said {said}, true was {truth}"


class Soak:
    """One run; see the module's docstring."""

    def __init__(self, seed: int, folder: Path, tell: Callable[[str], object]) -> None:
        self.figures = Figures(seed)
        self._chance = random.Random(seed)
        self._folder = folder
        self._tell = tell
        self._began = time.monotonic()

    async def run(self, seconds: float) -> Figures:
        async with AsyncExitStack() as stack:
            self._engine = await stack.enter_async_context(PrivateEngine())
            self._mongo = await stack.enter_async_context(PrivateMongo())
            self._world = await stack.enter_async_context(
                World(self._engine.url, self._mongo.url, seed=self.figures.seed)
            )
            await self._world.populate(NODES)
            settings = self._world.settings(lease_duration=f"{LEASE:.0f}s")
            self._watchers = [Eventwatch(self._folder, settings, name=name) for name in ("one", "two")]
            for watcher in self._watchers:
                stack.callback(watcher.close)
                watcher.start()
            await self._soak(seconds)
        return self.figures

    async def _soak(self, seconds: float) -> None:
        oracle = Oracle(self._world)
        await oracle.recovered()
        monitor = Monitor(self._world, self.figures)
        watching = asyncio.create_task(monitor.run(), name="monitor")
        self._began = time.monotonic()
        try:
            while time.monotonic() - self._began < seconds:
                await self._cycle(oracle, monitor)
                self.figures.seconds = time.monotonic() - self._began
                self.figures.operations = self._world.operations
                self.figures.save()
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _cycle(self, oracle: Oracle, monitor: Monitor) -> None:
        figures = self.figures
        faults = self._choose()
        async with self._world.busy(workers=self._chance.randint(1, 4)):
            with monitor.watching():
                await asyncio.sleep(self._chance.uniform(1, 4))
            await asyncio.gather(*(fault() for _, fault in faults))
            ended = time.monotonic()
        name = " and ".join(name for name, _ in faults)
        figures.cycles += 1
        figures.faults[name] = figures.faults.get(name, 0) + 1
        allowed = RECOVERY + (LEASE if "eventwatch" in name else 0)
        quiet_since = time.monotonic()
        try:
            took = await oracle.recovered(since=quiet_since, within=PATIENCE)
        except StillWrongError as error:
            if error.wrong != [repr(TimeoutError())]:
                raise
            figures.locked += 1
            await self._engine.kill()
            await self._engine.start()
            quiet_since = time.monotonic()
            took = await oracle.recovered(since=quiet_since, within=PATIENCE)
        figures.documents += len(self._world.inserted)
        if took > allowed:
            figures.divergent.append(f"cycle {figures.cycles}, {name}: wrong for {took:.2f} s after all was quiet")
        if took > figures.longest_recovery:
            figures.longest_recovery, figures.slowest_fault = took, name
        figures.longest_since_return = max(figures.longest_since_return, quiet_since - ended + took)
        figures.lost_requests += await oracle.lost_requests()
        await self._forget_the_gone()
        for watcher in self._watchers:
            if not watcher.running:
                raise AssertionError(f"a watcher has ended:\n{watcher.tail()}")
            if "Traceback" in watcher.text():
                raise AssertionError(f"an unexpected error:\n{watcher.tail(80)}")
            figures.resident_mb = max(figures.resident_mb, resident_mb(watcher.pid))
        self._tell(
            f"{time.monotonic() - self._began:6.0f} s  cycle {figures.cycles}: {name}; right {took:.2f} s after "
            f"all was quiet, {quiet_since - ended:.1f} s after the fault's end"
        )

    async def _forget_the_gone(self) -> None:
        """Containers and documents that are both gone need not be asked for until the end of the soak."""
        present = {row["_id"] async for row in self._world.documents.find({}, {"_id": 1})}
        for node_id in list(self._world.inserted):
            if node_id not in self._world.nodes and node_id not in present:
                self._world.inserted.discard(node_id)
                self._world.requests.pop(node_id, None)

    # -- faults ----------------------------------------------------------------------------------------

    def _choose(self) -> list[tuple[str, Fault]]:
        """One fault, or two at once of different parts."""
        parts: list[dict[str, Fault]] = [
            {
                "dockerd SIGTERM": self._restart_engine,
                "dockerd SIGKILL, a node dies": self._kill_engine,
                "dockerd SIGSTOP": self._freeze_engine,
            },
            {"mongod SIGKILL": self._kill_mongo, "mongod SIGSTOP": self._freeze_mongo},
            {
                "eventwatch SIGKILL": self._kill_watcher,
                "eventwatch SIGTERM": self._restart_watcher,
                "eventwatch SIGSTOP beyond its lease": self._freeze_watcher,
            },
        ]
        chosen = self._chance.sample(parts, 2 if self._chance.random() < 0.25 else 1)
        return [self._chance.choice(list(part.items())) for part in chosen]

    async def _restart_engine(self) -> None:
        await self._engine.terminate()
        await asyncio.sleep(self._chance.uniform(0, 2))
        await self._engine.start()

    async def _kill_engine(self) -> None:
        pid = 0
        with contextlib.suppress(*EXPECTED_ERRORS):
            node = self._chance.choice(list(self._world.nodes.values()))
            pid = (await node.inspect())["State"]["Pid"]
        await self._engine.kill()
        if pid:
            with contextlib.suppress(OSError):  # it has ended by itself
                self._engine.kill_container_process(pid)
        await asyncio.sleep(self._chance.uniform(0, 2))
        await self._engine.start()

    async def _freeze_engine(self) -> None:
        await freeze_for(self._chance.uniform(0.5, 5), self._engine)

    async def _kill_mongo(self) -> None:
        await self._mongo.kill()
        await asyncio.sleep(self._chance.uniform(0, 3))
        await self._mongo.start()

    async def _freeze_mongo(self) -> None:
        await freeze_for(self._chance.uniform(0.5, 5), self._mongo)

    async def _kill_watcher(self) -> None:
        watcher = self._chance.choice(self._watchers)
        await watcher.kill()
        await asyncio.sleep(self._chance.uniform(0, 3))
        watcher.start()

    async def _restart_watcher(self) -> None:
        watcher = self._chance.choice(self._watchers)
        await watcher.spoken()
        code = await watcher.terminate()
        if code:
            raise AssertionError(f"SIGTERM: ended with {code}\n{watcher.tail()}")
        watcher.start()

    async def _freeze_watcher(self) -> None:
        watcher = self._chance.choice(self._watchers)
        await freeze_for(self._chance.uniform(LEASE, 2.5 * LEASE), watcher)


def resident_mb(pid: int) -> float:
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) / 1024
    return 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description="Random life and random faults, and an oracle.")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    # Told to end, it ends as with Ctrl-C, so that it leaves nothing behind.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    with tempfile.TemporaryDirectory(prefix="ew-soak-") as folder:
        soak = Soak(options.seed, Path(folder), lambda line: print(line, flush=True))  # noqa: T201
        try:
            asyncio.run(soak.run(options.seconds))
        finally:
            soak.figures.save()
            print(soak.figures)  # noqa: T201
            for text in (*soak.figures.divergent, *soak.figures.lost_requests):
                print(text)  # noqa: T201
    return 0 if soak.figures.good else 1


if __name__ == "__main__":
    sys.exit(main())
