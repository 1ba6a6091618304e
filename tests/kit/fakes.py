"""In place of an engine, for faults that a real one cannot be made to have."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from eventwatch.core.errors import EngineError
from eventwatch.core.facts import Observation
from eventwatch.engine.docker import DockerEngine


@asynccontextmanager
async def served(
    socket: Path, answer: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> AsyncIterator[str]:
    """Let `answer` have every request to this socket; gives the URL of the engine that it passes for."""
    app = web.Application(client_max_size=0)
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    try:
        await web.UnixSite(runner, str(socket)).start()
        yield f"unix://{socket}"
    finally:
        await runner.cleanup()


class Failing:
    """An engine that fails about some containers, and counts what it is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bad: set[str] = set()
        self.asked: Counter[str] = Counter()
        real = DockerEngine.inspect

        async def inspect(engine: DockerEngine, node_id: str, *, as_of: int = 0) -> Observation:
            self.asked[node_id] += 1
            if node_id in self.bad:
                raise EngineError("Engine failed while inspecting it: RWLayer is unexpectedly nil", status=500)
            return await real(engine, node_id, as_of=as_of)

        monkeypatch.setattr(DockerEngine, "inspect", inspect)
