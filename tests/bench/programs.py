"""The processes that are measured: how each is started, how one knows that it watches, and what it has cost.

eventwatch, the floor and the poller are told their engine and database by the same variables, run with the same
Python, write their output to a file, and are asked to end by SIGTERM. Costs are read from /proc: on Linux only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import aiohttp

ROOT: Final = Path(__file__).resolve().parents[2]
START_TIMEOUT: Final = 60.0
STOP_TIMEOUT: Final = 15.0

ENGINE_VARIABLE: Final = "EVENTWATCH_DOCKER_HOST"
MONGO_VARIABLE: Final = "EVENTWATCH_MONGO_URL"
DATABASE_VARIABLE: Final = "EVENTWATCH_MONGO_DATABASE"
NETWORK_VARIABLE: Final = "EVENTWATCH_NODE_NETWORK"


class BenchError(RuntimeError):
    """A figure cannot be measured here; says why."""


def required(name: str) -> str:
    """The variable that whoever starts a measured program must set."""
    return os.environ[name]


@dataclass(frozen=True)
class Place:
    """Where a measured program works: an engine, a database, and the nodes' network."""

    engine_url: str
    mongo_url: str
    database: str
    network: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            ENGINE_VARIABLE: self.engine_url,
            MONGO_VARIABLE: self.mongo_url,
            DATABASE_VARIABLE: self.database,
            NETWORK_VARIABLE: self.network,
            "EVENTWATCH_HTTP_LISTEN": "",
        }


@dataclass(frozen=True)
class Usage:
    """What a process has used until a moment: CPU (s), context switches, resident memory (MB)."""

    at: float
    cpu: float
    switches: int
    resident: float


def usage(pid: int) -> Usage:
    """Read it for all threads of a process."""
    cpu, switches = 0.0, 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        cpu += int((task / "schedstat").read_text().split()[0]) / 1e9
        status = _status(task / "status")
        switches += int(status["voluntary_ctxt_switches"]) + int(status["nonvoluntary_ctxt_switches"])
    resident = int(_status(Path(f"/proc/{pid}/status"))["VmRSS"].split()[0]) / 1024
    return Usage(time.monotonic(), cpu, switches, resident)


def _status(path: Path) -> dict[str, str]:
    return dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)


class Program:
    """A running Python program, its standard output as lines."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.process = process
        self.log = log

    @property
    def pid(self) -> int:
        return self.process.pid

    def usage(self) -> Usage:
        return usage(self.pid)

    def hang_up(self) -> None:
        """Ask for a sweep."""
        self.process.send_signal(signal.SIGHUP)

    async def line(self) -> str:
        """The next line of standard output; raises when the program has ended."""
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        if not line:
            raise BenchError(f"{self.name} ended with {await self.process.wait()}: {self.last_words()}")
        return line.decode().strip()

    async def ready(self) -> None:
        """Wait for the line with which our own programs say that they watch."""
        async with asyncio.timeout(START_TIMEOUT):
            while await self.line() != "ready":
                pass

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no word in its log"

    async def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)
        try:
            async with asyncio.timeout(STOP_TIMEOUT):
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()


class Launcher:
    """Starts programs in one folder; `eventwatch_from` is the folder whose `eventwatch` package is measured."""

    def __init__(self, folder: Path, eventwatch_from: Path = ROOT) -> None:
        self._folder = folder
        self._eventwatch_from = eventwatch_from
        self._count = 0

    @asynccontextmanager
    async def python(
        self,
        name: str,
        *arguments: str,
        environment: Mapping[str, str],
        root: Path = ROOT,
        stdin: bool = False,
    ) -> AsyncIterator[Program]:
        self._count += 1
        log = self._folder / f"{self._count:03}-{name}.log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, *arguments),
                env={
                    "PATH": os.environ["PATH"],
                    "PYTHONPATH": str(root),
                    "PYTHONDONTWRITEBYTECODE": "1",
                    **environment,
                },
                cwd=self._folder,  # no .env of anybody's is read
                stdin=asyncio.subprocess.PIPE if stdin else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=output,
                limit=2**20,
            )
        program = Program(name, process, log)
        try:
            yield program
        finally:
            await program.end()

    @asynccontextmanager
    async def module(
        self, name: str, *arguments: str, place: Place | None = None, stdin: bool = False
    ) -> AsyncIterator[Program]:
        """One of the benchmark's own programs, entered when it is ready."""
        environment = place.environment if place else {}
        module = f"tests.bench.{name}"
        async with self.python(name, "-m", module, *arguments, environment=environment, stdin=stdin) as program:
            await program.ready()
            yield program

    @asynccontextmanager
    async def eventwatch(
        self, place: Place, *command: str, settings: Mapping[str, str] | None = None
    ) -> AsyncIterator[Program]:
        """`python -m eventwatch`, by default `run`, entered at once."""
        environment = {**place.environment, **(settings or {})}
        async with self.python(
            "eventwatch",
            "-m",
            "eventwatch",
            *(command or ("run",)),
            environment=environment,
            root=self._eventwatch_from,
        ) as program:
            yield program


class FakeControl:
    """The benchmark's hand on a fake engine."""

    def __init__(self, socket: Path, program: Program) -> None:
        self.url = f"unix://{socket}"
        self.program = program
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(str(socket)), timeout=aiohttp.ClientTimeout(total=600)
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(self, method: str, what: str, **query: str | int) -> Any:
        async with self._session.request(method, f"http://fake/bench/{what}", params=query) as response:
            response.raise_for_status()
            text = await response.text()
            return json.loads(text) if text else None

    async def emit(self, node: int, action: str) -> tuple[str, int]:
        """Let something happen to a node; its id and the event's `timeNano`."""
        answer = await self.ask("POST", "emit", node=node, action=action)
        return answer["id"], answer["timeNano"]

    async def truth(self) -> dict[str, dict[str, str]]:
        answer: dict[str, dict[str, str]] = await self.ask("GET", "truth")
        return answer

    async def inspections(self) -> int:
        return int((await self.requests()).get("/containers/{id}/json", 0))

    async def requests(self) -> dict[str, int]:
        answer: dict[str, int] = (await self.ask("GET", "stats"))["requests"]
        return answer


@asynccontextmanager
async def fake_engine(
    launcher: Launcher, socket: Path, *, nodes: int, options: Sequence[str] = ()
) -> AsyncIterator[FakeControl]:
    async with (
        launcher.module("fake_engine", str(socket), "--nodes", str(nodes), *options) as program,
        FakeControl(socket, program) as control,
    ):
        yield control
