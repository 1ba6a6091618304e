"""What compose.yaml adds to a change's way: from the event to its acknowledged write, with the proxy and without.

The whole project runs, on the engine of the tests with stand-in images, its database included. Each event comes
after half a second of silence, as deaths do: what holds back small pieces shows only then. The figure is the
sidecar's own, `latency` in `/api/changes`.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Final

from aiodocker import Docker
from pymongo import AsyncMongoClient
from rich.console import Console

from tests.bench.effort import Effort
from tests.bench.lab import Document, Lab, in_turn
from tests.bench.programs import BenchError
from tests.bench.report import Budget, Figure, Report, pooled
from tests.container.sidecars import project, stir
from tests.kit.images import build_sidecar, ensure_base, ensure_services
from tests.kit.mongod import free_port
from tests.kit.nodes import Nodes
from tests.kit.truth import manager_document
from tests.kit.waiting import eventually

DATABASE: Final = "TSM"
#: What is compared, and the file that makes compose.yaml so.
WAYS: Final[dict[str, tuple[str, ...]]] = {"proxy": (), "direct": ("direct",)}


async def stack(_: Lab, report: Report, effort: Effort, console: Console) -> None:
    """Through the shipped proxy, and on the engine's own socket."""
    ensure_base()
    build_sidecar()
    ensure_services()
    rounds: dict[str, list[list[float]]] = defaultdict(list)

    async def measure(way: str) -> None:
        rounds[way].append(await latencies(way, effort))

    await in_turn(tuple(WAYS), effort.rounds, measure, console, "stack")
    report.figures.append(
        Figure(
            "event to acknowledged write p50, compose.yaml",
            "ms",
            pooled(rounds["proxy"], 0.5),
            pooled(rounds["direct"], 0.5),
            compared_with="without its proxy",
            budget=Budget("ratio", at_most=1.3),
        )
    )


async def latencies(way: str, effort: Effort) -> list[float]:
    """One composed project's, in ms."""
    url = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    run = f"ew-bench-{secrets.token_hex(3)}"
    async with Docker(url=url) as docker, Nodes(docker, prefix=f"{run}-", network=run) as nodes:
        with tempfile.TemporaryDirectory(prefix="ew-bench-") as folder:
            env = {"DB_COLLECTION": DATABASE, "EVENTWATCH_NODE_NETWORK": run, "EVENTWATCH_SWEEP_INTERVAL": "1s"}
            async with project(Path(folder), free_port(), url, *WAYS[way], **env) as made:
                made.up()
                sidecar = made.container("eventwatch")
                await sidecar.wait_ready()
                node = await nodes.start("stirred")
                async with AsyncMongoClient[Document](made.database_url()) as client:
                    collection = client[DATABASE]["ToolServerNode"]
                    await collection.insert_one(manager_document(node.id))
                    await eventually(lambda: collection.count_documents({"_id": node.id, "status": "running"}))
                    await stir(node, times=effort.stack_events // 2)
                found = [1000 * latency for latency in await sidecar.latencies()]
    if not found:
        raise BenchError(f"eventwatch made no change ({way})")
    return found
