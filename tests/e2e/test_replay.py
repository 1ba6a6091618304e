"""Replays through the real pipeline into a real MongoDB: every recording ends at the truth."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient

from eventwatch.core.errors import ConfigError, LeaseLostError
from eventwatch.core.facts import Change
from eventwatch.pipeline.elector import LeaderElector
from eventwatch.replay.player import Report, Tier, open_replay
from eventwatch.replay.recording import Recording, Truth, expected_path, read_expected, read_recording
from eventwatch.replay.recording import to_json as line
from eventwatch.settings.model import Settings
from eventwatch.store.documents import ToolServerNode
from tests.kit.processes import Ended, our_environment, run

TESTS = Path(__file__).parent.parent
RECORDINGS = sorted((TESTS / "recordings").glob("*.jsonl"))
LIFECYCLE = TESTS / "recordings" / "lifecycle.jsonl"
NAMES = [path.stem for path in RECORDINGS]

Records = list[dict[str, Any]]


def settings_for(database: str) -> Settings:
    return Settings.model_construct(mongo_database=database)


def recorded(path: Path) -> tuple[Recording, Truth]:
    recording = read_recording(path)
    return recording, read_expected(expected_path(path), recording)


async def replayed(
    path: Path,
    mongo_url: str,
    database: str,
    *,
    truth: Truth | None = None,
    tiers: Tier = Tier.SWEEP,
    hurry: bool = False,
    listener: Callable[[Change], object] | None = None,
) -> Report:
    recording = read_recording(path)
    truth = truth if truth is not None else read_expected(expected_path(path), recording)
    settings = settings_for(database)
    async with open_replay(recording, settings, url=mongo_url, truth=truth, tiers=tiers, hurry=hurry) as running:
        if listener and running.parts:
            running.parts.writer.listeners.append(listener)
        return await running.finish()


def read_records(path: Path) -> Records:
    return [json.loads(text) for text in path.read_text().splitlines()]


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{line(record)}\n" for record in records))
    return path


# -- at any speed ---------------------------------------------------------------------------------------------


def test_the_recordings_are_there() -> None:
    assert len(RECORDINGS) == 15


#: Documents that are wrong at the end with hints only, with settling, and with sweeps; of the others, none is.
WRONG = {
    "daemon-crash": (1, 1, 0),
    "gap-overflow": (5, 5, 0),
    "network-reconnect": (2, 0, 0),
    "silent-changes": (0, 1, 0),
}


@pytest.mark.parametrize("hurry", [False, True], ids=["step by step", "in a hurry"])
@pytest.mark.parametrize("path", RECORDINGS, ids=NAMES)
async def test_every_recording_ends_at_the_truth(
    path: Path, mongo_url: str, database: str, *, hurry: bool
) -> None:
    reports = [await replayed(path, mongo_url, database, tiers=tiers, hurry=hurry) for tiers in Tier]
    assert tuple(report.wrong for report in reports) == WRONG.get(path.stem, (0, 0, 0))
    assert reports[-1].divergences == []
    assert reports[-1].latencies
    # Of what a real stream would bring, all is delivered: a reconnect repeats nothing, and loses nothing.
    assert {report.events for report in reports} == {read_recording(path).events}


@pytest.mark.parametrize("path", RECORDINGS, ids=NAMES)
async def test_every_recording_ends_at_the_truth_in_the_form_that_engine_29_gives_it(
    path: Path, tmp_path: Path, mongo_url: str, database: str
) -> None:
    new = write_records(tmp_path / path.name, [as_of_api_152(record) for record in read_records(path)])
    expected_path(new).write_text(expected_path(path).read_text())
    report = await replayed(new, mongo_url, database, hurry=True)
    assert report.divergences == []
    assert report.events == read_recording(path).events


def as_of_api_152(record: dict[str, Any]) -> dict[str, Any]:
    """API 1.52 has dropped three fields of events, which repeated others."""
    if record["kind"] != "event":
        return record
    return {**record, "event": {k: v for k, v in record["event"].items() if k not in {"status", "id", "from"}}}


async def test_every_recording_ends_at_the_truth_at_20_times_real_time(mongo_url: str, database: str) -> None:
    # All at once, each in a database of its own. Beanie is bound by the last one; each replay's store is its own.
    with MongoClient[dict[str, Any]](mongo_url) as client:
        try:
            async with AsyncExitStack() as stack:
                runs = {}
                for number, path in enumerate(RECORDINGS):
                    recording, truth = recorded(path)
                    settings = settings_for(f"{database}_{number}")
                    runs[path.stem] = await stack.enter_async_context(
                        open_replay(recording, settings, url=mongo_url, truth=truth, speed=20.0)
                    )
                reports = await asyncio.gather(*(run.finish() for run in runs.values()))
        finally:
            for number in range(len(RECORDINGS)):
                client.drop_database(f"{database}_{number}")
    assert [name for name, report in zip(runs, reports, strict=True) if report.divergences != []] == []


async def test_ninety_recorded_seconds_are_not_waited_for(tmp_path: Path, mongo_url: str, database: str) -> None:
    one_after_another: Records = []
    truth: dict[str, Any] = {}
    end = 1_800_000_000_000_000_000
    for path in (p for p in RECORDINGS if "@" not in p.stem and not p.stem.startswith(("burst", "daemon", "gap"))):
        recording = read_recording(path)
        later = end - recording.started_at
        one_after_another += [shifted(r, later) for r in read_records(path) if r["kind"] != "header"]
        truth |= json.loads(expected_path(path).read_text())
        end = recording.ended_at + later + 1_000_000_000
    path = write_records(tmp_path / "long.jsonl", one_after_another)
    expected_path(path).write_text(json.dumps(truth))
    report = await replayed(path, mongo_url, database)
    assert report.divergences == []
    assert report.recorded_seconds > 88
    assert report.seconds < report.recorded_seconds / 3  # a second or two; how many is for the benchmark


def shifted(record: dict[str, Any], by: int) -> dict[str, Any]:
    later = {**record, "at": record["at"] + by}
    if record["kind"] == "event":
        later["event"] = {**record["event"], "timeNano": record["event"]["timeNano"] + by}
    return later


@pytest.mark.parametrize("name", ["burst-of-30-nodes", "gap-overflow", "silent-changes"])
async def test_virtual_time_gives_the_same_result_each_time(name: str, mongo_url: str, database: str) -> None:
    path = TESTS / "recordings" / f"{name}.jsonl"
    logs: list[list[Change]] = [[], []]
    for log in logs:
        await replayed(path, mongo_url, database, listener=log.append)
    assert logs[0]
    assert [told(written) for written in logs[0]] == [told(written) for written in logs[1]]


def told(written: Change) -> tuple[object, ...]:
    new = {name: value for name, value in written.new.items() if name != "epoch"}
    return written.node_id, new, written.deleted, written.cause, written.at_ns


async def test_what_only_the_final_sweep_put_right_is_told(mongo_url: str, database: str) -> None:
    report = await replayed(TESTS / "recordings" / "silent-changes.jsonl", mongo_url, database)
    assert [d.node_id for d in report.before_sweep or ()] == report.drift
    assert len(report.drift) == 1
    assert report.sweep_corrections == {"status": 1}


# -- other dialects, derived ----------------------------------------------------------------------------------


def as_api_1_52(event: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name not in {"status", "id", "from"}}


def as_podman(event: dict[str, Any]) -> dict[str, Any]:
    if event["Type"] != "container":
        return as_api_1_52(event)
    action, _, rest = event["Action"].partition(":")
    actor = event["Actor"]
    if action == "health_status":
        actor = {**actor, "Attributes": {**actor["Attributes"], "health_status": rest.strip()}}
        rest = ""
    name = {"die": "died", "destroy": "remove"}.get(action, action)
    return {**event, "Action": name, "status": name, "Actor": actor}


@pytest.mark.parametrize("path", RECORDINGS, ids=NAMES)
@pytest.mark.parametrize("dialect", [as_api_1_52, as_podman])
async def test_other_dialects_end_at_the_same_truth(
    dialect: Callable[[dict[str, Any]], dict[str, Any]], path: Path, tmp_path: Path, mongo_url: str, database: str
) -> None:
    records = [
        {**record, "event": dialect(record["event"])} if record["kind"] == "event" else record
        for record in read_records(path)
    ]
    assert records != read_records(path)
    derived = write_records(tmp_path / "derived.jsonl", records)
    truth = read_expected(expected_path(path), read_recording(derived))
    report = await replayed(derived, mongo_url, database, truth=truth)
    assert report.divergences == []
    assert report.events == read_recording(path).events


# -- the database ---------------------------------------------------------------------------------------------


async def test_time_stands_still_between_steps(mongo_url: str, database: str) -> None:
    recording, truth = recorded(LIFECYCLE)
    async with open_replay(recording, settings_for(database), url=mongo_url, truth=truth) as running:
        assert await ToolServerNode.count() == 0
        await running.until(3.0)
        assert running.clock.time_ns() == recording.started_at + 3_000_000_000
        before = await ToolServerNode.find_all().to_list()
        await asyncio.sleep(0.05)
        assert running.clock.time_ns() == recording.started_at + 3_000_000_000
        assert await ToolServerNode.find_all().to_list() == before
        assert await running.divergences()
        assert (await running.finish()).divergences == []


async def test_nodes_of_others_are_in_the_way_and_left_alone_when_forced(mongo_url: str, database: str) -> None:
    recording, truth = recorded(LIFECYCLE)
    foreign = {"_id": "f" * 64, "short_id": "f" * 12, "status": "running", "health": "healthy", "ip": "10.9.9.9"}
    with MongoClient[dict[str, Any]](mongo_url) as client:
        nodes = client[database]["ToolServerNode"]
        nodes.insert_one(foreign)
        with pytest.raises(
            ConfigError, match=f"^Database {database} holds 1 nodes that are not of this recording"
        ):
            async with open_replay(recording, settings_for(database), url=mongo_url, truth=truth):
                pass
        assert list(nodes.find()) == [foreign]
        async with open_replay(
            recording, settings_for(database), url=mongo_url, truth=truth, force=True
        ) as running:
            assert (await running.finish()).divergences == []
        assert nodes.find_one({"_id": foreign["_id"]}) == foreign
        assert nodes.count_documents({}) == len(truth) + 1


async def test_documents_that_no_replay_made_are_only_deleted_when_forced(mongo_url: str, database: str) -> None:
    recording, truth = recorded(LIFECYCLE)
    node_id = min(recording.first_seen)
    live = {"_id": node_id, "short_id": node_id[:12], "status": "running", "health": "healthy", "ip": "10.9.9.9"}
    with MongoClient[dict[str, Any]](mongo_url) as client:
        nodes = client[database]["ToolServerNode"]
        nodes.insert_one(live)
        with pytest.raises(ConfigError, match="holds documents of 1 nodes of this recording, made by no replay"):
            async with open_replay(recording, settings_for(database), url=mongo_url, truth=truth):
                pass
        assert list(nodes.find()) == [live]
        async with open_replay(
            recording, settings_for(database), url=mongo_url, truth=truth, force=True
        ) as running:
            assert (await running.finish()).divergences == []


async def test_a_second_replay_starts_from_nothing(mongo_url: str, database: str) -> None:
    for _ in range(2):
        report = await replayed(LIFECYCLE, mongo_url, database)
        assert report.divergences == []
        assert report.drift == []


async def test_a_database_that_is_being_watched_is_refused_even_if_forced(mongo_url: str, database: str) -> None:
    recording, truth = recorded(LIFECYCLE)
    async with open_replay(recording, settings_for(database), url=mongo_url, truth=truth) as running:
        checker = [peer.holds for peer in await running.store.peers("replay")] == [True]
        assert checker
    with MongoClient[dict[str, Any]](mongo_url) as client:
        checkers = client[database]["NodeChecker"]
        assert checkers.count_documents({}) == 0  # the lease was given back
        # As a live checker of another engine leaves it.
        checkers.update_one(
            {"engine_id": "real"}, [{"$set": {"expires_at": {"$add": ["$$NOW", 60_000]}}}], upsert=True
        )
        with pytest.raises(ConfigError, match="is in use: a live checker watches engine real"):
            async with open_replay(recording, settings_for(database), url=mongo_url, truth=truth, force=True):
                pass


async def test_a_replay_that_loses_its_lease_says_so(
    mongo_url: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording, truth = recorded(LIFECYCLE)
    monkeypatch.setattr(LeaderElector, "holds", lambda _: False)
    with pytest.raises(LeaseLostError, match="The lease ran out"):
        async with open_replay(recording, settings_for(database), url=mongo_url, truth=truth) as running:
            await running.finish()


# -- the command ----------------------------------------------------------------------------------------------


class Command:
    """`eventwatch replay` in a process of its own."""

    def __init__(self, folder: Path, mongo_url: str, database: str) -> None:
        self.folder = folder
        self.environment = our_environment(EVENTWATCH_MONGO_URL=mongo_url, EVENTWATCH_MONGO_DATABASE=database)

    def __call__(self, *arguments: str | Path) -> Ended:
        command = (sys.executable, "-m", "eventwatch", "replay", *arguments)
        return run(*command, cwd=self.folder, env=self.environment, check=False)


@pytest.fixture
def command(tmp_path: Path, mongo_url: str, database: str) -> Command:
    return Command(tmp_path, mongo_url, database)


@pytest.fixture
def documents(mongo_url: str, database: str) -> Iterator[Callable[[], int]]:
    with MongoClient[dict[str, Any]](mongo_url) as client:
        yield lambda: client[database]["ToolServerNode"].count_documents({})


def test_the_command_tells_how_it_went(command: Command) -> None:
    done = command(TESTS / "recordings" / "silent-changes.jsonl", "--speed", "0")
    assert done.code == 0
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith("36 events of 4 containers, 11.7 s recorded: ")
    assert lines[1].startswith("From event to acknowledged write: p50 ")
    assert lines[2:] == [
        "Drift: 1 documents that only the final sweep put right",
        "Divergence: 0 of 4 documents",
    ]


def test_a_divergence_is_one_line_and_exit_code_1(command: Command, tmp_path: Path) -> None:
    _, truth = recorded(LIFECYCLE)
    wrong = min(truth)
    gone = max(truth)
    status = truth[wrong]["status"]
    truth[wrong] = {**truth[wrong], "status": "dead"}
    was = truth.pop(gone)["status"]
    (tmp_path / "other.json").write_text(json.dumps(truth))
    done = command(LIFECYCLE, "--speed", "0", "--expect", "other.json")
    assert done.code == 1
    assert done.stdout.splitlines()[:2] == [
        f"{wrong} status: expected 'dead', found '{status}'",
        f"{gone} document: expected 'none', found '{was}'",
    ]
    assert done.stderr == "eventwatch: 2 of 4 documents diverge from other.json\n"


def test_machines_get_json(command: Command) -> None:
    done = command(TESTS / "recordings" / "silent-changes.jsonl", "--speed", "0", "--json", "--tiers", "2")
    assert done.code == 1
    told = json.loads(done.stdout)
    assert [(d["field"], d["expected"], d["found"]) for d in told["divergences"]] == [
        ("status", "exited", "restarting")
    ]
    assert told["divergences"] == told["divergences_before_final_sweep"]
    assert told["events"] == 36
    assert told["events_per_second"] > 0
    assert told["latency_ms"].keys() == {"p50", "p90", "p99"}
    assert told["tiers"] == 2


def test_without_a_truth_nothing_is_compared(command: Command, tmp_path: Path) -> None:
    path = write_records(tmp_path / "alone.jsonl", read_records(LIFECYCLE))
    done = command(path, "--speed", "0")
    assert done.code == 0
    assert done.stdout.splitlines()[-1] == "Divergence: unknown, there is no expected file beside the recording"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["cut.jsonl"], "cut.jsonl:3: not JSON: ", id="bad-line"),
        pytest.param(["none.jsonl"], "none.jsonl: cannot be read: No such file or directory", id="no-file"),
        pytest.param(["good.jsonl", "--expect", "bad.json"], "bad.json:1: ", id="bad-truth"),
        pytest.param(["good.jsonl", "--expect", "none.json"], "none.json: cannot be read", id="no-truth"),
    ],
)
def test_bad_input_is_one_line_exit_code_2_and_no_write(
    arguments: list[str], message: str, command: Command, documents: Callable[[], int], tmp_path: Path
) -> None:
    records = read_records(LIFECYCLE)
    write_records(tmp_path / "good.jsonl", records)
    lines = (tmp_path / "good.jsonl").read_text().splitlines()
    (tmp_path / "cut.jsonl").write_text("\n".join([*lines[:2], lines[2][:50], *lines[3:]]) + "\n")
    (tmp_path / "bad.json").write_text('{"x": {"status": "running", "health": "none", "ip": ""}}')
    done = command(*arguments, "--speed", "0")
    assert done.code == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"eventwatch: {message}")
    assert done.stderr.count("\n") == 1
    assert documents() == 0


def test_a_wrong_speed_is_refused(command: Command) -> None:
    for wrong in ("-1", "fast", "nan", "inf"):
        done = command(LIFECYCLE, f"--speed={wrong}")
        assert done.code == 2
        assert "must be 0 (as fast as it can) or up to" in done.stderr


def test_a_terminal_shows_a_progress_bar(command: Command) -> None:
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "eventwatch", "replay", LIFECYCLE, "--speed", "40"],
        cwd=command.folder,
        env={**command.environment, "TERM": "xterm"},
        stdout=subprocess.DEVNULL,
        stderr=follower,
    ) as process:
        os.close(follower)
        shown = b""
        try:
            while chunk := os.read(leader, 4096):
                shown += chunk
        except OSError:  # how Linux says that the other end is closed
            pass
        finally:
            os.close(leader)
    assert process.returncode == 0
    assert b"lifecycle.jsonl" in shown
    assert b"/22" in shown


# -- the plugin -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mongod", ["private", "given"])
def test_users_replay_recordings_in_their_own_tests(mongod: str, tmp_path: Path, mongo_url: str) -> None:
    """In their own project, and with no more than an installed eventwatch."""
    installed = importlib.metadata.entry_points(group="pytest11", name="eventwatch.testing")
    given = {"EVENTWATCH_TEST_MONGO_URL": mongo_url} if mongod == "given" else {}
    done = run(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", tmp_path / "temp"),
        *(() if installed else ("-p", "eventwatch.testing")),
        cwd=TESTS / "plugin_project",
        env=our_environment(**given),
        within=120,
    )
    assert "3 passed" in done.stdout
