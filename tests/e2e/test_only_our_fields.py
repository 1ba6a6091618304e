"""Managers write the same documents all the time: nothing that they wrote is ever lost to eventwatch.

Each document has one manager, for managers that replace whole documents take one another's writes back, which
would prove nothing about us. A manager reads its document again before each of its writes, so that even a loss
that a later write covers is counted. The same test against a writer that replaces whole documents, as pollers
do, shows that it would find such losses.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.kit.nodes import Node
from tests.kit.truth import Document, ago, true_fields
from tests.kit.waiting import end
from tests.kit.world import World

NODES, MANAGERS = 8, 4
#: At least so long, and so many writes of each manager.
SECONDS, WRITES = 4.0, 100


@dataclass
class Manager:
    """Writes `last_req_time`, a counter and a field that nobody else knows, as fast as it can."""

    world: World
    nodes: list[Node]
    replaces: bool
    written: dict[str, Document] = field(default_factory=dict)
    writes: int = 0
    lost: int = 0

    async def work(self, seconds: float) -> None:
        # Ends between two writes: a write that is cancelled may have been done or not.
        until = time.monotonic() + seconds
        for node in itertools.cycle(self.nodes):
            if time.monotonic() > until and self.writes > WRITES:
                return
            await self.write(node)

    async def write(self, node: Node) -> None:
        document = await self.world.document(node)
        assert document is not None
        self.compare(document)
        self.writes += 1
        fields: Document = {"last_req_time": ago(0), "counter": self.writes, "session": {"of": [self.writes]}}
        if self.replaces:
            await self.world.collection.replace_one({"_id": node.id}, document | fields)
        else:
            await self.world.collection.update_one({"_id": node.id}, {"$set": fields})
        self.written[node.id] = fields

    def compare(self, document: Document) -> None:
        last = self.written.get(document["_id"], {})
        self.lost += any(document.get(name) != value for name, value in last.items())


async def disturb(node: Node) -> None:
    while True:
        for happens in (node.pause, node.unpause, node.kill, node.start):
            await happens()
            await asyncio.sleep(0.05)


async def hammer(world: World, nodes: list[Node]) -> list[Manager]:
    """Let managers write and nodes come and go for a while; what was written, and what of it was lost."""
    managers = [Manager(world, nodes[n::MANAGERS], replaces=n >= MANAGERS / 2) for n in range(MANAGERS)]
    async with asyncio.TaskGroup() as tasks:
        working = [tasks.create_task(manager.work(SECONDS), name="manager") for manager in managers]
        disturbing = [tasks.create_task(disturb(node), name="disturb") for node in nodes]
        await asyncio.wait(working)
        for task in disturbing:
            task.cancel()
    return managers


async def count_losses(managers: list[Manager]) -> int:
    """Losses seen by the managers, and those that only the documents' last state shows."""
    for manager in managers:
        for node in manager.nodes:
            document = await manager.world.document(node)
            assert document is not None
            manager.compare(document)
    return sum(manager.lost for manager in managers)


@asynccontextmanager
async def replacing(world: World, nodes: list[Node]) -> AsyncIterator[None]:
    """A writer that inspects, changes what it has read and replaces the whole document."""

    async def poll(node: Node) -> None:
        while True:
            document = await world.document(node)
            truth = true_fields(await node.inspect(), network=world.nodes.network)
            await world.collection.replace_one({"_id": node.id}, (document or {}) | truth)

    tasks = [asyncio.create_task(poll(node), name="poll") for node in nodes]
    try:
        yield
    finally:
        await end(*tasks)


async def eight_nodes(world: World) -> list[Node]:
    nodes = list(await asyncio.gather(*(world.nodes.start(f"node-{number}") for number in range(NODES))))
    for node in nodes:
        await world.insert(node, unknown="to eventwatch")
    return nodes


async def test_no_write_of_a_manager_is_lost(world: World) -> None:
    nodes = await eight_nodes(world)
    settings: dict[str, Any] = {"sweep_interval": 0.5, "settle_delay": 0.1}
    async with world.watching(**settings) as watched:
        managers = await hammer(world, nodes)
        await world.becomes_true()
        assert len(watched.written) > 2 * NODES
    assert await count_losses(managers) == 0
    unknown = {"unknown": "to eventwatch"}
    assert await world.collection.count_documents(unknown) == NODES


async def test_a_writer_that_replaces_whole_documents_loses_some(world: World) -> None:
    nodes = await eight_nodes(world)
    async with replacing(world, nodes):
        managers = await hammer(world, nodes)
    assert await count_losses(managers) > 0
