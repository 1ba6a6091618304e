"""A randomized soak: `python -m tests.faults.soak --seconds N --seed S`, or `make soak`.

Two engines with nodes and a watcher each, and all documents in one collection; with `--engines 1`, one engine with
two watchers that share a lease. Nodes live at random, a manager writes at random (unless `--no-replacing`, it
replaces whole documents with what it read up to 3 s before), and there are random faults, now and then two at
once. After each fault the world falls silent; 2 s after the engines and the database are back every document must
equal its inspection (4 s where the holder of a lease of 2 s was lost). What a stale replace put back may stay
until the next sweep, which is then asked for. What no watcher has ever owned, as its container came and went while
none was there, may stay for minutes.

Beside that, all the time:
- each deletion of a document is looked into: a container that any engine still has ends the soak at once;
- a stop by eventwatch is wrong, as no node is ever idle;
- while no fault is about, a monitor compares without a rest, and keeps the longest time that a document was wrong
  about a container that did not change.

An engine that has locked a container for ever (20.10 does, rarely, when one is paused while it is probed) cannot
be compared with: it is killed, and counted.

The seed decides what is done and when; what comes of it, the machine decides. The figures go to
`.cache/soak.json`; the exit code is 1 when anything was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from pymongo.errors import OperationFailure, PyMongoError

import eventwatch.store.connection  # noqa: F401 - it mends the driver
from tests.faults.harness import EXPECTED_ERRORS, RECOVERY, REPLACES, Oracle, StillWrongError, World, freeze_for
from tests.kit.engines import PrivateEngine
from tests.kit.eventwatch import Eventwatch
from tests.kit.mongod import PrivateMongo
from tests.kit.processes import ROOT
from tests.kit.truth import Document, true_fields
from tests.kit.waiting import end, eventually

TABLE: Final = ROOT / ".cache" / "soak.json"
LOGS: Final = ROOT / ".cache" / "soak"
LEASE: Final = 2.0
#: Nodes at the start and at most, and how much happens to them at once: on all engines together.
NODES: Final = 12
MOST: Final = 16
WORKERS: Final = 4
#: How old what the manager writes back may be (s), with `--replacing`.
STALE: Final = 3.0
#: How long a host may be without a watcher: mostly seconds, now and then over a minute.
ABSENCE: Final = (3.0, 8.0)
LONG_ABSENCE: Final = 80.0
LEADS: Final = "Nodes status checker started."
STOPS: Final = "Stopping node: "
DELETES: Final = "Node deleted from db: "
#: Seconds after which an engine that does not answer about a container has locked it for ever.
LOCKED: Final = 12.0
#: Seconds after which a document that is still wrong ends the soak: it will not heal.
PATIENCE: Final = 45.0
HISTORY_LOST: Final = 286

T = TypeVar("T")
Fault = Callable[[], Coroutine[Any, Any, None]]


@dataclass
class Figures:
    """What the soak is for."""

    seed: int
    seconds: float = 0.0
    cycles: int = 0
    #: The last cycle: its number, its faults, and where.
    under_way: str = ""
    faults: dict[str, int] = field(default_factory=dict)
    operations: int = 0
    #: Comparisons of a document with an inspection, by the oracle after each cycle.
    documents: int = 0
    divergent: list[str] = field(default_factory=list)
    #: Documents that only a sweep put right after a stale replace of the manager.
    swept: int = 0
    #: Documents of containers that came and went while no watcher was there to own them.
    unowned: int = 0
    deletions: int = 0
    wrong_deletions: list[str] = field(default_factory=list)
    wrong_stops: list[str] = field(default_factory=list)
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
    #: The same where a stale replace of the manager was the reason.
    longest_believed: float = 0.0
    looks: int = 0
    resident_mb: float = 0.0

    @property
    def wrong(self) -> list[str]:
        """All that must not have been."""
        return [*self.divergent, *self.wrong_deletions, *self.wrong_stops, *self.lost_requests]

    def save(self) -> None:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(json.dumps(asdict(self), indent=1))

    def __str__(self) -> str:
        faults = ", ".join(f"{count} x {name}" for name, count in sorted(self.faults.items()))
        return (
            f"seed {self.seed}: {self.cycles} fault cycles in {self.seconds:.0f} s ({faults}); "
            f"{self.operations} things happened to nodes; {self.documents} documents checked, "
            f"{len(self.divergent)} divergent, {self.swept} swept after a stale replace, "
            f"{self.unowned} never owned; {self.deletions} deletions, {len(self.wrong_deletions)} wrong; "
            f"{len(self.wrong_stops)} wrong stops; "
            f"{len(self.lost_requests)} requests lost; {self.locked} x an engine had locked a container for ever "
            f"and was killed; longest recovery {self.longest_recovery:.2f} s ({self.slowest_fault}), at most "
            f"{self.longest_since_return:.2f} s since the fault's end; longest wrong without a fault "
            f"{self.longest_wrong:.2f} s in {self.looks} looks ({self.longest_wrong_about}), a stale replace "
            f"believed for {self.longest_believed:.2f} s; "
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
        self._believed_since: dict[str, float] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        self._wrong_since.clear()
        self._believed_since.clear()
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
                    self._forget(node_id)

    def _forget(self, node_id: str) -> None:
        self._wrong_since.pop(node_id, None)
        self._believed_since.pop(node_id, None)

    async def _look(self, node_id: str) -> None:
        container = await self._oracle.inspect(node_id)
        document = await self._world.documents.find_one({"_id": node_id})
        if not self._watching:
            return
        self._figures.looks += 1
        truth = true_fields(container, network=self._world.network) if container else None
        said = {name: document.get(name) for name in truth or ()} if document else None
        if said == truth:
            self._forget(node_id)
            return
        now = time.monotonic()
        if container and document and self._world.was_put_back(document, container):
            since = self._believed_since.setdefault(node_id, now)
            self._figures.longest_believed = max(self._figures.longest_believed, now - since)
            return
        life = [container["State"][name] for name in ("StartedAt", "FinishedAt")] if container else None
        known, since = self._wrong_since.get(node_id, (None, now))
        if known != (truth, life):
            since = now
        self._wrong_since[node_id] = ((truth, life), since)
        if now - since > self._figures.longest_wrong:
            self._figures.longest_wrong = now - since
            self._figures.longest_wrong_about = f"{node_id[:12]} said {said}, true was {truth}"


@dataclass
class Host:
    """One Docker host: its engine, the nodes on it, and its watchers."""

    name: str
    engine: PrivateEngine
    world: World
    watchers: list[Eventwatch]
    figures: Figures

    def __post_init__(self) -> None:
        #: Containers whose document has had an engine's id.
        self.owned: set[str] = set()
        self.oracle = Oracle(self.world, only_ours=True, excuse=self._excuse)
        self.strict = Oracle(self.world, only_ours=True)
        self.monitor = Monitor(self.world, self.figures)

    def _excuse(self, document: Document, container: Document | None) -> bool:
        """A stale replace may wait for a sweep; what nobody ever owned may stay for minutes."""
        if container is None:
            return document["_id"] not in self.owned
        return self.world.was_put_back(document, container)

    @property
    def led(self) -> bool:
        """Whether a watcher has had the lease."""
        return any(LEADS in watcher.output for watcher in self.watchers)

    async def recovered(self, oracle: Oracle) -> float:
        """How long (s) from now on a document is wrong; kills an engine that has locked a container."""
        began = time.monotonic()
        try:
            return await oracle.recovered(since=began, within=LOCKED)
        except StillWrongError as error:
            locked = error.wrong == [repr(TimeoutError())]
        if locked:
            self.figures.locked += 1
            await self.engine.kill()
            await self.engine.start()
            began = time.monotonic()
        try:
            return await oracle.recovered(since=began, within=PATIENCE)
        except StillWrongError as error:
            where = f"{self.figures.under_way}, host {self.name}"
            self.figures.divergent += [f"{where}, for {PATIENCE:.0f} s: {text}" for text in error.wrong]
            raise

    async def put_right(self) -> None:
        """Delete what was never owned, and let what was put back be swept."""
        unowned = [node_id for node_id, container in self.oracle.excused.items() if container is None]
        if unowned:
            await self.world.documents.delete_many({"_id": {"$in": unowned}})
        self.figures.unowned += len(unowned)
        put_back = len(self.oracle.excused) - len(unowned)
        self.figures.swept += put_back
        for watcher in self.watchers if put_back else ():
            await watcher.speaks()
            watcher.send(signal.SIGHUP)

    async def has(self, node_id: str) -> bool:
        """Whether the engine has the container; one that does not answer is asked until it does."""
        while True:
            try:
                return await self.oracle.inspect(node_id) is not None
            except EXPECTED_ERRORS:
                await asyncio.sleep(0.1)

    async def forget_the_gone(self) -> None:
        """Containers and documents that are both gone need not be asked for until the end of the soak."""
        world = self.world
        present = {row["_id"] async for row in world.documents.find({}, {"_id": 1})}
        gone = world.offered - world.nodes.keys() - present
        world.offered -= gone
        world.inserted -= gone
        for node_id in gone:
            world.requests.pop(node_id, None)
            world.put_back.pop(node_id, None)


class WrongDeletionError(AssertionError):
    """A document was deleted whose container is there."""


class Follower:
    """Follows the collection: sees whose the documents are, and looks into every deletion."""

    def __init__(self, hosts: list[Host], figures: Figures) -> None:
        self._hosts = hosts
        self._figures = figures
        self._token: Mapping[str, Any] | None = None
        self.follows = asyncio.Event()

    async def run(self) -> None:
        """Follow, whatever happens to the database, until a deletion is wrong."""
        while True:
            try:
                await self._follow()
            except PyMongoError as error:
                if isinstance(error, OperationFailure) and error.code == HISTORY_LOST:
                    raise
                await asyncio.sleep(0.1)

    async def _follow(self) -> None:
        owned = {"updateDescription.updatedFields.engine_id": {"$exists": True}}
        wanted = [{"$match": {"$or": [{"operationType": "delete"}, owned]}}]
        documents = self._hosts[0].world.documents
        async with await documents.watch(wanted, resume_after=self._token, max_await_time_ms=200) as changes:
            self.follows.set()
            while changes.alive:
                change = await changes.try_next()
                self._token = changes.resume_token
                if change is None:
                    continue
                node_id = change["documentKey"]["_id"]
                if change["operationType"] == "delete":
                    await self._judge(node_id)
                for host in self._hosts:
                    host.owned.add(node_id)

    async def _judge(self, node_id: str) -> None:
        self._figures.deletions += 1
        if any(node_id in host.world.removed for host in self._hosts):
            return
        for host in self._hosts:
            if await host.has(node_id):
                watchers = [watcher for each in self._hosts for watcher in each.watchers]
                who = [watcher.log.stem for watcher in watchers if DELETES + node_id in watcher.output]
                text = f"{node_id[:12]}, a container of host {host.name}, has lost its document to watcher {who}"
                self._figures.wrong_deletions.append(f"{self._figures.under_way}: {text}")
                raise WrongDeletionError(text)


class Soak:
    """One run; see the module's docstring."""

    def __init__(
        self,
        seed: int,
        folder: Path,
        tell: Callable[[str], object],
        *,
        engines: int = 2,
        replacing: bool = True,
    ) -> None:
        self.figures = Figures(seed)
        self._chance = random.Random(seed)
        self._folder = folder
        self._tell = tell
        self._stale_s = STALE if replacing else 0.0
        # Two watchers in any case: they share an engine, or have one each.
        self._names = [["one", "two"]] if engines == 1 else [["one"], ["two"]]
        self._hosts: list[Host] = []
        self._began = time.monotonic()

    @property
    def _watchers(self) -> list[Eventwatch]:
        return [watcher for host in self._hosts for watcher in host.watchers]

    async def run(self, seconds: float) -> Figures:
        """Soak for so long; all that was wrong is in the figures. Raises where going on makes no sense."""
        async with AsyncExitStack() as stack:
            self._mongo = await stack.enter_async_context(PrivateMongo())
            for names in self._names:
                self._hosts.append(await self._enter_host(stack, names))
            # Before there are nodes: a watcher that has never seen another has the say over what nobody owns.
            for watcher in self._watchers:
                watcher.start()
            await eventually(lambda: all(host.led for host in self._hosts))
            try:
                await self._soak(seconds)
            except* (WrongDeletionError, StillWrongError):
                pass  # the figures have it
            finally:
                self._count()
        return self.figures

    def _count(self) -> None:
        self.figures.seconds = time.monotonic() - self._began
        self.figures.operations = sum(host.world.operations for host in self._hosts)

    async def _enter_host(self, stack: AsyncExitStack, names: list[str]) -> Host:
        engine = await stack.enter_async_context(PrivateEngine())
        number = len(self._hosts)
        world = await stack.enter_async_context(
            World(
                engine.url,
                self._mongo.url,
                seed=self.figures.seed + number,
                database=self._hosts[0].world.database if self._hosts else "",
                most=MOST // len(self._names),
                stale_s=self._stale_s,
            )
        )
        settings = world.settings(lease_duration=f"{LEASE:.0f}s", idle_timeout="24h")
        watchers = [Eventwatch(self._folder, settings, name=name) for name in names]
        for watcher in watchers:
            stack.callback(watcher.close)
        return Host(str(number + 1), engine, world, watchers, self.figures)

    async def _soak(self, seconds: float) -> None:
        follower = Follower(self._hosts, self.figures)
        async with asyncio.TaskGroup() as tasks:
            beside = [tasks.create_task(follower.run(), name="follower")]
            beside += [tasks.create_task(host.monitor.run(), name="monitor") for host in self._hosts]
            await follower.follows.wait()
            for host in self._hosts:
                await host.world.populate(NODES // len(self._hosts))
            await all_of(host.recovered(host.strict) for host in self._hosts)
            self._began = time.monotonic()
            while time.monotonic() - self._began < seconds:
                await self._cycle()
                self._count()
                self.figures.save()
            await end(*beside)

    async def _cycle(self) -> None:
        faults = self._choose()
        name = " and ".join(name for name, _, _ in faults)
        where = ", ".join(where for _, where, _ in faults)
        self.figures.under_way = f"cycle {self.figures.cycles + 1}, {name} ({where})"
        for each, _, _ in faults:
            self.figures.faults[each] = self.figures.faults.get(each, 0) + 1
        async with AsyncExitStack() as life:
            for host in self._hosts:
                await life.enter_async_context(
                    host.world.busy(workers=self._chance.randint(1, WORKERS // len(self._hosts)))
                )
            with ExitStack() as watching:
                for host in self._hosts:
                    watching.enter_context(host.monitor.watching())
                await asyncio.sleep(self._chance.uniform(1, 4))
            await all_of(fault() for _, _, fault in faults)
            ended = time.monotonic()
        silent_for, took = await self._judge(name, ended)
        self._tell(
            f"{time.monotonic() - self._began:6.0f} s  {self.figures.under_way}; right {took:.2f} s after all was "
            f"quiet, {silent_for:.1f} s after the fault's end"
        )

    async def _judge(self, name: str, ended: float) -> tuple[float, float]:
        """What the oracle says of the cycle whose fault ended at that moment."""
        figures = self.figures
        figures.cycles += 1
        silent_for = time.monotonic() - ended
        took = max(await all_of(host.recovered(host.oracle) for host in self._hosts))
        figures.documents += sum(len(host.world.inserted) for host in self._hosts)
        allowed = RECOVERY + (LEASE if "eventwatch" in name else 0)
        if took > allowed:
            figures.divergent.append(f"cycle {figures.cycles}, {name}: wrong for {took:.2f} s after all was quiet")
        if took > figures.longest_recovery:
            figures.longest_recovery, figures.slowest_fault = took, name
        figures.longest_since_return = max(figures.longest_since_return, silent_for + took)
        for host in self._hosts:
            await host.put_right()
        swept = max(await all_of(host.recovered(host.strict) for host in self._hosts))
        if swept > RECOVERY:
            figures.divergent.append(f"cycle {figures.cycles}: a sweep left what was put back for {swept:.2f} s")
        for host in self._hosts:
            figures.lost_requests += await host.oracle.lost_requests()
            await host.forget_the_gone()
        for watcher in self._watchers:
            self._read_log(watcher)
        return silent_for, took

    def _read_log(self, watcher: Eventwatch) -> None:
        if not watcher.running:
            raise AssertionError(f"a watcher has ended:\n{watcher.tail()}")
        news = watcher.news()
        if "Traceback" in news:
            raise AssertionError(f"an unexpected error:\n{watcher.tail(80)}")
        stops = [line for line in news.splitlines() if STOPS in line]
        self.figures.wrong_stops += [
            f"cycle {self.figures.cycles}, watcher {watcher.log.stem}: {line}" for line in stops
        ]
        self.figures.resident_mb = max(self.figures.resident_mb, resident_mb(watcher.pid))

    # -- faults ----------------------------------------------------------------------------------------

    def _choose(self) -> list[tuple[str, str, Fault]]:
        """One fault, or two at once of different parts: what, where, and how."""
        host = self._chance.choice(self._hosts)
        parts: list[tuple[str, dict[str, Fault]]] = [
            *((f"engine {host.name}", self._engine_faults(host)) for host in self._hosts),
            ("database", {"mongod SIGKILL": self._kill_mongo, "mongod SIGSTOP": self._freeze_mongo}),
            (f"watcher of engine {host.name}", self._watcher_faults(host)),
        ]
        chosen = self._chance.sample(parts, 2 if self._chance.random() < 0.25 else 1)
        return [
            (name, where, faults[name]) for where, faults in chosen for name in [self._chance.choice([*faults])]
        ]

    def _engine_faults(self, host: Host) -> dict[str, Fault]:
        return {
            "dockerd SIGTERM": partial(self._restart_engine, host),
            "dockerd SIGKILL, a node dies": partial(self._kill_engine, host),
            "dockerd SIGSTOP": partial(self._freeze_engine, host),
        }

    def _watcher_faults(self, host: Host) -> dict[str, Fault]:
        watcher = self._chance.choice(host.watchers)
        faults: dict[str, Fault] = {
            "eventwatch SIGKILL": partial(self._kill_watcher, watcher),
            "eventwatch SIGTERM": partial(self._restart_watcher, watcher),
            "eventwatch SIGSTOP beyond its lease": partial(self._freeze_watcher, watcher),
        }
        for other in self._hosts:
            if other is not host:
                faults["eventwatch away"] = partial(self._leave_alone, host)
                faults["eventwatch away, the other SIGKILL"] = partial(self._leave_alone, host, restart=other)
        return faults

    async def _restart_engine(self, host: Host) -> None:
        await host.engine.stop()
        await asyncio.sleep(self._chance.uniform(0, 2))
        await host.engine.start()

    async def _kill_engine(self, host: Host) -> None:
        pid = 0
        with contextlib.suppress(*EXPECTED_ERRORS):
            node = self._chance.choice(list(host.world.nodes.values()))
            pid = (await node.inspect())["State"]["Pid"]
        await host.engine.kill()
        if pid:
            with contextlib.suppress(OSError):  # it has ended by itself
                host.engine.kill_container_process(pid)
        await asyncio.sleep(self._chance.uniform(0, 2))
        await host.engine.start()

    async def _freeze_engine(self, host: Host) -> None:
        await freeze_for(self._chance.uniform(0.5, 5), host.engine)

    async def _kill_mongo(self) -> None:
        await self._mongo.kill()
        await asyncio.sleep(self._chance.uniform(0, 3))
        await self._mongo.start()

    async def _freeze_mongo(self) -> None:
        await freeze_for(self._chance.uniform(0.5, 5), self._mongo)

    async def _kill_watcher(self, watcher: Eventwatch, *, away_s: float = 3.0) -> None:
        await watcher.kill()
        await asyncio.sleep(self._chance.uniform(0, away_s))
        watcher.start()

    async def _restart_watcher(self, watcher: Eventwatch) -> None:
        await self._terminate(watcher)
        watcher.start()

    async def _terminate(self, watcher: Eventwatch) -> None:
        await watcher.speaks()
        if code := await watcher.stop():
            raise AssertionError(f"SIGTERM: ended with {code}\n{watcher.tail()}")

    async def _freeze_watcher(self, watcher: Eventwatch) -> None:
        await freeze_for(self._chance.uniform(LEASE, 2.5 * LEASE), watcher)

    async def _leave_alone(self, host: Host, *, restart: Host | None = None) -> None:
        """Its nodes have no watcher, while the manager writes all their documents back without a stamp."""
        [watcher] = host.watchers
        if self._chance.random() < 0.5:
            await watcher.kill()
        else:
            await self._terminate(watcher)
        host.world.replace_share = 1.0
        if restart:
            await asyncio.sleep(STALE)
            await self._kill_watcher(restart.watchers[0], away_s=0)
        absence = LONG_ABSENCE if self._chance.random() < 0.1 else self._chance.uniform(*ABSENCE)
        await asyncio.sleep(absence)
        host.world.replace_share = REPLACES
        watcher.start()


async def all_of(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results; what fails ends the rest."""
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(each) for each in work]
    return [task.result() for task in running]


def resident_mb(pid: int) -> float:
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) / 1024
    return 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description="Random life and random faults, and an oracle.")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--engines", type=int, choices=[1, 2], default=2, help="on one database (default: 2)")
    parser.add_argument(
        "--replacing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let the manager write back whole documents that are seconds old (default)",
    )
    options = parser.parse_args()
    # Told to end, it ends as with Ctrl-C, so that it leaves nothing behind.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    logs = LOGS / str(options.seed)
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    soak = Soak(
        options.seed,
        logs,
        lambda line: print(line, flush=True),  # noqa: T201
        engines=options.engines,
        replacing=options.replacing,
    )
    try:
        asyncio.run(soak.run(options.seconds))
    finally:
        soak.figures.save()
        print(soak.figures)  # noqa: T201
        for text in soak.figures.wrong:
            print(text)  # noqa: T201
        print(f"logs: {logs}")  # noqa: T201
    return 1 if soak.figures.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
