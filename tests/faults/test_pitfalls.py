"""The 15 pitfalls that users of comparable programs hit, one test or more for each, by number and name.

The watcher runs in this process, between a real MongoDB and a real engine behind a proxy that can lie, fail and
fall silent. Unless a test says otherwise no sweep by the timer helps.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest
import pytest_asyncio
from aiohttp import web

from eventwatch import Settings
from eventwatch.app import Application
from eventwatch.core.backoff import Pace
from eventwatch.core.clock import SystemClock
from eventwatch.core.errors import ConfigError
from eventwatch.core.facts import Cause
from eventwatch.engine import docker as engine_module
from eventwatch.engine import wire
from eventwatch.pipeline import watcher as watcher_module
from tests.faults.harness import EXPECTED_ERRORS, RECOVERY, Oracle, Row, World, times
from tests.faults.proxies import EngineProxy, Wire
from tests.kit.engines import PrivateEngine
from tests.kit.mongod import PrivateMongo, free_address
from tests.kit.nodes import Node
from tests.kit.processes import run
from tests.kit.seen import filmed, logged, texts
from tests.kit.truth import Document, ago
from tests.kit.waiting import NEVER, eventually
from tests.kit.world import Watched, watching

pytestmark = pytest.mark.asyncio(loop_scope="session")

FLOOD: Final = 100_000
#: Bytes; aiohttp's own reader of lines gives up at 512 KiB.
LONG: Final = 600 * 1024
NOBODY: Final = "b" * 64


@dataclass
class Scene:
    """Four nodes with their documents, and a proxy in front of their engine."""

    world: World
    proxy: EngineProxy
    folder: Path
    nodes: list[Node] = field(default_factory=list)

    def settings(self, **changes: Any) -> Settings:
        base: dict[str, Any] = {
            "docker_host": self.proxy.url,
            "mongo_url": self.world.mongo_url,
            "mongo_database": self.world.database,
            "node_network": self.world.network,
            "sweep_interval": NEVER,
            "http_listen": "",
        }
        return Settings(_env_file=None, **(base | changes))

    @asynccontextmanager
    async def watched(self, **changes: Any) -> AsyncIterator[Watched]:
        async with watching(self.settings(**changes)) as watched:
            await self.is_right()
            yield watched

    async def is_right(self, within: float = 10.0) -> float:
        return await Oracle(self.world).recovered(within=within)

    async def document(self, node: Node) -> Document | None:
        return await self.world.documents.find_one({"_id": node.id})

    async def says(self, node: Node, **fields: Any) -> bool:
        return await self.world.documents.count_documents({"_id": node.id, **fields}) == 1

    async def count(self) -> int:
        return await self.world.documents.count_documents({})


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def crowd(engine: PrivateEngine, mongo: PrivateMongo) -> AsyncIterator[World]:
    async with World(engine.url, mongo.url) as world:
        for name, health in (("one", None), ("two", None), ("three", "ok"), ("four", None)):
            node = await world.maker.start(name, healthcheck=health, interval_s=0.3)  # type: ignore[arg-type]
            world.nodes[node.id] = node
        yield world


@pytest_asyncio.fixture(loop_scope="session")
async def scene(crowd: World, engine: PrivateEngine, tmp_path: Path) -> AsyncIterator[Scene]:
    """All nodes running and in a database of the test's own."""
    first = crowd.database
    crowd.database = f"{first}_{tmp_path.name[-20:]}".replace("-", "_")
    crowd.inserted.clear()
    crowd.requests.clear()
    nodes = list(crowd.nodes.values())
    for node in nodes:
        for operation in (node.unpause, node.start):
            with suppress(*EXPECTED_ERRORS):
                await operation()
        await crowd.insert(node)
    async with EngineProxy(tmp_path, engine.url) as proxy:
        yield Scene(crowd, proxy, tmp_path, nodes)
    await crowd.client.drop_database(crowd.database)
    crowd.database = first
    for node_id in set(crowd.nodes) - {node.id for node in nodes}:
        with suppress(*EXPECTED_ERRORS):
            await crowd.nodes[node_id].remove()
        del crowd.nodes[node_id]


def line(node: Node | str, action: str, *, at: int | None = None, **attributes: str) -> Document:
    """An event as API 1.52 tells it: without `status`, `id` and `from`."""
    return {
        "Type": "container",
        "Action": action,
        "Actor": {"ID": node if isinstance(node, str) else node.id, "Attributes": attributes},
        "timeNano": at or time.time_ns(),
    }


async def test_pitfall_1_aiodocker_dies_silently(scene: Scene) -> None:
    """A clean end, an abort, a line over 512 KiB, one over every limit, garbage: the stream goes on."""
    one, two, *_ = scene.nodes
    async with scene.watched() as watched:
        for break_it in (scene.proxy.end, scene.proxy.cut):
            opened = scene.proxy.asked.count("events")
            if (breaking := break_it()) is not None:
                await breaking
            await eventually(partial(asked_again, scene, "events", opened))
            await eventually(lambda: scene.proxy.streams)
            await one.restart(grace_s=0)
            await scene.is_right()
        reconnects = scene.proxy.asked.count("events")
        await scene.proxy.emit(line(two, "rename", label="x" * LONG))
        await eventually(lambda: watched.events(two, "rename"))
        for garbage in (
            b"x" * (wire.MAX_LINE + 1),
            b"\n{\n",
            b"[]\n",
            b'{"Type":"container"}\n',
            b"\xff\n",
        ):
            await scene.proxy.emit(garbage)
        await eventually(lambda: watched.count("eventwatch_events_total", action="malformed") >= 5)
        await two.kill()
        await eventually(lambda: scene.says(two, status="exited", ip=""), RECOVERY)
        assert scene.proxy.asked.count("events") == reconnects


async def test_pitfall_2_no_default_timeout(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """An inspection that is never answered ends, holds up nobody, and is repeated."""
    monkeypatch.setattr(engine_module, "INSPECT_DEADLINE", 0.5)
    one, two, *_ = scene.nodes
    async with scene.watched() as watched:
        hanging = scene.proxy.hold(f"/containers/{one.id}/json")
        await one.pause()
        await one.unpause()
        await two.kill()
        await eventually(lambda: scene.says(two, status="exited", ip=""), RECOVERY)
        with logged("WARNING") as lines:
            await eventually(lambda: any("Failed to get node info" in text for text in texts(lines)))
        asked = scene.proxy.asked.count(f"containers/{one.id}/json")
        await eventually(lambda: scene.proxy.asked.count(f"containers/{one.id}/json") > asked)
        hanging.set()
        await scene.is_right()
        assert watched.app.pipeline is not None


async def test_pitfall_2_a_container_that_the_engine_has_locked_holds_up_no_other(scene: Scene) -> None:
    """An inspection that never ends is waited for beside the sweep, not within it."""
    one, two, *_ = scene.nodes
    async with scene.watched() as watched:
        answered = scene.proxy.hold(f"/containers/{one.id}/json")
        scene.proxy.mute = True
        await one.pause()
        await two.kill()
        watched.app.sweep_now()
        await eventually(lambda: scene.says(two, status="exited", ip=""))
        assert await scene.says(one, status="running")
        answered.set()
        await eventually(lambda: scene.says(one, status="paused"), RECOVERY)


async def test_pitfall_3_the_engine_drops_events(scene: Scene) -> None:
    """What no event told, the next sweep finds, and counts as drift."""
    one, two, *_ = scene.nodes
    async with scene.watched(sweep_interval=1.0) as watched:
        scene.proxy.mute = True
        await one.kill()
        await two.pause()
        await eventually(lambda: scene.says(one, status="exited", ip=""), 3)
        await eventually(lambda: scene.says(two, status="paused"), 3)
        await eventually(lambda: watched.count("eventwatch_drift_corrections_total", field="status") >= 2)


async def test_pitfall_3_a_flood_of_100_000_events_is_read_while_the_database_is_frozen(
    scene: Scene, mongo: PrivateMongo
) -> None:
    """The reader only parses and enqueues: were it to wait for the database, the engine would drop events."""
    actions = ("die", "start", "pause", "unpause", "health_status: healthy", "exec_create: x", "no such action")
    one, *_ = scene.nodes
    async with scene.watched(lease_duration=120.0) as watched:
        mongo.freeze()
        try:
            began, sent = time.monotonic(), 0
            while sent < FLOOD:
                batch = [
                    line(scene.nodes[n % 4] if n % 8 else f"{n % 500:064x}", actions[n % 7])
                    for n in range(sent, sent + 500)
                ]
                await scene.proxy.emit(b"".join(json.dumps(event).encode() + b"\n" for event in batch))
                sent += len(batch)
            await eventually(lambda: len(watched.noticed) >= FLOOD, 60)
            took = time.monotonic() - began
        finally:
            mongo.thaw()
        assert watched.app.pipeline is not None
        assert watched.app.pipeline.reconciler.depth() < 1000
        await one.kill()
        row = Row("event flood of 100,000, database frozen", times=1, documents=await scene.count())
        row.longest_recovery = await scene.is_right(30)
        row.save()
        assert row.longest_recovery <= RECOVERY
        assert took < 60


async def test_pitfall_4_since_is_no_log(scene: Scene) -> None:
    """It resumes with nanoseconds in integers, drops what is replayed, and sweeps what is not."""
    one, two, *_ = scene.nodes
    async with scene.watched() as watched:
        await one.kill()
        await eventually(lambda: scene.says(one, status="exited"))
        for forgetful in (False, True):
            scene.proxy.forgetful = forgetful
            allow = scene.proxy.fail("/events", 503)
            scene.proxy.cut()
            await (two.kill() if forgetful else one.start())
            allow()
            await eventually(lambda: scene.proxy.streams)
            assert await scene.is_right() <= RECOVERY
        keys = [event.key for event in watched.noticed]
        assert len(keys) == len(set(keys))
        await eventually(lambda: watched.count("eventwatch_stream_gaps_total") >= 1)
    resumed = [since for since in scene.proxy.since if since is not None]
    assert resumed
    assert all(re.fullmatch(r"\d{10}\.\d{9}", since) for since in resumed)


async def test_pitfall_5_the_gap_between_list_and_watch(scene: Scene) -> None:
    """The stream is open before anything is inspected, and tells what happens during the first sweep."""
    one, two, *_ = scene.nodes
    killed: list[str] = []

    async def kill_meanwhile(request: web.Request) -> None:
        if "/containers/" in request.path and not killed:
            killed.append(two.id)
            await two.kill()
            await one.pause()

    scene.proxy.rules.append(kill_meanwhile)
    async with scene.watched():
        assert killed
        assert await scene.says(two, status="exited", ip="")
        assert await scene.says(one, status="paused")
    inspected = next(number for number, path in enumerate(scene.proxy.asked) if path.startswith("containers/"))
    assert scene.proxy.asked.index("events") < inspected


class Readiness:
    """What /readyz of a watcher on `listen` says."""

    def __init__(self) -> None:
        self.listen = free_address()

    async def reasons(self) -> list[str]:
        async with aiohttp.ClientSession() as session, session.get(f"http://{self.listen}/readyz") as answer:
            told: list[str] = await answer.json()
            if answer.status == 200:
                return []  # what it says then are notes
            assert (answer.status, bool(told)) == (503, True)
            return told

    async def is_ready(self) -> bool:
        return await self.reasons() == []

    async def doubts(self, reason: str) -> bool:
        return any(told.startswith(reason) for told in await self.reasons())


async def test_pitfall_6_healthy_but_deaf(scene: Scene) -> None:
    """Open, and not a word: a sweep finds what was not told, and it is not ready until the stream tells again."""
    one, two, *_ = scene.nodes
    ready = Readiness()
    async with scene.watched(sweep_interval=0.3, http_listen=ready.listen) as watched:
        await eventually(ready.is_ready)
        scene.proxy.mute = True
        await one.kill()
        await eventually(partial(ready.doubts, "stream: connected but deaf"))
        assert await scene.says(one, status="exited", ip="")
        scene.proxy.mute = False
        await two.kill()  # the next word, or the next proof that there was none
        await eventually(ready.is_ready)
        await eventually(lambda: watched.count("eventwatch_stream_reconnects_total", reason="deaf") >= 1)


async def test_readiness_tells_of_a_stream_that_is_away_and_of_a_sweep_that_is_late(scene: Scene) -> None:
    ready = Readiness()
    async with scene.watched(sweep_interval=0.3, http_listen=ready.listen):
        await eventually(ready.is_ready)
        for part, reason in (("/events", "stream: not connected"), ("/containers/", "sweep: the last one")):
            undo = scene.proxy.fail(part, 500)
            scene.proxy.cut()
            await eventually(partial(ready.doubts, reason))
            undo()
            await eventually(ready.is_ready)


async def test_readiness_tells_of_a_database_that_is_gone_and_of_a_lease_that_is_lost(
    scene: Scene, mongo: PrivateMongo
) -> None:
    ready = Readiness()
    async with scene.watched(http_listen=ready.listen, lease_duration=2.0):
        await eventually(ready.is_ready)
        await mongo.kill()
        try:
            await eventually(partial(ready.doubts, "database: it does not answer"))
            await eventually(partial(ready.doubts, "lease: not held"))
        finally:
            await mongo.start()
        await eventually(ready.is_ready)


async def test_readiness_tells_of_a_brake_that_is_engaged(scene: Scene) -> None:
    ready = Readiness()
    async with scene.watched(http_listen=ready.listen, delete_limit=2) as watched:
        await eventually(ready.is_ready)
        undo = scene.proxy.fail("/json", 404, b'{"message":"No such container"}')
        for _ in range(2):
            watched.app.sweep_now()
            await eventually(partial(ready.doubts, "brake: "))
        assert await scene.count() == 4
        undo()
        watched.app.sweep_now()
        await eventually(ready.is_ready)


async def test_pitfall_7_giving_up(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thirtieth attempt in a row that fails is followed by the next one."""
    monkeypatch.setattr(watcher_module, "RECONNECT", Pace(base=0.01, cap=0.05, stable=10.0))
    one, *_ = scene.nodes
    async with scene.watched():
        asked = scene.proxy.asked.count("events")
        undo = scene.proxy.fail("/events", 500)
        scene.proxy.cut()
        await eventually(lambda: scene.proxy.asked.count("events") > asked + 30)
        await one.kill()
        undo()
        await eventually(lambda: scene.says(one, status="exited", ip=""), RECOVERY)


async def test_pitfall_8_hot_loops(scene: Scene) -> None:
    """Streams that end cleanly at once, and a thousand bad lines, cost neither the engine nor the disk."""
    one, *_ = scene.nodes

    async def ends_at_once(request: web.Request) -> web.Response | None:
        return web.Response() if request.path.endswith("/events") else None

    with logged("INFO") as lines:
        async with scene.watched() as watched:
            scene.proxy.rules.append(ends_at_once)
            asked = scene.proxy.asked.count("events")
            scene.proxy.cut()
            await asyncio.sleep(3)
            attempts = scene.proxy.asked.count("events") - asked
            assert 2 <= attempts <= 12
            assert len(texts(lines)) < 40
            scene.proxy.rules.clear()
            await eventually(lambda: scene.proxy.streams)
            told = len(texts(lines))
            await scene.proxy.emit(b"{\n" * 1000)
            await eventually(lambda: watched.count("eventwatch_events_total", action="malformed") >= 1000)
            assert len(texts(lines)) - told <= 15
            await one.kill()
            await eventually(lambda: scene.says(one, status="exited", ip=""), RECOVERY)


@pytest.mark.parametrize("mounted", [True, False], ids=["under a bind mount", "with the folder it lies in"])
async def test_pitfall_9_the_sockets_inode(scene: Scene, engine: PrivateEngine, mounted: bool) -> None:
    """The socket is another file now, at the same path."""
    one, *_ = scene.nodes
    before, after, seen = (scene.folder / name for name in ("before", "after", "seen"))
    before.mkdir()
    after.mkdir()
    if mounted:
        seen.mkdir()
        run("mount", "--bind", str(before), str(seen))
        after = before
    else:
        seen.symlink_to(before)
    try:
        async with EngineProxy(before, engine.url) as first:
            watch = scene.watched(docker_host=f"unix://{seen}/proxy.sock")
            await watch.__aenter__()
        try:
            assert first.asked.count("events") == 1
            await one.kill()
            if not mounted:
                seen.unlink()
                seen.symlink_to(after)
            async with EngineProxy(after, engine.url) as second:
                row = Row("socket replaced " + ("under a bind mount" if mounted else "with its folder"), times=1)
                row.documents, row.longest_recovery = await scene.count(), await scene.is_right()
                row.save()
                assert row.longest_recovery <= RECOVERY
                assert second.streams == 1
        finally:
            await watch.__aexit__(None, None, None)
    finally:
        if mounted:
            run("umount", "--lazy", str(seen))


async def test_pitfall_9_a_dead_socket_that_only_a_restart_replaces_ends_the_program(
    scene: Scene, engine: PrivateEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mounted by itself, the old socket stays: a restart of the container mounts the new one, so we end."""
    monkeypatch.setattr(engine_module, "DEAD_MOUNT", 1.0)
    one, *_ = scene.nodes
    seen = scene.folder / "seen.sock"
    seen.touch()
    settings = scene.settings(docker_host=f"unix://{seen}")
    async with EngineProxy(scene.folder, engine.url):
        run("mount", "--bind", str(scene.folder / "proxy.sock"), str(seen))
        app = Application(settings)
        running = asyncio.create_task(app.run())
        await scene.is_right()
    (scene.folder / "proxy.sock").unlink(missing_ok=True)
    try:
        async with EngineProxy(scene.folder, engine.url):
            await one.kill()
            with pytest.raises(ConfigError, match="mounted by itself"):
                await asyncio.wait_for(running, 20)
            run("umount", str(seen))
            run("mount", "--bind", str(scene.folder / "proxy.sock"), str(seen))
            async with watching(settings):
                await scene.is_right()
    finally:
        run("umount", "--lazy", str(seen))


async def test_pitfall_10_a_socket_proxy_cuts_and_forbids(scene: Scene) -> None:
    """A stream that is cut is no news; a 403 is not a 404 and deletes nothing, not even a node that is gone."""
    one, *_ = scene.nodes
    extra = await scene.world.maker.start("extra")
    scene.world.nodes[extra.id] = extra
    await scene.world.insert(extra)
    async with scene.watched(sweep_interval=0.3) as watched:
        with logged("INFO") as lines:
            opened = scene.proxy.asked.count("events")
            scene.proxy.cut()
            await eventually(lambda: scene.proxy.asked.count("events") > opened)
            await eventually(
                lambda: watched.app.pipeline and watched.app.pipeline.watcher.connected_at is not None
            )
            assert any("Reconnecting to the engine" in text for text in texts(lines, "INFO"))
            assert not texts(lines, "WARNING")
        undo = scene.proxy.fail("/containers/", 403)
        scene.proxy.mute = True
        await extra.remove()
        sweeps = watched.count("eventwatch_sweep_duration_seconds_count")
        await eventually(lambda: watched.count("eventwatch_sweep_duration_seconds_count") > sweeps + 1)
        assert await scene.count() == 5
        undo()
        scene.proxy.mute = False
        await one.kill()
        await scene.is_right()
        assert await scene.count() == 4


async def test_pitfall_11_api_versions_that_move(scene: Scene) -> None:
    """The version is negotiated anew on each connection; what API 1.52 drops from events is not needed."""
    one, *_ = scene.nodes

    async def older(request: web.Request) -> web.Response | None:
        if not request.path.endswith("/version"):
            return None
        return web.json_response({"Version": "19.03", "ApiVersion": "1.40", "MinAPIVersion": "1.12"})

    scene.proxy.rules.append(older)
    async with scene.watched() as watched:
        scene.proxy.rules.clear()
        scene.proxy.cut()
        await eventually(lambda: len(scene.proxy.versions) > 1)
        assert scene.proxy.versions[0] == "1.40"
        assert scene.proxy.versions[-1] == "1.41"
        await eventually(lambda: scene.proxy.streams)
        scene.proxy.mute = True
        await one.kill()
        await scene.proxy.emit(line(one, "die"))
        await eventually(lambda: scene.says(one, status="exited", ip=""), RECOVERY)
        assert watched.of(one)[-1].cause is Cause.EVENT


async def test_pitfall_12_ordering_and_stale_health(scene: Scene) -> None:
    """An older event that comes late changes nothing; a node that does not run is never healthy."""
    one, _, checked, _ = scene.nodes
    async with scene.watched() as watched:
        await checked.wait_health("healthy")
        await eventually(lambda: scene.says(checked, health="healthy"))
        await checked.kill()
        await eventually(lambda: scene.says(checked, status="exited", health="unhealthy"))
        await checked.start()
        await eventually(lambda: scene.says(checked, status="running"))
        await checked.wait_health("healthy")
        await scene.is_right()
        await one.restart(grace_s=0)
        await scene.is_right()
        async with filmed(scene.world.documents) as film:
            told = watched.events(one)
            late = time.time_ns() - 3_000_000_000
            await scene.proxy.emit(line(one, "die", at=late), line(one, "pause", at=late + 1))
            await eventually(lambda: watched.events(one) == told + 2)
            await asyncio.sleep(1)
        assert not [image for image in film.of(one) if not image.says(status="running")]


async def test_pitfall_13_podman(scene: Scene) -> None:
    """It says `died` and `remove`, and refuses filters that Docker knows: only type and event are asked for."""
    one, *_ = scene.nodes
    asked: list[str] = []

    async def note(request: web.Request) -> None:
        if request.path.endswith("/events"):
            asked.append(request.query["filters"])

    scene.proxy.rules.append(note)
    extra = await scene.world.maker.start("extra")
    scene.world.nodes[extra.id] = extra
    await scene.world.insert(extra)
    async with scene.watched():
        scene.proxy.mute = True
        await one.kill()
        await scene.proxy.emit(line(one, "died"))
        await eventually(lambda: scene.says(one, status="exited", ip=""), RECOVERY)
        await extra.remove()
        await scene.proxy.emit(line(extra, "remove"))
        await eventually(lambda: absent(scene, extra), RECOVERY)
    for filters in map(json.loads, asked):
        assert filters.keys() == {"type", "event"}
        assert {"died", "remove"} <= set(filters["event"])  # asked for `die`, Podman 4.3 tells of none


async def absent(scene: Scene, node: Node) -> bool:
    return await scene.document(node) is None


async def test_pitfall_14_resurrection_by_a_stale_inspection(scene: Scene) -> None:
    """A sweep's answer from before a node's death, given after it, does not bring it back to life."""
    one, *_ = scene.nodes
    async with scene.watched() as watched, filmed(scene.world.documents) as film:
        late = scene.proxy.hold(f"/containers/{one.id}/json")
        asked = scene.proxy.asked.count(f"containers/{one.id}/json")
        watched.app.sweep_now()
        await eventually(lambda: scene.proxy.asked.count(f"containers/{one.id}/json") > asked)
        await asyncio.sleep(0.1)
        await one.kill()
        await eventually(lambda: scene.says(one, status="exited", ip=""), RECOVERY)
        late.set()
        await asyncio.sleep(1)
        await scene.is_right()
    statuses = [image.document["status"] for image in film.of(one) if image.document]
    assert "running" not in statuses[statuses.index("exited") :]


async def test_pitfall_14_lost_update_and_a_deleted_document_that_is_written_again(scene: Scene) -> None:
    """No write brings back a document that the manager deleted, nor an old `last_req_time`."""
    one, two, *_ = scene.nodes
    async with scene.watched() as watched:
        await scene.world.documents.delete_one({"_id": one.id})
        await one.kill()
        moment = ago(0)
        await scene.world.documents.update_one({"_id": two.id}, {"$set": {"last_req_time": moment}})
        await two.kill()
        await eventually(lambda: scene.says(two, status="exited", ip="", last_req_time=moment))
        await eventually(lambda: watched.events(one, "die"))
        await asyncio.sleep(1)
        watched.app.sweep_now()
        await asyncio.sleep(0.5)
        assert await scene.document(one) is None
        scene.world.inserted.discard(one.id)
        await scene.is_right()


async def test_pitfall_14_a_document_that_cannot_be_read(scene: Scene) -> None:
    """It is reported once and left as it is; all others are kept right, and it is too once it is mended."""
    one, two, *_ = scene.nodes
    bad = {"status": ["running"], "port": "many", "extra": {"deep": 1}}
    sound = await scene.document(one)
    assert sound is not None
    row = Row("unreadable document", times=1, documents=await scene.count())
    await scene.world.documents.update_one({"_id": one.id}, {"$set": bad})
    await scene.world.documents.insert_one({"_id": NOBODY, "short_id": 7})
    scene.world.inserted.discard(one.id)
    with logged("WARNING") as lines:
        async with watching(scene.settings(sweep_interval=0.3, docker_host=scene.proxy.url)) as watched:
            await two.kill()
            await eventually(lambda: scene.says(two, status="exited", ip=""), RECOVERY)
            sweeps = watched.count("eventwatch_sweep_duration_seconds_count")
            await eventually(lambda: watched.count("eventwatch_sweep_duration_seconds_count") > sweeps + 2)
            assert await scene.says(one, **bad)
            await scene.world.documents.delete_one({"_id": NOBODY})
            await scene.world.documents.replace_one({"_id": one.id}, sound)
            scene.world.inserted.add(one.id)
            row.longest_recovery = await scene.is_right()
            row.save()
    assert row.longest_recovery <= RECOVERY
    for node_id in (one.id, NOBODY):
        assert sum(f"Document {node_id} is skipped" in text for text in texts(lines)) == 1
    assert not texts(lines, "ERROR")


class JumpingClock(SystemClock):
    """A wall clock that somebody sets; the monotonic one is not impressed."""

    ahead_s = 0.0

    def time_ns(self) -> int:
        return super().time_ns() + round(self.ahead_s * 1e9)


async def test_pitfall_15_idle_logic_under_a_clock_that_jumps_by_an_hour(scene: Scene) -> None:
    """Neither way does a jump stop a node that is in use, nor does a `last_req_time` in the future; age does."""
    clock = JumpingClock()
    one, two, *_ = scene.nodes
    app = Application(scene.settings(sweep_interval=0.3, idle_timeout=1800), clock=clock)
    running = asyncio.create_task(app.run(), name="eventwatch")
    row = Row("clock jumps by an hour", documents=await scene.count())
    try:
        await eventually(lambda: app.pipeline and app.pipeline.sweeper.last_success is not None)
        await scene.world.documents.update_one({"_id": two.id}, {"$set": {"last_req_time": ago(-86400)}})
        for ahead in (3600.0, 0.0, -3600.0, 0.0, 7200.0):
            clock.ahead_s = ahead
            row.times += 1
            await eventually(partial(has_swept, app, count_sweeps(app) + 3))
            await one.restart(grace_s=0)
            row.longest_recovery = max(row.longest_recovery, await scene.is_right())
        stops = app.metrics.registry.get_sample_value
        assert not stops("eventwatch_stops_total", {"reason": "idle", "result": "stopped"})
        assert await scene.world.documents.count_documents({"status": "running"}) == 4
        row.save()
        assert row.longest_recovery <= RECOVERY
    finally:
        app.stop()
        await running


def asked_again(scene: Scene, path: str, before: int) -> bool:
    return scene.proxy.asked.count(path) > before


def has_swept(app: Application, times: float) -> bool:
    return count_sweeps(app) >= times


def count_sweeps(app: Application) -> float:
    return app.metrics.registry.get_sample_value("eventwatch_sweep_duration_seconds_count") or 0.0


# -- faults of the engine's that have no number -------------------------------------------------------------


async def test_500s_and_garbage_from_the_engine_delete_nothing_and_pass(scene: Scene) -> None:
    answers = [
        (500, b'{"message":"told to fail"}'),
        (502, b"<html>Bad Gateway</html>"),
        (200, b"{"),
        (200, b"{}"),
        (200, b"[]"),
        (200, b"null"),
        (200, b'{"State":{"Status":null},"Id":[]}'),
        (200, b"\xff\xfe\x00garbage"),
    ]
    row = Row("500s and garbage from the engine")
    with logged("WARNING") as lines:
        async with scene.watched(sweep_interval=0.3):
            for number, (status, body) in enumerate(answers):
                undo = scene.proxy.fail("/containers/", status, body)
                node = scene.nodes[number % 4]
                await node.restart(grace_s=0)
                await asyncio.sleep(0.8)
                if number % 2:
                    await node.kill()
                assert await scene.count() == 4, body
                undo()
                row.times += 1
                row.documents += 4
                row.longest_recovery = max(row.longest_recovery, await scene.is_right(30))
    row.save()
    assert not texts(lines, "ERROR")
    assert row.longest_recovery <= RECOVERY


async def test_a_half_open_connection_to_the_engine_does_not_last(
    scene: Scene, engine: PrivateEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing arrives any more and nothing is closed: only the rotation of the connection finds out."""
    monkeypatch.setattr(watcher_module, "LIFETIME", (2.0, 3.0))
    monkeypatch.setattr(engine_module, "CALL_DEADLINE", 1.0)
    monkeypatch.setattr(engine_module, "INSPECT_DEADLINE", 1.0)
    one, two, *_ = scene.nodes
    row = Row("half-open connection to the engine")
    async with Wire(engine.url) as wire, scene.watched(docker_host=wire.url) as watched:
        for number in range(times()):
            node = (one, two)[number % 2]
            assert wire.die() > 0
            died = time.monotonic()
            await (node.kill() if number % 4 < 2 else node.start())
            row.times += 1
            row.documents += await scene.count()
            took = await Oracle(scene.world).recovered(since=died, within=30)
            row.longest_recovery = max(row.longest_recovery, took)
        assert watched.count("eventwatch_stream_reconnects_total", reason="rotated") >= 1
    row.save()
    # A connection's life, one call that times out on an old connection, one more attempt, and some air.
    assert row.longest_recovery <= 3 + 1 + watcher_module.RENEWAL_RETRY + 2 * RECOVERY
