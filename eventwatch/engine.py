"""The Docker Engine, and nothing about why: the only module that talks to it.

Contract: every call has a deadline; a 404 is an answer (`found=False`), everything else that is not an answer
is an `EngineError`; the event stream ends by returning (a clean end) or by raising `EngineError`, never by
falling silent on its own. The stream is read by our own reader on a client of its own: aiodocker's
`subscribe()` hangs for ever once a stream has ended, and one long line kills it.

The calls that are made, all of them: `GET /version`, `GET /info`, `GET /events`, `GET /containers/json`,
`GET /containers/{id}/json`, `POST /containers/{id}/stop`.

Not promised: that events arrive in the order of their `timeNano`, once, or at all.
"""

from __future__ import annotations

import asyncio
import errno
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import quote

import aiodocker
import aiohttp
from aiodocker.exceptions import DockerError
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from eventwatch.errors import ConfigError, EngineError
from eventwatch.model import (
    ACTION_ALIASES,
    CONTAINER_ACTIONS,
    NETWORK_ACTIONS,
    Event,
    Observation,
    parse_container,
    parse_event,
    parse_time,
)
from eventwatch.settings import Settings

#: What a host application has if it talks to Docker itself.
DockerClient = aiodocker.Docker

#: No container has this id: asking for it tells whether asking is allowed (404) or denied (403).
NOBODY: Final = "0" * 64
DENIED: Final = HTTPStatus.FORBIDDEN

DEFAULT_HOST: Final = "unix:///var/run/docker.sock"
#: Engine 19.03. Older ones lack nothing that is asked for, but nobody tests against them any more.
MINIMUM_API: Final = (1, 40)
#: Seconds. An inspection waits for the container's lock, 5 s were measured in a burst of 30.
INSPECT_DEADLINE: Final = 30.0
CALL_DEADLINE: Final = 10.0
#: A line is its container's labels, mostly; beyond this it is skipped, not buffered.
MAX_LINE: Final = 8 * 1024 * 1024

#: Seconds of refusals after which a socket that is mounted by itself is taken for that of an engine before.
DEAD_MOUNT: Final = 120.0

#: aiodocker's status for "could not connect".
_NO_ANSWER: Final = 900

_FILTERS: Final = json.dumps(
    {"type": ["container", "network"], "event": [*CONTAINER_ACTIONS, *ACTION_ALIASES, *NETWORK_ACTIONS]}
)
_CURES: Final = {
    errno.EACCES: "permission denied: add this user to the socket's group (docker), or `group_add` in compose",
    errno.ENOENT: "no such socket: start the engine, mount its socket, or set DOCKER_HOST",
    errno.ECONNREFUSED: "nobody listens: start the engine, or set DOCKER_HOST",
}


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Who the engine is. `id` survives restarts of the engine and names the owner of a node.

    `system_time` is its wall clock when it answered, None if it did not tell.
    """

    id: str
    name: str
    version: str
    api_version: str
    system_time: datetime | None = None


class Engine(Protocol):
    """What the pipeline asks of an engine; `DockerEngine` is the real one, a replay is another."""

    async def identify(self) -> EngineInfo:
        """Ask who it is, negotiating the API version anew."""
        ...

    def events(
        self, since: int | None, on_malformed: Callable[[str], object]
    ) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """Open the event stream from `since` (ns, inclusive). Entered once the engine has accepted it."""
        ...

    async def inspect(self, node_id: str, *, as_of: int = 0) -> Observation:
        """What the engine says of a container now."""
        ...

    async def list_running(self, label: str | None = None) -> list[str]:
        """Ids of the running containers, or of those that carry `label` (`key` or `key=value`)."""
        ...

    async def stop(self, node_id: str, *, grace: float) -> None:
        """Stop a container: SIGTERM, and SIGKILL after `grace` seconds. Already stopped or gone is fine."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


class DockerEngine:
    """A Docker Engine (or Podman's Docker-compatible service) behind `settings.docker_host`.

    `client` may be an aiodocker client that the caller owns; the event stream still opens its own.
    """

    def __init__(self, settings: Settings, client: aiodocker.Docker | None = None) -> None:
        self._network = settings.node_network
        self._url = settings.docker_host or DEFAULT_HOST
        self._tls = _tls_context(settings.docker_cert_path) if settings.docker_tls_verify else None
        if self._tls and self._url.startswith("tcp://"):
            self._url = "https://" + self._url.removeprefix("tcp://")
        self._client = client
        self._retired: aiodocker.Docker | None = None
        self._owns_client = client is None
        self._refused_since: float | None = None

    def _new_client(self) -> aiodocker.Docker:
        try:
            return aiodocker.Docker(
                url=self._url,
                ssl_context=self._tls,
                timeout=aiohttp.ClientTimeout(sock_connect=CALL_DEADLINE),
            )
        except ValueError as error:
            raise ConfigError(f"EVENTWATCH_DOCKER_HOST: {self._url} is not usable: {error}") from None

    def _docker(self) -> aiodocker.Docker:
        if self._client is None:
            self._client = self._new_client()
        return self._client

    async def identify(self) -> EngineInfo:
        docker = self._docker()
        docker.api_version = "auto"
        async with self._deadline("asking the engine who it is", CALL_DEADLINE):
            version = await docker.version()
            api = tuple(int(part) for part in str(version["ApiVersion"]).split("."))
            if api < MINIMUM_API:
                raise ConfigError(
                    f"Engine at {self._url} speaks API {version['ApiVersion']}, eventwatch needs 1.40 or later: "
                    "upgrade the engine"
                )
            try:
                info = await docker.system.info()
            except DockerError as error:
                if error.status == DENIED:
                    raise ConfigError(
                        f"Engine at {self._url} denies GET /info (403), which tells the engine's id: "
                        "allow it in the socket proxy"
                    ) from None
                raise
        engine_id, name = str(info.get("ID") or ""), str(info.get("Name") or "")
        if any("Podman" in str(part.get("Name")) for part in version.get("Components") or ()):
            engine_id = f"podman-{name}"  # Podman makes up a new ID for every answer.
        if not engine_id:
            raise ConfigError(
                f"Engine at {self._url} tells no id in GET /info: nodes could not be told from others'"
            )
        return EngineInfo(
            engine_id,
            name,
            str(version.get("Version")),
            str(version["ApiVersion"]),
            parse_time(info.get("SystemTime")),
        )

    @asynccontextmanager
    async def events(
        self,
        since: int | None,
        on_malformed: Callable[[str], object],
        *,
        parse: Callable[[object], Event | None] = parse_event,
    ) -> AsyncIterator[AsyncIterator[Event]]:
        docker = self._new_client()
        params = {"filters": _FILTERS}
        if since is not None:
            params["since"] = engine_time(since)
        try:
            async with self._deadline("opening the event stream", CALL_DEADLINE):
                await docker.version()  # negotiates the API version that the URL below is made of
                response = await docker.session.get(
                    f"{docker.docker_host}/{docker.api_version}/events",
                    params=params,
                    timeout=aiohttp.ClientTimeout(total=None, sock_connect=CALL_DEADLINE),
                )
                if response.status != HTTPStatus.OK:
                    raise DockerError(response.status, (await response.text())[:200].strip())
            try:
                yield self._read_events(response, on_malformed, parse)
            finally:
                response.close()
        finally:
            await docker.close()

    async def _read_events(
        self,
        response: aiohttp.ClientResponse,
        on_malformed: Callable[[str], object],
        parse: Callable[[object], Event | None],
    ) -> AsyncIterator[Event]:
        try:
            async for line in split_lines(response.content.iter_any(), on_malformed):
                try:
                    event = parse(json.loads(line))
                except (ValueError, RecursionError) as error:
                    on_malformed(f"{error}: {line[:120]!r}")
                    continue
                if event is not None:
                    yield event
        except (aiohttp.ClientError, HttpProcessingError, OSError) as error:
            raise EngineError(f"Event stream broke: {_reason(error)}") from None

    async def inspect(self, node_id: str, *, as_of: int = 0) -> Observation:
        container = await self.container(node_id)
        if container is None:
            return Observation(node_id=node_id, found=False, time_nano=as_of)
        try:
            return parse_container(container, network=self._network, as_of=as_of)
        except (KeyError, TypeError, AttributeError) as error:
            raise EngineError(f"Engine's answer about {node_id} is no inspection: {error!r}") from None

    async def container(self, node_id: str) -> dict[str, Any] | None:
        """An inspection in the engine's own words; None when there is no such container (404)."""
        # A bare GET: under aiodocker's `show()`, a sweep costs half as much again.
        async with self._deadline(f"inspecting {node_id}", INSPECT_DEADLINE):
            docker = self._docker()
            if docker.api_version == "auto":
                await docker.version()
            path = f"{docker.docker_host}/{docker.api_version}/containers/{quote(node_id, safe='')}/json"
            async with docker.session.get(URL(path, encoded=True)) as response:
                body = await response.read()
            if response.status == HTTPStatus.NOT_FOUND:
                return None
            if response.status != HTTPStatus.OK:
                raise DockerError(response.status, body[:200].decode(errors="replace").strip())
            container = json.loads(body)
        if not isinstance(container, dict):  # `null` is JSON too, and must not pass for a 404
            raise EngineError(f"Engine's answer about {node_id} is no inspection: {container!r}")
        return container

    async def list_all(self) -> list[str]:
        """Ids of all containers, running or not."""
        async with self._deadline("listing containers", INSPECT_DEADLINE):
            return [container.id for container in await self._docker().containers.list(all=True)]

    async def list_running(self, label: str | None = None) -> list[str]:
        filters = json.dumps({"status": ["running", "paused"], **({"label": [label]} if label else {})})
        async with self._deadline("listing containers", INSPECT_DEADLINE):
            return [container.id for container in await self._docker().containers.list(filters=filters)]

    async def stop(self, node_id: str, *, grace: float) -> None:
        try:
            async with self._deadline(f"stopping {node_id}", grace + CALL_DEADLINE):
                await self._docker().containers.container(node_id).stop(t=round(grace))
        except EngineError as error:
            if error.status not in {304, 404}:
                raise

    async def close(self) -> None:
        if self._owns_client:
            await self._retire(self._client)
            await self._retire(None)

    async def _retire(self, silent: aiodocker.Docker | None) -> None:
        """Have the next call open anew: behind a half-open connection each kept one would time out in turn.

        Calls on it that are still under way may end; it is closed when the next one is retired.
        """
        if self._owns_client and silent is self._client:
            self._client, self._retired, closing = None, self._client, self._retired
            if closing is not None:
                await closing.close()

    @asynccontextmanager
    async def _deadline(self, doing: str, seconds: float) -> AsyncIterator[None]:
        """Bound one call and turn whatever it raises into one line with the cure."""
        client = self._docker()
        try:
            async with asyncio.timeout(seconds):
                yield
            self._refused_since = None
        except TimeoutError:
            await self._retire(client)
            raise EngineError(
                f"Engine at {self._url} did not answer within {seconds:.0f} s while {doing}"
            ) from None
        except (DockerError, aiohttp.ClientConnectionError) as error:
            if distrust := _distrust(error):
                raise EngineError(
                    f"Engine at {self._url} and we do not trust each other: {distrust}: "
                    "check ca.pem, cert.pem and key.pem in DOCKER_CERT_PATH",
                    unreachable=True,
                    permanent=True,
                ) from None
            if cure := self._cure(_errno(error)):
                raise EngineError(
                    f"Engine at {self._url} unreachable: {cure}",
                    unreachable=True,
                    permanent=_errno(error) == errno.EACCES,
                ) from None
            told = error.message if isinstance(error, DockerError) else _reason(error)
            status = error.status if isinstance(error, DockerError) else _NO_ANSWER
            if status == _NO_ANSWER:
                raise EngineError(f"Engine unreachable while {doing}: {told}", unreachable=True) from None
            raise EngineError(f"Engine failed while {doing}: {error}", status=status) from None
        except (aiohttp.ClientError, OSError, ValueError, KeyError, TypeError) as error:
            raise EngineError(f"Engine failed while {doing}: {_reason(error)}") from None

    def _cure(self, number: int) -> str | None:
        """What mends this error of the operating system. Raises ConfigError when only a restart of ours does."""
        path = self._url.removeprefix("unix://")
        if number != errno.ECONNREFUSED or path == self._url:
            return _CURES.get(number)
        if Path(path).is_dir():
            raise ConfigError(
                f"Engine at {self._url} unreachable: "
                "it is a folder: Docker makes one where a mount's source is missing; "
                "remove it, and mount the socket's folder"
            )
        now = time.monotonic()
        self._refused_since = self._refused_since or now
        if now - self._refused_since > DEAD_MOUNT and is_mounted_by_itself(path):
            raise ConfigError(
                f"Engine at {self._url} has refused for {DEAD_MOUNT:.0f} s: the socket is mounted by itself, so "
                "it stays that of an engine before. A restart mounts the new one; better mount its folder"
            )
        return _CURES[number]


def is_mounted_by_itself(path: str) -> bool:
    """Whether a socket is a mount point: it stays the old, dead one when the engine makes itself a new one."""
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()]
    return str(Path(path).resolve()) in mounts


def as_engine(engine: Engine | DockerClient, settings: Settings) -> Engine:
    """Accept what a host application has: one of ours, or its own aiodocker client."""
    return DockerEngine(settings, engine) if isinstance(engine, DockerClient) else engine


def engine_time(time_nano: int) -> str:
    """`SECONDS.NANOS` as the engine's `since` wants it; through a float it would lose events."""
    return "{}.{:09d}".format(*divmod(time_nano, 1_000_000_000))


async def split_lines(
    chunks: AsyncIterator[bytes], on_oversized: Callable[[str], object], *, limit: int = MAX_LINE
) -> AsyncIterator[bytes]:
    """Split a byte stream into non-empty lines; one longer than `limit` is reported and skipped.

    An unfinished last line is dropped: the stream was cut in the middle of it.
    """
    pending = bytearray()
    skipping = False
    async for chunk in chunks:
        *complete, rest = chunk.split(b"\n")
        for end in complete:
            pending += end
            if not skipping and pending.strip():
                yield bytes(pending)
            pending.clear()
            skipping = False
        pending += rest
        if len(pending) > limit:
            if not skipping:
                on_oversized(f"line longer than {limit} bytes: {bytes(pending[:120])!r}")
            skipping = True
            pending.clear()


def _tls_context(cert_path: str | None) -> ssl.SSLContext:
    folder = Path(cert_path or Path.home() / ".docker")
    try:
        context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
        context.load_cert_chain(str(folder / "cert.pem"), str(folder / "key.pem"))
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


def _distrust(error: BaseException) -> str:
    """What TLS has against one of the two, nothing when it is not that. A handshake that was cut is not."""
    cut = (ssl.SSLEOFError, ssl.SSLZeroReturnError)
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, (*cut, aiohttp.ClientError)):
            return getattr(cause, "verify_message", "") or cause.reason or _reason(cause)
    return ""


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
