"""The record of which engine had a container: apart from the document, as long as the container, and no longer."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import partial

import pytest

from eventwatch.store.base import ENGINES, OWNERS, checker_id
from tests.e2e.test_idle_stop import sweep
from tests.kit.nodes import Node
from tests.kit.seen import logged, texts
from tests.kit.truth import Document, ago, manager_document
from tests.kit.waiting import eventually
from tests.kit.world import World


async def owner(world: World, node: Node) -> Document | None:
    return await world.database[OWNERS].find_one({"_id": node.id})


async def is_off_record(world: World, node: Node) -> bool:
    """Remembered only for a while, as one that is gone."""
    row = await owner(world, node)
    return row is None or "gone_at" in row


async def test_a_node_is_on_record_under_its_engines_id_and_name_until_it_is_gone(world: World) -> None:
    info = await world.docker.system.info()
    node, later = await world.start("one"), await world.nodes.start("later")
    async with world.watching():
        await eventually(partial(owner, world, node))
        assert await owner(world, node) == {"_id": node.id, "engine_id": info["ID"], "host": info["Name"]}
        await world.insert(later)
        await eventually(partial(owner, world, later))
        await node.remove()
        await eventually(partial(is_off_record, world, node))
        assert await owner(world, later)


async def test_a_replace_of_the_document_leaves_the_record_alone(world: World) -> None:
    node = await world.start("one")
    async with world.watching() as watched:
        recorded = await eventually(partial(owner, world, node))
        await world.collection.delete_one({"_id": node.id})
        await sweep(watched)
        await world.insert(node)
        await sweep(watched)
        assert await owner(world, node) == recorded


async def test_a_node_whose_document_the_manager_deletes_by_itself_goes_off_record(world: World) -> None:
    node = await world.start("one")
    async with world.watching():
        await eventually(partial(owner, world, node))
        await world.collection.delete_one({"_id": node.id})
        await node.remove()
        await eventually(partial(is_off_record, world, node))


async def test_a_node_that_went_while_nobody_watched_goes_off_record(world: World) -> None:
    node, kept = await world.start("one"), await world.start("kept")
    async with world.watching():
        await eventually(partial(owner, world, node))
        await eventually(partial(owner, world, kept))
    await world.collection.delete_many({"_id": {"$in": [node.id, kept.id]}})
    await node.remove()
    async with world.watching():
        await eventually(partial(is_off_record, world, node))
        assert await owner(world, kept), "its container is still there, and its document may come back"


async def test_a_document_that_a_manager_brings_back_after_its_deletion_goes_again(world: World) -> None:
    """Its stale save inserts it anew, without a stamp: beside another engine, nobody's are left alone."""
    node = await world.start("one")
    await world.collection.insert_one(manager_document("f" * 64, engine_id="another"))
    async with world.watching() as watched:
        await eventually(partial(owner, world, node))
        stale = await world.document(node)
        assert stale is not None
        await node.remove()
        await eventually(partial(is_off_record, world, node))
        older = {name: value for name, value in stale.items() if name not in {"engine_id", "epoch"}}
        await world.collection.insert_one(older)
        await sweep(watched)
        await sweep(watched)
        assert await world.document(node) is None
    assert await world.collection.count_documents({"engine_id": "another"}) == 1


FUTURE = datetime(2999, 1, 1, tzinfo=UTC)
SOON = datetime.now(UTC) + timedelta(hours=20)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        (OWNERS, {"engine_id": 7, "host": ["?"], "registered": "yesterday", "claim": "mine"}),
        (OWNERS, {"engine_id": None, "claim": {"until": FUTURE, "by": "?", "run": ago(0), "stands": True}}),
        (OWNERS, {"claim": [{"until": FUTURE}]}),
        (OWNERS, {"claim": {"until": "soon", "by": 7}}),
        (OWNERS, {"_id": {"a": 1}, "claim": {"until": SOON, "by": "?"}}),
        ("ToolServerNode", {"_id": "e" * 64, "engine_id": "gone", "epoch": 2**48 - 1}),
        (ENGINES, {"idle_stops_from": FUTURE, "twin": {"seen_at": FUTURE}}),
        (ENGINES, {"idle_stops_from": "soon", "twin": {"seen_at": "now", "host": 7}, "epoch": "high"}),
        (ENGINES, {"twin": ["?"], "engine_id": 7}),
        ("NodeChecker", {"standbys": "?", "containers": {"?": 1}, "look": "?", "host": 7}),
        ("NodeChecker", {"standbys": [1, None, {"seen_at": FUTURE}], "containers": ["../?", 7], "look": None}),
    ],
)
async def test_odd_rows_end_nothing(world: World, name: str, row: Document) -> None:
    node, gone = await world.start("one"), await world.start("gone")
    engine_id = (await world.docker.system.info())["ID"]
    _id = node.id if name == OWNERS else checker_id(engine_id)
    row = {"_id": _id, "engine_id": engine_id, **row}
    await world.database[name].replace_one({"_id": row["_id"]}, row, upsert=True)
    with logged("WARNING") as lines:
        async with world.watching() as watched:
            first = watched.app.pipeline
            await eventually(lambda: world.says(node, status="running"))
            await node.kill()
            await gone.remove()
            await eventually(lambda: world.says(node, status="exited"))
            await sweep(watched)
            await eventually(partial(is_off_record, world, gone))
            assert watched.app.pipeline is first
    assert not [text for text in texts(lines) if "Starting over" in text or "Sweep failed" in text]


async def test_a_dry_run_puts_nothing_on_record(world: World) -> None:
    await world.start("one")
    async with world.watching(dry_run=True) as watched:
        await sweep(watched)
    assert await world.database[OWNERS].count_documents({}) == 0
