"""What an ssh:// URL may be, and that an `ssh` that does anything but its job harms nobody."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from pathlib import Path

import pytest

import eventwatch.engine.docker
import eventwatch.engine.ssh
from eventwatch.core.errors import ConfigError, EngineError
from eventwatch.engine.docker import DockerEngine
from eventwatch.engine.ssh import SshForwarder, parse_ssh_url
from eventwatch.settings.model import Settings
from tests.kit.processes import processes_under
from tests.kit.waiting import eventually


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ssh://host", "-- host docker system dial-stdio"),
        ("ssh://host/", "-- host docker system dial-stdio"),
        ("ssh://ann@host:2222", "-l ann -p 2222 -- host docker system dial-stdio"),
        ("ssh://[fe80::1%eth0]:22", "-p 22 -- fe80::1%eth0 docker system dial-stdio"),
        (
            "ssh://host/run/user/7/docker.sock",
            "-- host docker --host unix:///run/user/7/docker.sock system dial-stdio",
        ),
    ],
)
def test_a_url_is_read_as_docker_reads_it(url: str, words: str) -> None:
    assert " ".join(parse_ssh_url(url).command()).endswith(f"ControlMaster=no {words}")


@pytest.mark.parametrize(
    "url",
    [
        "ssh://-oProxyCommand=reboot",
        "ssh://-l@host",
        "ssh://ann@-host",
        "ssh://ann:secret@host",
        "ssh://",
        "ssh://ho st",
        "ssh://host;reboot",
        "ssh://$(reboot)@host",
        "ssh://host/run/x;reboot",
        "ssh://host/a b",
        "ssh://host:port",
        "ssh://host?a=b",
        "ssh://host#a",
        "ssh://a@b@host",
        "ssh://h\nx",
        "ssh://host/%2e",
    ],
)
def test_what_might_be_an_option_or_reach_a_shell_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is not usable: it must be ssh://") as raised:
        DockerEngine(Settings.model_construct(docker_host=url))
    assert "secret" not in str(raised.value)


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DockerEngine:
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(eventwatch.engine.ssh, "ENDING", 0.2)
    return DockerEngine(Settings(_env_file=None, docker_host="ssh://host"))


def ssh_is(folder: Path, script: str) -> None:
    program = folder / "bin" / "ssh"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def sockets(folder: Path) -> list[Path]:
    return list(folder.glob("eventwatch-ssh-*"))


async def test_an_ssh_that_neither_speaks_nor_ends_is_ended(
    engine: DockerEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssh_is(tmp_path, f"trap '' TERM\nwhile sleep 0.1; do echo {tmp_path}/bin/loop >{tmp_path}/ran; done")
    monkeypatch.setattr(eventwatch.engine.docker, "CALL_DEADLINE", 0.5)
    with pytest.raises(EngineError, match="did not answer within"):
        await engine.identify()
    # Its connection is closed with the deadline, and so it ends before the engine is closed.
    await eventually(lambda: not processes_under(tmp_path / "bin"), 20)
    with pytest.raises(EngineError):
        await engine.identify()
    await engine.close()
    assert not processes_under(tmp_path / "bin")
    assert not sockets(tmp_path)


async def test_what_ssh_says_is_one_clean_line_and_it_is_given_no_secret(
    engine: DockerEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVENTWATCH_MONGO_URL", "mongodb://ann:Tr0ub4dor@host")
    monkeypatch.setenv("DB_PASSWORD", "Tr0ub4dor")
    flood = "yes noise | head -c 1000000 >&2"
    ssh_is(tmp_path, f"env >{tmp_path}/env\n{flood}\nprintf '\\n\\033[31mno\\n' >&2\nexit 255")
    with pytest.raises(EngineError) as raised:
        await engine.identify()
    await engine.close()
    assert str(raised.value) == "Engine at ssh://host unreachable: \\x1b[31mno"
    assert "Tr0ub4dor" not in (tmp_path / "env").read_text()


async def test_no_more_processes_run_than_may(
    engine: DockerEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssh_is(tmp_path, "exec sleep 600")
    monkeypatch.setattr(eventwatch.engine.ssh, "MOST_PROCESSES", 0)
    with pytest.raises(EngineError, match="0 connections over ssh are open, and none ends"):
        await engine.identify()
    await engine.close()


async def test_who_has_given_up_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for a login that is not needed any more would fail for those before it."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(eventwatch.engine.ssh, "STARTING", 600.0)
    ssh_is(tmp_path, f"echo one >>{tmp_path}/started\ncat >/dev/null")
    forwarder = SshForwarder(parse_ssh_url("ssh://host"))
    for _ in range(20):
        _, writer = await asyncio.open_unix_connection(await forwarder.socket())
        writer.close()
    _, writer = await asyncio.open_unix_connection(await forwarder.socket())
    await eventually((tmp_path / "started").exists, 20)
    await eventually(lambda: len(forwarder._bridges) == 1 and not forwarder._endings, 20)
    writer.close()
    await eventually(lambda: not forwarder._bridges and not forwarder._endings, 20)
    await forwarder.close()


async def robbed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[SshForwarder, Path]:
    """One whose socket somebody has removed with its folder, and where that was."""
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    ssh_is(folder, "cat >/dev/null")
    monkeypatch.setenv("PATH", f"{folder}/bin:/usr/bin:/bin")
    forwarder = SshForwarder(parse_ssh_url("ssh://host"))
    path = await forwarder.socket()
    shutil.rmtree(path.parent)
    return forwarder, path


async def test_a_socket_that_somebody_removed_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwarder, path = await robbed(tmp_path, monkeypatch)
    assert await forwarder.socket() == path
    assert path.is_socket()
    await forwarder.close()
    assert not sockets(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to somebody else")
async def test_a_folder_that_somebody_else_put_in_its_place_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwarder, path = await robbed(tmp_path, monkeypatch)
    path.parent.mkdir()
    path.touch()
    os.chown(path.parent, 65534, 65534)
    elsewhere = await forwarder.socket()
    assert elsewhere.parent != path.parent
    assert elsewhere.is_socket()
    await forwarder.close()
    assert sockets(tmp_path) == [path.parent]
