"""HTTP for probes, Prometheus and people: reads what the application shows, changes nothing.

`/livez` says that the event loop turns. `/readyz` says whether the documents can be trusted right now, with a
reason for each doubt. `/` is a page for people, `/metrics` is for Prometheus, `/api/nodes` and `/api/changes`
(server-sent events) are for programs. Read-only; who is answered is `eventwatch.http.access`'s to say.

Contract: whatever clients do, answering takes a small share of the event loop, no step of it more than some
milliseconds, and a bounded number of connections. Each answer is made at most once per moment (`answers.MOMENT`),
and so up to that old.
"""

from __future__ import annotations

import asyncio
import errno
import re
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from loguru import logger
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from yarl import URL

from eventwatch.errors import ConfigError
from eventwatch.http.access import Access, is_foreign, is_loopback, without_ids
from eventwatch.http.answers import WORTH_PACKING, Answer, Answers, NodePages, Turns, accepts_gzip, dumps
from eventwatch.http.connections import Connections
from eventwatch.metrics import Metrics
from eventwatch.readiness import IDENTITY
from eventwatch.reconciler import Written

CONNECTIONS: Final = web.AppKey("connections", Connections)
STATIC: Final = Path(__file__).parent / "static"
#: The page brings all that it needs; nothing from elsewhere runs in it or frames it.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
#: Changes kept for those who connect later, and those that may wait for a slow reader before it is cut off.
KEPT_CHANGES: Final = 200
SLOW_READER: Final = 1000
#: Those who may follow changes at once, and after how many silent seconds they are asked whether they still do.
MOST_READERS: Final = 64
SILENCE: Final = 15.0
#: Seconds between attempts to get an address that another process listens on.
AGAIN: Final = 0.5
#: Nodes on a page of `/api/nodes`, unless fewer are asked for.
PAGE: Final = 1000
#: Bytes that are written at once, and the seconds in which a client must have read what it asked for.
PIECE: Final = 65536
READING: Final = 10.0
#: Answers a second, at most: 100 of 1000 nodes each took 8 % of a processor, making them included. Probes
#: have a measure of their own.
RATE: Final = 50.0
PROBE_RATE: Final = 100.0
BURST: Final = 20
#: Seconds that a client may have to wait for its turn.
LONGEST_TURN: Final = 3.0
PROBES: Final = ("/livez", "/readyz")


class ChangeFeed:
    """The last changes, and everyone who wants to hear of the next."""

    def __init__(self) -> None:
        self.recent: deque[bytes] = deque(maxlen=KEPT_CHANGES)  # as JSON, which is made once for all readers
        self._readers: set[asyncio.Queue[bytes | None]] = set()

    def publish(self, written: Written) -> None:
        """Take one acknowledged change; a reader that is too slow is told to go."""
        change = dumps({**asdict(written), "cause": str(written.cause)}).encode()
        self.recent.append(change)
        for reader in list(self._readers):
            if reader.qsize() >= SLOW_READER:
                self._readers.discard(reader)
                reader.put_nowait(None)
            else:
                reader.put_nowait(change)

    def recall(self, changes: list[dict[str, Any]]) -> None:
        """Put changes, newest first, before those that are known; readers are ended, to come back for them."""
        if changes:
            room = KEPT_CHANGES - len(self.recent)
            self.recent.extendleft(dumps(change).encode() for change in changes[:room])
            self.close()

    def close(self) -> None:
        """End every reader's stream."""
        for reader in self._readers:
            reader.put_nowait(None)
        self._readers.clear()

    @property
    def is_full(self) -> bool:
        """Whether no more readers are taken."""
        return len(self._readers) >= MOST_READERS

    async def follow(self) -> AsyncGenerator[bytes, None]:
        """The recent changes, then each new one, until `close`; nothing (b"") when there was none for a while."""
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        for recent in self.recent:
            queue.put_nowait(recent)
        self._readers.add(queue)
        try:
            while True:
                change: bytes | None = b""
                with suppress(TimeoutError):
                    async with asyncio.timeout(SILENCE):
                        change = await queue.get()
                if change is None:
                    return
                yield change
        finally:
            self._readers.discard(queue)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    """What is served, and from where it is read. `identity` tells a health check whose pages these are."""

    metrics: Metrics
    feed: ChangeFeed
    node_ids: Callable[[], Iterable[str]]
    node: Callable[[str], Mapping[str, Any] | None]
    statuses: Callable[[], Iterable[str | None]]
    doubts: Callable[[], list[str]]
    notes: Callable[[], list[str]]
    identity: str
    access: Access = field(default_factory=Access)
    _answers: Answers = field(default_factory=Answers)

    def application(self) -> web.Application:
        """The routes, and what comes before them."""
        application = web.Application(middlewares=[_taking_turns(), _guarding(self.access)])
        application.on_response_prepare.append(_harden)
        nodes = NodePages(self.node_ids, self.node)

        async def show_nodes(request: web.Request) -> web.StreamResponse:
            return await self.show_nodes(request, nodes)

        application.add_routes(
            [
                web.get("/", self.page),
                web.static("/static", STATIC),
                web.get("/livez", self.livez),
                web.get("/readyz", self.readyz),
                web.get("/metrics", self.show_metrics),
                web.get("/api/nodes", show_nodes),
                web.get("/api/changes", self.follow_changes),
            ]
        )
        return application

    async def page(self, _: web.Request) -> web.FileResponse:
        """The status page, for people."""
        return web.FileResponse(STATIC / "index.html")

    async def livez(self, _: web.Request) -> web.Response:
        """The event loop turns."""
        return web.Response(text="ok\n")

    async def readyz(self, request: web.Request) -> web.Response:
        """Whether the documents can be trusted: 503 with the reasons why not, else 200 with notes."""
        reasons = self.doubts()
        told = [*reasons, *self.notes()]
        if not self.access.accepts_token(request.headers.get("Authorization", "")):
            told = [without_ids(reason) for reason in told]
        return web.json_response(told, status=503 if reasons else 200, headers={IDENTITY: self.identity})

    async def show_metrics(self, request: web.Request) -> web.StreamResponse:
        """For Prometheus."""

        async def make() -> Answer:
            self.metrics.show_nodes(self.statuses())
            return Answer(generate_latest(self.metrics.registry), {"Content-Type": CONTENT_TYPE_LATEST})

        return await _send(request, await self._answers.get("metrics", make))

    async def show_nodes(self, request: web.Request, nodes: NodePages) -> web.StreamResponse:
        """The documents by id, as last read or written, and the idle time that is left to each (s).

        A page of them: `limit` at most, those after the id `after`; a Link header names the next page.
        """
        after, written = request.query.get("after", ""), request.query.get("limit", str(PAGE))
        if re.fullmatch(r"[0-9]{1,4}", written, re.ASCII) is None or not 1 <= int(written) <= PAGE:
            return web.Response(status=400, text=f"limit must be a number from 1 to {PAGE}\n")
        limit = int(written)

        async def make() -> Answer:
            body, last = await nodes.page(after=after, limit=limit)
            headers = {"Content-Type": "application/json; charset=utf-8"}
            if last is not None:
                following = URL.build(path="/api/nodes", query={"limit": limit, "after": last})
                headers["Link"] = f'<{following}>; rel="next"'
            return Answer(body, headers)

        return await _send(request, await self._answers.get((after, limit), make))

    async def follow_changes(self, request: web.Request) -> web.StreamResponse:
        """Server-sent events: the recent changes, then each new one."""
        if self.feed.is_full:
            return _busy(f"{MOST_READERS} follow the changes already\n")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"})
        await response.prepare(request)
        await response.write(b"retry: 500\n: changes of node documents\n\n")
        with suppress(ConnectionError, TimeoutError):  # the reader left, or does not read
            async with aclosing(self.feed.follow()) as changes:
                async for change in changes:
                    async with asyncio.timeout(READING):
                        await response.write(b"data: " + change + b"\n\n" if change else b":\n\n")
            return response
        _abort(request)
        return response


@asynccontextmanager
async def serve(host: str, port: int, pages: Pages) -> AsyncIterator[None]:
    """Serve for the duration of the block.

    An address in use is a warning, and tried again until it is free. Raises ConfigError for one that can never be
    listened on.
    """
    listen = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    scheme = "https" if pages.access.tls else "http"
    application = pages.application()
    connections = application[CONNECTIONS] = Connections(tls=pages.access.tls)
    runner = web.AppRunner(application, shutdown_timeout=1.0)
    await runner.setup()
    assert runner.server is not None  # noqa: S101 - set up
    server = runner.server

    def announce() -> None:
        logger.info(
            "Status page on {}://{}/ (and /livez /readyz /metrics /api/nodes /api/changes)", scheme, listen
        )
        if pages.access.token is None and not is_loopback(host):
            logger.warning(
                "HTTP on {} asks for no token: whoever reaches it can read every node; "
                "set EVENTWATCH_HTTP_TOKEN_FILE",
                listen,
            )

    async def take_over() -> None:
        """Serve as soon as the address is free, until cancelled."""
        while True:
            await asyncio.sleep(AGAIN)
            # What is wrong meanwhile, such as an interface that went away, may pass: the watching goes on.
            with suppress(OSError):
                async with connections.listening(server, host, port):
                    announce()
                    await asyncio.Event().wait()

    async with AsyncExitStack() as stack:
        stack.push_async_callback(runner.cleanup)
        stack.callback(pages.feed.close)
        try:
            await stack.enter_async_context(connections.listening(server, host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ConfigError(f"EVENTWATCH_HTTP_LISTEN: cannot listen on {listen}: {error}") from None
            # A standby on the same host, or a predecessor that is about to end: watching is worth more than
            # showing it.
            logger.warning("EVENTWATCH_HTTP_LISTEN: {} is in use, going on without HTTP until it is free", listen)
            waiting = asyncio.create_task(take_over(), name="http-waiting")
            stack.push_async_callback(asyncio.wait, {waiting})
            stack.callback(waiting.cancel)
        else:
            announce()
        yield


# -- before a page ------------------------------------------------------------------------------------------


def _taking_turns() -> Middleware:
    """Keep the connection of a request open, and its answer waiting while there are too many."""
    pages = Turns(rate=RATE, burst=BURST, longest=LONGEST_TURN)
    probes = Turns(rate=PROBE_RATE, burst=BURST, longest=LONGEST_TURN)

    @web.middleware
    async def take_turns(request: web.Request, handler: Handler) -> web.StreamResponse:
        with request.config_dict[CONNECTIONS].answering(request.protocol):
            if not await (probes if request.path in PROBES else pages).take():
                return _busy("too many requests\n")
            return await handler(request)

    return take_turns


def _guarding(access: Access) -> Middleware:
    """Refuse what is not for us, what another site asks for, and what lacks the token."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        host = request.headers.get("Host", "")
        if not access.serves_host(host):
            text = f"{host!r} is not served: use an IP address, or name it in EVENTWATCH_HTTP_ALLOWED_HOSTS\n"
            return web.Response(status=421, text=text)
        if is_foreign(request.headers, request.path):
            return web.Response(status=403, text="other sites are refused\n")
        if request.path not in PROBES and not access.accepts_token(request.headers.get("Authorization", "")):
            challenge = {"WWW-Authenticate": 'Basic realm="eventwatch", charset="UTF-8"'}
            text = "a token is needed: as bearer token, or as password of any user\n"
            return web.Response(status=401, text=text, headers=challenge)
        return await handler(request)

    return guard


def _busy(text: str) -> web.Response:
    response = web.Response(status=503, text=text, headers={"Retry-After": "1"})
    response.force_close()
    return response


# -- after it -----------------------------------------------------------------------------------------------


async def _send(request: web.Request, answer: Answer) -> web.StreamResponse:
    """Send an answer, compressed if that is asked for, no faster than the client reads it, and not for ever."""
    body, headers = answer.body, dict(answer.headers)
    if len(body) >= WORTH_PACKING:
        headers["Vary"] = "Accept-Encoding"
        if accepts_gzip(request.headers.get("Accept-Encoding", "")):
            body = await answer.packed()
            headers["Content-Encoding"] = "gzip"
    if len(body) <= PIECE or request.method == "HEAD":
        return web.Response(body=body, headers=headers)
    response = web.StreamResponse(headers=headers)
    response.content_length = len(body)
    view = memoryview(body)
    try:
        async with asyncio.timeout(READING):
            await response.prepare(request)
            for begin in range(0, len(body), PIECE):
                await response.write(view[begin : begin + PIECE])
            await response.write_eof()
    except TimeoutError:
        _abort(request)
    return response


def _abort(request: web.Request) -> None:
    """End the connection without waiting for what its client has not read."""
    if request.transport is not None:
        request.transport.abort()


async def _harden(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Content-Security-Policy"] = POLICY
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Referrer-Policy"] = "no-referrer"
    is_static = request.path.startswith("/static/") and response.status < web.HTTPBadRequest.status_code
    response.headers["Cache-Control"] = "no-cache" if is_static else "no-store"  # no-cache: kept, but asked about
    response.headers.pop("Server", None)
