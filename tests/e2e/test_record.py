"""Recordings of real engines: complete, without secrets, through a restart, and replayable to the truth."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiodocker import Docker

from eventwatch.core.errors import EngineError
from eventwatch.core.facts import Event
from eventwatch.engine.docker import DockerEngine
from eventwatch.engine.protocol import EngineInfo
from eventwatch.engine.wire import CONTAINER_ACTIONS, NETWORK_ACTIONS, parse_event
from eventwatch.replay.player import open_replay
from eventwatch.replay.recorder import Recorder
from eventwatch.replay.recording import (
    DisconnectLine,
    EventLine,
    InspectLine,
    Recording,
    RecordingWriter,
    expected_path,
    read_expected,
    read_recording,
    subject,
)
from eventwatch.settings.model import Settings
from tests.kit.engines import PrivateEngine
from tests.kit.eventwatch import program
from tests.kit.nodes import Nodes
from tests.kit.processes import our_environment
from tests.kit.waiting import eventually

SECRET = "correct-horse-battery-staple"
ROOT = Path(__file__).parent.parent.parent


@asynccontextmanager
async def recording_to(path: Path, docker_url: str, network: str) -> AsyncIterator[Recorder]:
    """Record while the block runs; on leaving it, the recording is complete."""
    settings = Settings.model_construct(docker_host=docker_url, node_network=network)
    recorder = Recorder(settings, path)
    running = asyncio.create_task(recorder.run())
    try:
        await eventually(lambda: running.done() or not recorder._away)
        yield recorder
    finally:
        recorder.stop()
        await running


def keys(recording: Recording) -> set[tuple[int, str, str]]:
    """What identifies each event, as `logged_events` gives it."""
    lines = (entry for entry in recording.lines if isinstance(entry, EventLine))
    return {(raw["timeNano"], raw["Action"], raw["Actor"]["ID"]) for raw in (entry.raw for entry in lines)}


async def logged_events(docker_url: str, since: float, until_time: float) -> list[dict[str, Any]]:
    """What the engine itself still remembers (256 events at most), asked for afterwards."""
    filters = {"type": ["container", "network"], "event": [*CONTAINER_ACTIONS, *NETWORK_ACTIONS]}
    connector = aiohttp.UnixConnector(path=docker_url.removeprefix("unix://"))
    async with aiohttp.ClientSession(connector=connector) as session:
        parameters = {"since": f"{since:.3f}", "until": f"{until_time:.3f}", "filters": json.dumps(filters)}
        async with session.get("http://docker/v1.40/events", params=parameters) as response:
            return [json.loads(text) for text in (await response.text()).splitlines()]


async def replays_to_the_truth(path: Path, mongo_url: str, database: str) -> Recording:
    recording = read_recording(path)
    truth = read_expected(expected_path(path), recording)
    settings = Settings.model_construct(mongo_database=database)
    async with open_replay(recording, settings, url=mongo_url, truth=truth) as running:
        report = await running.finish()
    assert report.divergences == []
    # A container that stood still the whole time, whosever it is on this engine, only the sweep can tell of.
    told_of = {entry.event.node_id for entry in recording.lines if isinstance(entry, EventLine) and entry.event}
    assert set(report.drift) & told_of == set()
    return recording


async def test_the_command_records_until_ctrl_c_and_without_secrets(
    nodes: Nodes, docker_url: str, tmp_path: Path, mongo_url: str, database: str
) -> None:
    before = await nodes.start("before", env={"PASSWORD": SECRET})
    path = tmp_path / "live.jsonl"
    place = {"EVENTWATCH_DOCKER_HOST": docker_url, "EVENTWATCH_NODE_NETWORK": nodes.network}
    process = program("-m", "eventwatch", "record", path, env=our_environment(**place), cwd=tmp_path)
    part = tmp_path / "live.jsonl.part"
    await eventually(lambda: part.exists() and part.read_text().count("\n") > 1)
    node = await nodes.start(
        "a",
        healthcheck="ok",
        interval_s=0.3,
        env={"PASSWORD": SECRET},
        command=["sh", "-c", f": {SECRET}; httpd -f -p 31942 & wait"],
    )
    await node.wait_health("healthy")
    await node.exec(["echo", SECRET])
    await before.stop(0)
    failing = await nodes.create("b", command=[f"/{SECRET}"])
    with pytest.raises(Exception, match="no such file"):
        await failing.start()
    gone = await nodes.start("c")
    await gone.remove()
    await asyncio.sleep(0.2)  # what the engine has not sent yet is not our loss
    assert await process.stop(signal.SIGINT) == 0, process.output
    assert "Recorded " in process.output
    process.close()
    assert sorted(os.listdir(tmp_path)) == ["live.expected.json", "live.jsonl"]  # noqa: PTH208

    text = path.read_text()
    assert SECRET not in text
    for outside in ('"Env"', '"Cmd"', '"Mounts"', '"HostConfig"', '"Log"', '"Error"', '"Path"', '"Args"'):
        assert outside not in text
    recording = await replays_to_the_truth(path, mongo_url, database)
    assert recording.header.network == nodes.network
    truth = read_expected(expected_path(path), recording)
    assert gone.id not in truth
    seen = await node.inspect()
    address = seen["NetworkSettings"]["Networks"][nodes.network]["IPAddress"]
    assert truth[node.id] == {"status": "running", "health": "healthy", "ip": address}
    assert truth[before.id]["status"] == "exited"
    assert truth[failing.id] == {"status": "created", "health": "none", "ip": ""}


async def test_each_event_is_followed_by_an_inspection_that_is_not_older(
    nodes: Nodes, docker_url: str, tmp_path: Path
) -> None:
    path = tmp_path / "r.jsonl"
    async with recording_to(path, docker_url, nodes.network):
        node = await nodes.start("a")
        await node.stop(0)
        await asyncio.sleep(0.2)
    lines = [entry for entry in read_recording(path).lines if subject(entry) == node.id]
    told = [entry for entry in lines if isinstance(entry, EventLine)]
    assert {e.event.action for e in told if e.event} >= {"create", "connect", "start", "die", "stop", "disconnect"}
    for number, entry in enumerate(lines):
        if isinstance(entry, EventLine):
            answer = lines[number + 1]
            assert isinstance(answer, InspectLine)
            assert answer.at >= entry.at
    assert isinstance(lines[-1], InspectLine)


async def test_of_a_burst_no_event_is_missing(nodes: Nodes, docker_url: str, tmp_path: Path) -> None:
    path = tmp_path / "burst.jsonl"
    began = time.time()
    async with recording_to(path, docker_url, nodes.network):
        made = await asyncio.gather(*(nodes.start(f"n{number}") for number in range(12)))
        await asyncio.gather(*(node.kill() for node in made))
        await asyncio.gather(*(node.remove() for node in made[:6]))
        await asyncio.sleep(0.3)  # what the engine has not sent yet is not our loss
        logged = await logged_events(docker_url, began, time.time())
    ours = {node.id for node in made}
    wanted = {
        (raw["timeNano"], raw["Action"], raw["Actor"]["ID"])
        for raw in logged
        if raw["Actor"]["ID"] in ours or raw["Actor"]["Attributes"].get("container") in ours
    }
    assert len(wanted) > 50
    assert wanted <= keys(read_recording(path))


async def test_a_recording_survives_the_engine(tmp_path: Path, mongo_url: str, database: str) -> None:
    path = tmp_path / "restart.jsonl"
    async with (
        PrivateEngine() as engine,
        Docker(url=engine.url) as docker,
        Nodes(docker, "rec-", network="rec") as nodes,
    ):
        async with recording_to(path, engine.url, "rec") as recorder:
            node = await nodes.start("a", restart="always")
            other = await nodes.start("b")
            await engine.kill()
            await eventually(lambda: recorder._away)
            await engine.start()
            await eventually(lambda: not recorder._away)
            later = await nodes.start("c")
            await asyncio.sleep(0.3)
        seen = await node.inspect()
    recording = await replays_to_the_truth(path, mongo_url, database)
    breaks = [number for number, entry in enumerate(recording.lines) if isinstance(entry, DisconnectLine)]
    assert len(breaks) == 1
    behind = recording.lines[breaks[0] :]
    assert {node.id, other.id} <= {entry.node_id for entry in behind if isinstance(entry, InspectLine)}
    truth = read_expected(expected_path(path), recording)
    assert truth.keys() == {node.id, other.id, later.id}
    assert truth[node.id]["ip"] == seen["NetworkSettings"]["Networks"]["rec"]["IPAddress"]
    assert truth[other.id]["status"] == "exited"


async def test_without_an_engine_at_the_start_nothing_is_written(tmp_path: Path) -> None:
    settings = Settings.model_construct(docker_host=f"unix://{tmp_path}/none.sock")
    with pytest.raises(EngineError, match="no such socket"):
        await Recorder(settings, tmp_path / "r.jsonl").run()
    assert os.listdir(tmp_path) == []  # noqa: PTH208


# -- an engine that is busier than any real one ---------------------------------------------------------------


class FloodingEngine(DockerEngine):
    """Sends events as fast as they are read, and answers no inspection until all are sent."""

    def __init__(self, flood: int, *, breaks: bool = False) -> None:
        super().__init__(Settings.model_construct())
        self.flood = flood
        self.breaks = breaks
        self.sent = asyncio.Event()
        #: That no more comes, and a stream that breaks after the flood is open again.
        self.quiet = asyncio.Event()
        self.away = False
        self.inspecting = 0
        self.most = 0

    async def identify(self) -> EngineInfo:
        return EngineInfo("flood", "flood", "1", "1.41")

    @asynccontextmanager
    async def events(
        self,
        since: int | None,  # noqa: ARG002
        on_malformed: Callable[[str], object],  # noqa: ARG002
    ) -> AsyncIterator[AsyncIterator[Event]]:
        yield self._flood()

    async def _flood(self) -> AsyncIterator[Event]:
        for number in range(0 if self.sent.is_set() else self.flood):
            actor = {"ID": f"{number % 50:064}", "Attributes": {}}
            event = parse_event({"Type": "container", "Action": "kill", "Actor": actor, "timeNano": number + 1})
            assert event is not None
            yield event
            if number % 500 == 0:
                await asyncio.sleep(0)  # as the socket does: others run between two chunks
        if self.breaks and not self.sent.is_set():
            self.sent.set()
            raise EngineError("broke")
        self.sent.set()
        self.quiet.set()
        await asyncio.Event().wait()

    async def list_all(self) -> list[str]:
        return []

    async def container(self, node_id: str) -> dict[str, Any] | None:
        if self.away:
            raise EngineError("away", unreachable=True)
        self.inspecting += 1
        self.most = max(self.most, self.inspecting)
        await self.sent.wait()
        await asyncio.sleep(0)
        self.inspecting -= 1
        return {"Id": node_id, "State": {"Status": "running"}}


@pytest.mark.parametrize("breaks", [False, True])
async def test_a_flood_is_read_while_inspections_and_the_disk_stand_still(
    breaks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What makes an engine drop events is a reader that stalls, and nothing here can stall it."""
    engine = FloodingEngine(20_000, breaks=breaks)
    all_sent = threading.Event()
    write = RecordingWriter.write

    def stalled(writer: RecordingWriter, records: Iterable[Mapping[str, Any]]) -> None:
        if threading.current_thread() is not threading.main_thread():
            assert all_sent.wait(60)
        write(writer, records)

    monkeypatch.setattr(RecordingWriter, "write", stalled)
    path = tmp_path / "flood.jsonl"
    recorder = Recorder(Settings.model_construct(), path, engine=engine)
    running = asyncio.create_task(recorder.run())
    await asyncio.wait_for(engine.sent.wait(), 60)
    all_sent.set()
    await asyncio.wait_for(engine.quiet.wait(), 60)
    recorder.stop()
    counts = await running
    lines = read_recording(path).lines
    times = [entry.event.time_nano for entry in lines if isinstance(entry, EventLine) and entry.event]
    assert times == list(range(1, 20_001))
    assert counts["event"] == 20_000
    assert counts.get("disconnect", 0) == breaks
    assert engine.most == 32
    for number, entry in enumerate(lines):
        if isinstance(entry, EventLine):
            assert isinstance(lines[number + 1], InspectLine)


async def test_when_the_engine_is_away_at_the_end_there_is_no_truth(tmp_path: Path) -> None:
    engine = FloodingEngine(10)
    path = tmp_path / "r.jsonl"
    expected_path(path).write_text("{}")  # of an earlier recording
    recorder = Recorder(Settings.model_construct(), path, engine=engine)
    running = asyncio.create_task(recorder.run())
    await engine.sent.wait()
    await recorder._questions.wait_idle()
    engine.away = True
    recorder.stop()
    with pytest.raises(EngineError, match="10 containers could not be inspected at the end"):
        await running
    assert len(read_recording(path).lines) == 20
    assert not expected_path(path).exists()
