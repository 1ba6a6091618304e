"""HTTP for probes, Prometheus and people: reads what the application shows, changes nothing.

`/livez` says that the event loop turns. `/readyz` says whether the documents can be trusted right now, with a
reason for each doubt. `/` is a page for people, `/metrics` is for Prometheus; `/api/engines`, `/api/nodes`,
`/api/nodes/ID` (which can wait until a node is what a manager needs) and `/api/changes` (server-sent events) are
for programs. Read-only; who is answered is `eventwatch.http.access`'s to say.

Contract: whatever clients do, answering takes a small share of the event loop, no step of it more than some
milliseconds, and a bounded number of connections. Each answer is made at most once per moment (`answers.MOMENT`),
and so up to that old.
"""

from __future__ import annotations

import asyncio
import errno
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from loguru import logger
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from yarl import URL

from eventwatch.core.durations import parse_duration
from eventwatch.core.errors import ConfigError, EventwatchError, NodeDiedError, NodeGoneError, WaitTimeoutError
from eventwatch.core.facts import CONDITIONS, is_container_id
from eventwatch.core.metrics import Metrics
from eventwatch.http.access import SHORT_ID, Access, is_foreign, is_loopback, short_ids, without_ids
from eventwatch.http.answers import (
    WORTH_PACKING,
    Answer,
    Answers,
    NodePages,
    Turns,
    accepts_gzip,
    dumps,
    dumps_many,
)
from eventwatch.http.connections import Connections
from eventwatch.http.feed import MOST_READERS, ChangeFeed, Missed
from eventwatch.http.nearby import IDENTITY
from eventwatch.http.rows import Rows

CONNECTIONS: Final = web.AppKey("connections", Connections)
STATIC: Final = Path(__file__).parent / "static"
#: The page brings all that it needs; nothing from elsewhere runs in it or frames it.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
#: Seconds between attempts to get an address that another process listens on.
AGAIN: Final = 0.5
#: Nodes on a page of `/api/nodes`, unless fewer are asked for.
PAGE: Final = 1000
#: Bytes that are written at once, and the seconds in which a client must have read what it asked for.
PIECE: Final = 65536
READING: Final = 10.0
#: Seconds for which an answer about other engines, which the database is asked for, is given again as it is.
FLEET_MOMENT: Final = 2.0
JSON: Final = "application/json; charset=utf-8"
#: Answers a second, at most: 100 of 1000 nodes each took 8 % of a processor, making them included. Probes
#: have a measure of their own.
RATE: Final = 50.0
PROBE_RATE: Final = 100.0
BURST: Final = 20
#: Seconds that a client may have to wait for its turn.
LONGEST_TURN: Final = 3.0
#: One node costs little, and a manager may ask, and wait, for thousands at the same time.
NODE_RATE: Final = 500.0
NODE_BURST: Final = 500
LONGEST_NODE_TURN: Final = 10.0
#: Seconds for which a client may wait for a node, and for which it does unless it says how long.
LONGEST_WAIT: Final = 600.0
WAIT: Final = 30.0
_STATUSES: Final = {ValueError: 400, NodeGoneError: 404, WaitTimeoutError: 408, NodeDiedError: 410}
_JSON: Final = {"Content-Type": JSON}
#: Characters of a path; all of ours are shorter.
LONGEST_PATH: Final = 200
LONGEST_ID: Final = 64
PROBES: Final = ("/livez", "/readyz")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    """What is served, and from where it is read. `identity` tells a health check whose pages these are."""

    metrics: Metrics
    feed: ChangeFeed
    node_ids: Callable[[], Iterable[str]]
    node: Callable[[str], Mapping[str, Any] | None]
    states: Callable[[], Iterable[tuple[str | None, str | None]]]
    doubts: Callable[[], list[str]]
    notes: Callable[[], list[str]]
    #: The engines on record, and the one that is watched here. Raises StoreError.
    engines: Callable[[], Awaitable[list[dict[str, Any]]]]
    engine_id: Callable[[], str]
    #: The rows of an engine's nodes: `limit` at most of those after an id. Raises StoreError.
    read_page: Callable[[str, str, int], Awaitable[tuple[list[dict[str, Any]], str | None]]]
    #: The ids of two nodes at most that begin so, whoever keeps them. Raises StoreError.
    find: Callable[[str], Awaitable[list[str]]]
    #: A node's row as the database has it; None: there is none. Raises StoreError.
    read: Callable[[str], Awaitable[Mapping[str, Any] | None]]
    #: Its row once it is `healthy`, `running` or the like within so many seconds; None once it is `deleted`.
    wait: Callable[[str, str, float], Awaitable[Mapping[str, Any] | None]]
    #: A node's changes on record, newest first, whether or not it has a document. Raises StoreError.
    changes: Callable[[str], Awaitable[list[dict[str, Any]]]]
    #: What the status page shows of all nodes; of who watches what; and of the last hour.
    rows: Rows
    overview: Callable[[], Mapping[str, Any]]
    series: Callable[[], Mapping[str, Any]]
    identity: str
    access: Access = field(default_factory=Access)
    _answers: Answers = field(default_factory=Answers)
    _fleet: Answers = field(default_factory=partial(Answers, FLEET_MOMENT))

    def application(self) -> web.Application:
        """The routes, and what comes before them."""
        application = web.Application(middlewares=[_taking_turns(), _guarding(self.access)])
        application.on_response_prepare.append(_harden)
        nodes = NodePages(self.node_ids, self.node, self.shown)

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
                web.get("/api/nodes/{id}", self.show_node),
                web.get("/api/engines", self.show_engines),
                web.get("/api/nodes/{id}/changes", self.show_changes),
                web.get("/api/rows", self.show_rows),
                web.get("/api/overview", self.show_overview),
                web.get("/api/series", self.show_series),
                web.get("/api/changes", self.follow_changes),
            ]
        )
        return application

    @property
    def longest_beginning(self) -> int:
        """How many digits of an id may be asked for without the others: an answer to more would tell them."""
        return SHORT_ID if self.access.token is None else LONGEST_ID - 1

    def shown(self, text: bytes) -> bytes:
        """What a client may read of this text: whole ids are for those who have shown a token.

        To the managers that are known, a container's id is the session of whoever uses it.
        """
        return text if self.access.token is not None else short_ids(text)

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
        told = [self.shown(reason.encode()).decode() for reason in told]
        return web.json_response(told, status=503 if reasons else 200, headers={IDENTITY: self.identity})

    async def show_metrics(self, request: web.Request) -> web.StreamResponse:
        """For Prometheus."""

        async def make() -> Answer:
            self.metrics.show_nodes(self.states())
            self.metrics.ready.set(not self.doubts())
            return Answer(generate_latest(self.metrics.registry), {"Content-Type": CONTENT_TYPE_LATEST})

        return await _send(request, await self._answers.get("metrics", make))

    async def show_nodes(self, request: web.Request, nodes: NodePages) -> web.StreamResponse:
        """The documents by id, as last read or written, and the idle time that is left to each (s).

        A page of them: `limit` at most, those after the id `after`; a Link header names the next page. Those of
        another `engine` are read from the database.
        """
        after, written = request.query.get("after", ""), request.query.get("limit", str(PAGE))
        if re.fullmatch(r"[0-9]{1,4}", written, re.ASCII) is None or not 1 <= int(written) <= PAGE:
            return web.Response(status=400, text=f"limit must be a number from 1 to {PAGE}\n")
        engine = request.query.get("engine", "")
        limit, after = int(written), after if self.access.token is not None else after[:SHORT_ID]
        other = engine if engine != self.engine_id() else ""
        if len(engine) > LONGEST_PATH:
            return web.Response(status=400, text="that is no engine's id\n")

        async def make() -> Answer:
            body, last = await (
                self._read_page(other, after, limit) if other else nodes.page(after=after, limit=limit)
            )
            headers = dict(_JSON)
            if last is not None:
                query: dict[str, str | int] = {"engine": engine} if engine else {}
                last = self.shown(last.encode()).decode()
                following = URL.build(path="/api/nodes", query={**query, "limit": limit, "after": last})
                headers["Link"] = f'<{following}>; rel="next"'
            return Answer(body, headers)

        try:
            answers = self._fleet if other else self._answers
            return await _send(request, await answers.get((other, after, limit), make))
        except EventwatchError as error:
            return _refusal(503, str(error))

    async def _read_page(self, engine: str, after: str, limit: int) -> tuple[bytes, str | None]:
        # An id may have been cut: then it stands for all that begin so.
        rows, last = await self.read_page(engine, f"{after}~" if after else "", limit)
        return self.shown(await dumps_many(rows)), last

    async def show_engines(self, request: web.Request) -> web.StreamResponse:
        """Every engine on record with what its watcher last told; `own` is the one that is watched here."""

        async def make() -> Answer:
            rows = [row | {"own": row["engine_id"] == self.engine_id()} for row in await self.engines()]
            return Answer(await dumps_many(rows), _JSON)

        try:
            return await _send(request, await self._fleet.get("engines", make))
        except EventwatchError as error:
            return _refusal(503, str(error))

    async def show_rows(self, request: web.Request) -> web.StreamResponse:
        """What the status page shows of each node, as far as it changed since the version that it names."""
        have = request.query.get("since", "")

        async def make() -> Answer:
            return Answer(self.shown(await self.rows.answer(have)), _JSON)

        return await _send(request, await self._answers.get(("rows", have), make))

    async def show_overview(self, request: web.Request) -> web.StreamResponse:
        """Who watches what, and how well."""

        async def make() -> Answer:
            await self.rows.refresh()
            counts = {"statuses": +self.rows.statuses, "problems": +self.rows.problems}
            return Answer(self.shown(dumps({**self.overview(), **counts}).encode()), _JSON)

        return await _send(request, await self._answers.get("overview", make))

    async def show_series(self, request: web.Request) -> web.StreamResponse:
        """The last hour by minutes: latency, events, writes."""

        async def make() -> Answer:
            return Answer(dumps(self.series()).encode(), _JSON)

        return await _send(request, await self._answers.get("series", make))

    async def show_changes(self, request: web.Request) -> web.StreamResponse:
        """A node's changes on record, newest first; of one that is gone by its whole id, for a while by less."""
        asked = request.match_info["id"]
        try:
            node_id = await self._node_named(asked, gone=True)
            changes = await self.changes(node_id)
        except (EventwatchError, ValueError) as error:
            return _refusal(_STATUSES.get(type(error), 503), str(error))
        return _json(changes, bytes if asked == node_id else self.shown)

    async def show_node(self, request: web.Request) -> web.StreamResponse:
        """One node, by its id or the beginning of it; with `until` and `timeout`, once it is what is waited for.

        404: it has no document, or has none any more; 408: not in time; 410: it ended; 503: the database is away.
        """
        try:
            node_id, until, seconds = await self._asked_for(request)
            # Whoever asks by the whole id knows it.
            show = bytes if request.match_info["id"] == node_id else self.shown
            if until is None:
                row = await self.read(node_id)
                if row is None:
                    raise NodeGoneError(f"Node {node_id[:12]} has no document")
                return _json(row, show)
            with request.config_dict[CONNECTIONS].parking(request.protocol) as parked:
                if not parked:
                    return _busy("too many wait already\n")
                row = await self.wait(node_id, until, seconds) or {"node_id": node_id, "deleted": True}
                return _json(row, show)
        except (EventwatchError, ValueError) as error:
            return _refusal(_STATUSES.get(type(error), 503), str(error))

    async def _asked_for(self, request: web.Request) -> tuple[str, str | None, float]:
        """Which node, what it is waited for to be, and for how long (s). Raises ValueError, NodeGoneError."""
        until = request.query.get("until")
        seconds = parse_duration(request.query.get("timeout", WAIT))
        if until not in {None, *CONDITIONS} or seconds > LONGEST_WAIT:
            raise ValueError(
                f"until must be one of {', '.join(CONDITIONS)}, and timeout at most {LONGEST_WAIT:.0f}s"
            )
        return await self._node_named(request.match_info["id"]), until, seconds

    async def _node_named(self, asked: str, *, gone: bool = False) -> str:
        """The whole id; `gone`: also of one that was deleted lately. Raises ValueError, EventwatchError."""
        longest = self.longest_beginning
        if not is_container_id(asked) and re.fullmatch(rf"[0-9a-f]{{4,{longest}}}", asked, re.ASCII) is None:
            raise ValueError(f"a node is asked for by its id, or by 4 to {longest} digits of its beginning")
        found = [asked] if is_container_id(asked) else await self.find(asked)
        if not found and gone:
            found = [node_id for node_id in self.feed.node_ids if node_id.startswith(asked)]
        if not found:
            raise NodeGoneError(f"no node's id begins with {asked}")
        if len(found) > 1:
            raise ValueError(f"several nodes' ids begin with {asked}")
        return found[0]

    async def follow_changes(self, request: web.Request) -> web.StreamResponse:
        """Server-sent events: the recent changes, then each new one; `?from=now` leaves the recent ones out.

        A reader that comes back names the last id it has seen (`Last-Event-ID`), and gets what came after it; if
        that is not certain, an event `missed` comes first, and all that is kept.
        """
        if self.feed.is_full:
            return _busy(f"{MOST_READERS} follow the changes already\n")
        begin, seen = request.query.get("from", "kept"), request.headers.get("Last-Event-ID", "")
        if begin not in {"kept", "now"}:
            return _refusal(400, "from must be now, or absent")
        after = int(seen) if re.fullmatch(r"[0-9]{1,20}", seen, re.ASCII) else -1 if seen else None
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Accel-Buffering": "no"})
        await response.prepare(request)
        await response.write(b"retry: 500\n: changes of node documents\n\n")
        with suppress(ConnectionError, TimeoutError):  # the reader left, or does not read
            async with aclosing(self.feed.follow(after=after, old=begin == "kept")) as changes:
                async for change in changes:
                    text = b":\n\n"
                    if isinstance(change, Missed):
                        text = b"event: missed\ndata: {}\n\n"
                    elif change is not None:
                        text = b"id: %d\ndata: %s\n\n" % (change.number, self.shown(change.data))
                    async with asyncio.timeout(READING):
                        await response.write(text)
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
    runner = web.AppRunner(application, shutdown_timeout=1.0, handler_cancellation=True)
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
        except UnicodeError:
            raise ConfigError(f"EVENTWATCH_HTTP_LISTEN: {host!r:.80} is no host name") from None
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
    single = Turns(rate=NODE_RATE, burst=NODE_BURST, longest=LONGEST_NODE_TURN)

    @web.middleware
    async def take_turns(request: web.Request, handler: Handler) -> web.StreamResponse:
        with request.config_dict[CONNECTIONS].answering(request.protocol):
            turns = probes if request.path in PROBES else pages
            if not await (single if request.path.startswith("/api/nodes/") else turns).take():
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
        if len(request.path) > LONGEST_PATH:
            return web.Response(status=404, text="there is no such page\n")
        if is_foreign(request.headers, request.path):
            return web.Response(status=403, text="other sites are refused\n")
        if request.path not in PROBES and not access.accepts_token(request.headers.get("Authorization", "")):
            challenge = {"WWW-Authenticate": 'Basic realm="eventwatch", charset="UTF-8"'}
            if request.headers.get("Sec-Fetch-Dest") == "empty":
                challenge = {}  # a browser would ask its user, and not tell the page, which tells it better
            text = "a token is needed: as bearer token, or as password of any user\n"
            return web.Response(status=401, text=text, headers=challenge)
        return await handler(request)

    return guard


def _json(value: object, show: Callable[[bytes], bytes]) -> web.Response:
    return web.Response(body=show(dumps(value).encode()), headers=_JSON)


def _refusal(status: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status)


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
