"""An engine on ssh://: the real ssh, sshd and `docker system dial-stdio`, on this machine."""

from __future__ import annotations

import asyncio
import stat
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from eventwatch.core.errors import EngineError
from eventwatch.engine.docker import NOBODY, DockerEngine
from eventwatch.settings.model import Settings
from tests.kit.eventwatch import run_program
from tests.kit.nodes import Node
from tests.kit.processes import SYSTEM_PATH, our_environment, processes_under
from tests.kit.ssh import PrivateSshd
from tests.kit.waiting import eventually
from tests.kit.world import World

AT_ONCE = 40


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def sshd(docker_url: str) -> AsyncIterator[PrivateSshd]:
    async with PrivateSshd(DOCKER_HOST=docker_url) as server:
        yield server


@pytest.fixture(autouse=True)
def _our_ssh(sshd: PrivateSshd, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", sshd.path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@asynccontextmanager
async def closing(url: str) -> AsyncIterator[DockerEngine]:
    engine = DockerEngine(Settings(_env_file=None, docker_host=url))
    try:
        yield engine
    finally:
        await engine.close()


def clients(sshd: PrivateSshd) -> list[int]:
    """Every ssh that runs with the settings of this server's clients."""
    return [pid for pid, command in processes_under(sshd.folder).items() if command.startswith("/usr/bin/ssh ")]


def sockets(folder: Path) -> list[Path]:
    return list(folder.glob("eventwatch-ssh-*"))


async def gone(world: World, node: Node) -> bool:
    return await world.document(node) is None


async def test_documents_are_kept_true_over_ssh_through_a_cut_line(world: World, sshd: PrivateSshd) -> None:
    node = await world.start("a")
    async with world.watching(docker_host=sshd.url):
        await world.becomes_true()
        await node.kill()
        await world.becomes_true()
        await sshd.stop()
        await node.start()
        await sshd.start()
        await world.becomes_true()
        await node.remove()
        await eventually(lambda: gone(world, node))
    assert not clients(sshd)


async def test_many_calls_at_once_share_few_processes_and_nothing_is_left(
    sshd: PrivateSshd, docker_url: str, tmp_path: Path
) -> None:
    async with closing(sshd.url) as engine, closing(docker_url) as direct:
        assert (await engine.identify()).id == (await direct.identify()).id
        most = 0

        async def count() -> None:
            nonlocal most
            while True:
                most = max(most, len(clients(sshd)))
                await asyncio.sleep(0.02)

        counting = asyncio.create_task(count())
        seen = await asyncio.gather(*(engine.inspect(NOBODY) for _ in range(AT_ONCE)))
        counting.cancel()
        assert not any(each.found for each in seen)
        assert 1 < most < AT_ONCE
        (folder,) = sockets(tmp_path)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not clients(sshd)
    assert not sockets(tmp_path)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("no host key", "Host key verification failed.: none is known"),
        ("another key", ": ssh needs a key for it"),
        ("no docker", "docker: command not found: install docker on that host"),
        ("no engine", "nowhere"),
        ("nobody listens", "Connection refused"),
    ],
)
async def test_what_keeps_ssh_from_the_engine_is_told_in_one_line_and_mended_without_a_restart(
    sshd: PrivateSshd, fault: str, told: str
) -> None:
    url = sshd.url + ("/nowhere" if fault == "no engine" else "")
    known, allowed = sshd.known_hosts.read_text(), sshd.authorized_keys.read_text()
    async with closing(url) as engine:
        match fault:
            case "no host key":
                sshd.known_hosts.write_text("")
            case "another key":
                sshd.authorized_keys.write_text("")
            case "no docker":
                await sshd.stop()
                await sshd.start(PATH="/nowhere")
            case "nobody listens":
                await sshd.stop()
        try:
            for _ in range(2):
                with pytest.raises(EngineError) as raised:
                    await engine.identify()
                assert str(raised.value).startswith(f"Engine at {url} unreachable: ")
                assert told in str(raised.value)
                assert "\n" not in str(raised.value)
                assert raised.value.unreachable
        finally:
            sshd.known_hosts.write_text(known)
            sshd.authorized_keys.write_text(allowed)
            if fault in {"no docker", "nobody listens"}:
                await sshd.stop()
                await sshd.start(PATH=SYSTEM_PATH)
        if fault != "no engine":
            assert (await engine.identify()).id
    assert not clients(sshd)


async def test_the_commands_reach_an_engine_over_ssh(sshd: PrivateSshd, world: World, tmp_path: Path) -> None:
    env = our_environment(
        DOCKER_HOST=sshd.url,
        EVENTWATCH_MONGO_URL=world.mongo_url,
        EVENTWATCH_MONGO_DATABASE=world.database_name,
        EVENTWATCH_NODE_NETWORK=world.nodes.network,
        PATH=sshd.path,
    )
    node = await world.start("a")
    code, said = await run_program("-m", "eventwatch", "sweep", env=env, cwd=tmp_path)
    assert code == 0, said
    assert await world.says(node, status="running")
