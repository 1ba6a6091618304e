"""What no machine runs as containers: thousands of nodes, floods and recordings, on the fake engine.

The sweep is measured from the SIGHUP that asks for it to the last change that another client sees, with a tenth
of the nodes changed behind everybody's back; the floor does its own on the same signal. Staleness here is that of
freshness.py, with the fake engine's events. A flood's rate counts until the document of the event behind it
is right; a replay's time is that of the whole command, as its user waits for it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from tests.bench.effort import Effort
from tests.bench.fake_engine import FLOOD_CYCLE, NETWORK, STATUS_AFTER, FakeNode, fake_id
from tests.bench.freshness import GIVE_UP
from tests.bench.lab import NEVER, PATIENCE, EngineEvent, Lab, Seen, in_turn, match
from tests.bench.programs import BenchError, FakeControl, Place, Program
from tests.bench.report import Budget, Figure, Report, Series, percentile, pooled

EVENTFUL: Final = ("die", "start", "pause", "unpause")
#: The emits of a round go to this many nodes, however many there are.
STIRRED: Final = 10
OURS: Final = "eventwatch"
POLL: Final = 0.005
#: The part of the events that must have changed a document each.
SEEN_AT_LEAST: Final = 0.9
#: A flood for the memory figure comes in this many parts, with a look at the memory after each.
PARTS: Final = 10


@dataclass
class Watched:
    """A program that watches a fake engine, and its documents."""

    place: Place
    program: Program
    seen: Seen


@asynccontextmanager
async def watched(lab: Lab, name: str, fake: FakeControl, settings: Mapping[str, str]) -> AsyncIterator[Watched]:
    place = lab.place(name, engine=fake)
    await lab.fill(place, await fake.truth())
    async with lab.observed(place) as seen, lab.running(name, place, settings=settings) as program:
        yield Watched(place, program, seen)


# -- sweeps and events as documents grow ----------------------------------------------------------------------


async def scale(lab: Lab, report: Report, effort: Effort, console: Console) -> None:
    """Sweeps beside their floor, and events, at few and many documents."""
    settings = {"EVENTWATCH_SWEEP_INTERVAL": NEVER}
    sweeps: dict[tuple[str, int], list[float]] = defaultdict(list)
    round_trips: dict[int, int] = {}
    async with AsyncExitStack() as stack:
        fakes, ours = {}, {}
        for size in effort.sizes:
            fakes[size] = await stack.enter_async_context(lab.fake_engine(size))
            ours[size] = await stack.enter_async_context(watched(lab, OURS, fakes[size], settings))
            async with watched(lab, "floor", fakes[size], settings) as floor:
                subjects = {OURS: ours[size], "floor": floor}
                rounds = effort.rounds if size < effort.sizes[-1] else effort.long_rounds
                for number in range(rounds):
                    changed = await fakes[size].ask("POST", "silent", count=max(1, size // 10))
                    for name in subjects if number % 2 == 0 else reversed(subjects):
                        sweeps[name, size].append(await one_sweep(subjects[name], changed))
                console.print(f"  sweeps of {size:,} nodes: {rounds} rounds", style="dim")
            round_trips[size] = await quiet_sweep(lab, fakes[size], ours[size])
        _report_sweeps(report, effort, sweeps, round_trips)
        few, many = effort.sizes[0], effort.sizes[-1]
        stale: dict[int, list[list[float]]] = defaultdict(list)
        for number in range(effort.rounds):
            for size in (few, many) if number % 2 == 0 else (many, few):
                stale[size].append(await stir(fakes[size], ours[size].seen, effort))
        ours[many].program.hang_up()
        during = await stir(fakes[many], ours[many].seen, effort)
        await asyncio.sleep(1.0)
    for share, budget in ((0.5, Budget("ratio", at_most=1.1)), (0.99, None)):
        report.figures.append(
            Figure(
                f"staleness p{100 * share:.0f} at {many:,} documents",
                "ms",
                pooled(stale[many], share),
                pooled(stale[few], share),
                compared_with=f"at {few}",
                budget=budget,
            )
        )
    report.figures.append(
        Figure(
            f"staleness p50 during a sweep of {many:,}",
            "ms",
            pooled([during], 0.5),
            pooled(stale[many], 0.5),
            compared_with="without",
            note=f"p99 {percentile(during, 0.99):.3g} ms",
        )
    )


async def one_sweep(subject: Watched, changed: Mapping[str, Any]) -> float:
    """Seconds until every one of the changed nodes' documents was seen right."""
    subject.seen.clear()
    missing, last = set(changed["ids"]), 0
    looked = 0

    def complete() -> bool:
        nonlocal looked, last
        for change in subject.seen.changes[looked:]:
            looked += 1
            if change.fields.get("status") == changed["status"]:
                missing.discard(change.node_id)
                last = change.at
        return not missing

    began = time.time_ns()
    subject.program.hang_up()
    if not await subject.seen.until(complete):
        raise BenchError(f"{len(missing)} of {len(changed['ids'])} changes were not found by a sweep")
    return (last - began) / 1e9


async def quiet_sweep(lab: Lab, fake: FakeControl, subject: Watched) -> int:
    """How often the database was asked during a sweep that had nothing to change."""
    async with lab.collection(subject.place) as collection:
        database = collection.database
        size = await collection.count_documents({})
        before = await fake.inspections()
        await database.command("profile", 2)
        subject.program.hang_up()
        deadline = time.monotonic() + PATIENCE
        while await fake.inspections() < before + size:
            if time.monotonic() > deadline:
                raise BenchError("a sweep did not inspect every node")
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)
        await database.command("profile", 0)
        return await database["system.profile"].count_documents(
            {"appName": "eventwatch", "ns": f"{database.name}.ToolServerNode"}
        )


def _report_sweeps(
    report: Report,
    effort: Effort,
    sweeps: Mapping[tuple[str, int], list[float]],
    round_trips: Mapping[int, int],
) -> None:
    few, middle, many = effort.sizes
    for size in effort.sizes:
        report.figures.append(
            Figure(
                f"sweep of {size:,} nodes",
                "s",
                Series(sweeps[OURS, size]),
                Series(sweeps["floor", size]),
                budget=Budget("ratio", at_most=1.3) if size == middle else None,
            )
        )
    report.figures.append(
        Figure(
            f"sweep at {many:,}, per node",
            "ms",
            Series([1e3 * took / many for took in sweeps[OURS, many]]),
            Series([1e3 * took / middle for took in sweeps[OURS, middle]]),
            compared_with=f"at {middle:,}",
            budget=Budget("ratio", at_most=1.1),
            note="linear at worst",
        )
    )
    report.figures.append(
        Figure(
            f"database round trips, unchanged sweep at {many:,}",
            "",
            Series([float(round_trips[many])]),
            Series([float(round_trips[few])]),
            compared_with=f"at {few}",
            budget=Budget("ratio", at_most=2),
            note=f"{round_trips}; a find has a second batch beyond 101 documents",
        )
    )


async def stir(fake: FakeControl, seen: Seen, effort: Effort) -> list[float]:
    """One event every `scale_pace` seconds; the staleness of each in ms.

    A node that ends and starts again before either is written was never told to be otherwise: its document said
    `running` all the time, rightly in the end. Such events have no staleness, and are left out.
    """
    sent: list[EngineEvent] = []
    size = len(await fake.truth())
    chosen = sorted({size * number // STIRRED for number in range(STIRRED)})
    for node in chosen:  # a sweep's round may have left them exited
        await fake.emit(node, "start")
    await asyncio.sleep(1.0)
    seen.clear()
    for number in range(effort.scale_events):
        step, position = divmod(number, len(chosen))
        action = EVENTFUL[step % len(EVENTFUL)]
        node_id, time_nano = await fake.emit(chosen[position], action)
        sent.append(EngineEvent(node_id, action, time_nano))
        await asyncio.sleep(effort.scale_pace)
    matched = await match(sent, seen, within=GIVE_UP)
    found = [(at - event.time_nano) / 1e6 for event, at in matched.items() if at is not None]
    said = dict.fromkeys((event.node_id for event in sent), "running")
    said |= {change.node_id: change.fields["status"] for change in seen.changes if "status" in change.fields}
    lost = {event.node_id for event in sent if matched[event] is None}
    lost = {i for i in lost if said[i] != STATUS_AFTER[[e.action for e in sent if e.node_id == i][-1]]}
    if lost or len(found) < len(sent) * SEEN_AT_LEAST:
        raise BenchError(f"only {len(found)} of {len(sent)} events were seen; wrong in the end: {sorted(lost)}")
    return found


# -- floods ---------------------------------------------------------------------------------------------------


async def flood(lab: Lab, report: Report, effort: Effort, console: Console) -> None:
    """Many events as fast as they are taken, and the memory over many more."""
    rates: dict[str, list[float]] = defaultdict(list)
    async with lab.fake_engine(effort.nodes) as fake:

        async def measure(name: str) -> None:
            place = lab.place(name, engine=fake)
            await lab.fill(place, await fake.truth())
            async with lab.running(name, place):
                rates[name].append(await one_flood(lab, fake, place, effort.flood))

        await in_turn((OURS, "merge"), effort.rounds, measure, console, "flood")
        report.figures.append(
            Figure(
                f"flood of {effort.flood:,} events",
                "events/s",
                Series(rates[OURS]),
                Series(rates["merge"]),
                compared_with="bare loop",
            )
        )
        place = lab.place(OURS, engine=fake)
        await lab.fill(place, await fake.truth())
        async with lab.running(OURS, place) as program:
            resident, total = [], effort.flood_memory * effort.rounds
            for _ in range(PARTS):
                await one_flood(lab, fake, place, total // PARTS)
                resident.append(program.usage().resident)
            wrong = await wrong_documents(lab, fake, place)
    report.details["flood_memory_mb"] = resident
    report.figures.append(
        Figure(
            f"memory after {total:,} events",
            "MB",
            Series(resident[-1:]),
            Series(resident[:1]),
            compared_with=f"after {total // PARTS:,}",
            budget=Budget("ratio", at_most=1.05),
            note=f"after each tenth: {', '.join(f'{mb:.1f}' for mb in resident)}; wrong documents: {wrong}",
        )
    )


async def one_flood(lab: Lab, fake: FakeControl, place: Place, events: int) -> float:
    """Events per second until the document of the event behind the flood was right."""
    marker = await fake.ask("POST", "flood", events=events)
    async with lab.collection(place) as collection:
        deadline = time.monotonic() + PATIENCE
        while not await collection.count_documents({"_id": marker["id"], "status": marker["status"]}):
            if time.monotonic() > deadline:
                raise BenchError("the event behind the flood is not in the documents")
            await asyncio.sleep(POLL)
        began: int = marker["began"]
        return events / ((time.time_ns() - began) / 1e9)


async def wrong_documents(lab: Lab, fake: FakeControl, place: Place, *, within: float = 3.0) -> int:
    """How many documents do not say the truth, once they had time to."""
    truth = await fake.truth()
    deadline = time.monotonic() + within
    async with lab.collection(place) as collection:
        while True:
            rows = await collection.find({"_id": {"$in": list(truth)}}).to_list()
            wrong = sum(any(row.get(name) != value for name, value in truth[row["_id"]].items()) for row in rows)
            if not wrong or time.monotonic() > deadline:
                return wrong + len(truth) - len(rows)
            await asyncio.sleep(0.05)


# -- replay ---------------------------------------------------------------------------------------------------


async def replay(lab: Lab, report: Report, effort: Effort, console: Console) -> None:
    """`eventwatch replay --speed 0` beside a bare loop over the same file."""
    recording = lab.folder / "replay.jsonl"
    nodes = write_recording(recording, nodes=effort.nodes, events=effort.replayed)
    took: dict[str, list[float]] = defaultdict(list)

    async def measure(name: str) -> None:
        async with lab.fake_engine(1) as fake:
            place = lab.place(name, engine=fake)
        if name != OURS:  # a replay plays the manager itself
            await lab.fill(place, {node.node_id: node.truth for node in nodes})
        took[name].append(await one_replay(lab, name, place, recording))

    await in_turn((OURS, "bare"), effort.rounds, measure, console, "replay")
    report.figures.append(
        Figure(
            f"replay of {effort.replayed:,} events at full speed",
            "s",
            Series(took[OURS]),
            Series(took["bare"]),
            compared_with="bare loop",
            budget=Budget("value", at_most=3.0),
            note="from the start of the process; one event per recorded millisecond",
        )
    )


async def one_replay(lab: Lab, name: str, place: Place, recording: Path) -> float:
    if name == OURS:
        command = ("replay", str(recording), "--speed", "0", "--json")
        context = lab.launcher.eventwatch(place, *command)
    else:
        context = lab.launcher.python(
            "bare-loop", "-m", "tests.bench.floor", "replay", str(recording), environment=place.environment
        )
    began = time.monotonic()
    async with context as program, asyncio.timeout(PATIENCE):
        if await program.process.wait():
            raise BenchError(f"{name} failed: {program.last_words()}")
    return time.monotonic() - began


def write_recording(path: Path, *, nodes: int, events: int) -> list[FakeNode]:
    """A recording of nodes that go round the flood's cycle; an inspection after each event, as when recorded."""
    crowd = [FakeNode(number, fake_id(number)) for number in range(nodes)]
    at = 1_767_225_600_000_000_000
    with path.open("w", encoding="utf-8") as file:

        def write(record: Mapping[str, object]) -> None:
            file.write(json.dumps(record, separators=(",", ":")) + "\n")

        def inspect(node: FakeNode) -> None:
            seen = node.inspection()
            kept = {name: seen[name] for name in ("Id", "Name", "Created", "State")}
            config = {name: seen["Config"][name] for name in ("Image", "Labels", "ExposedPorts")}
            networks = {"Networks": seen["NetworkSettings"]["Networks"]}
            container = {**kept, "Config": config, "NetworkSettings": networks}
            write({"kind": "inspect", "at": at, "id": node.node_id, "status": 200, "container": container})

        engine = {"version": "20.10.24", "api_version": "1.41"}
        write({"kind": "header", "version": 1, "engine": engine, "network": NETWORK, "started_at": at})
        for node in crowd:
            inspect(node)
        for number in range(events):
            step, position = divmod(number, nodes)
            node, action = crowd[position], FLOOD_CYCLE[step % len(FLOOD_CYCLE)]
            node.status = STATUS_AFTER.get(action, node.status)
            at += 1_000_000
            write({"kind": "event", "at": at, "event": json.loads(node.event(action, at))})
            inspect(node)
    truth = {node.node_id: node.truth for node in crowd}
    path.with_name(f"{path.stem}.expected.json").write_text(json.dumps(truth), encoding="utf-8")
    return crowd
