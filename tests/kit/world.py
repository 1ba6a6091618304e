"""Nodes and their documents, and `watch()` over them in the test's own process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiodocker import Docker
from pymongo import AsyncMongoClient
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.asynchronous.database import AsyncDatabase

from eventwatch import Settings, watch
from eventwatch.app import Application
from eventwatch.core.facts import Change, Event
from eventwatch.engine.docker import DockerEngine
from eventwatch.pipeline.reconciler import Reconciler
from eventwatch.store.base import ENGINES, checker_id
from tests.kit.nodes import Node, Nodes
from tests.kit.truth import Document, ago, assert_documents_true, manager_document
from tests.kit.waiting import NEVER, PATIENCE, eventually


@dataclass
class Watched:
    """A running `watch()` that has connected and swept once, and what it has written since."""

    app: Application
    written: list[Change] = field(default_factory=list)
    noticed: list[Event] = field(default_factory=list)

    def of(self, node: Node) -> list[Change]:
        return [change for change in self.written if change.node_id == node.id]

    def count(self, name: str, **labels: str) -> float:
        """A metric's value, by its full name."""
        return self.app.metrics.registry.get_sample_value(name, labels) or 0.0

    def events(self, node: Node, *actions: str) -> int:
        """How many events of this node (only these actions, if any are named) have arrived."""
        return sum(event.node_id == node.id and (event.action in actions or not actions) for event in self.noticed)


@asynccontextmanager
async def watching(settings: Settings) -> AsyncIterator[Watched]:
    """Run `watch(settings)`, entered once it leads, has its event stream open and has swept."""
    noticed: list[Event] = []
    real_notice = Reconciler.on_event

    def on_event(self: Reconciler, event: Event) -> None:
        noticed.append(event)
        real_notice(self, event)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reconciler, "on_event", on_event)
        async with watch(settings) as app:
            await eventually(lambda: app.pipeline and app.pipeline.sweeper.last_success is not None)
            await eventually(lambda: app.pipeline and app.pipeline.watcher.connected_at is not None)
            assert app.pipeline is not None
            watched = Watched(app, noticed=noticed)
            app.pipeline.writer.listeners.append(watched.written.append)
            yield watched


@dataclass
class World:
    """One test's nodes and documents, seen as a manager and as an operator see them."""

    docker: Docker
    nodes: Nodes
    client: AsyncMongoClient[Document]
    mongo_url: str
    database_name: str

    @property
    def database(self) -> AsyncDatabase[Document]:
        return self.client[self.database_name]

    @property
    def collection(self) -> AsyncCollection[Document]:
        return self.database["ToolServerNode"]

    @property
    def checkers(self) -> AsyncCollection[Document]:
        return self.database["NodeChecker"]

    def settings(self, **changes: Any) -> Settings:
        """Settings of a watcher that sweeps at the start and then leaves all to events, unless told otherwise."""
        base: dict[str, Any] = {
            "mongo_url": self.mongo_url,
            "mongo_database": self.database_name,
            "node_network": self.nodes.network,
            "sweep_interval": NEVER,
            "http_listen": "",
        }
        return Settings(_env_file=None, **(base | changes))

    @asynccontextmanager
    async def watching(self, **changes: Any) -> AsyncIterator[Watched]:
        async with watching(self.settings(**changes)) as watched:
            yield watched

    async def insert(self, node: Node | str, **fields: Any) -> None:
        """Insert a node's document as a manager does, right after it made the container."""
        await self.collection.insert_one(manager_document(node if isinstance(node, str) else node.id, **fields))

    async def begin_idle_stops(self) -> None:
        """Let eventwatch find that it announced idle stops long ago: a first contact's grace takes minutes."""
        engine_id = (await DockerEngine(self.settings(), self.docker).identify()).id
        row = {"_id": checker_id(engine_id), "engine_id": engine_id, "idle_stops_from": ago(1)}
        await self.database[ENGINES].insert_one(row)

    async def document(self, node: Node) -> Document | None:
        return await self.collection.find_one({"_id": node.id})

    async def says(self, node: Node, **fields: Any) -> bool:
        document = await self.document(node)
        return document is not None and all(document.get(name) == value for name, value in fields.items())

    async def becomes_true(self, *, within: float = PATIENCE) -> None:
        await assert_documents_true(self.docker, self.database, self.nodes.network, within=within)

    async def status(self, node: Node) -> str:
        """What the engine says."""
        return str((await node.inspect())["State"]["Status"])

    async def ip(self, node: Node) -> str:
        """The address on the nodes' network that the engine shows."""
        return str((await node.inspect())["NetworkSettings"]["Networks"][self.nodes.network]["IPAddress"])

    async def start(self, name: str, **options: Any) -> Node:
        """Start a node and insert its document."""
        node = await self.nodes.start(name, **options)
        await self.insert(node)
        return node


@asynccontextmanager
async def opened_world(docker: Docker, nodes: Nodes, mongo_url: str, database: str) -> AsyncIterator[World]:
    async with AsyncMongoClient[Document](mongo_url) as client:
        world = World(docker, nodes, client, mongo_url, database)
        await world.database.create_collection("ToolServerNode")
        await world.begin_idle_stops()
        yield world
