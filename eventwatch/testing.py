"""A pytest plugin: drive your own code against a recording and a real MongoDB. Installing eventwatch is enough.

    async def test_only_live_nodes_are_routed_to(replay):
        async with replay("recordings/lifecycle.jsonl") as played:
            await played.until(4.0)                       # seconds of the recording
            assert await my_manager.routable_nodes() == [...]
            assert not (await played.finish()).divergences

Inside the block Beanie is initialised on a database of the test's own, so the code under test reads (and
writes) `ToolServerNode` as it does in production. Time is virtual: it passes in `until` and `finish` only, and
what happened until then is written when they return. Any plugin that runs `async def` tests will do.

`ReplayEngine` alone, with `read_recording` and a clock, stands in wherever an engine is asked for:
`update_node_status(node, engine=ReplayEngine(recording, VirtualClock(recording.ended_at)), settings=...)`.

The mongod is `EVENTWATCH_TEST_MONGO_URL`, or else a private one for the session (`eventwatch[embedded]`).

Not promised: isolation between tests of one process that run at the same time; Beanie knows one database.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import pytest

if TYPE_CHECKING:
    from eventwatch.core.clock import VirtualClock
    from eventwatch.replay.engine import ReplayEngine
    from eventwatch.replay.player import Replay, Report
    from eventwatch.replay.recording import Recording, read_recording

__all__ = [
    "Database",
    "Recording",
    "Replay",
    "ReplayEngine",
    "Replayer",
    "Report",
    "VirtualClock",
    "read_recording",
]

#: Names a mongod to use instead of a private one.
URL_VARIABLE = "EVENTWATCH_TEST_MONGO_URL"
_HOMES = {
    "Recording": "replay.recording",
    "Replay": "replay.player",
    "ReplayEngine": "replay.engine",
    "Report": "replay.player",
    "VirtualClock": "core.clock",
    "read_recording": "replay.recording",
}


def __getattr__(name: str) -> Any:
    # Late: pytest imports its plugins at every start, whether or not a test will ask for a replay.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = __import__(f"eventwatch.{_HOMES[name]}", fromlist=[name])
    return getattr(module, name)


class Database(NamedTuple):
    """A database of one test's own."""

    url: str
    name: str


class Replayer(Protocol):
    """What the fixture `replay` gives."""

    def __call__(self, recording: Path | str, *, speed: float = 0.0) -> AbstractAsyncContextManager[Replay]:
        """Replay a recording; a relative path counts from the test's folder."""
        ...


@pytest.fixture(scope="session")
def eventwatch_mongo_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a mongod to test with."""
    url = os.environ.get(URL_VARIABLE)
    if url:
        yield url
        return
    with _private_mongod(tmp_path_factory.mktemp("eventwatch-mongo")) as url:
        yield url


@pytest.fixture
def eventwatch_database(eventwatch_mongo_url: str) -> Iterator[Database]:
    """An empty database, dropped afterwards."""
    from pymongo import MongoClient  # noqa: PLC0415 - see __getattr__

    database = Database(eventwatch_mongo_url, f"eventwatch_test_{secrets.token_hex(6)}")
    yield database
    with MongoClient[dict[str, Any]](database.url) as client:
        client.drop_database(database.name)


@pytest.fixture
def replay(request: pytest.FixtureRequest, eventwatch_database: Database) -> Replayer:
    """Open replays into the test's database, for `async with`."""
    from eventwatch.replay.player import open_replay  # noqa: PLC0415
    from eventwatch.replay.recording import expected_path, read_expected, read_recording  # noqa: PLC0415 - see __getattr__
    from eventwatch.settings.model import Settings  # noqa: PLC0415

    # Not from the environment: a test must not depend on how its machine is configured.
    settings = Settings.model_construct(mongo_database=eventwatch_database.name)

    def replayer(recording: Path | str, *, speed: float = 0.0) -> AbstractAsyncContextManager[Replay]:
        path = request.path.parent / recording
        read = read_recording(path)
        beside = expected_path(path)
        truth = read_expected(beside, read) if beside.exists() else None
        return open_replay(read, settings, url=eventwatch_database.url, speed=speed, truth=truth, force=True)

    return replayer


@contextmanager
def _private_mongod(folder: Path) -> Iterator[str]:
    """Run a mongod on an event loop of its own, as it outlives that of any test."""
    from eventwatch.store.embedded import EmbeddedMongo  # noqa: PLC0415 - see __getattr__

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="eventwatch-mongod", daemon=True)
    thread.start()
    mongo = EmbeddedMongo(folder)
    try:
        asyncio.run_coroutine_threadsafe(mongo.__aenter__(), loop).result()
        try:
            yield mongo.url
        finally:
            asyncio.run_coroutine_threadsafe(mongo.__aexit__(None, None, None), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
