"""The fleet: every engine on record, which of them are dead, and what goes when one is forgotten."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from unittest.mock import AsyncMock

import httpx
import pytest

from eventwatch import check_nodes_status
from eventwatch.cli.engines import examine_forgetting
from eventwatch.core.clock import SystemClock
from eventwatch.core.errors import ConfigError
from eventwatch.core.metrics import Metrics
from eventwatch.engine.docker import as_engine
from eventwatch.engine.protocol import Engine, EngineInfo
from eventwatch.pipeline.fleet import SILENCE, DeadEngines
from eventwatch.store.base import ENGINES, OWNERS, checker_id
from eventwatch.store.connection import open_store
from eventwatch.store.documents import NodeChecker
from eventwatch.store.rows import Lease
from tests.e2e.test_operator import ask
from tests.kit.mongod import free_address
from tests.kit.seen import logged, texts
from tests.kit.truth import Document, ago
from tests.kit.waiting import eventually
from tests.kit.world import World

DEAD = "A dead engine"
EPOCH = 7


def ids(count: int, digit: str = "d") -> list[str]:
    return [f"{number:08x}".ljust(64, digit) for number in range(count)]


async def add_engine(world: World, engine_id: str, *, expires_in: float, nodes: list[str]) -> None:
    """What a watcher of another engine leaves; half of the documents were replaced by a manager since."""
    checker: Document = {
        "_id": checker_id(engine_id),
        "engine_id": engine_id,
        "manager_id": engine_id,
        "host": "host-b",
        "version": "9.9",
        "epoch": EPOCH,
        "renewed_at": ago(15 - expires_in),
        "expires_at": ago(-expires_in),
        "report": {"nodes": {"running": len(nodes)}, "p50": 0.002, "p99": 0.02, "drift": 3, "reasons": []},
    }
    await world.checkers.insert_one(checker)
    await world.database[ENGINES].insert_one(
        {"_id": checker_id(engine_id), "engine_id": engine_id, "epoch": EPOCH}
    )
    for number, node_id in enumerate(nodes):
        stamp = {"engine_id": engine_id, "epoch": EPOCH} if number % 2 else {}
        await world.insert(node_id, status="running", **stamp)
        await world.database[OWNERS].insert_one({"_id": node_id, "engine_id": engine_id, "host": "host-b"})


async def test_every_engine_is_listed_with_what_its_watcher_tells(world: World, tmp_path: Path) -> None:
    address = free_address()
    nodes = [await world.start(f"n{number}") for number in range(2)]
    await add_engine(world, DEAD, expires_in=-SILENCE - 60, nodes=ids(4))
    own = str((await world.docker.system.info())["ID"])

    async def rows() -> dict[str, Document]:
        reply = await client.get("/api/engines")
        assert reply.status_code == 200
        return {row["engine_id"]: row for row in reply.json()}

    async def told() -> bool:
        return (await rows())[own]["latency_p50"] is not None

    async with (
        world.watching(http_listen=address, lease_duration=3) as watched,
        httpx.AsyncClient(base_url=f"http://{address}") as client,
    ):
        await nodes[0].kill()
        await eventually(lambda: world.says(nodes[0], status="exited"))
        await eventually(told, within=30)
        found = await rows()
        mine, theirs = found[own], found[DEAD]
        assert (mine["state"], mine["own"], mine["nodes"]) == ("ready", True, {"exited": 1, "running": 1})
        assert (mine["leader"], mine["version"]) == (watched.app.checker.manager_id, watched.app.checker.version)
        assert mine["sweep_age"] >= 0
        assert (theirs["state"], theirs["own"], theirs["host"]) == ("dead", False, "host-b")
        assert (theirs["nodes"], theirs["drift"], theirs["latency_p99"]) == ({"running": 4}, 3, 0.02)
        assert list(found) == [DEAD, own], "what needs somebody is not first"
        page = (await client.get("/api/nodes", params={"engine": DEAD})).json()
        assert [row["node_id"] for row in page] == [node_id[:12] for node_id in ids(4)[1::2]]
        notes = (await client.get("/readyz")).json()
        assert [note for note in notes if note.startswith("fleet: ") and DEAD in note], notes
        assert watched.count("eventwatch_engines_dead") == 1

        code, table = await ask(world, tmp_path, "engines")
        assert code == 0
        assert "host-b" in table
        assert "dead" in table
    # It ended as it should: that is on record, too.
    code, text = await ask(world, tmp_path, "engines", "--json")
    [left] = [row for row in json.loads(text) if row["engine_id"] == own]
    assert (code, left["state"], left["nodes"]) == (0, "away", {"exited": 1, "running": 1})


async def test_an_engine_whose_manager_checks_its_nodes_itself_is_not_dead(world: World) -> None:
    node = await world.start("ours")
    engine = as_engine(world.docker, world.settings())
    own = (await engine.identify()).id
    elsewhere = cast(
        "Engine", SimpleNamespace(identify=AsyncMock(return_value=EngineInfo("elsewhere", "", "", "")))
    )
    async with open_store(world.mongo_url, world.database_name) as store:
        await check_nodes_status(engine=world.docker, settings=world.settings())
        await world.database[ENGINES].update_one({"_id": checker_id(own)}, {"$set": {"seen_at": ago(2 * SILENCE)}})
        with pytest.raises(ConfigError, match="had no watcher that is on record"):
            await examine_forgetting(own, store, elsewhere)
    assert await world.collection.count_documents({"_id": node.id}) == 1


async def test_a_status_that_no_key_may_be_costs_no_lease(world: World) -> None:
    await world.start("ours")
    await world.insert("f" * 64, status="a\x00b")
    own = str((await world.docker.system.info())["ID"])

    async def renewed() -> bool:
        row = await world.checkers.find_one({"_id": checker_id(own)})
        return bool(row and row.get("report") and row["report"]["nodes"].get("other") == 1)

    with logged() as lines:
        async with world.watching(lease_duration=3):
            await eventually(renewed, within=20)
    assert not [text for text in texts(lines) if "lease" in text]


async def test_a_bad_document_of_another_engine_hides_no_page(world: World) -> None:
    for node_id in ids(6):
        await world.insert(node_id, engine_id=DEAD, **({"ip": 7} if node_id == ids(6)[1] else {}))
    async with open_store(world.mongo_url, world.database_name) as store:
        found, last = await store.read_page(DEAD, after="", limit=3)
        assert ([row.node_id for row in found], last) == ([ids(6)[0], ids(6)[2]], ids(6)[2])
        found, last = await store.read_page(DEAD, after=ids(6)[2], limit=3)
        assert ([row.node_id for row in found], last) == (ids(6)[3:], None)


async def test_only_a_dead_engine_is_forgotten_and_only_what_is_its_own_goes(world: World, tmp_path: Path) -> None:
    node = await world.start("ours")
    own = str((await world.docker.system.info())["ID"])
    dead, alive, adopted, back = ids(6), ids(3, "a"), ids(1, "b"), ids(1, "c")
    await add_engine(world, DEAD, expires_in=-SILENCE - 60, nodes=dead + adopted + back)
    await add_engine(world, "alive", expires_in=60, nodes=alive)
    await add_engine(world, "away", expires_in=-5, nodes=[])
    # On another engine now, whose watcher has not put that on record yet; and of a watcher that has come back.
    await world.collection.update_one({"_id": adopted[0]}, {"$set": {"engine_id": "alive", "epoch": 9}})
    await world.collection.update_one({"_id": back[0]}, {"$set": {"engine_id": DEAD, "epoch": EPOCH + 1}})
    await world.insert("e" * 64)  # nobody's

    async def documents() -> list[str]:
        return sorted([row["_id"] async for row in world.collection.find({}, {"_id": 1})])

    async with world.watching():
        await eventually(partial(world.database[OWNERS].find_one, {"_id": node.id}))
        before = await documents()
        engine = as_engine(world.docker, world.settings())
        async with open_store(world.mongo_url, world.database_name) as store:
            for engine_id, reason in (
                (own, "the engine which these settings name"),
                ("alive", "is watched by host-b"),
                ("away", "may just be restarting"),
                ("nowhere", "no engine nowhere is on record"),
            ):
                with pytest.raises(ConfigError, match=reason):
                    await examine_forgetting(engine_id, store, engine)
        code, text = await ask(world, tmp_path, "engines", "forget", DEAD)
        assert code == 2
        assert f"{len(dead)} documents would be deleted" in text
        assert "--yes" in text
        assert await documents() == before

        code, text = await ask(world, tmp_path, "engines", "forget", DEAD, "--yes")
        assert (code, f"{len(dead)} documents are deleted" in text) == (0, True), text
        assert await documents() == sorted(set(before) - set(dead))
        assert await world.database[OWNERS].count_documents({"engine_id": DEAD}) == 0
        assert await world.checkers.count_documents({"engine_id": DEAD}) == 0


@pytest.mark.parametrize("report", [None, 7, {"nodes": 7, "p50": "x", "drift": 1.5, "reasons": {"a": 1}}])
async def test_odd_records_of_engines_are_shown_as_far_as_they_make_sense(world: World, report: object) -> None:
    odd: Document = {"engine_id": "odd", "host": 7, "version": None, "renewed_at": "now", "standbys": [7]}
    await world.checkers.insert_one({"_id": checker_id("odd"), "report": report, **odd})
    await world.checkers.insert_one({"_id": checker_id("none"), "engine_id": 7})
    await world.database[ENGINES].insert_one(
        {"_id": checker_id("odd"), "engine_id": "odd", "left_at": "then", "ended_at": "then"}
    )
    async with open_store(world.mongo_url, world.database.name) as store:
        [record] = [each for each in await store.read_engines(10) if each.engine_id == "odd"]
        assert (record.engine_id, record.host, record.alive, record.age) == ("odd", "", False, None)
        assert (record.nodes, record.p50, record.drift, record.reasons) == ({}, None, None, ())


async def test_an_epoch_is_not_given_again_though_no_node_remembers_it(world: World) -> None:
    epochs = []
    async with open_store(world.mongo_url, world.database_name) as store:
        for name in ("one", "two"):
            checker = NodeChecker.model_construct(manager_id=name, interval=1.0, pid=1, host="host", version="0")
            lease = await store.acquire_lease(checker, engine_id="engine", duration=10)
            assert isinstance(lease, Lease)
            epochs.append(lease.epoch)
            await store.release_lease(lease)
    assert epochs == [1, 2]


async def test_a_dead_engine_is_told_of_while_it_has_documents(world: World) -> None:
    await add_engine(world, DEAD, expires_in=-SILENCE - 60, nodes=ids(2))
    # However many others went after it, that have left nothing.
    for number in range(30):
        await add_engine(world, f"empty {number}", expires_in=-SILENCE - 30, nodes=[])
    await add_engine(world, "away", expires_in=-SILENCE + 60, nodes=ids(2, "e"))
    metrics = Metrics()
    async with open_store(world.mongo_url, world.database.name) as store:
        looker = DeadEngines(store, SystemClock(), metrics)
        await looker.look()
        [note] = looker.notes
        assert DEAD in note
        assert "1 engine true" in note
        await world.collection.delete_many({})
        await looker.look()
        assert looker.notes == []
