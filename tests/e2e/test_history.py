"""The history: bounded, each node's own, without effect on anything else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from typing import Any

import pytest

from eventwatch.core.clock import SystemClock
from eventwatch.core.errors import StoreError
from eventwatch.core.facts import Cause, Change
from eventwatch.store.base import HISTORY, OLD_HISTORY
from eventwatch.store.changes import HISTORY_CHANGES
from eventwatch.store.connection import Store, open_store
from eventwatch.store.history import History, PastChange, parse_change, read_changes
from eventwatch.store.rows import Entry
from tests.e2e.test_operator import ask
from tests.kit.seen import logged, texts
from tests.kit.truth import Document
from tests.kit.waiting import eventually
from tests.kit.world import World

ENGINE = "engine"
NODE, OTHER = "a" * 64, "b" * 64
NOW = datetime.now(UTC).replace(microsecond=0)


def change(node_id: str, old: Any, new: Any, *, second: float = 0.0) -> Change:
    at_ns = round((NOW.timestamp() + second) * 1e9)
    return Change(
        node_id,
        node_id[:12],
        {"status": old},
        {"status": new},
        deleted=False,
        cause=Cause.EVENT,
        at_ns=at_ns,
        latency=0.001,
    )


@pytest.fixture
async def store(mongo_url: str, database: str) -> AsyncIterator[Store]:
    async with open_store(mongo_url, database) as opened:
        yield opened


@pytest.fixture
def history(store: Store) -> History:
    return History(store, SystemClock(), engine_id=ENGINE)


def news(changes: list[PastChange]) -> list[object]:
    return [past.new["status"] for past in changes]


async def test_a_write_whose_acknowledgement_is_lost_is_repeated_without_effect(
    store: Store, history: History, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, lost = Store.write_history, 3

    async def write_history(self: Store, entries: list[Entry]) -> tuple[int, list[str]]:
        nonlocal lost
        done = await real(self, entries)
        if lost:
            lost -= 1
            raise StoreError("Database connection lost while writing the history")
        return done

    monkeypatch.setattr(Store, "write_history", write_history)
    with logged("WARNING") as lines:
        for attempt in range(4):
            history.remember(change(NODE, "old", f"new{attempt}", second=attempt))
            history.remember(change(NODE, "up", "down", second=attempt + 0.5))
            await history.flush()
    changes = await read_changes(store, NODE, limit=50)
    assert news(changes) == ["down", "new3", "new2", "new1", "new0"]
    assert (changes[0].count, changes[1].count) == (4, 1)
    assert len(texts(lines)) == 1
    assert not history._waiting
    await history.flush()
    assert await read_changes(store, NODE, limit=50) == changes


async def test_a_node_that_flaps_costs_no_other_its_history_and_is_counted(store: Store, history: History) -> None:
    history.remember(change(OTHER, "running", "exited"))
    for second in range(2_000):
        old, new = ("healthy", "unhealthy") if second % 2 else ("unhealthy", "healthy")
        history.remember(change(NODE, old, new, second=second))
        if second % 500 == 0:
            await history.flush()
    await history.flush()
    for node_id, count, first in ((NODE, 1000, NOW.timestamp() + 1), (OTHER, 1, NOW.timestamp())):
        newest = (await read_changes(store, node_id, limit=10))[0]
        assert (newest.count, newest.at.timestamp()) == (count, first)
    assert len(await read_changes(store, engine_id=ENGINE, limit=10)) == 3
    assert [past.node_id for past in await read_changes(store, engine_id=ENGINE, limit=1)] == [NODE]


async def test_of_each_node_its_last_changes_are_kept(store: Store, history: History) -> None:
    for number in range(3 * HISTORY_CHANGES):
        history.remember(change(NODE, number, number + 1, second=number))
        if number % 7 == 0:
            await history.flush()
    await history.flush()
    kept = news(await read_changes(store, NODE, limit=1000))
    assert kept == list(range(3 * HISTORY_CHANGES, 2 * HISTORY_CHANGES, -1))


async def test_what_comes_again_after_long_is_told_again(store: Store, history: History) -> None:
    for second in (0, 10, 4000):
        history.remember(change(NODE, "running", "exited", second=second))
    await history.flush()
    assert [past.count for past in await read_changes(store, NODE, limit=10)] == [1, 2]


async def test_texts_are_cut_and_values_that_no_database_takes_are_made_texts(
    store: Store, history: History
) -> None:
    for number, odd in enumerate(("x" * 1_000_000, "\ud800", 2**70)):
        history.remember(change(NODE, None, odd, second=number))
    await history.flush()
    assert news(await read_changes(store, NODE, limit=10)) == [str(2**70), "?", "x" * 200]


async def test_histories_expire_and_those_that_changed_longest_ago_go_first(
    store: Store, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eventwatch.store.history.NODES", 20)
    monkeypatch.setattr("eventwatch.store.history.NEW_NODES", 10)
    collection = world.database[HISTORY]
    await collection.drop()  # by hand
    history = History(store, SystemClock(), engine_id=ENGINE)
    for number in range(50):
        history.remember(change(f"{number:064x}", "running", "exited", second=number))
        if number % 10 == 9:
            await history.flush()
    ids = sorted([row["_id"] async for row in collection.find()])
    assert ids == [f"{number:064x}" for number in range(30, 50)]
    indexes = await collection.index_information()
    assert [index.get("expireAfterSeconds") for index in indexes.values() if index["key"] == [("at", 1)]] == [
        2592000
    ]


ODD: dict[str, Document] = {
    "empty": {},
    "changes is a text": {"at": NOW, "changes": "abc"},
    "a change is a number": {"at": NOW, "changes": [1, None, {}]},
    "no at": {"changes": [{"id": "1", "old": {}, "new": {"status": "x"}}]},
    "at is a text": {"at": "zzz", "changes": [{"at": "zzz", "until": 1, "old": 2, "new": 3, "deleted": 4}]},
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
async def test_an_odd_history_is_left_out_and_holds_up_no_other(
    store: Store, history: History, world: World, odd: Document
) -> None:
    await world.database[HISTORY].insert_one({"_id": NODE, **odd})
    for node_id in (NODE, OTHER):
        history.remember(change(node_id, "running", "exited"))
    await history.flush()
    assert not history._waiting
    assert OTHER in [past.node_id for past in await read_changes(store, engine_id=ENGINE, limit=10)]
    assert isinstance(await read_changes(store, NODE, limit=10), list)


@pytest.mark.parametrize(
    "row",
    [
        {"node_id": "x1"},
        {"node_id": "x1", "at": "zzz", "deleted": False, "old": {}, "new": {}},
        {"node_id": "x1", "at": NOW, "deleted": False},
        {"at": NOW, "old": {}, "new": {"status": "x"}},
        {},
    ],
)
def test_an_odd_row_is_no_change(row: Mapping[str, Any]) -> None:
    assert parse_change(row) is None


async def test_rows_of_an_earlier_version_are_read_too(store: Store, history: History, world: World) -> None:
    old_row = {
        "node_id": NODE,
        "short_id": NODE[:12],
        "at": NOW,
        "cause": "idle",
        "deleted": True,
        "old": {},
        "new": {},
        "latency": None,
    }
    rows = world.database[OLD_HISTORY]
    await rows.insert_many([dict(old_row), {"node_id": NODE}, {"node_id": NODE, "at": "zzz"}])
    history.remember(change(NODE, "running", "exited", second=60))
    await history.flush()
    for changes in (
        await read_changes(store, NODE, limit=10),
        await read_changes(store, engine_id=ENGINE, limit=10),
    ):
        assert [(past.deleted, past.cause) for past in changes] == [(False, "event"), (True, "idle")]
    assert await rows.count_documents({}) == 3


@pytest.mark.parametrize("name", [HISTORY, OLD_HISTORY])
async def test_a_view_in_the_place_of_the_history_ends_nothing(world: World, name: str) -> None:
    node = await world.start("viewed")
    await world.database.command("create", name, viewOn=world.collection.name, pipeline=[])
    with logged("INFO") as lines:
        async with world.watching():
            await world.becomes_true()
            await asyncio.sleep(1.5)
            await node.kill()
            await eventually(lambda: world.says(node, status="exited"), within=1)
    assert not [text for text in texts(lines) if "Starting over" in text]
    assert len([text for text in texts(lines, "WARNING") if "History is not written" in text]) == (name == HISTORY)


async def test_no_exception_leaves_the_history(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    for name in ("write_history", "read_history"):
        monkeypatch.setattr(Store, name, fail)
    with logged("WARNING") as lines:
        history.remember(None)  # type: ignore[arg-type]
        history.remember(change(NODE, "running", "exited"))
        await history.flush()
        await history.flush()
        await history.finish()
        await history.recall(lambda _: None, limit=10)
    assert len([text for text in texts(lines) if "a bug" in text]) == 2


def test_what_waits_for_the_database_is_bounded_and_each_node_keeps_its_last_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("eventwatch.store.history.WAITING", 500)
    history = History(None, SystemClock(), engine_id=ENGINE)  # type: ignore[arg-type]
    history.remember(change(OTHER, "running", "exited"))
    for number in range(100):
        for node in range(100):
            history.remember(change(f"{node:064x}", number, number + 1))
    assert history._waiting == sum(len(node.to_write) for node in history._nodes.values()) <= 501
    assert history._nodes[OTHER].to_write


async def test_explain_tells_how_often_and_escapes_what_it_tells(
    world: World, history: History, store: Store, tmp_path: Any
) -> None:
    for second in (0, 1, 2):
        history.remember(change(NODE, "running", "exited\x1b[31m\nforged", second=second))
    await history.flush()
    code, text = await ask(world, tmp_path, "explain", NODE)
    assert code == 0, text
    assert r"status running -> exited\x1b[31m\nforged (by event, 1.0 ms after the event, 3 times since" in text
