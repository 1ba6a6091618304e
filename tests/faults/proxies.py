"""What stands between eventwatch and a real engine in order to lie, to fail and to fall silent.

`EngineProxy` speaks HTTP: it forwards, unless told to answer by itself, and can speak up on the event stream.
`Wire` moves bytes: it can stop doing so without closing a connection, as a network does, and hold back what is on
its way, as a writer does that was paused in mid-write.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import aiohttp
from aiohttp import web

from tests.kit.fakes import served

#: What a proxy must not pass on, because each side of it has its own.
HOP_BY_HOP: Final = {"connection", "transfer-encoding", "content-length", "host", "keep-alive"}

#: Answers a request itself, or returns None to have it forwarded.
Rule = Callable[[web.Request], Awaitable[web.StreamResponse | None]]


class EngineProxy:
    """An engine's API on a socket of its own; `rules` are asked in order, then `backend` is."""

    def __init__(self, folder: Path, backend: str) -> None:
        self.socket = folder / "proxy.sock"
        self.backend = backend
        self.rules: list[Rule] = []
        #: Paths asked for, without the API version, and the API versions and `since` of the event streams.
        self.asked: list[str] = []
        self.versions: list[str] = []
        self.since: list[str | None] = []
        #: Whether what the engine says on the event stream is swallowed.
        self.mute = False
        #: Whether the engine is not told what to resume from, as if its memory did not reach that far.
        self.forgetful = False
        self._streams: set[web.StreamResponse] = set()
        self._stack = contextlib.AsyncExitStack()

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    @property
    def _path(self) -> str:
        return self.backend.removeprefix("unix://")

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(served(self.socket, self._handle))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cut()
        await self._stack.aclose()

    # -- what may be done to it ------------------------------------------------------------------------

    def fail(self, part: str, status: int, body: bytes = b'{"message":"told to fail"}') -> Callable[[], None]:
        """Answer every request whose path contains `part` with `status`; returns how to undo it."""

        async def rule(request: web.Request) -> web.Response | None:
            if part not in request.path:
                return None
            return web.Response(status=status, body=body, content_type="application/json")

        self.rules.append(rule)
        return lambda: self.rules.remove(rule)

    def hold(self, part: str) -> asyncio.Event:
        """Get the engine's answer to requests whose path contains `part`, but give it only once this is set."""
        gate = asyncio.Event()

        async def rule(request: web.Request) -> web.Response | None:
            if part not in request.path or gate.is_set():
                return None
            async with (
                aiohttp.ClientSession(connector=aiohttp.UnixConnector(self._path)) as session,
                session.get(f"http://engine{request.path_qs}") as source,
            ):
                body, status = await source.read(), source.status
            await gate.wait()
            return web.Response(status=status, body=body, content_type="application/json")

        self.rules.append(rule)
        return gate

    async def emit(self, *lines: bytes | dict[str, Any]) -> None:
        """Send lines on every open event stream, as if the engine had."""
        for line in lines:
            data = line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n"
            for stream in list(self._streams):
                await stream.write(data)

    def cut(self) -> None:
        """Break every open event stream in the middle."""
        for stream in list(self._streams):
            transport = stream._req.transport if stream._req is not None else None
            if transport is not None:
                transport.abort()

    async def end(self) -> None:
        """End every open event stream cleanly."""
        for stream in list(self._streams):
            self._streams.discard(stream)
            await stream.write_eof()

    @property
    def streams(self) -> int:
        return len(self._streams)

    # -- forwarding ------------------------------------------------------------------------------------

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        _, _, versioned = request.path.partition("/v1.")
        self.asked.append(versioned.partition("/")[2] or request.path.lstrip("/"))
        if request.path.endswith("/events"):
            self.versions.append(f"1.{versioned.partition('/')[0]}")
            self.since.append(request.query.get("since"))
        for rule in list(self.rules):
            answer = await rule(request)
            if answer is not None:
                return answer
        return await self._forward(request)

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        url = request.rel_url.without_query_params("since") if self.forgetful else request.rel_url
        try:
            async with (
                aiohttp.ClientSession(
                    connector=aiohttp.UnixConnector(self._path), timeout=aiohttp.ClientTimeout(total=None)
                ) as session,
                session.request(
                    request.method,
                    f"http://engine{url}",
                    data=await request.read(),
                    headers=kept(request.headers),
                ) as source,
            ):
                answer = web.StreamResponse(status=source.status, headers=kept(source.headers))
                await answer.prepare(request)
                events = request.path.endswith("/events")
                if events:
                    self._streams.add(answer)
                try:
                    async for chunk in source.content.iter_any():
                        if not (events and self.mute):
                            await answer.write(chunk)
                finally:
                    self._streams.discard(answer)
                return answer
        except (aiohttp.ClientError, OSError) as error:
            if request.transport is not None:
                request.transport.abort()
            raise web.HTTPBadGateway(text=str(error)) from None


def kept(headers: Any) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower() not in HOP_BY_HOP}


class Wire:
    """A TCP port that leads to an engine's socket, or to another port of this machine.

    Connections that `die` swallow all bytes and never close. What the client sends can be held back by its text,
    and sent on later.
    """

    def __init__(self, backend: str | int, host: str = "127.0.0.1") -> None:
        self._host = host
        self.port = 0
        #: What was held back first, all connections together.
        self.held = b""
        self._backend = backend
        self._alive: set[asyncio.Task[None]] = set()
        self._dead: set[asyncio.Task[None]] = set()
        self._text: bytes | None = None
        self._arrived = asyncio.Event()
        self._released = asyncio.Event()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"tcp://{self._host}:{self.port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, self._host, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        tasks = self._alive | self._dead
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.wait_closed()

    def die(self) -> int:
        """Stop moving bytes on every connection there is now; new connections work. Returns their number."""
        self._dead |= self._alive
        return len(self._alive)

    def hold(self, text: bytes) -> None:
        """Hold back from now on what contains `text`, and whatever follows it on the same connection."""
        self._text = text

    def release(self) -> None:
        self._text = None
        self._released.set()

    async def has_held(self, within: float = 5.0) -> None:
        """Wait until something is held back."""
        async with asyncio.timeout(within):
            await self._arrived.wait()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._alive.add(task)
        writers = [writer]
        try:
            back_reader, back_writer = await self._connect()
            writers.append(back_writer)
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(task, reader, back_writer, forth=True), name="forth")
                pumps.create_task(self._pump(task, back_reader, writer, forth=False), name="back")
        except* (OSError, asyncio.CancelledError):
            pass
        finally:
            self._alive.discard(task)
            self._dead.discard(task)
            for end in writers:
                end.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if isinstance(self._backend, int):
            return await asyncio.open_connection("127.0.0.1", self._backend)
        return await asyncio.open_unix_connection(self._backend.removeprefix("unix://"))

    async def _pump(
        self, task: asyncio.Task[None], source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, forth: bool
    ) -> None:
        while data := await source.read(65536):
            if task in self._dead:
                continue
            if forth and self._text is not None and self._text in data:
                self.held += data
                self._arrived.set()
                await self._released.wait()
            sink.write(data)
            await sink.drain()
        if task not in self._dead:
            sink.close()
