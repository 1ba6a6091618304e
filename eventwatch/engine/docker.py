"""The Docker Engine, and nothing about why: the only module that talks to it.

Contract: every call has a deadline and a limit on what is read; the engine's own "no such container" is an answer
(`found=False`), everything else that is not an answer is an `EngineError`, another 404 too; the event stream ends
by returning (a clean end) or by raising `EngineError`, never by falling silent on its own. The stream is read by
our own reader on a client of its own: aiodocker's `subscribe()` hangs for ever once a stream has ended, and one
long line kills it.

The calls that are made, all of them: `GET /version`, `GET /info`, `GET /events`, `GET /containers/json`,
`GET /containers/{id}/json`, `POST /containers/{id}/stop`, `GET /networks/{id}`, with `idle_activity` also
`GET /containers/{id}/stats`, and by `doctor` alone `GET /networks`. No redirect is followed. A container's `{id}`
is 64 hexadecimal digits, save where `resolve` asks about a name.

Not promised: that events arrive in the order of their `timeNano`, once, or at all.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import os
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import aiodocker
import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from eventwatch.core.clock import Slices
from eventwatch.core.errors import ConfigError, EngineError
from eventwatch.core.facts import Event, Observation, Usage, is_container_id, nanos, parse_time
from eventwatch.core.listing import Listed
from eventwatch.core.text import printable
from eventwatch.engine.protocol import PODMAN_FIX, Engine, EngineInfo, is_named_by_nobody
from eventwatch.engine.ssh import MOST_PROCESSES, SshForwarder, parse_ssh_url
from eventwatch.engine.wire import (
    ACTION_ALIASES,
    CONTAINER_ACTIONS,
    LOG_CUT,
    LOG_CUT_TYPE,
    NETWORK_ACTIONS,
    engine_time,
    log_cut,
    parse_addresses,
    parse_container,
    parse_event,
    parse_listed,
    parse_usage,
    split_lines,
)
from eventwatch.settings.model import Settings, mask_url

#: What a host application has if it talks to Docker itself.
DockerClient = aiodocker.Docker

#: No container has this id: asking for it tells whether asking is allowed ("no such container") or denied (403).
NOBODY: Final = "0" * 64
DENIED: Final = HTTPStatus.FORBIDDEN

DEFAULT_HOST: Final = "unix:///var/run/docker.sock"
#: Engine 19.03. Older ones lack nothing that is asked for, but nobody tests against them any more.
MINIMUM_API: Final = (1, 40)
#: The label of what a compose file made.
COMPOSE_PROJECT: Final = "com.docker.compose.project"
#: Seconds. An inspection waits for the container's lock, 5 s were measured in a burst of 30.
INSPECT_DEADLINE: Final = 30.0
#: Characters of an engine's id, name or version.
LONGEST_NAME: Final = 256
CALL_DEADLINE: Final = 10.0
#: ns. An engine's clock may run this much apart from ours between two looks at it.
CLOCK_TOLERANCE: Final = 1_000_000_000

#: Connections to an engine behind ssh, besides one for each stop: a sweep inspects ten at a time.
MOST_AT_ONCE: Final = 12

#: Seconds of refusals after which a socket that is mounted by itself is taken for that of an engine before.
DEAD_MOUNT: Final = 120.0

_KIB: Final = 1024
_MIB: Final = 1024 * _KIB


@dataclass(frozen=True, slots=True)
class Call:
    """One kind of request. `limit`: bytes read of an answer; `statuses`: those that say that it was done."""

    method: str
    path: str
    limit: int = _MIB
    statuses: frozenset[int] = frozenset({HTTPStatus.OK})


#: All requests that are made; the list in the module's docstring is checked against it.
CALLS: Final[Mapping[str, Call]] = {
    "version": Call("GET", "/version"),
    "info": Call("GET", "/info"),
    "events": Call("GET", "/events"),
    "list": Call("GET", "/containers/json", 64 * _MIB),
    "inspect": Call("GET", "/containers/{id}/json", 2 * _MIB),
    "stop": Call(
        "POST", "/containers/{id}/stop", statuses=frozenset({HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED})
    ),
    "network": Call("GET", "/networks/{id}", 256 * _KIB),
    "stats": Call("GET", "/containers/{id}/stats", _MIB),
    "networks": Call("GET", "/networks", 8 * _MIB),
}
#: Bytes read of an answer that is an error.
ERROR_LIMIT: Final = 64 * _KIB

#: What is counted must be what arrives: neither side inflates anything.
_HEADERS: Final = {"Accept-Encoding": "identity"}
_WHO: Final = "asking the engine who it is"
_API_VERSION: Final = re.compile(r"[0-9]{1,3}\.[0-9]{1,3}")
_NAME: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")
#: Those of swarms have 25 letters and digits.
_NETWORK_ID: Final = re.compile(r"[0-9a-z]{25,64}")
_SOME_ID: Final = re.compile(r"\b[0-9a-f]{64}\b")

_FAILURES: Final = (aiohttp.ClientError, HttpProcessingError, OSError, ValueError)
_ITEM: Final = json.JSONDecoder()
_BETWEEN_ITEMS: Final = re.compile(r"[ \t\r\n,]*")
_FILTERS: Final = json.dumps(
    {
        "type": ["container", "network", LOG_CUT_TYPE],
        "event": [*CONTAINER_ACTIONS, *ACTION_ALIASES, *NETWORK_ACTIONS, LOG_CUT],
    }
)
_FIXES: Final = {
    errno.EACCES: "permission denied: add this user to the socket's group (docker), or `group_add` in compose",
    errno.ENOENT: "no such socket: start the engine, mount its socket, or set DOCKER_HOST",
    errno.ECONNREFUSED: "nobody listens: start the engine, or set DOCKER_HOST",
}


#: With these, a page is from a web server that stays one; with a 5xx, maybe from a proxy whose engine starts.
_WEB_SERVER: Final = {HTTPStatus.OK, HTTPStatus.NOT_FOUND, HTTPStatus.NOT_IMPLEMENTED}


@dataclass(frozen=True, slots=True)
class _Session:
    """A client, and the API version that is spoken over it (`v1.41`; nothing while that is being asked for)."""

    docker: aiodocker.Docker
    api_version: str = ""

    def url(self, path: str) -> URL:
        version = f"/{self.api_version}" if self.api_version else ""
        return URL(f"{self.docker.docker_host}{version}{path}", encoded=True)


class DockerEngine:
    """A Docker Engine (or Podman's Docker-compatible service) behind `settings.docker_host`.

    `client` may be an aiodocker client that the caller owns: nothing about it is changed, and the API version that
    it was given is kept to. The event stream still opens a client of its own.

    The API version is negotiated once per client and never changed on it: when the engine turns out to speak
    another one, a new client takes the place of the one before, on which the calls under way may end.
    """

    def __init__(self, settings: Settings, client: aiodocker.Docker | None = None) -> None:
        self._network = settings.node_network
        self._url = settings.docker_host or DEFAULT_HOST
        self._tls: ssl.SSLContext | None = None
        #: The way to an engine behind ssh.
        self._ssh = _forwarder(self._url) if self._url.startswith("ssh:") else None
        #: Connections; over ssh each is a process, and a client that is replaced has some for a while.
        self._most = settings.stop_concurrency + MOST_AT_ONCE
        if self._ssh is not None:
            self._most = min(self._most, MOST_PROCESSES // 2 - 2)
        if settings.docker_tls_verify and self._url.startswith("tcp://"):
            self._url = "https://" + self._url.removeprefix("tcp://")
        if self._url.startswith("https://"):
            verify = settings.docker_tls_verify
            self._tls = _tls_context(settings.docker_cert_path) if verify else _trusting()
        #: The URL without a password, for messages.
        self._named = mask_url(self._url)
        self._client = client
        self._pinned = "" if client is None or client.api_version == "auto" else client.api_version
        self._session: _Session | None = None
        self._negotiation = asyncio.Lock()
        self._retired: _Session | None = None
        self._refused_since: float | None = None
        #: The engine's clock minus our monotonic one (ns), None until it has told its time.
        self._clock_offset: int | None = None
        self._podman = False
        #: When its log of events was cut last, of which it has told (engine time, ns).
        self._log_cut = 0

    async def identify(self) -> EngineInfo:
        session = await self._connected()
        async with self._deadline(_WHO, CALL_DEADLINE, session):
            version = await self._version(session.docker)
        api_version = _api_version(version)
        if tuple(int(part) for part in api_version.split(".")) < MINIMUM_API:
            raise ConfigError(
                f"Engine at {self._named} speaks API {api_version}, eventwatch needs 1.40 or later: "
                "upgrade the engine"
            )
        if session.api_version != f"v{api_version}" and not self._pinned:
            await self._retire(session)
        asked_at = time.monotonic_ns()
        try:
            info = _decoded(await self._ask("info", doing=_WHO, seconds=CALL_DEADLINE), dict, _WHO)
        except EngineError as error:
            if error.status == DENIED:
                raise ConfigError(
                    f"Engine at {self._named} denies GET /info (403), which tells the engine's id: "
                    "allow it in the socket proxy"
                ) from None
            raise
        system_time = parse_time(info.get("SystemTime"))
        self._clock_offset = nanos(system_time) - asked_at if system_time else None
        engine_id, name = str(info.get("ID") or ""), printable(info.get("Name") or "", LONGEST_NAME)
        if not (engine_id.isascii() and engine_id.isprintable() and len(engine_id) <= LONGEST_NAME):
            raise EngineError(f"Engine failed while {_WHO}: its id is {engine_id!r:.80}")
        warning = ""
        self._podman = "Podman" in str(version.get("Components"))
        if self._podman:  # which makes up a new ID for every answer
            engine_id = podman_id(name, str(info.get("DockerRootDir") or ""), rootless=bool(info.get("Rootless")))
            if is_named_by_nobody(name):
                warning = (
                    f"Podman has no id but the name of its host, which is {name or 'empty'} here as on many "
                    f"another: where two of one name share a database, {PODMAN_FIX}"
                )
        if not engine_id:
            raise ConfigError(
                f"Engine at {self._named} tells no id in GET /info: nodes could not be told from others'"
            )
        return EngineInfo(
            engine_id, name, printable(version.get("Version"), LONGEST_NAME), api_version, system_time, warning
        )

    @asynccontextmanager
    async def events(
        self, since: int | None, on_malformed: Callable[[str], object]
    ) -> AsyncIterator[AsyncIterator[Event]]:
        doing = "opening the event stream"
        params = {"filters": _FILTERS}
        if since is None and self._podman and self._clock_offset is not None:
            # It answers first, and looks for the end of its log then: what happens in between would not be told.
            since = time.monotonic_ns() + self._clock_offset - CLOCK_TOLERANCE
        if since is not None:
            params["since"] = engine_time(since)
        docker = await self._new_client()
        try:
            # An engine that is silent here is silent on the other client too, which would only find out later.
            async with self._deadline(doing, CALL_DEADLINE, self._session):
                response = await self._request(await self._negotiated(docker), "events", params=params)
                if response.status not in CALLS["events"].statuses:
                    await _refused(response, doing)
            try:
                yield self._read_events(response, on_malformed)
            finally:
                response.close()
        finally:
            await _close(docker)

    async def _read_events(
        self, response: aiohttp.ClientResponse, on_malformed: Callable[[str], object]
    ) -> AsyncIterator[Event]:
        try:
            async for line in split_lines(response.content.iter_any(), on_malformed):
                try:
                    raw = json.loads(line)
                    event = parse_event(raw)
                except (ValueError, RecursionError) as error:
                    on_malformed(f"{error}: {line[:120]!r}")
                    continue
                if event is None and (cut := log_cut(raw)) > self._log_cut:
                    self._log_cut = cut
                    raise EngineError("Podman has cut its log of events, and leaves out what it had not read")
                if event is not None:
                    yield event
        except (aiohttp.ClientError, HttpProcessingError, OSError) as error:
            raise EngineError(f"Event stream broke: {_reason(error)}") from None

    async def inspect(self, node_id: str, *, as_of: int = 0) -> Observation:
        container = await self.container(node_id)
        if container is None:
            return Observation(node_id=node_id, found=False, time_nano=as_of)
        offset = self._clock_offset
        not_after = None if offset is None else time.monotonic_ns() + offset + CLOCK_TOLERANCE
        try:
            return parse_container(container, network=self._network, as_of=as_of, not_after=not_after)
        except Exception as error:  # noqa: BLE001 - whatever one container's answer is like, it harms no other
            raise EngineError(f"Engine's answer about {node_id} is no inspection: {_line(repr(error))}") from None

    async def container(self, node_id: str) -> dict[str, Any] | None:
        """An inspection in the engine's own words; None when there is no such container."""
        _check_id(node_id)
        doing = f"inspecting {node_id}"
        body = await self._ask("inspect", node_id, doing=doing, seconds=INSPECT_DEADLINE)
        if body is None:
            return None
        container: dict[str, Any] = _decoded(body, dict, doing)
        if container.get("Id") != node_id:
            raise EngineError(f"Engine failed while {doing}: it answered about {_line(container.get('Id'))}")
        return container

    async def addresses(self, network_id: str) -> Mapping[str, str]:
        if _NETWORK_ID.fullmatch(network_id) is None:
            return {}
        doing = "asking a network for addresses"
        return parse_addresses(
            _decoded(await self._ask("network", network_id, doing=doing, seconds=CALL_DEADLINE), dict, doing)
        )

    async def usage(self, node_id: str) -> Usage:
        _check_id(node_id)
        doing = f"asking for the usage of {node_id}"
        once = {"stream": "false", "one-shot": "true"}
        body = await self._ask("stats", node_id, doing=doing, seconds=CALL_DEADLINE, params=once)
        return Usage() if body is None else parse_usage(_decoded(body, dict, doing))

    async def resolve(self, name: str) -> str | None:
        if _NAME.fullmatch(name) is None:
            return None
        doing = f"looking for {name}"
        body = await self._ask("inspect", name, doing=doing, seconds=INSPECT_DEADLINE)
        if body is None:
            return None
        node_id = _decoded(body, dict, doing).get("Id")
        if not is_container_id(node_id):
            raise EngineError(f"Engine failed while {doing}: it answered about {_line(node_id)}")
        return str(node_id)

    async def list_all(self) -> list[str]:
        return await self._list(all="1")

    async def list_rows(self) -> list[Listed]:
        rows, slices = [], Slices()
        for row in await self._rows(all="1"):
            if (listed := parse_listed(row)) is not None:
                rows.append(listed)
            await slices.turn()
        return rows

    async def list_running(self, label: str | None = None) -> list[str]:
        filters = {"status": ["running", "paused"], **({"label": [label]} if label else {})}
        return await self._list(filters=json.dumps(filters))

    async def list_newest(self, limit: int) -> list[str]:
        return await self._list(all="1", limit=str(limit))

    async def list_on_network(self, network: str, *, older_than: float) -> list[str]:
        """Ids of the containers that have run on this network for so many seconds, as a manager's nodes do.

        Without those of compose projects: these are the manager itself, its database and the like.
        """
        doing = "listing containers"
        params = {"filters": json.dumps({"status": ["running", "paused"], "network": [network]})}
        rows = _decoded(await self._ask("list", doing=doing, seconds=INSPECT_DEADLINE, params=params), list, doing)
        latest = time.time() - older_than
        found = []
        for row in rows:
            if not isinstance(row, dict) or not is_container_id(row.get("Id")):
                continue
            created, labels = row.get("Created"), row.get("Labels") or {}
            # The filter matches parts of a name as well.
            there = network in ((row.get("NetworkSettings") or {}).get("Networks") or {})
            old = isinstance(created, int | float) and created <= latest
            if there and old and COMPOSE_PROJECT not in labels:
                found.append(str(row["Id"]))
        return found

    async def list_networks(self) -> list[str]:
        """Names of all networks."""
        doing = "listing networks"
        rows = _decoded(await self._ask("networks", doing=doing, seconds=CALL_DEADLINE), list, doing)
        return [row["Name"] for row in rows if isinstance(row, dict) and isinstance(row.get("Name"), str)]

    async def _list(self, **params: str) -> list[str]:
        rows = await self._rows(**params)
        return [row["Id"] for row in rows if isinstance(row, dict) and is_container_id(row.get("Id"))]

    async def _rows(self, **params: str) -> list[Any]:
        doing = "listing containers"
        body = await self._ask("list", doing=doing, seconds=INSPECT_DEADLINE, params=params)
        return await _decoded_in_slices(body, doing)

    async def stop(self, node_id: str, *, grace: float) -> None:
        _check_id(node_id)
        seconds, params = grace + CALL_DEADLINE, {"t": str(round(grace))}
        await self._ask("stop", node_id, doing=f"stopping {node_id}", seconds=seconds, params=params)

    async def close(self) -> None:
        for session in (self._session, self._retired):
            if session is not None and self._client is None:
                await _close(session.docker)
        self._session = self._retired = None
        if self._ssh is not None:
            await self._ssh.close()

    # -- sessions --------------------------------------------------------------------------------------

    async def _new_client(self) -> aiodocker.Docker:
        timeout = aiohttp.ClientTimeout(sock_connect=CALL_DEADLINE)
        if self._ssh is not None:
            socket = str(await self._ssh.socket())
            # Each connection is a process here and a login there: rather wait for one of those that are open.
            connector = aiohttp.UnixConnector(socket, limit=self._most)
            return aiodocker.Docker(url="unix://localhost", connector=connector, timeout=timeout)
        try:
            return aiodocker.Docker(url=self._url, ssl_context=self._tls, timeout=timeout)
        except ValueError as error:
            raise ConfigError(f"EVENTWATCH_DOCKER_HOST: {self._named} is not usable: {error}") from None

    async def _connected(self) -> _Session:
        """The session for the next call. Who comes first negotiates for all."""
        if self._session is None:
            async with self._deadline(_WHO, CALL_DEADLINE), self._negotiation:
                if self._session is None:
                    docker = self._client or await self._new_client()
                    try:
                        self._session = await self._negotiated(docker)
                    except BaseException:
                        if docker is not self._client:
                            await _close(docker)
                        raise
        return self._session

    async def _negotiated(self, docker: aiodocker.Docker) -> _Session:
        if self._podman and self._session is not None:
            # It takes a second for that answer, on a busy machine three; `identify` asks it right behind.
            return _Session(docker, self._session.api_version)
        return _Session(docker, self._pinned or f"v{_api_version(await self._version(docker))}")

    async def _version(self, docker: aiodocker.Docker) -> dict[str, Any]:
        async with await self._request(_Session(docker), "version") as response:
            if response.content_type == "text/html" and response.status in _WEB_SERVER:
                raise ConfigError(
                    f"EVENTWATCH_DOCKER_HOST: what answers at {self._named} is a web server, not a Docker engine"
                )
            version: dict[str, Any] = _decoded(await _body(response, CALLS["version"], _WHO), dict, _WHO)
            return version

    async def _retire(self, session: _Session | None) -> None:
        """Have the next call open anew: behind a half-open connection each kept one would time out in turn.

        Calls on it that are still under way may end; it is closed when the next one is retired.
        """
        if session is not None and session is self._session:
            self._session, self._retired, closing = None, session, self._retired
            if closing is not None and self._client is None:
                await _close(closing.docker)

    # -- requests --------------------------------------------------------------------------------------

    async def _ask(
        self, name: str, part: str = "", *, doing: str, seconds: float, params: Mapping[str, str] | None = None
    ) -> bytes | None:
        """The body of the engine's answer; None when it says that it has no container `part`."""
        session = self._session or await self._connected()
        try:  # as `_deadline`, which would cost a sweep 3 percent
            async with asyncio.timeout(seconds), await self._request(session, name, part, params) as response:
                body = await _body(response, CALLS[name], doing, part)
        except _FAILURES as error:
            raise await self._failure(error, doing, seconds, session) from None
        self._refused_since = None
        return body

    async def _request(
        self, session: _Session, name: str, part: str = "", params: Mapping[str, str] | None = None
    ) -> aiohttp.ClientResponse:
        """The one place where an engine is asked anything. The answer's body is not read yet."""
        call = CALLS[name]
        response = await session.docker.session.request(
            call.method,
            session.url(call.path.format(id=quote(part, safe=""))),
            params=params,
            headers=_HEADERS,
            allow_redirects=False,
            auto_decompress=False,
            raise_for_status=False,
        )
        if response.headers.get("Content-Encoding", "identity") != "identity":
            response.close()
            raise EngineError(
                f"Engine at {self._named} compressed its answer, which nobody asked for", status=response.status
            )
        return response

    @asynccontextmanager
    async def _deadline(self, doing: str, seconds: float, session: _Session | None = None) -> AsyncIterator[None]:
        """Bound one call and turn whatever it raises into one line with the cure."""
        try:
            async with asyncio.timeout(seconds):
                yield
        except _FAILURES as error:
            raise await self._failure(error, doing, seconds, session) from None
        self._refused_since = None

    async def _failure(
        self, error: Exception, doing: str, seconds: float, session: _Session | None
    ) -> EngineError:
        if isinstance(error, TimeoutError):
            await self._retire(session)
            return EngineError(f"Engine at {self._named} did not answer within {seconds:.0f} s while {doing}")
        if not isinstance(error, aiohttp.ClientConnectionError):
            return EngineError(f"Engine failed while {doing}: {_reason(error)}")
        if self._ssh is not None and self._ssh.trouble:
            return EngineError(f"Engine at {self._named} unreachable: {self._ssh.trouble}", unreachable=True)
        if distrust := _tls_failure(error):
            return EngineError(
                f"Engine at {self._named} and we do not trust each other: {distrust}: "
                "check ca.pem, cert.pem and key.pem in DOCKER_CERT_PATH",
                unreachable=True,
                permanent=True,
            )
        if cure := self._fix(_errno(error)):
            return EngineError(
                f"Engine at {self._named} unreachable: {cure}",
                unreachable=True,
                permanent=_errno(error) == errno.EACCES,
            )
        return EngineError(f"Engine unreachable while {doing}: {_reason(error)}", unreachable=True)

    def _fix(self, number: int) -> str | None:
        """What mends this error of the operating system. Raises ConfigError when only a restart of ours does."""
        if self._ssh is not None:  # its local socket is ours alone
            return None
        path = self._url.removeprefix("unix://")
        if number == errno.ENOENT and (others := [str(each) for each in usual_sockets() if str(each) != path]):
            return f"{_FIXES[number]}: there is {' and '.join(others)}"
        if number != errno.ECONNREFUSED or path == self._url:
            return _FIXES.get(number)
        if Path(path).is_dir():
            raise ConfigError(
                f"Engine at {self._named} unreachable: "
                "it is a folder: Docker makes one where a mount's source is missing; "
                "remove it, and mount the socket's folder"
            )
        now = time.monotonic()
        self._refused_since = self._refused_since or now
        if now - self._refused_since > DEAD_MOUNT and is_mounted_by_itself(path):
            raise ConfigError(
                f"Engine at {self._named} has refused for {DEAD_MOUNT:.0f} s: the socket is mounted by itself, so "
                "it stays that of an engine before. A restart mounts the new one; better mount its folder"
            )
        return _FIXES[number]


def usual_sockets() -> list[Path]:
    """The sockets of engines in their usual places here: Docker's, this user's rootless one, and Podman's."""
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}")
    places = (
        Path(DEFAULT_HOST.removeprefix("unix://")),
        runtime / "docker.sock",
        runtime / "podman" / "podman.sock",
        Path("/run/podman/podman.sock"),
    )
    return [place for place in places if _is_socket(place)]


def _is_socket(path: Path) -> bool:
    try:
        return path.is_socket()
    except OSError:  # in a folder of somebody else
        return False


def podman_id(host: str, storage: str, *, rootless: bool) -> str:
    """An id for a Podman, of what it tells of itself, so that all who ask it agree, by whatever way they do.

    One host may have many, so each goes by where it keeps its containers, too. None inherits the id that all of a
    host once shared: under it are the nodes of the others as well, which it would take for its own that are gone.
    Two hosts of one name are not told apart: see pipeline/twins.py.
    """
    kept = hashlib.sha256(f"{'rootless' if rootless else 'root'} {storage}".encode(errors="replace"))
    return f"podman-{host}-{kept.hexdigest()[:12]}"


async def _close(docker: aiodocker.Docker) -> None:
    await docker.close()
    if docker.connector is not None:  # one that was given to it stays open
        await docker.connector.close()


def is_mounted_by_itself(path: str) -> bool:
    """Whether a socket is a mount point: it stays the old, dead one when the engine makes itself a new one."""
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()]
    return str(Path(path).resolve()) in mounts


def as_engine(engine: Engine | DockerClient, settings: Settings) -> Engine:
    """Accept what a host application has: one of ours, or its own aiodocker client."""
    return DockerEngine(settings, engine) if isinstance(engine, DockerClient) else engine


def _check_id(node_id: str) -> None:
    if not is_container_id(node_id):
        raise EngineError(f"{_line(node_id)} is no container id: the engine is not asked about it")


def _api_version(version: Mapping[str, Any]) -> str:
    """The highest API version that the engine speaks, of its answer to `GET /version`."""
    text = version.get("ApiVersion")
    if isinstance(text, str) and _API_VERSION.fullmatch(text):
        return text
    raise EngineError(f"Engine failed while {_WHO}: its ApiVersion is {_line(text)}")


async def _body(response: aiohttp.ClientResponse, call: Call, doing: str, part: str = "") -> bytes | None:
    """The body of an answer; None when it is that there is no container `part`, EngineError for what is none."""
    if response.status in call.statuses:
        return await _read(response, call.limit, doing)
    await _refused(response, doing, part)
    return None


async def _refused(response: aiohttp.ClientResponse, doing: str, part: str = "") -> None:
    """Raise EngineError for an answer that is none, save the engine's own "no such container" about `part`."""
    body = await _read(response, ERROR_LIMIT, doing)
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        told = None
    message = told.get("message") if isinstance(told, dict) else None
    why = f"{response.status} {_line(message or body.decode(errors='replace'))}"
    if response.status == HTTPStatus.NOT_FOUND:
        if part and isinstance(message, str):
            text = message.lower()
            if "no such container" in text and set(_SOME_ID.findall(text)) <= {part}:
                return
        why += ', which is not the engine\'s own "no such container"'
    elif HTTPStatus.MULTIPLE_CHOICES <= response.status < HTTPStatus.BAD_REQUEST:
        why += ", a redirect, which is not followed"
    raise EngineError(f"Engine failed while {doing}: {why}", status=response.status)


async def _read(response: aiohttp.ClientResponse, limit: int, doing: str) -> bytes:
    chunks: list[bytes] = []
    length = 0
    while chunk := await response.content.readany():
        length += len(chunk)
        if length > limit:
            response.close()
            raise EngineError(
                f"Engine failed while {doing}: its answer ({response.status}) is longer than {limit} bytes",
                status=response.status,
            )
        chunks.append(chunk)
    return b"".join(chunks)


def _decoded(body: bytes | None, kind: type[Any], doing: str) -> Any:
    try:
        answer = json.loads(body or b"")
    except (ValueError, RecursionError) as error:
        raise EngineError(f"Engine failed while {doing}: its answer is no JSON: {_reason(error)}") from None
    if not isinstance(answer, kind):  # `null` is JSON too, and must not pass for a container that is gone
        raise EngineError(f"Engine failed while {doing}: its answer is JSON, but no {kind.__name__}")
    return answer


async def _decoded_in_slices(body: bytes | None, doing: str) -> list[Any]:
    """As `_decoded` of a list, which may be megabytes: one item at a time, between which others get their turn."""
    try:
        text = (body or b"").decode()
        at = _BETWEEN_ITEMS.match(text).end()  # type: ignore[union-attr]  # it matches nothing, too
        if not text.startswith("[", at):
            raise ValueError("no list")  # noqa: TRY301 - which another function words
        items, slices = [], Slices()
        at = _BETWEEN_ITEMS.match(text, at + 1).end()  # type: ignore[union-attr]
        while not text.startswith("]", at):
            item, at = _ITEM.raw_decode(text, at)
            items.append(item)
            at = _BETWEEN_ITEMS.match(text, at).end()  # type: ignore[union-attr]
            await slices.turn()
        if text[at + 1 :].strip():
            raise ValueError("more than a list")  # noqa: TRY301
    except (ValueError, RecursionError):
        return _decoded(body, list, doing)  # type: ignore[no-any-return]
    return items


def _forwarder(url: str) -> SshForwarder:
    try:
        return SshForwarder(parse_ssh_url(url))
    except ValueError as error:
        raise ConfigError(f"EVENTWATCH_DOCKER_HOST: {mask_url(url)} is not usable: {error}") from None


def _trusting(authorities: str | None = None) -> ssl.SSLContext:
    """A context that trusts these authorities, or those that the machine trusts."""
    context = ssl.create_default_context(cafile=authorities)
    # From Python 3.13 on it is set, and refuses authorities that were made by Docker's own instructions.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def _tls_context(cert_path: str | None) -> ssl.SSLContext:
    folder = Path(cert_path or Path.home() / ".docker")
    try:
        ca, cert, key = (folder / name for name in ("ca.pem", "cert.pem", "key.pem"))
        # Of a Docker context only, as for the docker command, either will do: a certificate, or an authority.
        own = folder.parts[-4:-2] == ("contexts", "tls") and (cert.exists() or key.exists())
        context = _trusting(str(ca) if ca.exists() or not own else None)
        if cert.exists() or key.exists() or not ca.exists():
            context.load_cert_chain(str(cert), str(key))
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"DOCKER_CERT_PATH: {folder} must hold ca.pem, cert.pem and key.pem for DOCKER_TLS_VERIFY: {error}"
        ) from None
    return context


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _errno(error: BaseException) -> int:
    """The operating system's word on a failed connection, 0 when there is none."""
    told = (getattr(cause, "errno", None) for cause in _causes(error))
    return next((number for number in told if number), 0)


def _tls_failure(error: BaseException) -> str:
    """What TLS has against one of the two, nothing when it is not that. A handshake that was cut is not."""
    cut = (ssl.SSLEOFError, ssl.SSLZeroReturnError)
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, (*cut, aiohttp.ClientError)):
            return getattr(cause, "verify_message", "") or cause.reason or _reason(cause)
    return ""


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _line(text: object) -> str:
    """The engine's words, or what it sent in their place, as one short line of printable text."""
    words = " ".join((text if isinstance(text, str) else repr(text)).split())
    return "".join(letter if letter.isprintable() else "?" for letter in words[:200]) or "nothing"
