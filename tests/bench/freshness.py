"""How stale documents are on the real engine: one event at a time, and a hundred at once.

Staleness is the time from the engine's `timeNano` of an event to the moment when another client sees the
document say what the event says, or something newer (MongoDB change stream, read by a process of its own). The
same clock serves both, as engine, database and observer share the machine.

eventwatch, the floor and the poller take turns on the same containers with nothing else watching them. Per event
the first change is taken that says the right thing about the right document, whoever of the tiers wrote it.
What is not measured: events that prove nothing by themselves (`stop`, `kill`), which a settle makes right.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from rich.console import Console

from tests.bench.effort import Effort
from tests.bench.lab import EngineEvent, Lab, Seen, in_turn, match
from tests.bench.programs import BenchError
from tests.bench.report import Budget, Figure, Report, Series, percentile, pooled
from tests.kit.nodes import Node

#: Seconds until a change that was not seen counts as missed.
GIVE_UP = 5.0
HEALTH_PERIOD = 2.0
#: Every other node begins with the second, so that all kinds come at any time.
CYCLES = (("pause", "unpause", "kill", "start"), ("kill", "start", "pause", "unpause"))


@dataclass
class Samples:
    """Staleness in ms, per program, round by round and by action; and what was never seen."""

    rounds: dict[str, list[list[float]]] = field(default_factory=lambda: defaultdict(list))
    actions: dict[str, dict[str, list[float]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    missed: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    async def add(self, name: str, events: Sequence[EngineEvent], seen: Seen) -> None:
        """Match a round's events with the changes seen; waits for those that are still on their way."""
        found: list[float] = []
        for event, at in (await match(events, seen, within=GIVE_UP)).items():
            if at is None:
                self.missed[name] += 1
                continue
            found.append((at - event.time_nano) / 1e6)
            self.actions[name][event.action].append(found[-1])
        if not found:
            raise BenchError(f"{name} made none of {len(events)} changes within {GIVE_UP:.0f} s")
        self.rounds[name].append(found)

    def series(self, name: str, share: float) -> Series:
        return pooled(self.rounds[name], share)

    def all(self, name: str) -> list[float]:
        return [sample for samples in self.rounds[name] for sample in samples]

    def note(self) -> str:
        counts = ", ".join(f"{len(self.all(name))} {name}" for name in self.rounds)
        missed = ", ".join(f"{count} {name}" for name, count in self.missed.items())
        return f"changes matched: {counts}" + (f"; never seen: {missed}" if missed else "")


async def staleness(lab: Lab, report: Report, effort: Effort, console: Console) -> None:
    """Quiet engine: start, die, pause, unpause and health, one event at a time."""
    plain = await lab.plain_nodes(effort.stirred)
    health = await lab.start_nodes(effort.stirred_health, healthcheck="flag")
    samples = Samples()

    async def measure(name: str) -> None:
        await lab.all_running(plain)
        await one_round(lab, name, [*plain, *health], samples, lambda: stir(plain, health, effort))

    await in_turn(("eventwatch", "floor"), effort.rounds, measure, console, "staleness")
    await in_turn(("poller",), effort.long_rounds, measure, console, "staleness of the poller")
    await lab.remove(health)
    report.staleness = {name: samples.all(name) for name in ("floor", "eventwatch", "poller")}
    report.details["staleness_ms_by_action"] = {
        name: {
            action: {"count": len(found), "p50": percentile(found, 0.5), "p99": percentile(found, 0.99)}
            for action, found in sorted(actions.items())
        }
        for name, actions in samples.actions.items()
    }
    for share, limit in ((0.5, 1.1), (0.99, 1.0)):
        name, note = f"staleness p{100 * share:.0f}, quiet engine", samples.note() if share == 0.5 else ""
        report.figures.append(beside_the_floor(name, samples, share, at_most=limit, note=note))
    report.figures.append(
        Figure(
            "freshness p50 beside the poller",
            "ms",
            samples.series("eventwatch", 0.5),
            samples.series("poller", 0.5),
            compared_with="poller",
            inverse=True,
            budget=Budget("ratio", at_least=100),
        )
    )


async def burst(lab: Lab, report: Report, effort: Effort, console: Console) -> None:
    """Many kills at once, and then as many starts."""
    nodes = await lab.plain_nodes(effort.burst)
    bursts = {"kills": Samples(), "starts": Samples()}

    async def kill_all() -> None:
        await asyncio.gather(*(node.kill() for node in nodes))

    async def start_all() -> None:
        await asyncio.gather(*(node.start() for node in nodes))

    async def measure(name: str) -> None:
        await lab.all_running(nodes)
        for what, happen in (("kills", kill_all), ("starts", start_all)):
            await asyncio.sleep(0.5)
            await one_round(lab, name, nodes, bursts[what], happen)

    await in_turn(("eventwatch", "floor"), effort.long_rounds, measure, console, "burst")
    await lab.remove(nodes)
    report.details["burst_ms"] = {name: bursts["kills"].all(name) for name in bursts["kills"].rounds}
    for what, limit in (("kills", 1.0), ("starts", 1.1)):
        samples = bursts[what]
        name = f"burst of {effort.burst} {what}"
        report.figures += [
            beside_the_floor(f"{name} p99", samples, 0.99, at_most=limit, note=samples.note()),
            beside_the_floor(f"{name} p50", samples, 0.5),
        ]


def beside_the_floor(
    name: str, samples: Samples, share: float, *, at_most: float | None = None, note: str = ""
) -> Figure:
    """A percentile of eventwatch's staleness and of the floor's; `at_most`: the budget of their ratio."""
    ours, floor = samples.series("eventwatch", share), samples.series("floor", share)
    budget = None if at_most is None else Budget("ratio", at_most=at_most)
    return Figure(name, "ms", ours, floor, budget=budget, note=note)


async def one_round(
    lab: Lab, name: str, nodes: Sequence[Node], samples: Samples, happen: Callable[[], Awaitable[None]]
) -> None:
    """Let things happen while `name` watches, and match what the engine said with what the documents said."""
    place = lab.place(name)
    await lab.fill(place, await lab.truth(nodes))
    async with lab.observed(place) as seen, lab.running(name, place), lab.engine_events() as events:
        seen.clear()
        await happen()
        await asyncio.sleep(0.2)
        ours = {node.id for node in nodes}
        await samples.add(name, [event for event in events if event.node_id in ours], seen)


async def stir(plain: Sequence[Node], health: Sequence[Node], effort: Effort) -> None:
    """Let one thing happen every `pace` seconds, to each node in turn, and flip the health checks meanwhile."""
    begun: dict[int, asyncio.Task[None]] = {}
    async with asyncio.TaskGroup() as tasks:
        flipping = [tasks.create_task(flip(node)) for node in health]
        for number in range(effort.events):
            step, position = divmod(number, len(plain))
            if position in begun:  # a slow machine: one thing after the other per node
                await begun[position]
            cycle = CYCLES[position % len(CYCLES)]
            action: Callable[[], Awaitable[None]] = getattr(plain[position], cycle[step % len(cycle)])
            begun[position] = tasks.create_task(_do(action))
            await asyncio.sleep(effort.pace)
        for task in flipping:
            task.cancel()


async def _do(action: Callable[[], Awaitable[None]]) -> None:
    await action()


async def flip(node: Node) -> None:
    """Turn a node from healthy to unhealthy and back, for ever, out of step with the others."""
    healthy = False
    await asyncio.sleep(random.uniform(0, HEALTH_PERIOD))
    while True:
        healthy, began = not healthy, time.monotonic()
        await node.set_healthy(healthy)
        await asyncio.sleep(max(0.0, HEALTH_PERIOD - (time.monotonic() - began)))
