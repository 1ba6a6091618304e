"""A small world in memory for the property tests: containers with a known past, an engine, and a store.

It keeps to what was measured of real engines (and is free in everything else): an inspection blocks while the
container's lock is held and shows a state no older than the question; `kill` comes before the change, `stop`
before or after `die`; health changes with pause, stop and start without an event; a kill while restarting has
no event at all; network changes have network events only; deliveries come up to 100 ms late, in any order, and
more than once; a resumed stream repeats what is newer than `since`.

Each state of a container has a version that shows as its only exposed port, so that a document's `port` tells
which state it was made of.
"""

from __future__ import annotations

import asyncio
import random
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from eventwatch.core.clock import Clock, KindestClock
from eventwatch.core.errors import EngineError
from eventwatch.core.facts import Change, Event, Observation, Owner, Recorded, Usage, Write
from eventwatch.core.listing import Listed
from eventwatch.engine.protocol import EngineInfo
from eventwatch.engine.wire import parse_container, parse_listed
from eventwatch.pipeline.pipeline import Pipeline
from eventwatch.pipeline.requests import SweepRequests
from eventwatch.replay.timeline import Busy, Simulation
from eventwatch.settings.model import Settings
from eventwatch.store.connection import Store
from eventwatch.store.documents import ToolServerNode
from eventwatch.store.nodes import LOOKED_AT
from eventwatch.store.rows import Lease, Peer, Refused
from tests.kit.listed import row_of

START = 1_800_000_000_000_000_000
MS = 1_000_000
NETWORK = "net"
FIRST_PORT = 10_000
ENGINE_ID = "simulated"
LATEST_DELIVERY = 100 * MS

OPERATIONS = (
    "start",
    "exit",
    "stop",
    "crash",
    "give_up",
    "pause",
    "unpause",
    "health",
    "reattach",
    "rename",
    "remove",
)
GAPS = (1, 5, 20, 120, 300, 1200)


@dataclass(frozen=True, slots=True)
class State:
    """What is true of a container from `at` on; `status` "" means that it is gone."""

    at: int
    version: int = 0
    life: int = 0
    status: str = "created"
    health: str = "none"
    ip: str = ""
    started_at: int | None = None
    finished_at: int | None = None
    checked: bool = False

    def inspection(self, node_id: str) -> dict[str, Any]:
        return {
            "Id": node_id,
            "State": {
                "Status": self.status,
                "ExitCode": 0,
                "StartedAt": text(self.started_at),
                "FinishedAt": text(self.finished_at),
                **({"Health": {"Status": self.health}} if self.health != "none" else {}),
            },
            "Config": {
                "ExposedPorts": {f"{FIRST_PORT + self.version}/tcp": {}},
                "Healthcheck": {"Test": ["CMD", "check"]} if self.checked else None,
            },
            "NetworkSettings": {"Networks": {NETWORK: {"IPAddress": self.ip}}},
        }


def text(at: int | None) -> str:
    if at is None:
        return "0001-01-01T00:00:00Z"
    return datetime.fromtimestamp(at // 1_000_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%S") + (
        f".{at % 1_000_000_000:09d}Z"
    )


class Container:
    """The past and future of one container, made of operations, each at its time."""

    def __init__(self, number: int, chance: random.Random, *, checked: bool, starts_at: int) -> None:
        self.id = f"{number:064x}"
        self.number = number
        self.events: list[Event] = []
        self.locks: list[tuple[int, int]] = []
        #: Since when its endpoint on the network has had which address.
        self.endpoints: list[tuple[int, str]] = [(starts_at, "")]
        self._chance = chance
        self._checked = checked
        self._now = starts_at
        self.states = [State(starts_at, checked=checked)]
        self._tell("create")

    def __repr__(self) -> str:
        """Its past, for reading what a property failed with; times in ms."""
        entries = [
            (state.at, f"[{state.version} {state.status or 'gone'} {state.health} {state.ip}]")
            for state in self.states
        ]
        entries += [(event.time_nano, f"{event.action} {event.health or ''}".strip()) for event in self.events]
        told = ", ".join(f"{(at - START) / MS:.3f} {what}" for at, what in sorted(entries))
        return f"<Container {self.number}: {told}>"

    @property
    def last(self) -> State:
        return self.states[-1]

    def at(self, time_ns: int) -> State | None:
        """What was true then; None before it was created."""
        number = bisect_right(self.states, time_ns, key=lambda state: state.at)
        return self.states[number - 1] if number else None

    def unlocked_at(self, time_ns: int) -> int:
        """When the container's lock is free, at `time_ns` or later."""
        for since, until in self.locks:
            if since <= time_ns < until:
                time_ns = until
        return time_ns

    def address_at(self, time_ns: int) -> str:
        """What the network says of it then."""
        number = bisect_right(self.endpoints, time_ns, key=lambda endpoint: endpoint[0])
        return self.endpoints[number - 1][1] if number else ""

    def do(self, operation: str, gap: int) -> None:
        """Let `operation` happen after `gap` ms, if it can happen to a container in this state."""
        self._now += gap * MS
        getattr(self, f"_{operation}")()

    def _tell(self, action: str, *, health: str | None = None) -> None:
        # Each event a little later than what it is about, and than the one before.
        self._now += self._chance.randint(1, 3) * MS
        network = ("n", NETWORK) if action in {"connect", "disconnect"} else ("", "")
        self.events.append(Event(action, self.id, self._now, health, *network))

    def _join(self, ip: str) -> None:
        self.endpoints.append((self._now, ip))
        self._tell("connect")

    def _leave(self) -> None:
        self.endpoints.append((self._now, ""))
        self._tell("disconnect")

    def _become(self, **changes: Any) -> None:
        self._now += 1000
        self.states.append(replace(self.last, at=self._now, version=self.last.version + 1, **changes))

    def _holding(self, within_ms: int) -> None:
        """Let time pass while the container's lock is held."""
        until = self._now + self._chance.randint(1, within_ms) * MS
        self.locks.append((self._now, until))
        self._now = until

    def _start(self) -> None:
        if self.last.status in {"created", "exited"}:
            self._begin()

    def _begin(self) -> None:
        life = self.last.life + 1
        ip = f"10.{self.number}.{life}.1"
        self._join(ip)
        self._holding(200)
        self._become(
            status="running",
            health="starting" if self._checked else "none",
            life=life,
            ip=ip,
            started_at=self._now + 1000,
        )
        self._tell("start")

    def _down(self, status: str, *, stop: bool = False) -> None:
        self._become(
            status=status, health="unhealthy" if self._checked else "none", ip="", finished_at=self._now + 1000
        )
        early = stop and self._chance.random() < 0.5
        began = self._now
        if early:
            self._tell("stop")
        self._tell("die")
        self.locks.append((began, self._now))
        self._holding(50)
        self._leave()
        if stop and not early:
            self._tell("stop")

    def _exit(self) -> None:
        if self.last.status == "running":
            self._down("exited")

    def _stop(self) -> None:
        if self.last.status == "restarting":
            self._become(status="exited")
            self._tell("stop")
        elif self.last.status in {"running", "paused"}:
            self._tell("kill")
            if self.last.status == "paused":
                self._unpause()
            self._now += self._chance.randint(1, 100) * MS
            self._down("exited", stop=True)

    def _crash(self) -> None:
        if self.last.status == "running":
            self._down("restarting")
            if self._chance.random() < 0.5:
                self._now += self._chance.randint(100, 400) * MS
                self._begin()

    def _give_up(self) -> None:
        if self.last.status == "restarting":
            self._become(status="exited")  # a kill while restarting: no event tells

    def _pause(self) -> None:
        if self.last.status == "running":
            self._become(
                status="paused", health="unhealthy" if self.last.health == "healthy" else self.last.health
            )
            self._tell("pause")

    def _unpause(self) -> None:
        if self.last.status == "paused":
            self._become(status="running")
            self._tell("unpause")

    def _health(self) -> None:
        if self.last.status == "running" and self._checked:
            health = "unhealthy" if self.last.health == "healthy" else "healthy"
            self._become(health=health)
            self._tell("health_status", health=health)

    def _reattach(self) -> None:
        if self.last.status == "running":
            self._become(ip="")
            self._tell("disconnect")
            self._leave()
            self._now += self._chance.choice(GAPS) * MS
            self._become(ip=f"10.{self.number}.{self.last.life}.{2 + self._chance.randrange(200)}")
            self._join(self.last.ip)

    def _rename(self) -> None:
        if self.last.status:
            self._tell("rename")

    def _remove(self) -> None:
        if not self.last.status:
            return
        if self.last.status in {"running", "paused"}:
            self._tell("kill")
            self._down("removing")
        self._become(status="", ip="")
        self._tell("destroy")


# -- the engine -----------------------------------------------------------------------------------------------


@dataclass
class Stream:
    """What goes wrong between the engine and us."""

    repeated: float = 0.0
    #: Times (ns) between which no stream can be held and nothing can be asked.
    away: tuple[int, int] | None = None
    #: A reconnect repeats nothing: the engine restarted, and its buffer with it.
    forgets: bool = False
    #: Times (ns) between which inspections fail, while events flow.
    refuses: tuple[int, int] | None = None
    #: Events with a `timeNano` between these are never delivered.
    dropped: tuple[int, int] | None = None


class UnaskedEngine:
    """What an engine in a test need not know: to be asked for it is an error."""

    async def identify(self) -> EngineInfo:
        raise NotImplementedError

    async def inspect(self, node_id: str, *, as_of: int = 0) -> Observation:
        raise NotImplementedError

    async def resolve(self, name: str) -> str | None:
        raise NotImplementedError

    async def list_all(self) -> list[str]:
        raise NotImplementedError

    async def list_rows(self) -> list[Listed]:
        raise NotImplementedError

    async def list_running(self, label: str | None = None) -> list[str]:
        raise NotImplementedError

    async def list_newest(self, limit: int) -> list[str]:
        raise NotImplementedError

    async def addresses(self, network_id: str) -> Mapping[str, str]:  # noqa: ARG002 - as an engine is asked
        return {}

    async def usage(self, node_id: str) -> Usage:
        raise NotImplementedError

    async def stop(self, node_id: str, *, grace: float) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


class SimulatedEngine(UnaskedEngine):
    """Tells of the containers; `chance` decides how late."""

    def __init__(
        self, containers: Sequence[Container], stream: Stream, chance: random.Random, clock: Clock
    ) -> None:
        self._containers = {container.id: container for container in containers}
        self._stream = stream
        self._chance = chance
        self._clock = clock
        #: Of each state that an inspection showed, how new (ns) it was at least, as far as the inspection tells.
        self.proven: dict[tuple[str, int], int] = {}
        self._deliveries = sorted(self._deliver(), key=lambda delivery: delivery[0])

    def _deliver(self) -> Iterator[tuple[int, Event]]:
        lost = self._stream.dropped or (0, 0)
        for container in self._containers.values():
            for event in container.events:
                if lost[0] <= event.time_nano < lost[1]:
                    continue
                times = 2 if self._chance.random() < self._stream.repeated else 1
                for _ in range(times):
                    yield event.time_nano + self._chance.randint(0, LATEST_DELIVERY), event

    @property
    def last_delivery(self) -> int:
        return max((at for at, _ in self._deliveries), default=START)

    def _check(self) -> None:
        if self._is_within(self._stream.away):
            raise EngineError("away", unreachable=True)

    def _is_within(self, times: tuple[int, int] | None) -> bool:
        return times is not None and times[0] <= self._clock.time_ns() < times[1]

    async def identify(self) -> EngineInfo:
        self._check()
        now = datetime.fromtimestamp(self._clock.time_ns() / 1e9, UTC)
        return EngineInfo(ENGINE_ID, "", "", "", now)

    @asynccontextmanager
    async def events(
        self,
        since: int | None,
        on_malformed: Callable[[str], object],  # noqa: ARG002
    ) -> AsyncIterator[AsyncIterator[Event]]:
        self._check()
        yield self._read(since, self._clock.time_ns())

    async def _read(self, since: int | None, opened: int) -> AsyncIterator[Event]:
        away = self._stream.away
        breaks = away[0] if away and opened < away[0] else None
        if since is not None and not self._stream.forgets:
            missed = [event for at, event in self._deliveries if at <= opened and event.time_nano >= since]
            for event in sorted(missed, key=lambda event: event.time_nano):
                yield event
        for at, event in self._deliveries:
            if at <= opened:
                continue
            if breaks is not None and at >= breaks:
                break
            await self._until(at)
            yield event
        if breaks is None:
            await asyncio.Event().wait()
            return
        await self._until(breaks)
        raise EngineError("broken")

    async def _until(self, at: int) -> None:
        await self._clock.sleep(max(0, at - self._clock.time_ns()) / 1e9)

    async def inspect(self, node_id: str, *, as_of: int = 0) -> Observation:
        self._check()
        await self._clock.sleep(self._chance.choice((0.0, 0.0005, 0.03, 0.2, 0.6)))
        container = self._containers[node_id]
        while (free := container.unlocked_at(self._clock.time_ns())) > self._clock.time_ns():
            await self._until(free)
        state = container.at(self._clock.time_ns())
        self._check()
        if self._is_within(self._stream.refuses):
            raise EngineError("internal error", status=500)
        await self._clock.sleep(self._chance.choice((0.0, 0.0005, 0.02, 0.1)))  # the answer's way to us
        self._check()
        if state is None or not state.status:
            return Observation(node_id=node_id, found=False, time_nano=as_of)
        seen = parse_container(state.inspection(node_id), network=NETWORK, as_of=as_of)
        key = (node_id, state.version)
        self.proven[key] = min(seen.time_nano, self.proven.get(key, seen.time_nano))
        return seen

    async def addresses(self, network_id: str) -> Mapping[str, str]:  # noqa: ARG002 - there is one
        self._check()
        await self._clock.sleep(self._chance.choice((0.0, 0.0005, 0.03, 0.2)))
        self._check()
        if self._is_within(self._stream.refuses):
            raise EngineError("internal error", status=500)
        now = self._clock.time_ns()
        told = {i: address for i, container in self._containers.items() if (address := container.address_at(now))}
        await self._clock.sleep(self._chance.choice((0.0, 0.0005, 0.02, 0.1)))  # the answer's way to us
        return told

    async def list_all(self) -> list[str]:
        return await self.list_newest(len(self._containers))

    async def list_rows(self) -> list[Listed]:
        """As they were a moment ago, as Docker's are."""
        self._check()
        now = self._clock.time_ns()
        moment = datetime.fromtimestamp(now / 1e9, UTC)
        rows = []
        for container in self._containers.values():
            there, old = container.at(now), container.at(now - self._chance.choice((0, 5, 70)) * MS)
            if there and there.status:
                shown = old if old and old.status else there
                rows.append(parse_listed(row_of(shown.inspection(container.id), moment)))
        await self._clock.sleep(self._chance.choice((0.0, 0.0005, 0.03)))
        return [row for row in rows if row]

    async def list_running(self, label: str | None = None) -> list[str]:
        assert label is None
        self._check()
        now = self._clock.time_ns()
        states = {i: each.at(now) for i, each in self._containers.items()}
        return [i for i, state in states.items() if state and state.status in {"running", "paused"}]

    async def list_newest(self, limit: int) -> list[str]:
        self._check()
        now = self._clock.time_ns()
        there = [each for each in self._containers.values() if (state := each.at(now)) and state.status]
        there.sort(key=lambda each: each.states[0].at, reverse=True)
        return [each.id for each in there[:limit]]


# -- the store ------------------------------------------------------------------------------------------------


class MemoryStore(Store):
    """The store's contract on a dictionary, with calls that take time. `watchers` see each document written."""

    def __init__(self, chance: random.Random, clock: Clock) -> None:
        self.documents: dict[str, Recorded] = {}
        self.deleted: list[str] = []
        self.watchers: list[Callable[[Recorded], object]] = []
        self.engines = 1
        self.looks = 0
        self._chance = chance
        self._clock = clock

    @asynccontextmanager
    async def _call(self) -> AsyncIterator[None]:
        await self._clock.sleep(self._chance.choice((0.0, 0.0003, 0.02)))
        yield
        await self._clock.sleep(self._chance.choice((0.0, 0.0003, 0.02)))

    async def read(
        self,
        node_ids: Collection[str],
        *,
        to_write: bool = False,  # noqa: ARG002
    ) -> dict[str, Recorded]:
        async with self._call():
            documents = {i: self.documents[i] for i in node_ids if i in self.documents}
        return dict(documents)

    async def look(self, node_ids: Collection[str]) -> dict[str, tuple[object, ...]]:
        async with self._call():
            self.looks += 1
            documents = [self.documents[i] for i in node_ids if i in self.documents]
            return {doc.node_id: tuple(getattr(doc, name) for name in LOOKED_AT) for doc in documents}

    async def count_engines(self) -> int:
        return self.engines

    async def read_own(
        self, engine_id: str, node_ids: Collection[str], *, leftovers: bool = False
    ) -> dict[str, Recorded]:
        assert engine_id == ENGINE_ID
        return await self.read(self.documents if leftovers else node_ids)

    async def write(self, changes: Sequence[Write], *, lease: Lease | None) -> Refused:
        assert lease is None
        vanished, conflicting = set(), set()
        async with self._call():
            for change in changes:
                document = self.documents.get(change.node_id)
                if change.delete:
                    self.documents.pop(change.node_id, None)
                    self.deleted.append(change.node_id)
                elif document is None:
                    vanished.add(change.node_id)
                elif any(getattr(document, name) != value for name, value in (change.expected or {}).items()):
                    conflicting.add(change.node_id)
                else:
                    self.put(replace(document, **change.fields))  # type: ignore[arg-type]
        return Refused(frozenset(vanished), frozenset(), frozenset(conflicting))

    async def register(self, node: ToolServerNode, *, lease: Lease | None) -> bool:
        raise NotImplementedError

    async def system_time(self) -> datetime:
        return datetime.fromtimestamp(self._clock.time_ns() / 1e9, UTC)

    async def peers(self, engine_id: str, *, besides: str = "") -> list[Peer]:  # noqa: ARG002
        return []

    async def read_owners(self, node_ids: Collection[str]) -> dict[str, Owner]:  # noqa: ARG002
        return {}

    async def twin_seen(self, engine_id: str, *, within: float) -> str | None:  # noqa: ARG002
        return None

    async def trace_of_others(self, engine_id: str) -> str | None:  # noqa: ARG002
        return None

    def put(self, document: Recorded) -> None:
        self.documents[document.node_id] = document
        for watcher in self.watchers:
            watcher(document)


class OnlyUrgent(SweepRequests):
    """Sweeps are made when a part finds that it needs one, not at a connect and not on the timer."""

    def ask(self, *, after_connect: bool = False) -> None:
        if not after_connect:
            super().ask()

    async def wait(self, seconds: float) -> bool:
        return await super().wait(seconds + 1e6)


# -- everything together --------------------------------------------------------------------------------------


@dataclass
class World:
    """Containers, the pipeline that watches them, and the manager that makes their documents."""

    containers: Sequence[Container]
    stream: Stream
    seed: int
    #: Sweeps happen as in a watcher: at each connect, on the timer, at the end. Without, only when a node's own
    #: inspection finds it gone, which is the sweep's to decide.
    sweeps: bool = True
    #: Documents are looked at between sweeps, as in a watcher.
    looks: bool = False
    settings: Settings = field(
        default_factory=lambda: Settings.model_construct(
            node_network=NETWORK, node_port=1, idle_timeout=0.0, settle_delay=0.25, sweep_interval=5.0
        )
    )

    def __post_init__(self) -> None:
        chance = random.Random(self.seed)
        self.time = Simulation(START, Busy())
        self.clock = self.time.clock
        self.engine = SimulatedEngine(self.containers, self.stream, chance, self.clock)
        self.store = MemoryStore(chance, self.clock)
        self.changes: list[Change] = []
        self._chance = chance

    @property
    def end(self) -> int:
        """When everything has happened and been told."""
        told = max(container.states[-1].at for container in self.containers)
        mended = max(self.stream.away or (0, 0), self.stream.refuses or (0, 0))[1]
        return max(told, self.engine.last_delivery, mended)

    async def run(
        self, *, after: float = 3.0, meanwhile: Mapping[int, Callable[[], object]] | None = None
    ) -> None:
        """Run to the end and `after` seconds longer, then sweep once more if there are sweeps."""
        acts = meanwhile or {}
        end = max(self.end, *acts, START) + round(after * 1e9)
        async with asyncio.TaskGroup() as tasks:
            pipeline = self._start(tasks)
            for at, act in acts.items():
                self.clock.call_later(max(0, at - START) / 1e9, act)
            for container in self.containers:
                self._insert_later(container)
            await self.time.run_until(end)
            if self.sweeps:
                pipeline.requests.ask()
                await self.time.run_until(end + round(after * 1e9))
            pipeline.end()

    def _insert_later(self, container: Container) -> None:
        late = self._chance.choice((0, 20, 300)) * MS
        at = container.events[0].time_nano + late

        def insert() -> None:
            state = container.at(at)
            if state and state.status:  # the manager does not keep what is gone already
                self.store.put(Recorded(container.id, container.id[:12], "created", "none", "", FIRST_PORT))

        self.clock.call_later(max(0, at - START) / 1e9, insert)

    def _start(self, tasks: asyncio.TaskGroup) -> Pipeline:
        settings = self.settings
        pipeline = self.pipeline = Pipeline(
            engine=self.engine,
            store=self.store,
            settings=settings,
            clock=self.clock,
            time=KindestClock(self.clock, settings.idle_timeout),
            tasks=tasks,
            engine_id=ENGINE_ID,
            requests=SweepRequests(self.clock) if self.sweeps else OnlyUrgent(self.clock),
            manager_id="simulated",
            rng=random.Random(self.seed),
            looks=self.looks,
        )
        self.reconciler, self.requests = pipeline.reconciler, pipeline.requests
        if not self.sweeps:
            self.reconciler.replace_known({}, known_before={})  # as a first pass where there are no documents yet
        pipeline.writer.listeners.append(self.changes.append)
        pipeline.start()
        return pipeline

    def wrong(self) -> dict[str, tuple[object, object]]:
        """Documents that do not say the truth, each with what it says and what is true."""
        found: dict[str, tuple[object, object]] = {}
        for container in self.containers:
            document = self.store.documents.get(container.id)
            truth = None
            if container.last.status:
                seen = parse_container(container.last.inspection(container.id), network=NETWORK)
                truth = (seen.status, seen.health, seen.ip, seen.tcp_ports[0])
            says = document and (document.status, document.health, document.ip, document.port)
            never_made = says is None and container.id not in self.store.deleted
            if says != truth and not never_made:
                found[container.id] = (says, truth)
        return found
