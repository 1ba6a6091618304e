"""The epoch of each write to each document, from a change stream: two writers at a time would show there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from tests.faults.harness import World
from tests.kit.waiting import end


class Epochs:
    """The epoch of every document as it changes, from a change stream, which shows each write by itself."""

    def __init__(self) -> None:
        self.seen: dict[str, list[int]] = {}
        self.writes = 0

    def take(self, change: Mapping[str, Any]) -> None:
        self.writes += 1
        fields = change.get("fullDocument") or {}
        if change["operationType"] == "update":
            fields = change["updateDescription"]["updatedFields"]
        if "epoch" in fields:
            self.seen.setdefault(change["documentKey"]["_id"], []).append(fields["epoch"])

    @property
    def went_back(self) -> list[str]:
        """Documents that a write with an older epoch than their own has reached."""
        return [f"{node_id[:12]}: {epochs}" for node_id, epochs in self.seen.items() if epochs != sorted(epochs)]

    @property
    def all(self) -> set[int]:
        return {epoch for epochs in self.seen.values() for epoch in epochs}


@asynccontextmanager
async def followed(world: World) -> AsyncIterator[Epochs]:
    epochs = Epochs()

    async def follow() -> None:
        async for change in changes:
            epochs.take(change)

    async with await world.documents.watch(max_await_time_ms=100) as changes:
        following = asyncio.create_task(follow(), name="epochs")
        try:
            yield epochs
        finally:
            await asyncio.sleep(0.3)  # for what the database has accepted and not told yet
            await end(following)
