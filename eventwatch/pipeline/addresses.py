"""Addresses of containers by what their network says, for many who ask at once.

A network tells of all that is on it, so one look serves all who asked before it began; who comes later may ask of
an endpoint that it did not show yet, and waits for the next one. There is one look at a time, however many start.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TypeAlias

from eventwatch.core.errors import EngineError
from eventwatch.engine.protocol import Engine

#: None: the engine refuses to tell.
_Look: TypeAlias = "asyncio.Task[Mapping[str, str] | None]"


class Addresses:
    """`tasks` runs the looks."""

    def __init__(self, *, engine: Engine, tasks: asyncio.TaskGroup) -> None:
        self._engine = engine
        self._tasks = tasks
        #: By network: the look under way, and the one behind it.
        self._current: dict[str, _Look] = {}
        self._next: dict[str, _Look] = {}

    async def of(self, network_id: str, node_id: str) -> str | None:
        """The address that a container has by now, empty if the network says none; None: the engine refuses."""
        look = self._next.get(network_id)
        if look is None:
            before = self._current.get(network_id)
            name = f"addresses-{network_id[:12]}"
            look = self._next[network_id] = self._tasks.create_task(self._look(network_id, before), name=name)
        told = await asyncio.shield(look)  # others wait for it, too
        return None if told is None else told.get(node_id, "")

    async def _look(self, network_id: str, before: _Look | None) -> Mapping[str, str] | None:
        if before is not None:
            await asyncio.wait({before})
        look = self._current[network_id] = self._next.pop(network_id)
        try:
            return await self._engine.addresses(network_id)
        except EngineError:
            return None
        finally:
            if self._current.get(network_id) is look:
                del self._current[network_id]

    def end(self) -> None:
        """End the looks, and with them the waiting for them."""
        for look in (*self._current.values(), *self._next.values()):
            look.cancel()
        self._next.clear()
