"""What is asked of an engine, and what its answers may do, when the engine is anything but well-meaning."""

from __future__ import annotations

import asyncio
import gzip
import inspect as introspection
import json
import re
import secrets
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from aiodocker import Docker
from aiohttp import web

import eventwatch.engine.docker
from eventwatch.core.errors import ConfigError, EngineError
from eventwatch.core.facts import Event, nanos, parse_time
from eventwatch.engine.docker import CALLS, ERROR_LIMIT, Call, DockerEngine
from eventwatch.engine.protocol import EngineInfo, id_fix
from eventwatch.engine.wire import parse_listed
from eventwatch.settings.model import Settings
from tests.kit.certificates import make_certificates
from tests.kit.fakes import served

NODE = "a" * 64
OTHER = "b" * 64
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


def inspection(node_id: str = NODE, **state: Any) -> dict[str, Any]:
    return {"Id": node_id, "State": {"Status": "running", "StartedAt": "2026-01-01T00:00:00Z"} | state}


class FakeEngine:
    """Behaves until a test puts another answer in the place of one; notes all that it is asked."""

    def __init__(self) -> None:
        self.url = ""
        #: Method and raw path with query, as received; and each request's headers.
        self.asked: list[str] = []
        self.headers: list[Any] = []
        self.api_version = "1.41"
        self.system_time: str | None = None
        #: What `/version` and `/info` tell besides.
        self.version: dict[str, Any] = {}
        self.info: dict[str, Any] = {}
        self.answers: dict[str, Answer] = {}

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(f"{request.method} {request.raw_path}")
        self.headers.append(request.headers.copy())
        path = re.sub(r"^/v[\d.]+(?=/)", "", request.path)
        name = re.sub(r"^/containers/[^/]+/", "/containers/{id}/", path)
        name = re.sub(r"^/networks/[^/]+$", "/networks/{id}", name)
        if name in self.answers:
            return await self.answers[name](request)
        if name not in CALLERS:
            return web.json_response({"message": "page not found"}, status=404)
        await asyncio.sleep(0)  # gives way, as a real answer does
        return web.json_response(
            {
                "/version": {"Version": "1", "ApiVersion": self.api_version} | self.version,
                "/info": {"ID": "fake", "Name": "fake", "SystemTime": self.system_time} | self.info,
                "/containers/json": [{"Id": NODE}, {"Id": "../volumes"}, {"Id": None}, 7, {}],
                "/networks": [{"Name": "net"}, {"Name": 7}, 7, {}],
                "/networks/{id}": {"Containers": {NODE: {"IPv4Address": "10.0.0.2/16"}}},
                "/containers/{id}/stats": {"cpu_stats": {"cpu_usage": {"total_usage": 1}}},
                "/containers/{id}/json": inspection(path.split("/")[-2]),
            }.get(name),
            status=204 if name.endswith("/stop") else 200,
        )

    def always(self, path: str, status: int, body: bytes = b"", **headers: str) -> None:
        """Answer this path so from now on."""

        async def answer(_: web.Request) -> web.Response:
            return web.Response(
                status=status,
                body=body,
                headers={"Content-Type": "application/json"}
                | {name.replace("_", "-"): value for name, value in headers.items()},
            )

        self.answers[path] = answer

    def endless(self, path: str, status: int = 200, chunk: bytes = b"x" * 16384, **headers: str) -> None:
        """Answer this path without an end."""

        async def answer(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(
                status=status, headers={name.replace("_", "-"): value for name, value in headers.items()}
            )
            await response.prepare(request)
            with suppress(ConnectionError):
                while True:
                    await response.write(chunk)
            return response

        self.answers[path] = answer

    def engine(self, client: Docker | None = None, **settings: Any) -> DockerEngine:
        return DockerEngine(Settings(_env_file=None, docker_host=self.url, **settings), client)


@pytest.fixture
async def fake(tmp_path: Path) -> AsyncIterator[FakeEngine]:
    made = FakeEngine()
    async with served(tmp_path / "engine.sock", made.answer) as made.url:
        yield made


@pytest.fixture
async def engine(fake: FakeEngine) -> AsyncIterator[DockerEngine]:
    async with closing(fake.engine()) as made:
        yield made


@asynccontextmanager
async def closing(engine: DockerEngine) -> AsyncIterator[DockerEngine]:
    try:
        yield engine
    finally:
        await engine.close()


async def first_event(engine: DockerEngine) -> object:
    async with engine.events(None, lambda _: None) as events:
        return await anext(events, None)


#: Each call, by the path that it asks for.
CALLERS: dict[str, Callable[[DockerEngine], Coroutine[Any, Any, object]]] = {
    "/version": lambda engine: engine.identify(),
    "/info": lambda engine: engine.identify(),
    "/events": first_event,
    "/containers/json": lambda engine: engine.list_running(),
    "/containers/{id}/json": lambda engine: engine.inspect(NODE),
    "/containers/{id}/stop": lambda engine: engine.stop(NODE, grace=1),
    "/networks/{id}": lambda engine: engine.addresses(NODE),
    "/containers/{id}/stats": lambda engine: engine.usage(NODE),
    "/networks": lambda engine: engine.list_networks(),
}


def test_the_documented_requests_are_those_that_are_made() -> None:
    documented = re.findall(r"`([A-Z]+ /[^`]*)`", introspection.getdoc(eventwatch.engine.docker) or "")
    assert documented == [f"{call.method} {call.path}" for call in CALLS.values()]
    assert set(CALLERS) == {call.path for call in CALLS.values()}


async def test_every_call_is_made_of_the_table_and_asks_for_no_compression(
    fake: FakeEngine, engine: DockerEngine
) -> None:
    for call in CALLERS.values():
        await call(engine)
    expected = {f"{call.method} {call.path}" for call in CALLS.values()}
    plain = [re.sub(r"/v1\.41|\?.*", "", asked).replace(NODE, "{id}") for asked in fake.asked]
    assert set(plain) == expected
    assert {headers["Accept-Encoding"] for headers in fake.headers} == {"identity"}
    assert all(asked.startswith(("GET /v1.41/", "POST /v1.41/")) for asked in fake.asked if "version" not in asked)


@pytest.mark.parametrize(
    ("told", "address"),
    [
        ({"IPv4Address": "10.0.0.2/16", "IPv6Address": "fd00::2/64"}, "10.0.0.2"),
        ({"IPv4Address": "", "IPv6Address": "fd00::2/64"}, "fd00::2"),
        ({"IPv4Address": "10.0.0.2"}, "10.0.0.2"),
        ({"IPv4Address": 7}, ""),
        ({"IPv4Address": "\ud800"}, ""),
        ({"IPv4Address": "10.0.0.2\x1b[2J"}, ""),
        ("10.0.0.2", ""),
        (None, ""),
    ],
)
async def test_a_network_tells_an_address_or_none(
    fake: FakeEngine, engine: DockerEngine, told: object, address: str
) -> None:
    fake.always("/networks/{id}", 200, json.dumps({"Containers": {NODE: told}}).encode())
    assert (await engine.addresses(NODE)).get(NODE, "") == address
    for containers in (None, [NODE], {OTHER: told}):
        fake.always("/networks/{id}", 200, json.dumps({"Containers": containers}).encode())
        assert NODE not in await engine.addresses(NODE)


async def test_a_network_that_tells_of_very_many_is_read_no_further(
    fake: FakeEngine, engine: DockerEngine
) -> None:
    """It would hold up the loop at each start."""
    endpoint = {"EndpointID": NODE, "IPv4Address": "10.0.0.2/16"}
    fake.always(
        "/networks/{id}", 200, json.dumps({"Containers": {f"{i:064x}": endpoint for i in range(3000)}}).encode()
    )
    with pytest.raises(EngineError, match="longer than"):
        await engine.addresses(NODE)


# -- what an answer may not do ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CALLERS)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_no_redirect_is_followed(fake: FakeEngine, engine: DockerEngine, path: str, status: int) -> None:
    fake.always(path, status, Location=f"/v1.41/containers/{OTHER}/kill")
    with pytest.raises(EngineError, match="redirect") as raised:
        await CALLERS[path](engine)
    assert raised.value.status == status
    assert not [asked for asked in fake.asked if OTHER in asked]


@pytest.mark.parametrize("path", CALLERS)
@pytest.mark.parametrize("own", [True, False], ids=["own client", "a caller's"])
async def test_nothing_compressed_is_read(fake: FakeEngine, path: str, own: bool) -> None:
    fake.endless(path, chunk=gzip.compress(bytes(10_000_000)), Content_Encoding="gzip")
    async with Docker(fake.url) as client, closing(fake.engine(None if own else client)) as engine:
        with pytest.raises(EngineError, match="compressed"):
            await CALLERS[path](engine)


@pytest.mark.parametrize("path", [path for path in CALLERS if path not in {"/events", "/containers/{id}/stop"}])
async def test_an_answer_without_an_end_is_read_up_to_its_limit(
    fake: FakeEngine, engine: DockerEngine, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CALLS, "list", Call("GET", "/containers/json", 1_000_000))
    fake.endless(path)
    with pytest.raises(EngineError, match=r"longer than \d+ bytes"):
        await CALLERS[path](engine)
    fake.answers.clear()
    await CALLERS[path](engine)


@pytest.mark.parametrize("path", CALLERS)
async def test_an_error_without_an_end_is_still_that_error(
    fake: FakeEngine, engine: DockerEngine, path: str
) -> None:
    fake.endless(path, 500)
    with pytest.raises(EngineError, match=f"longer than {ERROR_LIMIT} bytes") as raised:
        await CALLERS[path](engine)
    assert raised.value.status == 500


async def test_an_inspection_of_two_megabytes_is_read(fake: FakeEngine, engine: DockerEngine) -> None:
    body = json.dumps(inspection()).encode()
    limit = CALLS["inspect"].limit
    fake.always("/containers/{id}/json", 200, body.ljust(limit))
    assert (await engine.inspect(NODE)).found
    fake.always("/containers/{id}/json", 200, body.ljust(limit + 1))
    with pytest.raises(EngineError, match="longer than"):
        await engine.inspect(NODE)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"7",
        b"<html>",
        b"{",
        b"[" * 100_000,
        b'{"Id":1e999}',
        b"\xff",
        json.dumps(inspection(OTHER)).encode(),
        json.dumps(inspection(NODE.upper())).encode(),
        json.dumps({"Id": NODE}).encode(),
        json.dumps({"Id": NODE, "State": None}).encode(),
        json.dumps({"Id": NODE, "State": {"Status": "run\x1b[31m"}}).encode(),
        json.dumps({"Id": NODE, "State": {"Status": {"$ne": 1}}}).encode(),
    ],
    ids=lambda body: body[:12].decode(errors="replace") + f" {len(body)}",
)
async def test_what_is_no_inspection_of_this_container_is_an_error(
    fake: FakeEngine, engine: DockerEngine, body: bytes
) -> None:
    fake.always("/containers/{id}/json", 200, body)
    with pytest.raises(EngineError) as raised:
        await engine.inspect(NODE)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("body", [b"null", b"{}", b"<html>", b'"' + NODE.encode() + b'"'])
async def test_what_is_no_list_is_an_error(fake: FakeEngine, engine: DockerEngine, body: bytes) -> None:
    fake.always("/containers/json", 200, body)
    with pytest.raises(EngineError):
        await engine.list_all()


async def test_lists_hold_ids_and_nothing_else(fake: FakeEngine, engine: DockerEngine) -> None:
    assert await engine.list_all() == await engine.list_running("a=b") == await engine.list_newest(3) == [NODE]
    assert fake.asked[-1] == "GET /v1.41/containers/json?all=1&limit=3"


# -- Podman's event stream -----------------------------------------------------------------------------------


@pytest.mark.parametrize("podman", [True, False])
async def test_a_podman_that_answers_before_it_listens_is_asked_since_when_and_nothing_first(
    fake: FakeEngine, engine: DockerEngine, *, podman: bool
) -> None:
    fake.version = {"Components": [{"Name": "Podman Engine" if podman else "Engine"}]}
    fake.system_time = "2026-01-01T00:00:10Z"
    fake.always("/events", 200)
    await engine.identify()
    fake.asked.clear()
    await first_event(engine)
    assert ("GET /version" in fake.asked) is not podman  # which takes it a second
    since = re.search(r"since=(\d+)\.", fake.asked[-1])
    assert (since is not None) is podman
    if since:  # by its own clock
        assert 9 <= int(since[1]) - nanos(parse_time("2026-01-01T00:00:00Z")) // 10**9 < 1000


async def test_a_stream_ends_where_podman_has_cut_its_log_once_for_each_cut(
    fake: FakeEngine, engine: DockerEngine
) -> None:
    """It leaves out what it had not read by then; who asks again is told all of it, and of the cut, too."""

    def told(cut_at: int, then: int) -> bytes:
        cut = {
            "Type": "system",
            "Action": "log-rotation",
            "Actor": {"ID": "", "Attributes": {}},
            "timeNano": cut_at,
        }
        pause = {"Type": "container", "Action": "pause", "Actor": {"ID": NODE}, "timeNano": then}
        return json.dumps(cut).encode() + b"\n" + json.dumps(pause).encode() + b"\n"

    for cut_at, then in ((5, 6), (7, 8)):
        fake.always("/events", 200, told(cut_at, then))
        with pytest.raises(EngineError, match="cut its log"):
            await first_event(engine)
        assert await first_event(engine) == Event("pause", NODE, then)


# -- which one it is ----------------------------------------------------------------------------------------


async def podman_is(fake: FakeEngine, storage: str, *, rootless: bool = False, name: str = "host") -> EngineInfo:
    """Who a Podman is that tells this of itself, with a new ID each time, as it does."""
    fake.version = {"Components": [{"Name": "Podman Engine"}]}
    fake.info = {"ID": secrets.token_hex(8), "Name": name, "DockerRootDir": storage, "Rootless": rootless}
    async with closing(fake.engine()) as engine:
        return await engine.identify()


async def test_each_podman_has_one_id_of_its_own(fake: FakeEngine) -> None:
    async def ids() -> list[str]:
        usual, home = "/var/lib/containers/storage", "/home/ann/.local/share/containers/storage"
        return [
            (await podman_is(fake, usual)).id,
            (await podman_is(fake, usual, name="other")).id,
            (await podman_is(fake, usual, rootless=True)).id,
            (await podman_is(fake, home, rootless=True)).id,
            (await podman_is(fake, home.replace("ann", "bob"), rootless=True)).id,
            (await podman_is(fake, home)).id,
        ]

    first = await ids()
    assert first == await ids()
    assert len(set(first)) == len(first)
    # Under this one are documents of all that a host has, from before they were told apart.
    assert "podman-host" not in first


@pytest.mark.parametrize(
    ("name", "unsure"), [("localhost", True), ("LocalHost.localdomain", True), ("ann", False)]
)
async def test_a_podman_whose_hosts_name_is_everybodys_says_so(
    fake: FakeEngine, name: str, *, unsure: bool
) -> None:
    info = await podman_is(fake, "/var/lib/containers/storage", name=name)
    assert (id_fix(info.id) in info.warning) is unsure


# -- gone or not --------------------------------------------------------------------------------------------


def told(message: object, **more: object) -> bytes:
    return json.dumps({"message": message, **more}).encode()


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(told(f"No such container: {NODE}"), id="docker"),
        pytest.param(
            told(
                f'no container with name or ID "{NODE}" found: no such container',
                cause="no such container",
                response=404,
            ),
            id="podman",
        ),
        pytest.param(told("No such container"), id="no-id"),
    ],
)
async def test_the_engines_own_word_is_that_it_is_gone(
    fake: FakeEngine, engine: DockerEngine, body: bytes
) -> None:
    fake.always("/containers/{id}/json", 404, body)
    fake.always("/containers/{id}/stop", 404, body)
    seen = await engine.inspect(NODE, as_of=7)
    assert (seen.found, seen.time_nano) == (False, 7)
    await engine.stop(NODE, grace=1)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(told("page not found"), id="page"),
        pytest.param(b"<html>No such container</html>", id="html"),
        pytest.param(b"", id="empty"),
        pytest.param(b"no such container", id="text"),
        pytest.param(b'["no such container"]', id="list"),
        pytest.param(told(["no such container"]), id="list-as-message"),
        pytest.param(told(f"No such container: {OTHER}"), id="another-container"),
        pytest.param(told(f"No such container: {NODE} or {OTHER}"), id="two-containers"),
        pytest.param(told(f"network {NODE} not found"), id="network"),
        pytest.param(json.dumps({"error": f"No such container: {NODE}"}).encode(), id="another-field"),
    ],
)
async def test_another_404_is_an_error(fake: FakeEngine, engine: DockerEngine, body: bytes) -> None:
    fake.always("/containers/{id}/json", 404, body)
    fake.always("/containers/{id}/stop", 404, body)
    for call in (engine.inspect(NODE), engine.stop(NODE, grace=1), engine.resolve("name")):
        with pytest.raises(EngineError, match="not the engine's own") as raised:
            await call
        assert raised.value.status == 404


@pytest.mark.parametrize("path", ["/version", "/info", "/events", "/containers/json"])
async def test_no_other_call_knows_a_container_that_is_gone(
    fake: FakeEngine, engine: DockerEngine, path: str
) -> None:
    fake.always(path, 404, told("No such container"))
    with pytest.raises(EngineError) as raised:
        await CALLERS[path](engine)
    assert raised.value.status == 404


@pytest.mark.parametrize("status", [204, 304])
async def test_a_container_that_does_not_run_any_more_is_stopped(
    fake: FakeEngine, engine: DockerEngine, status: int
) -> None:
    fake.always("/containers/{id}/stop", status)
    await engine.stop(NODE, grace=2.4)
    assert fake.asked[-1] == f"POST /v1.41/containers/{NODE}/stop?t=2"


@pytest.mark.parametrize("status", [200, 400, 403, 409, 500])
async def test_any_other_answer_to_a_stop_is_an_error(fake: FakeEngine, engine: DockerEngine, status: int) -> None:
    fake.always("/containers/{id}/stop", status, told("\x1b]0;no\x07"))
    with pytest.raises(EngineError, match=str(status)) as raised:
        await engine.stop(NODE, grace=1)
    assert raised.value.status == status
    assert str(raised.value).isprintable()


# -- what may travel in a path ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "node_id",
    [
        "",
        ".",
        "..",
        "a" * 63,
        "a" * 65,
        "A" * 64,
        "g" * 64,
        "\u0661" * 64,
        "a" * 63 + "\n",
        "a" * 64 + "\n",
        "a" * 12,
        "name",
        f"{NODE}/../{OTHER}",
        f"{NODE}?signal=KILL",
        f"{NODE}#",
        "../volumes/prune?b=",
        "../volumes/prune?b=/../../containers/name",
        "%2e%2e%2fvolumes",
        f"{NODE}/kill?x=",
    ],
)
async def test_nothing_is_asked_about_what_is_no_id(fake: FakeEngine, engine: DockerEngine, node_id: str) -> None:
    for call in (engine.inspect(node_id), engine.container(node_id), engine.stop(node_id, grace=1)):
        with pytest.raises(EngineError, match="is no container id"):
            await call
    assert fake.asked == []


@pytest.mark.parametrize("name", ["", ".", "../version", "a/b", "a?b", "a%2fb", "a b", "-a", "\u00e9", "a\n"])
async def test_nothing_is_asked_about_what_is_no_name(fake: FakeEngine, engine: DockerEngine, name: str) -> None:
    assert await engine.resolve(name) is None
    assert fake.asked == []


async def test_a_name_is_resolved_to_an_id(fake: FakeEngine, engine: DockerEngine) -> None:
    fake.always("/containers/{id}/json", 200, json.dumps(inspection()).encode())
    assert await engine.resolve("some.node_1-x") == NODE
    assert fake.asked[-1] == "GET /v1.41/containers/some.node_1-x/json"
    fake.always("/containers/{id}/json", 200, json.dumps(inspection("some.node")).encode())
    with pytest.raises(EngineError, match=r"answered about some\.node"):
        await engine.resolve("some.node_1-x")
    fake.always("/containers/{id}/json", 404, told("No such container: some.node_1-x"))
    assert await engine.resolve("some.node_1-x") is None


# -- the API version ----------------------------------------------------------------------------------------


async def test_whoever_comes_first_negotiates_for_all(fake: FakeEngine, engine: DockerEngine) -> None:
    await asyncio.gather(*(engine.inspect(NODE) for _ in range(10)))
    assert fake.asked.count("GET /version") == 1
    assert fake.asked.count(f"GET /v1.41/containers/{NODE}/json") == 10


async def test_inspections_beside_identifications_are_asked_for_in_a_negotiated_version(
    fake: FakeEngine,
) -> None:
    """A request without a version, or with another word in its place, is answered by "page not found"."""
    for delay in range(40):
        async with closing(fake.engine()) as engine:

            async def later(call: Callable[[], Awaitable[Any]], turns: int) -> Any:
                for _ in range(turns):
                    await asyncio.sleep(0)
                return await call()

            seen = [later(lambda: engine.inspect(NODE), 2 * number) for number in range(10)]
            who = [later(engine.identify, delay + 3 * number) for number in range(4)]
            answers = await asyncio.gather(*seen, *who)
        assert all(answer.found for answer in answers[:10])
    versions = {path.split("/")[1] for _, path in map(str.split, fake.asked) if path != "/version"}
    assert versions == {"v1.41"}


async def test_a_version_that_moves_gets_a_client_of_its_own(fake: FakeEngine, engine: DockerEngine) -> None:
    gate, arrived = asyncio.Event(), asyncio.Event()

    async def held(_: web.Request) -> web.Response:
        arrived.set()
        await gate.wait()
        return web.json_response(inspection())

    assert (await engine.identify()).api_version == "1.41"
    fake.answers["/containers/{id}/json"] = held
    under_way = asyncio.create_task(engine.inspect(NODE))
    await arrived.wait()
    fake.api_version = "1.99"
    assert (await engine.identify()).api_version == "1.99"
    assert fake.asked[-1] == "GET /v1.99/info"
    gate.set()
    assert (await under_way).found
    assert (await engine.inspect(NODE)).found
    await first_event(engine)
    asked = [path for path in fake.asked if "/containers/" in path or "/events" in path]
    assert [path.split("/")[1] for path in asked] == ["v1.41", "v1.99", "v1.99"]


@pytest.mark.parametrize("version", ["1.41/../../x", "v1.41", "", "1", "1.41?", "auto", None, 1.41, "\u0661.41"])
async def test_what_is_no_version_travels_nowhere(fake: FakeEngine, engine: DockerEngine, version: object) -> None:
    fake.always("/version", 200, json.dumps({"ApiVersion": version}).encode())
    for call in (engine.inspect(NODE), engine.identify(), first_event(engine)):
        with pytest.raises(EngineError, match="ApiVersion"):
            await call
    assert set(fake.asked) == {"GET /version"}


async def test_the_version_of_a_callers_client_is_kept_to_and_the_client_left_as_it_is(fake: FakeEngine) -> None:
    async with Docker(fake.url, api_version="v1.40") as client:
        engine = fake.engine(client)
        assert (await engine.identify()).api_version == "1.41"
        await engine.inspect(NODE)
        await first_event(engine)
        await engine.close()
        assert {path.split("/")[1] for path in fake.asked} == {"version", "v1.40"}
        assert (client.api_version, client.session.closed) == ("v1.40", False)


async def test_a_callers_client_that_negotiates_is_not_told_the_version(fake: FakeEngine) -> None:
    async with Docker(fake.url) as client:
        engine = fake.engine(client)
        await engine.inspect(NODE)
        fake.api_version = "1.44"
        await engine.identify()
        await engine.inspect(NODE)
        await engine.close()
        assert fake.asked[-1] == f"GET /v1.44/containers/{NODE}/json"
        assert (client.api_version, client.session.closed) == ("auto", False)


async def test_after_a_deadline_the_next_call_opens_anew(
    fake: FakeEngine, engine: DockerEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silent(_: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    await engine.inspect(NODE)
    fake.answers["/containers/{id}/json"] = silent
    monkeypatch.setattr(eventwatch.engine.docker, "INSPECT_DEADLINE", 0.05)
    with pytest.raises(EngineError, match="did not answer within"):
        await engine.inspect(NODE)
    fake.answers.clear()
    monkeypatch.undo()
    await engine.inspect(NODE)
    assert [asked for asked in fake.asked if "version" in asked] == ["GET /version"] * 2


# -- not there ----------------------------------------------------------------------------------------------


async def test_where_there_is_no_socket_that_of_a_rootless_engine_is_named(
    fake: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    async with closing(
        DockerEngine(Settings(_env_file=None, docker_host=f"unix://{tmp_path}/none.sock"))
    ) as engine:
        with pytest.raises(EngineError, match="no such socket") as before:
            await engine.identify()
        async with served(tmp_path / "docker.sock", fake.answer):
            with pytest.raises(EngineError, match="or set DOCKER_HOST: there is ") as raised:
                await engine.identify()
    assert f"{tmp_path}/docker.sock" in str(raised.value)
    assert f"{tmp_path}/docker.sock" not in str(before.value)


# -- Engine 29 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["application/json", "application/x-ndjson", "application/jsonl"])
async def test_the_events_of_api_152_are_read_to_their_clean_end(
    fake: FakeEngine, engine: DockerEngine, kind: str
) -> None:
    """Without `status`, `id` and `from`, of another type, and ended when the engine stops."""
    fake.api_version, fake.version = "1.52", {"MinAPIVersion": "1.44"}
    event = {"Type": "container", "Action": "die", "Actor": {"ID": NODE, "Attributes": {"exitCode": "0"}}}
    body = json.dumps({**event, "scope": "local", "time": 1, "timeNano": 10**9}).encode() + b"\n"
    fake.always("/events", 200, body, Content_Type=kind)
    async with engine.events(None, pytest.fail) as events:
        assert [(each.action, each.node_id) async for each in events] == [("die", NODE)]
    assert fake.asked[-1].startswith("GET /v1.52/events?")


async def test_an_inspection_and_a_row_of_api_152_say_what_older_ones_do(
    fake: FakeEngine, engine: DockerEngine
) -> None:
    """No address but those of networks, and health as a field of the list."""
    fake.api_version = "1.52"
    networks = {"Networks": {"tool-server-network": {"IPAddress": "10.0.0.2"}}}
    fake.always("/containers/{id}/json", 200, json.dumps(inspection() | {"NetworkSettings": networks}).encode())
    row = {"Id": NODE, "Names": ["/a"], "State": "running", "Status": "Up 2 seconds (healthy)"}
    health = {"Health": {"Status": "healthy", "FailingStreak": 0}}
    fake.always("/containers/json", 200, json.dumps([row | health | {"NetworkSettings": networks}]).encode())
    assert (await engine.inspect(NODE)).ip == "10.0.0.2"
    (listed,) = await engine.list_rows()
    del row["Status"]
    assert listed == parse_listed({**row, "Status": "Up 2 seconds (healthy)", "NetworkSettings": networks})


# -- the clock, TLS -----------------------------------------------------------------------------------------


async def test_a_time_that_the_engines_clock_has_not_reached_does_not_count(
    fake: FakeEngine, engine: DockerEngine
) -> None:
    ahead = inspection(StartedAt="2026-01-01T00:10:00Z", FinishedAt="2026-01-01T00:00:01Z")
    fake.always("/containers/{id}/json", 200, json.dumps(ahead).encode())
    minute = 60_000_000_000
    new_year = 1_767_225_600_000_000_000
    assert (await engine.inspect(NODE)).time_nano == new_year + 10 * minute  # nobody knows its clock yet
    fake.system_time = "2026-01-01T00:01:00Z"
    await engine.identify()
    seen = await engine.inspect(NODE)
    assert seen.time_nano == new_year + minute // 60
    assert seen.started_at is not None
    assert seen.started_at.minute == 10
    assert (await engine.inspect(NODE, as_of=new_year + 20 * minute)).time_nano == new_year + 20 * minute
    fake.system_time = "9999-12-31T23:59:59-14:00"
    assert (await engine.identify()).system_time is None
    assert (await engine.inspect(NODE)).time_nano == new_year + 10 * minute


@pytest.mark.parametrize("url", ["unix:///run/docker.sock", "ssh://host"])
def test_certificates_are_not_asked_for_where_there_is_no_tls(tmp_path: Path, url: str) -> None:
    DockerEngine(_with_tls(url, tmp_path))


@pytest.mark.parametrize("url", ["tcp://127.0.0.1:1", "https://127.0.0.1:1"])
def test_certificates_are_loaded_for_tls(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match="DOCKER_CERT_PATH"):
        DockerEngine(_with_tls(url, tmp_path))


async def test_an_engine_is_believed_over_tls_by_the_authorities_that_the_machine_trusts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read when the engine is made: those that aiohttp reads as it is imported are none, for a command."""
    make_certificates(tmp_path, "127.0.0.1")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "server.pem")
    fake = FakeEngine()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", fake.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.SockSite(runner, socket.create_server(("127.0.0.1", 0)), ssl_context=context)
        await site.start()
        fake.url = f"https://127.0.0.1:{runner.addresses[0][1]}"
        async with closing(fake.engine()) as engine:
            assert (await engine.identify()).id == "fake"
    finally:
        await runner.cleanup()


def _with_tls(url: str, folder: Path) -> Settings:
    return Settings(_env_file=None, docker_host=url, docker_tls_verify=True, docker_cert_path=str(folder))
