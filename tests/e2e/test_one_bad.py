"""One bad container, document or row: all others stay right, and one line says what is wrong with it."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial

import pytest
from bson import DatetimeMS, Int64

from eventwatch import ToolServerNode, update_node_status, watch
from eventwatch.core.errors import EngineError, LeaseLostError, StoreError
from eventwatch.core.facts import Observation
from eventwatch.engine.docker import DockerEngine
from eventwatch.engine.protocol import EngineInfo
from eventwatch.pipeline.inspections import RETRIED
from eventwatch.pipeline.writer import Writer
from eventwatch.store.base import OWNERS, checker_id
from eventwatch.store.connection import Store
from eventwatch.store.rows import Lease, Peer
from tests.e2e.test_idle_stop import quick, start_idle, sweep
from tests.e2e.test_never_stopped import get
from tests.kit.fakes import Failing
from tests.kit.mongod import free_address, free_port
from tests.kit.seen import logged, texts
from tests.kit.truth import Document, ago, manager_document
from tests.kit.waiting import eventually
from tests.kit.world import Watched, World

LABEL = "eventwatch.test-bad"
FUTURE = datetime(2099, 1, 1, tzinfo=UTC)


# -- containers ---------------------------------------------------------------------------------------------


@pytest.mark.needs("cgroups")
async def test_one_container_that_cannot_be_inspected_is_named_and_harms_no_other(
    world: World, failing: Failing
) -> None:
    bad, good, address = await world.start("bad"), await world.start("good"), free_address()
    with logged("INFO") as lines:
        async with world.watching(http_listen=address, sweep_interval=0.5) as watched:
            await world.becomes_true()
            failing.bad.add(bad.id)
            failing.asked.clear()
            await bad.pause()
            await eventually(lambda: watched.count("eventwatch_nodes_unvouched"))
            await good.kill()
            await eventually(lambda: world.says(good, status="exited"), within=1)
            before = watched.count("eventwatch_sweep_duration_seconds_count")
            await eventually(lambda: watched.count("eventwatch_sweep_duration_seconds_count") > before + 4)
            status, notes = await get(address, "/readyz")
            assert status == 200
            assert [note for note in json.loads(notes) if note.startswith("nodes: 1 ") and bad.id[:12] in note]
            assert failing.asked[bad.id] < 4 * watched.count("eventwatch_sweep_duration_seconds_count")
            failing.bad.clear()
            await bad.unpause()
            await world.becomes_true()
            await eventually(lambda: not watched.count("eventwatch_nodes_unvouched"))
            assert json.loads((await get(address, "/readyz"))[1]) == []
    told = [text for text in texts(lines, "WARNING") if bad.id in text or "RWLayer" in text]
    assert 2 <= len(told) <= 10, told


@pytest.mark.needs("cgroups")
async def test_of_many_failing_inspections_only_some_are_repeated_and_told_of(
    world: World, failing: Failing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eventwatch.pipeline.inspections.RETRIED", 2)
    monkeypatch.setattr("eventwatch.pipeline.sweeper.RETRIED", 2)
    nodes = [await world.start(f"node-{number}") for number in range(6)]
    with logged("INFO") as lines:
        async with world.watching() as watched:
            await world.becomes_true()
            failing.bad |= {node.id for node in nodes}
            await asyncio.gather(*(node.pause() for node in nodes))
            await eventually(lambda: watched.count("eventwatch_nodes_unvouched") == 6)
            failing.asked.clear()
            await asyncio.sleep(2)
            assert sum(failing.asked.values()) <= 2 * 8
            assert len(failing.asked) == 2
            failing.bad.clear()  # the first that succeeds has all the others inspected
            await eventually(lambda: not watched.count("eventwatch_nodes_unvouched"))
            await world.becomes_true()
    named = {text for text in texts(lines, "WARNING") if text.startswith("Failed to get node info from docker: ")}
    assert len(named) == 2
    assert RETRIED > 2


async def test_one_container_that_cannot_be_inspected_keeps_no_other_from_being_registered(
    world: World, failing: Failing
) -> None:
    nodes = [await world.nodes.start(f"labelled-{number}", labels={LABEL: "yes"}) for number in range(3)]
    failing.bad.add(nodes[1].id)
    async with world.watching(register_label=LABEL) as watched:
        for node in (nodes[0], nodes[2]):
            await eventually(partial(world.says, node, status="running"))
        assert await world.document(nodes[1]) is None
        failing.bad.clear()
        await sweep(watched)
        await eventually(lambda: world.says(nodes[1], status="running"))


async def test_a_container_made_long_before_its_start_becomes_true_at_its_start(world: World) -> None:
    async with world.watching(orphan_grace=0.3) as watched:
        node = await world.nodes.create("patient")
        await eventually(lambda: watched.events(node, "create"))
        await eventually(
            lambda: node.id in watched.app.pipeline.orphans.foreign if watched.app.pipeline else False
        )
        await node.start()
        await world.insert(node)
        await eventually(lambda: world.says(node, status="running"), within=2)


# -- documents and rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"manager_id": "m", "epoch": "abc", "expires_at": ago(60)},
        {"manager_id": "m", "epoch": float("inf"), "expires_at": ago(60)},
        {"manager_id": "m", "epoch": Int64(2**63 - 1), "expires_at": ago(60)},
        {"manager_id": "m", "epoch": 1, "cursor": "abc", "expires_at": ago(60)},
        {"manager_id": "m", "epoch": 1, "cursor": -5, "expires_at": ago(60)},
        {"manager_id": "m", "epoch": 1, "cursor": Int64(2**63 - 1), "expires_at": ago(60)},
        {"manager_id": "m", "epoch": 1, "pid": "abc", "host": 7, "expires_at": FUTURE},
        {"manager_id": 7, "epoch": 1, "expires_at": "soon"},
        {"manager_id": "m", "epoch": 1, "expires_at": ago(60), "note": DatetimeMS(2**60)},
        {"manager_id": "m", "epoch": 1, "expires_at": ago(-23 * 3600)},
        {"manager_id": "m", "epoch": 1, "expires_at": ago(60), "standbys": [{"seen_at": DatetimeMS(2**60)}, 7]},
    ],
)
async def test_an_odd_checker_document_is_taken_over(world: World, row: Document) -> None:
    node = await world.start("one")
    engine_id = (await world.docker.system.info())["ID"]
    await world.checkers.insert_one({"_id": checker_id(engine_id), "engine_id": engine_id, **row})
    async with world.watching():
        await world.becomes_true()
        await node.kill()
        await world.becomes_true()


async def test_a_claim_by_nobody_is_none(world: World) -> None:
    node = await start_idle(world, "idle")
    claim = {"until": ago(-3600), "stands": True}
    await world.database[OWNERS].update_one({"_id": node.id}, {"$set": {"claim": claim}}, upsert=True)
    with logged("WARNING") as lines:
        async with world.watching(**quick()):
            await eventually(lambda: world.says(node, status="exited"), 20)
    assert not [text for text in texts(lines) if "Starting over" in text]


async def test_a_standby_of_the_far_future_holds_up_no_deletion(world: World) -> None:
    node, gone = await world.start("one"), "d" * 64
    async with world.watching() as watched:
        await world.becomes_true()
        ghost = {"manager_id": "ghost", "host": "h", "pid": 1, "containers": [gone], "look": 1, "seen_at": FUTURE}
        await world.checkers.update_one({}, {"$set": {"standbys": [ghost]}})
        engine_id = (await world.docker.system.info())["ID"]
        await world.insert(gone, engine_id=engine_id)
        await world.database[OWNERS].insert_one({"_id": gone, "engine_id": engine_id})
        await eventually(lambda: swept_away(world, watched, gone), 20)
        assert await world.says(node, status="running")


async def swept_away(world: World, watched: Watched, node_id: str) -> bool:
    await sweep(watched)
    return await world.collection.count_documents({"_id": node_id}) == 0


@pytest.mark.parametrize("epoch", [float("inf"), float("nan"), Int64(2**63 - 1), 1e300, "abc"], ids=str)
async def test_an_odd_epoch_is_reported_once_and_left_alone(world: World, epoch: object) -> None:
    node = await world.start("one")
    odd = manager_document("f" * 64, epoch=epoch)
    await world.collection.insert_one(odd)
    with logged("WARNING") as lines:
        async with world.watching() as watched:
            await node.kill()
            await eventually(lambda: world.says(node, status="exited"))
            await sweep(watched)
            await sweep(watched)
    assert len([text for text in texts(lines) if f"Document {'f' * 64} is skipped" in text]) == 1
    assert await world.collection.count_documents({"_id": "f" * 64}) == 1
    assert not [text for text in texts(lines) if "Starting over" in text]


async def test_a_document_that_the_server_will_not_have_written_is_named_and_holds_up_no_other(
    world: World,
) -> None:
    bad, good = await world.start("bad"), await world.start("good")
    rule = {"$or": [{"_id": {"$ne": bad.id}}, {"status": "created"}]}
    await world.database.command("collMod", "ToolServerNode", validator=rule)
    with logged("INFO") as lines:
        async with world.watching() as watched:
            await eventually(lambda: world.says(good, status="running"))
            await sweep(watched)
            await good.kill()
            await eventually(lambda: world.says(good, status="exited"))
    told = [text for text in texts(lines, "WARNING") if f"Document {bad.id} cannot be written" in text]
    assert len(told) == 1
    assert f"Node {bad.id[:12]} status updated" not in "".join(texts(lines))


# -- inside a host ------------------------------------------------------------------------------------------


@asynccontextmanager
async def refused_login(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    async def refuse(_: Store, *__: object, **___: object) -> Lease | Peer:
        raise StoreError("Database refused the login while taking the lease", permanent=True)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "acquire_lease", refuse)
        yield


async def test_inside_a_host_the_watcher_goes_on_trying_whatever_happens(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await world.start("one")
    with logged("INFO") as lines:
        async with world.watching() as watched:
            await world.becomes_true()
            async with refused_login(monkeypatch):
                await world.checkers.update_one({}, {"$set": {"manager_id": "somebody", "expires_at": ago(1)}})
                await eventually(lambda: any("refused the login" in doubt for doubt in watched.app.doubts()))
            await node.kill()
            await world.becomes_true()
            await eventually(lambda: not watched.app.doubts())
    told = [text for text in texts(lines, "ERROR") if "refused the login" in text]
    assert len(told) == 1


async def test_inside_a_host_an_engine_that_talks_nonsense_for_a_while_ends_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await world.start("one")
    real = DockerEngine.identify

    async def broken(_: DockerEngine) -> EngineInfo:
        raise UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed")

    with logged("ERROR") as lines:
        async with world.watching() as watched:
            await world.becomes_true()
            monkeypatch.setattr(DockerEngine, "identify", broken)
            await world.checkers.update_one({}, {"$set": {"manager_id": "somebody", "expires_at": ago(1)}})
            await eventually(lambda: any("unexpected error" in text for text in texts(lines)), 20)
            await node.kill()
            monkeypatch.setattr(DockerEngine, "identify", real)
            await world.becomes_true()
            await eventually(lambda: not watched.app.doubts(), 20)


async def test_a_hosts_start_ends_when_it_is_told_to(world: World) -> None:
    told: list[int] = []
    settings = world.settings(mongo_url=f"mongodb://127.0.0.1:{free_port()}/")
    before = signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    try:
        asyncio.get_running_loop().call_later(0.5, signal.raise_signal, signal.SIGTERM)
        with pytest.raises(StoreError, match="Told to stop before it was started: "):
            async with asyncio.timeout(20), watch(settings):
                pytest.fail("entered without a database")
        assert told == [signal.SIGTERM]
        signal.raise_signal(signal.SIGTERM)
        assert len(told) == 2
    finally:
        signal.signal(signal.SIGTERM, before)


async def test_a_hosts_start_waits_for_the_database_so_long_and_no_longer(world: World) -> None:
    settings = world.settings(mongo_url=f"mongodb://127.0.0.1:{free_port()}/")
    with pytest.raises(StoreError, match="Not started within 1 s: "):
        async with watch(settings, start_timeout=1):
            pytest.fail("entered without a database")


async def test_a_managers_call_raises_nothing_when_the_lease_is_lost_in_the_middle(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = await world.start("one")
    async with world.watching():
        await world.becomes_true()
        given = await ToolServerNode.get(node.id)
        assert given is not None

        async def lost(_: Writer) -> None:
            raise LeaseLostError("The lease ran out")

        with monkeypatch.context() as patch, logged("WARNING") as lines:
            patch.setattr(Writer, "flush", lost)
            await update_node_status(given)
    assert f"Failed to get node info from docker: {node.id}" in texts(lines)


async def test_an_engine_that_does_not_say_who_it_is_is_swept_all_the_same_but_for_deletions(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, gone = await world.start("one"), "f" * 64
    engine_id = (await world.docker.system.info())["ID"]
    async with world.watching() as watched:
        await world.becomes_true()

        async def slow(_: DockerEngine) -> EngineInfo:
            raise EngineError("Engine did not answer within 10 s while asking the engine who it is")

        with monkeypatch.context() as patch:
            patch.setattr(DockerEngine, "identify", slow)
            await world.insert(gone, engine_id=engine_id)
            await world.collection.update_one({"_id": node.id}, {"$set": {"status": "exited"}})
            await sweep(watched)
            assert await world.says(node, status="running")
            assert await world.collection.count_documents({"_id": gone}) == 1
        await sweep(watched)
        assert await world.collection.count_documents({"_id": gone}) == 0


async def test_an_engine_that_is_slow_about_every_container_is_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eventwatch.app.PATIENCE", 0.1)
    real = DockerEngine.inspect
    node, gone = await world.start("one"), "f" * 64
    engine_id = (await world.docker.system.info())["ID"]
    async with world.watching() as watched:
        await world.becomes_true()

        async def slow(engine: DockerEngine, node_id: str, *, as_of: int = 0) -> Observation:
            await asyncio.sleep(0.5)
            return await real(engine, node_id, as_of=as_of)

        monkeypatch.setattr(DockerEngine, "inspect", slow)
        await world.insert(gone, engine_id=engine_id)
        for _ in range(5):
            await sweep(watched)
        assert await world.collection.count_documents({"_id": gone}) == 0
        assert await world.says(node, status="running")
