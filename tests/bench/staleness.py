"""`python -m tests.bench.staleness`: how stale a document is after a start and after a die, beside the floor.

Prints p50 and p99 in ms of 200 events as a Markdown table: from the engine's `timeNano` to the moment when the
change stream tells another process. eventwatch and the floor (a raw aiodocker event, one pymongo `update_one`)
take turns on the same containers. The short form of `python -m tests.bench --only staleness`, for a first look.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from functools import partial

from rich.console import Console

from tests.bench.freshness import Samples, one_round
from tests.bench.lab import Lab, in_turn, opened_lab
from tests.bench.report import percentile
from tests.kit.engines import INSTALLED, VERSIONS, PrivateEngine, Version
from tests.kit.nodes import Node

PROGRAMS = ("eventwatch", "floor")
NODES = 12
#: Seconds between two events: a quiet engine.
PACE = 0.15


async def kill_and_start(nodes: Sequence[Node], events: int) -> None:
    """Kill all nodes, one after the other, start them all again, and so on."""
    for number in range(events):
        lap, position = divmod(number, len(nodes))
        await (nodes[position].start if lap % 2 else nodes[position].kill)()
        await asyncio.sleep(PACE)


async def measure(events: int, rounds: int, console: Console, version: Version = INSTALLED) -> Samples:
    samples = Samples()

    async def one(lab: Lab, name: str) -> None:
        nodes = await lab.plain_nodes(NODES)
        await one_round(lab, name, nodes, samples, lambda: kill_and_start(nodes, events // rounds))

    async with PrivateEngine(version) as engine, opened_lab(engine_url=engine.url) as lab:
        await in_turn(PROGRAMS, rounds, partial(one, lab), console, "staleness")
    return samples


def table(samples: Samples) -> str:
    lines = ["| event | | eventwatch, ms | floor, ms | ratio |", "|---|---|---|---|---|"]
    actions = samples.actions["eventwatch"].keys() & samples.actions["floor"].keys()
    for action in (*sorted(actions), "both"):
        ours, floor = (samples.all(n) if action == "both" else samples.actions[n][action] for n in PROGRAMS)
        for share in (0.5, 0.99):
            pair = percentile(ours, share), percentile(floor, share)
            figures = f"{pair[0]:.2f} | {pair[1]:.2f} | {pair[0] / pair[1]:.2f}"
            lines.append(f"| {action} ({len(ours)}) | p{100 * share:.0f} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.staleness", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--events", type=int, default=200, help="events of each program (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="turns that they take (default: %(default)s)")
    parser.add_argument("--engine", choices=VERSIONS, default=INSTALLED, help="its version (default: %(default)s)")
    options = parser.parse_args()
    samples = asyncio.run(measure(options.events, options.rounds, Console(stderr=True), options.engine))
    print(table(samples))  # noqa: T201 - the program's output
    for name, count in samples.missed.items():
        print(f"\n{name}: {count} changes were never seen")  # noqa: T201


if __name__ == "__main__":
    main()
