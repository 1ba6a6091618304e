"""The engine of the Docker context that is current, however odd its files are."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eventwatch.core.errors import ConfigError
from eventwatch.engine.docker import DockerEngine
from eventwatch.settings.docker_context import ContextError, current_context
from eventwatch.settings.model import Settings, load_settings
from tests.kit.certificates import make_certificates


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of Docker's settings, which the environment names and nothing else of them."""
    for name in [name for name in os.environ if name.startswith(("EVENTWATCH_", "DOCKER_", "DB_"))]:
        monkeypatch.delenv(name)
    folder = tmp_path / "docker"
    folder.mkdir()
    monkeypatch.setenv("DOCKER_CONFIG", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def choose(home: Path, name: Any) -> None:
    (home / "config.json").write_text(json.dumps({"auths": {}, "currentContext": name}))


def digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def make(home: Path, name: str, host: str, **endpoint: Any) -> Path:
    """A context as `docker context create` writes it; its meta.json."""
    meta = home / "contexts" / "meta" / digest(name) / "meta.json"
    meta.parent.mkdir(parents=True)
    meta.write_text(
        json.dumps({"Name": name, "Metadata": {}, "Endpoints": {"docker": {"Host": host, **endpoint}}})
    )
    return meta


def certificates(home: Path, name: str) -> Path:
    folder = home / "contexts" / "tls" / digest(name) / "docker"
    folder.mkdir(parents=True)
    (folder / "ca.pem").touch()
    return folder


def problem() -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(None)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


def test_the_order_is_that_of_the_docker_command(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def host() -> str | None:
        return load_settings(None).docker_host

    for name in ("chosen", "named"):
        make(home, name, f"unix:///run/{name}.sock")
    assert host() is None
    choose(home, "chosen")
    assert host() == "unix:///run/chosen.sock"
    monkeypatch.setenv("DOCKER_CONTEXT", "named")
    assert host() == "unix:///run/named.sock"
    monkeypatch.setenv("DOCKER_CONTEXT", "default")
    assert host() is None
    monkeypatch.setenv("DOCKER_CONTEXT", "named")
    monkeypatch.setenv("DOCKER_HOST", "unix:///run/env.sock")
    assert host() == "unix:///run/env.sock"
    monkeypatch.setenv("EVENTWATCH_DOCKER_HOST", "unix:///run/ours.sock")
    assert host() == "unix:///run/ours.sock"
    assert Settings(docker_host="unix:///run/given.sock").docker_host == "unix:///run/given.sock"
    monkeypatch.delenv("EVENTWATCH_DOCKER_HOST")
    monkeypatch.delenv("DOCKER_HOST")
    assert Settings(docker_host="unix:///run/given.sock").docker_host == "unix:///run/given.sock"


def test_without_docker_config_it_is_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DOCKER_CONFIG")
    monkeypatch.setenv("HOME", str(tmp_path))
    home = tmp_path / ".docker"
    make(home, "one", "unix:///run/one.sock")
    choose(home, "one")
    assert load_settings(None).docker_host == "unix:///run/one.sock"


@pytest.mark.parametrize("text", ["{}", '{"currentContext": ""}', '{"currentContext": "default"}'])
def test_no_context_is_the_local_engine(home: Path, text: str) -> None:
    (home / "config.json").write_text(text)
    assert load_settings(None).docker_host is None


def test_a_context_without_a_host_is_dockers_default(home: Path) -> None:
    make(home, "empty", "")
    choose(home, "empty")
    assert load_settings(None).docker_host is None


def test_its_certificates_are_used_and_those_of_the_environment_are_not(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(home, "remote", "tcp://engine:2376")
    choose(home, "remote")
    monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    monkeypatch.setenv("DOCKER_CERT_PATH", "/elsewhere")
    settings = load_settings(None)
    assert (settings.docker_host, settings.docker_tls_verify, settings.docker_cert_path) == (
        "tcp://engine:2376",
        False,
        None,
    )
    folder = certificates(home, "remote")
    settings = load_settings(None)
    assert (settings.docker_tls_verify, settings.docker_cert_path) == (True, str(folder))


def test_an_authority_or_a_certificate_of_our_own_is_enough(home: Path, tmp_path: Path) -> None:
    make(home, "remote", "tcp://127.0.0.1:2376")
    choose(home, "remote")
    folder = certificates(home, "remote")
    made = tmp_path / "made"
    made.mkdir()
    make_certificates(made, "127.0.0.1")
    with pytest.raises(ConfigError, match=r"must hold ca\.pem, cert\.pem and key\.pem"):
        DockerEngine(load_settings(None))  # an empty ca.pem
    (folder / "ca.pem").write_bytes((made / "ca.pem").read_bytes())
    DockerEngine(load_settings(None))
    (folder / "cert.pem").write_bytes((made / "cert.pem").read_bytes())
    with pytest.raises(ConfigError, match=r"must hold ca\.pem, cert\.pem and key\.pem"):
        DockerEngine(load_settings(None))  # without its key
    (folder / "key.pem").write_bytes((made / "key.pem").read_bytes())
    (folder / "ca.pem").unlink()
    DockerEngine(load_settings(None))


def test_a_folder_of_certificates_without_an_authority_trusts_nobody(tmp_path: Path) -> None:
    make_certificates(tmp_path, "127.0.0.1")
    (tmp_path / "ca.pem").unlink()
    settings = Settings(docker_host="tcp://127.0.0.1:2376", docker_tls_verify=True, docker_cert_path=str(tmp_path))
    with pytest.raises(ConfigError, match=r"must hold ca\.pem, cert\.pem and key\.pem"):
        DockerEngine(settings)


def test_an_engine_that_is_not_verified_is_refused(home: Path) -> None:
    meta = make(home, "loose", "tcp://engine:2376", SkipTLSVerify=True)
    choose(home, "loose")
    said = problem()
    assert said.startswith("DOCKER_CONFIG: Docker context loose skips the verification of its engine")
    assert said.endswith(f"({meta})")


async def test_over_ssh_one_line_says_what_is_missing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(home, "far", "ssh://root@engine")
    choose(home, "far")
    engine = DockerEngine(load_settings(None))
    monkeypatch.setenv("PATH", str(home))
    with pytest.raises(ConfigError, match=r"ssh:// needs the ssh command, which is not on PATH"):
        await engine.identify()


def test_a_context_that_is_not_there_is_named_with_the_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(home, "gone")
    assert problem().startswith(
        "DOCKER_CONFIG: there is no Docker context gone: choose another by `docker context"
    )
    monkeypatch.setenv("DOCKER_CONTEXT", "../../../etc\x1b[2J" + "x" * 500)
    said = problem()
    assert said.startswith("DOCKER_CONTEXT: there is no Docker context ../../../etc\\x1b[2Jxxx")
    assert said.isprintable()


@pytest.mark.parametrize("which", ["config", "meta"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("text", "is no JSON"),
        ("deep", "is no JSON"),
        ("list", "an object is missing"),
        ("folder", "is no file"),
        ("pipe", "is no file"),
        ("device", "is no file"),
        ("huge", "is longer than"),
        ("denied", "cannot be read, Permission denied"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_at_once(
    home: Path, which: str, kind: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = make(home, "one", "unix:///run/one.sock")
    choose(home, "one")
    file = home / "config.json" if which == "config" else meta
    file.unlink()
    spoil: dict[str, Callable[[], object]] = {
        "text": lambda: file.write_bytes(b"\xff\x00{"),
        "deep": lambda: file.write_text("[" * 200_000),
        "list": lambda: file.write_text("[]"),
        "folder": file.mkdir,
        "pipe": lambda: os.mkfifo(file),
        "device": lambda: file.symlink_to("/dev/zero"),
        "huge": lambda: file.write_bytes(bytes(100 * 1024 * 1024)),
        "denied": file.touch,
    }
    spoil[kind]()
    real = os.open

    def opened(path: Path, *more: Any, **options: Any) -> int:
        if kind == "denied" and path == file:  # the user of these tests may read everything
            raise PermissionError(13, "Permission denied")
        return real(path, *more, **options)

    monkeypatch.setattr(os, "open", opened)
    said = problem()
    assert said.startswith("DOCKER_CONFIG: ")
    assert words in said
    assert said.endswith(f"({file})")


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"Endpoints": null}',
        '{"Endpoints": []}',
        '{"Endpoints": {}}',
        '{"Endpoints": {"docker": "unix:///x"}}',
        '{"Endpoints": {"docker": {"Host": 5}}}',
        '{"Endpoints": {"docker": {"Host": "npipe:////./pipe/x"}}}',
        '{"Endpoints": {"docker": {"Host": "unix://a b\\u001b[2J"}}}',
    ],
)
def test_a_context_that_names_no_engine_is_one_line(home: Path, text: str) -> None:
    make(home, "odd", "").write_text(text)
    choose(home, "odd")
    assert problem().isprintable()


@pytest.mark.parametrize("name", [5, ["one"], {"name": "one"}, True])
def test_a_current_context_that_is_no_name_is_one_line(home: Path, name: Any) -> None:
    choose(home, name)
    assert "a currentContext that is no name" in problem()


def test_a_user_without_a_home_has_no_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("DOCKER_CONFIG")
    monkeypatch.setattr(Path, "home", homeless)
    (tmp_path / "config.json").write_text("that of somebody else, where this was started")
    assert load_settings(None).docker_host is None
    monkeypatch.setenv("DOCKER_CONTEXT", "default")
    assert load_settings(None).docker_host is None
    monkeypatch.setenv("DOCKER_CONTEXT", "one")
    assert problem() == "DOCKER_CONTEXT: there is no home with Docker context one: set DOCKER_CONFIG"


def test_a_home_that_nobody_may_look_into_has_no_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a systemd unit with ProtectHome; but one that was named has to be readable."""

    def denied(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    monkeypatch.setattr(Path, "stat", denied)
    assert current_context() is None
    with pytest.raises(ContextError, match="cannot be read, Permission denied"):
        current_context(folder=str(tmp_path))
