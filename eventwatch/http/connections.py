"""Accepts connections, and keeps them few: idle ones end after some seconds, and what comes above the cap at once.

Why not asyncio's own server: it accepts without bound, and when descriptors run out it logs a traceback for each
attempt and stops listening for a second each time. The descriptors belong to the engine and the database first.

Contract: at most `cap` connections (and a few that are just being closed) are open. A newcomer above that takes
the place of the one that has been idle longest, one that was answered before one that has asked for nothing yet;
where none is idle, it is refused. Who is refused before it was answered is told so (503, to come again), save over
TLS, where that would take a handshake. An eighth of the places is for the machine's own probes only.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web
from loguru import logger

from eventwatch.http.access import is_loopback

MOST_CONNECTIONS: Final = 4096
#: Requests that wait for something to happen; they cost little, and have places of their own.
MOST_PARKED: Final = 4096
#: Seconds for a first request, header and TLS handshake included, and between two requests: enough for a client
#: that opens thousands on a busy machine; who has asked for nothing makes room long before, if that is needed.
FIRST_REQUEST: Final = 15.0
NEXT_REQUEST: Final = 15.0
#: Seconds for which a connection keeps its place even when others want it: between two requests, and before the
#: first, which may have come and wait to be read; between looks at idle ones, after an accept that failed, and
#: between two lines of log.
GRACE: Final = 0.1
FIRST_GRACE: Final = 1.0
LOOK: Final = 1.0
RETRY: Final = 0.5
QUIET: Final = 60.0
#: Connections above the cap that may be on their way out.
LEAVING: Final = 16
BACKLOG: Final = 1024
#: Seconds for which nobody is looked for who could make room, after nobody was found.
LOOK_AGAIN: Final = 0.05
#: What is sent to whom there is no room for.
NO_ROOM: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nCache-Control: no-store\r\n"
    b"Content-Type: text/plain; charset=utf-8\r\nContent-Length: 21\r\n\r\ntoo many connections\n"
)


def default_cap() -> int:
    """A quarter of the descriptors that this process may have open, and at most 4096."""
    return max(8, min(MOST_CONNECTIONS, _descriptors() // 4))


def _descriptors() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_PARKED * 4 if soft == resource.RLIM_INFINITY else soft


class _Tell:
    """Lets one message through every `QUIET` seconds: clients decide how often there would be one."""

    def __init__(self) -> None:
        self._quiet_until = 0.0

    def now(self) -> bool:
        """Whether it may be told now."""
        if time.monotonic() < self._quiet_until:
            return False
        self._quiet_until = time.monotonic() + QUIET
        return True


_tell = _Tell()


class _Protocol(web.RequestHandler):
    """aiohttp's, whose log and whose answer to what is no HTTP are one line without a banner."""

    __slots__ = ()

    def log_exception(self, *args: Any, **options: Any) -> None:
        """What is wrong after the answer, such as a body that nobody read: the client's affair."""
        logger.debug("HTTP: {} {!r}", args, options.get("exc_info"))

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - cites what was sent
    ) -> web.StreamResponse:
        """A bug is logged with its traceback; a request that cannot be read is not our fault and is not."""
        if status == web.HTTPInternalServerError.status_code and _tell.now():
            logger.opt(exception=exc).error("HTTP: {} could not be answered: {!r}", request.path, exc)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun already")
        text = "the request cannot be read\n" if status < web.HTTPInternalServerError.status_code else "failed\n"
        answer = web.Response(status=status, text=text, headers={"Cache-Control": "no-store", "Server": ""})
        answer.force_close()
        return answer


@dataclass(slots=True, eq=False)
class _Connection:
    socket: socket.socket
    since: float
    requests: int = 0
    busy: bool = False
    leaving: bool = False
    parked: bool = False


class Connections:
    """The open connections of one server."""

    def __init__(self, *, tls: ssl.SSLContext | None = None, cap: int | None = None) -> None:
        self.cap = default_cap() if cap is None else cap
        self._tls = tls
        self._open: dict[Any, _Connection] = {}  # by protocol; what has been idle longest comes first
        self._starting: set[asyncio.Task[None]] = set()
        #: Those that were refused, and are still reading that; the oldest first.
        self._refused: deque[socket.socket] = deque()
        self._tell = _Tell()
        #: Until when no place is looked for, as there was none just now (monotonic, s).
        self._full_until = 0.0
        self._parked = 0
        self._most_parked = min(MOST_PARKED, _descriptors() // 2)

    @asynccontextmanager
    async def listening(self, server: web.Server, host: str, port: int) -> AsyncIterator[None]:
        """Accept for the duration of the block. Raises OSError when the address cannot be listened on."""
        listeners = await _listeners(host, port)
        tasks = [asyncio.create_task(self._accept(server, each), name="http-accept") for each in listeners]
        tasks.append(asyncio.create_task(self._close_idle(), name="http-idle"))
        try:
            yield
        finally:
            for task in (*tasks, *self._starting):
                task.cancel()
            await asyncio.gather(*tasks, *self._starting, return_exceptions=True)
            for each in (*listeners, *self._refused):
                each.close()

    @contextmanager
    def answering(self, protocol: object) -> Iterator[None]:
        """Keep a connection open for as long as one of its requests is being answered."""
        connection = self._open.get(protocol)
        if connection is None:
            yield
            return
        connection.busy = True
        connection.requests += 1
        try:
            yield
        finally:
            connection.busy = False
            connection.since = time.monotonic()
            if self._open.pop(protocol, None):
                self._open[protocol] = connection

    @contextmanager
    def parking(self, protocol: object) -> Iterator[bool]:
        """Let a request wait on its connection without taking a place of the others; False: too many do."""
        connection = self._open.get(protocol)
        if connection is None or self._parked >= self._most_parked:
            yield connection is None
            return
        connection.parked = True
        self._parked += 1
        try:
            yield True
        finally:
            connection.parked = False
            self._parked -= 1

    @property
    def _count(self) -> int:
        return len(self._open) - self._parked

    # -- coming --------------------------------------------------------------------------------------------

    async def _accept(self, server: web.Server, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, address = await loop.sock_accept(listener)
            except OSError as error:
                self._say(f"no connection can be accepted: {error.strerror or error}")
                await asyncio.sleep(RETRY)
                continue
            try:
                self._admit(server, accepted, local=is_loopback(str(address[0])))
            except Exception as error:  # noqa: BLE001 - whatever is wrong with this one, the next ones are accepted
                accepted.close()
                self._say(f"a connection could not be admitted: {error!r}")
            await asyncio.sleep(0)  # many may be waiting, and each is accepted without a pause of its own

    def _admit(self, server: web.Server, accepted: socket.socket, *, local: bool) -> None:
        limit = self.cap if local else self.cap - self.cap // 8
        if self._count >= limit and not self._make_room(limit):
            self._refuse(accepted)
            self._say(f"{limit} connections are open, what comes above is refused")
            return
        protocol = _Protocol(
            server,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]
            keepalive_timeout=NEXT_REQUEST,
            lingering_time=1.0,
        )
        connection = self._open[protocol] = _Connection(accepted, time.monotonic())
        start = asyncio.create_task(self._start(protocol, connection), name="http-connection")
        self._starting.add(start)
        start.add_done_callback(self._starting.discard)

    def _refuse(self, accepted: socket.socket) -> None:
        """Tell a newcomer that there is no room, and close it when it had the time to read that.

        To close it at once, with a request that nobody has read, would take the answer back.
        """
        if self._tls is not None:
            accepted.close()
            return
        _tell_no_room(accepted)
        self._refused.append(accepted)
        if len(self._refused) > self.cap // 8:
            self._refused.popleft().close()

    async def _start(self, protocol: _Protocol, connection: _Connection) -> None:
        deadline = FIRST_REQUEST if self._tls else None
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: protocol,
                connection.socket,
                ssl=self._tls,
                ssl_handshake_timeout=deadline,
                ssl_shutdown_timeout=deadline,
            )
        except OSError:  # no TLS, or gone already
            connection.socket.close()
            self._open.pop(protocol, None)

    # -- going ---------------------------------------------------------------------------------------------

    def _make_room(self, limit: int) -> bool:
        self._forget_closed()
        if self._count < limit:
            return True
        if self._count >= self.cap + LEAVING:
            return False
        now = time.monotonic()
        if now < self._full_until:
            return False
        connection = self._longest_idle(now, answered=True) or self._longest_idle(now, answered=False)
        if connection is None:
            self._full_until = now + LOOK_AGAIN
            return False
        self._say(f"{limit} connections are open, those that are idle longest make room")
        if not connection.requests and self._tls is None:
            _tell_no_room(connection.socket)
        _end(connection)
        return True

    def _longest_idle(self, now: float, *, answered: bool) -> _Connection | None:
        grace = GRACE if answered else FIRST_GRACE
        for connection in self._open.values():
            if bool(connection.requests) != answered or connection.busy or connection.leaving:
                continue
            if now - connection.since <= grace:
                return None  # the others are idle for less long
            if not _has_asked(connection.socket):
                return connection
        return None

    async def _close_idle(self) -> None:
        while True:
            refused = len(self._refused)
            await asyncio.sleep(LOOK)
            for _ in range(min(refused, len(self._refused))):  # a look ago they were there already
                self._refused.popleft().close()
            self._forget_closed()
            now = time.monotonic()
            for connection in self._open.values():
                patience = NEXT_REQUEST if connection.requests else FIRST_REQUEST
                late = not connection.busy and now - connection.since > patience
                if late and not _has_asked(connection.socket):
                    _end(connection)

    def _forget_closed(self) -> None:
        gone = [protocol for protocol, connection in self._open.items() if connection.socket.fileno() < 0]
        for protocol in gone:
            del self._open[protocol]

    def _say(self, text: str) -> None:
        if self._tell.now():
            logger.warning("HTTP: {}", text)


def _end(connection: _Connection) -> None:
    """End a connection whatever it is in the middle of: a handshake, half a header, an answer nobody reads."""
    connection.leaving = True
    with contextlib.suppress(OSError):
        connection.socket.shutdown(socket.SHUT_RDWR)


def _has_asked(held: socket.socket) -> bool:
    """Whether something has come that nobody has read yet, as there was no time for it."""
    try:
        return bool(held.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except OSError:
        return False


def _tell_no_room(refused: socket.socket) -> None:
    """Answer a connection on which nothing was answered before, whatever it asks for, and nothing after that."""
    with contextlib.suppress(OSError):
        refused.send(NO_ROOM)
        refused.shutdown(socket.SHUT_WR)


async def _listeners(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen on every address of that host."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(asyncio.Protocol, host, port, start_serving=False)
    listeners: list[socket.socket] = []
    try:
        for bound in server.sockets:
            listener = socket.socket(fileno=os.dup(bound.fileno()))
            listeners.append(listener)
            listener.setblocking(False)
            listener.listen(BACKLOG)
    except OSError:
        for listener in listeners:
            listener.close()
        raise
    finally:
        server.close()
    return listeners
