"""`python -m tests.bench.sessions`: how long a manager's session start takes, and what waiting costs.

Prints three Markdown tables. The first is from the creation of a container to the moment when the manager knows
that it is healthy: looking at its document once a second beside the old poller and beside eventwatch, and with
`wait_for`; the container's health check, once a second, is the floor of all. The second is how long after the
death of a node, by the engine's clock, who waited for that knows of it, by each way of waiting. The third is what
many clients that wait over HTTP for one node at the same time cost, and when they know.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final

import aiohttp
from beanie import init_beanie
from pymongo import AsyncMongoClient

from eventwatch import NodeChecker, Settings, ToolServerNode, wait_for, watch
from tests.bench.lab import Lab, opened_lab
from tests.bench.programs import ROOT, Place
from tests.bench.report import percentile
from tests.kit.mongod import PrivateMongo, free_address
from tests.kit.nodes import Node

Wait = Callable[[str], Coroutine[Any, Any, None]]
POLL: Final = 1.0


async def look_again_and_again(node_id: str) -> None:
    """As the upstream manager does."""
    while (node := await ToolServerNode.get(node_id)) is None or node.health != "healthy":  # noqa: ASYNC110
        await asyncio.sleep(POLL)


async def wait_until_healthy(node_id: str) -> None:
    await wait_for(node_id, "healthy", 30)


async def one_session(lab: Lab, wait: Wait) -> float:
    began = time.monotonic()
    node = await lab.real.nodes.create(f"s{time.monotonic_ns()}", healthcheck="ok", interval_s=1.0)
    await ToolServerNode(id=node.id, short_id=node.id[:12]).insert()
    await node.start()
    await wait(node.id)
    took = time.monotonic() - began
    await node.remove()
    await asyncio.sleep(0.2 + (took * 7) % 1)  # so that the poller is met at any moment of its second
    return took


async def sessions(lab: Lab, runs: int) -> str:
    ways: dict[str, tuple[str, Wait]] = {
        "old poller, document read once a second": ("poller", look_again_and_again),
        "eventwatch, document read once a second": ("eventwatch", look_again_and_again),
        "eventwatch, `wait_for`": ("eventwatch", wait_until_healthy),
    }
    lines = ["| session start | p50, s | longest, s |", "|---|---|---|"]
    for name, (program, wait) in ways.items():
        place = lab.place("sessions")
        async with AsyncMongoClient[dict[str, Any]](place.mongo_url) as client:
            database = client[place.database]
            await init_beanie(database=database, document_models=[ToolServerNode, NodeChecker], skip_indexes=True)
            async with lab.running(program, place):
                took = [await one_session(lab, wait) for _ in range(runs)]
        lines.append(f"| {name} | {percentile(took, 0.5):.2f} | {max(took):.2f} |")
    return "\n".join(lines)


# -- each way of waiting ------------------------------------------------------------------------------------


@asynccontextmanager
async def inside(place: Place) -> AsyncIterator[None]:
    """This process watches, and waits."""
    settings = Settings(
        _env_file=None,
        docker_host=place.engine_url,
        mongo_url=place.mongo_url,
        mongo_database=place.database,
        node_network=place.network,
        http_listen="",
    )
    async with watch(settings) as app:
        while app.pipeline is None or app.pipeline.sweeper.last_success is None:  # noqa: ASYNC110 - once
            await asyncio.sleep(0.05)
        yield


@asynccontextmanager
async def beside(place: Place, lab: Lab) -> AsyncIterator[None]:
    """This process waits, and another one watches."""
    async with AsyncMongoClient[dict[str, Any]](place.mongo_url) as client:
        database = client[place.database]
        await init_beanie(database=database, document_models=[ToolServerNode, NodeChecker], skip_indexes=True)
        async with lab.running("eventwatch", place):
            leads = {"expires_at": {"$ne": None}}
            while not await database["NodeChecker"].count_documents(leads):  # noqa: ASYNC110 - once
                await asyncio.sleep(0.1)
            yield


async def by_call(node_id: str) -> None:
    await wait_for(node_id, "exited", 60)


def by_command(place: Place) -> Wait:
    async def run(node_id: str) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "eventwatch",
            "wait",
            node_id,
            "--for",
            "exited",
            "--timeout",
            "60s",
            env=dict(os.environ) | place.environment,
            cwd=ROOT,
            stdout=asyncio.subprocess.DEVNULL,
        )
        if await process.wait():
            raise RuntimeError(f"eventwatch wait ended with {process.returncode}")

    return run


async def lags(lab: Lab, place: Place, wait: Wait, runs: int) -> str:
    """How long after its death whoever waits for a node knows of it: p50 and longest, ms."""
    found = []
    for _ in range(runs):
        [node] = await lab.start_nodes(1)
        await lab.fill(place, await lab.truth([node]))
        async with lab.engine_events() as events:
            waiting = asyncio.create_task(wait(node.id))
            await asyncio.sleep(random.uniform(2, 3))  # so that no poll is in step
            await node.kill()
            await waiting
            known = time.time_ns()
            [died] = [event.time_nano for event in events if event.action == "die"]
        found.append((known - died) / 1e6)
        await lab.remove([node])
    return f"{percentile(found, 0.5):.1f} | {max(found):.1f}"


async def ways(lab: Lab, runs: int) -> str:
    lines = ["| waiting for 2 to 3 s | told after, p50, ms | longest, ms |", "|---|---|---|"]
    place = lab.place("ways")
    async with inside(place):
        lines.append(f"| inside `watch()` | {await lags(lab, place, by_call, runs)} |")
    place = lab.place("ways")
    async with beside(place, lab):
        lines.append(f"| another process, replica set | {await lags(lab, place, by_call, runs)} |")
        lines.append(
            f"| `eventwatch wait`, its end included | {await lags(lab, place, by_command(place), runs)} |"
        )
    async with PrivateMongo(standalone=True) as mongo:
        place = Place(place.engine_url, mongo.url, place.database, place.network)
        async with beside(place, lab):
            lines.append(f"| another process, standalone | {await lags(lab, place, by_call, runs)} |")
    return "\n".join(lines)


# -- many at once -------------------------------------------------------------------------------------------


async def one_waiter(session: aiohttp.ClientSession, address: str, node: Node) -> int:
    async with session.get(f"http://{address}/api/nodes/{node.id}?until=exited&timeout=120s") as answer:
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {await answer.text()}")
        return time.time_ns()


async def waiters(lab: Lab, counts: list[int]) -> str:
    lines = [
        "| waiting over HTTP | memory, MB | CPU a minute, s | told after, p50, ms | last, ms |",
        "|---|---|---|---|---|",
    ]
    for count in counts:
        [node] = await lab.start_nodes(1)
        place, address = lab.place("waiters"), free_address()
        await lab.fill(place, await lab.truth([node]))
        settings = {"EVENTWATCH_HTTP_LISTEN": address}
        async with (
            lab.running("eventwatch", place, settings=settings) as program,
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
            lab.engine_events() as events,
        ):
            waiting = [asyncio.create_task(one_waiter(session, address, node)) for _ in range(count)]
            await asyncio.sleep(5 + count / 250)
            before = program.usage()
            await asyncio.sleep(10)
            after = program.usage()
            await node.kill()
            told = await asyncio.gather(*waiting)
            [died] = [event.time_nano for event in events if event.action == "die"]
            took = [(moment - died) / 1e6 for moment in told]
        cpu = (after.cpu - before.cpu) * 60 / (after.at - before.at)
        figures = f"{after.resident:.0f} | {cpu:.1f} | {percentile(took, 0.5):.1f} | {max(took):.1f}"
        lines.append(f"| {count} | {figures} |")
    return "\n".join(lines)


async def measure(runs: int, counts: list[int]) -> None:
    async with opened_lab() as lab:
        if runs:
            print(await sessions(lab, runs), end="\n\n", flush=True)  # noqa: T201 - a command
            print(await ways(lab, runs), end="\n\n", flush=True)  # noqa: T201
        print(await waiters(lab, counts), flush=True)  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=20, help="of each way; 0 leaves out the first two tables")
    parser.add_argument("--waiters", type=int, nargs="*", default=[1, 100, 1000, 3000])
    arguments = parser.parse_args()
    asyncio.run(measure(arguments.runs, arguments.waiters))


if __name__ == "__main__":
    main()
