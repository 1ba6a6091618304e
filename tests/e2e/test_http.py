"""HTTP of a real watcher: its health check knows it, its token and TLS hold for everyone, its page still works."""

from __future__ import annotations

import asyncio
import http.server
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from eventwatch.core.errors import EventwatchError
from eventwatch.http import probe as readiness
from tests.e2e.test_embedding import environment
from tests.e2e.test_operator import ask
from tests.e2e.test_page import browser, complaints, shows, text_of
from tests.kit.certificates import make_certificates, trusting
from tests.kit.eventwatch import program, run_program
from tests.kit.mongod import free_address
from tests.kit.waiting import eventually
from tests.kit.world import World

TOKEN = "correct-horse-battery"


class Ready(http.server.BaseHTTPRequestHandler):
    """Says that it is ready, and is no eventwatch."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"[]")

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def another_program(address: str) -> Iterator[None]:
    host, _, port = address.partition(":")
    with http.server.ThreadingHTTPServer((host, int(port)), Ready) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()


async def test_a_health_check_takes_no_other_program_for_eventwatch(world: World, tmp_path: Path) -> None:
    address = free_address()
    with another_program(address):
        code, text = await ask(world, tmp_path, "healthcheck", EVENTWATCH_HTTP_LISTEN=address)
    assert code == 1
    assert text == f"eventwatch: {address.replace(':', ' port ')} is held by another program than eventwatch\n"


@pytest.mark.parametrize(
    "other",
    [{"EVENTWATCH_MONGO_DATABASE": "another"}, {"EVENTWATCH_DOCKER_HOST": "unix:///another.sock"}],
    ids=["database", "engine"],
)
async def test_a_health_check_takes_no_other_eventwatch_for_ours(
    world: World, tmp_path: Path, other: dict[str, str]
) -> None:
    address = free_address()
    async with world.watching(http_listen=address):
        code, text = await ask(world, tmp_path, "healthcheck", EVENTWATCH_HTTP_LISTEN=address, **other)
    assert code == 1
    assert f"is held by another eventwatch: pid {os.getpid()}, " in text
    assert text.count("\n") == 1


async def test_a_health_check_beside_its_eventwatch_needs_the_standard_library_alone(
    world: World, tmp_path: Path
) -> None:
    env, here = environment(world, EVENTWATCH_HTTP_LISTEN=free_address()), tmp_path / "here"
    here.mkdir()
    check = (
        "import sys; sys.argv[1:] = ['healthcheck']; from eventwatch.__main__ import main; main();"
        "print({'asyncio', 'http.client', 'pydantic', 'ssl', 'typing'} & sys.modules.keys())"
    )
    nearby = "from eventwatch.http.nearby import ask_nearby; print(ask_nearby())"

    async def said(script: str, cwd: Path = here, **more: str) -> str:
        return (await run_program("-c", script, env=env | more, cwd=cwd))[1]

    assert await said(nearby) == "None\n"
    async with program("-m", "eventwatch", "run", env=env, cwd=here) as running:
        await running.says("Nodes status checker started.", within=60)

        async def ready() -> bool:
            return await said(check) == "ready\nset()\n"

        await eventually(ready, 60)
        # What other settings describe is another one, which the whole command tells.
        assert await said(nearby, EVENTWATCH_MONGO_DATABASE="another") == "None\n"
        assert await said(nearby, tmp_path) == "None\n"
        # Which of two is meant is not certain, even if it is the same to the settings.
        async with program("-m", "eventwatch", "run", env=env, cwd=here) as second:
            await second.says("is in use", within=60)
            assert await said(nearby) == "ready\n"
            await running.kill()
            await second.says("Status page on", within=60)
            await eventually(ready, 60)


def listening(uid: int, address: str, port: int) -> str:
    """A row of /proc/net/tcp below its heading."""
    return (
        f"heading\n   0: {address}:{port:04X} 00000000:0000 0A 00000000:00000000 00:00000000 00000000 {uid} 0 1\n"
    )


@pytest.mark.parametrize(
    ("uid", "at", "refused"),
    [
        (65534, "0100007F", True),
        (65534, "00000000", True),
        (65534, "0200007F", False),
        (0, "0100007F", False),
        (1000, "0100007F", False),
    ],
)
def test_what_another_user_listens_with_is_not_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uid: int, at: str, refused: bool
) -> None:
    address = free_address()
    table = tmp_path / "tcp"
    table.write_text(listening(uid, at, int(address.partition(":")[2])))
    monkeypatch.setattr(readiness, "_TABLES", (str(table), str(tmp_path / "none")))
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    with another_program(address), pytest.raises(EventwatchError) as caught:
        readiness.ask_readiness("127.0.0.1", int(address.partition(":")[2]), watched=("", "", ""))
    assert (f"of another user (uid {uid})" in str(caught.value)) is refused


async def test_with_token_and_tls_a_health_check_works_and_sends_no_token(world: World, tmp_path: Path) -> None:
    make_certificates(tmp_path, "127.0.0.1")
    (tmp_path / "token").write_text(TOKEN + "\n")
    files = {
        "http_token_file": str(tmp_path / "token"),
        "http_tls_cert_file": str(tmp_path / "server.crt"),
        "http_tls_key_file": str(tmp_path / "server.key"),
    }
    address = free_address()
    variables = {f"EVENTWATCH_{name.upper()}": file for name, file in files.items()}
    trusted = trusting(tmp_path)
    async with world.watching(http_listen=address, **files):
        code, text = await ask(world, tmp_path, "healthcheck", EVENTWATCH_HTTP_LISTEN=address, **variables)
        assert (code, text) == (0, "ready\n")
        async with httpx.AsyncClient(base_url=f"https://{address}", verify=trusted) as client:
            assert (await client.get("/readyz")).status_code == 200
            assert (await client.get("/api/nodes")).status_code == 401
            assert (await client.get("/api/nodes", headers={"Authorization": f"Bearer {TOKEN}"})).json() == []
        (tmp_path / "server.crt").write_text((tmp_path / "cert.pem").read_text())
        code, text = await ask(world, tmp_path, "healthcheck", EVENTWATCH_HTTP_LISTEN=address, **variables)
        assert code == 1
        assert "shows another certificate than" in text


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"TOKEN_FILE": "nowhere"}, "EVENTWATCH_HTTP_TOKEN_FILE: nowhere cannot be read, No such file"),
        ({"TOKEN_FILE": "empty"}, "EVENTWATCH_HTTP_TOKEN_FILE: empty is empty"),
        ({"TLS_KEY_FILE": "empty"}, "EVENTWATCH_HTTP_TLS_KEY_FILE: needs EVENTWATCH_HTTP_TLS_CERT_FILE"),
        ({"TLS_CERT_FILE": "empty"}, "EVENTWATCH_HTTP_TLS_KEY_FILE: must be set when EVENTWATCH_HTTP_TLS_CERT"),
        ({"ALLOWED_HOSTS": "http://sidecar"}, "EVENTWATCH_HTTP_ALLOWED_HOSTS: must be host names without port"),
    ],
)
async def test_wrong_access_settings_end_a_run_with_2_and_one_line(
    world: World, tmp_path: Path, variables: dict[str, str], said: str
) -> None:
    (tmp_path / "empty").touch()
    more = {f"EVENTWATCH_HTTP_{name}": value for name, value in variables.items()}
    code, text = await ask(world, tmp_path, "run", EVENTWATCH_HTTP_LISTEN=free_address(), **more)
    assert code == 2
    assert text.startswith(f"eventwatch: {said}")
    assert text.count("\n") == 1


async def test_the_page_works_with_the_token_as_password_and_over_several_pages_of_nodes(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eventwatch.http.server.PAGE", 2)
    (tmp_path / "token").write_text(TOKEN)
    names = ("first", "second", "third", "fourth", "fifth")
    started = [await world.start(name) for name in names]
    address = free_address()
    async with browser() as driver, world.watching(http_listen=address, http_token_file=str(tmp_path / "token")):
        await asyncio.to_thread(driver.get, f"http://someone:{TOKEN}@{address}/")
        for node in started:
            await shows(driver, node.id[:12], "running")
        await started[0].kill()
        await shows(driver, started[0].id[:12], "exited")
        await eventually(lambda: text_of(driver, "readiness").startswith("Ready"))
        # The row may come with the next look at all nodes, before the change itself.
        await eventually(lambda: "running → exited" in text_of(driver, "changes"))
        assert complaints(driver) == []


async def test_a_name_is_served_once_it_is_allowed(world: World) -> None:
    address = free_address()
    names = "Sidecar, eventwatch"
    async with (
        world.watching(http_listen=address, http_allowed_hosts=names),
        httpx.AsyncClient(base_url=f"http://{address}") as client,
    ):
        for host, status in (("sidecar:9471", 200), ("eventwatch", 200), ("other", 421)):
            assert (await client.get("/api/nodes", headers={"Host": host})).status_code == status


async def test_a_standby_shows_a_node_by_the_beginning_of_its_id_too(world: World, tmp_path: Path) -> None:
    node, address = await world.start("one"), free_address()
    env = environment(world, EVENTWATCH_HTTP_LISTEN=address)
    async with (
        world.watching(),
        program("-m", "eventwatch", "run", env=env, cwd=tmp_path) as standby,
        httpx.AsyncClient(base_url=f"http://{address}") as client,
    ):
        await standby.says("Standing by", within=60)
        for asked in (node.id, node.id[:12]):
            assert (await client.get(f"/api/nodes/{asked}")).json()["status"] == await world.status(node)
        nobodys = node.id[:11] + ("1" if node.id[11] == "0" else "0")
        assert (await client.get(f"/api/nodes/{nobodys}")).status_code == 404
