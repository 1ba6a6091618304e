"""What was seen meanwhile: each state of each document, and each line of this process's log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from loguru import logger
from pymongo.asynchronous.collection import AsyncCollection

from tests.kit.nodes import Node
from tests.kit.truth import Document
from tests.kit.waiting import end


@dataclass(frozen=True)
class Image:
    """A document as it was at one moment, and what was written to make it so; None once deleted."""

    node_id: str
    operation: str
    document: Document | None
    updated: Document

    def says(self, **fields: Any) -> bool:
        return self.document is not None and all(
            self.document.get(name) == value for name, value in fields.items()
        )


@dataclass
class Film:
    """Every state of every document in order, from a change stream (which shows each write by itself)."""

    images: list[Image] = field(default_factory=list)
    _now: dict[str, Document] = field(default_factory=dict)

    def of(self, node: Node) -> list[Image]:
        return [image for image in self.images if image.node_id == node.id]

    def begin(self, documents: list[Document]) -> None:
        self._now = {document["_id"]: document for document in documents}

    def take(self, change: Mapping[str, Any]) -> None:
        node_id, operation = change["documentKey"]["_id"], change["operationType"]
        updated: Document = {}
        if operation == "delete":
            self._now.pop(node_id, None)
        elif operation == "update":
            updated = change["updateDescription"]["updatedFields"]
            self._now[node_id] = {**self._now.get(node_id, {"_id": node_id}), **updated}
        else:
            self._now[node_id] = change["fullDocument"]
        document = self._now.get(node_id)
        self.images.append(Image(node_id, operation, dict(document) if document else None, updated))


@asynccontextmanager
async def filmed(collection: AsyncCollection[Document]) -> AsyncIterator[Film]:
    """Film what happens to the documents from now on."""
    film = Film()
    async with await collection.watch(max_await_time_ms=100) as changes:
        film.begin(await collection.find().to_list())

        async def roll() -> None:
            async for change in changes:
                film.take(change)

        rolling = asyncio.create_task(roll(), name="film")
        try:
            yield film
        finally:
            await end(rolling)


@dataclass(frozen=True)
class Line:
    """One line of the log."""

    level: str
    text: str
    error: BaseException | None


@contextmanager
def logged(level: str = "DEBUG") -> Iterator[list[Line]]:
    """Every line that is logged in this process meanwhile."""
    lines: list[Line] = []

    def take(message: Any) -> None:
        record = message.record
        error = record["exception"].value if record["exception"] else None
        lines.append(Line(record["level"].name, record["message"], error))

    sink = logger.add(take, level=level)
    try:
        yield lines
    finally:
        logger.remove(sink)


def texts(lines: list[Line], level: str | None = None) -> list[str]:
    return [line.text for line in lines if level in (None, line.level)]
