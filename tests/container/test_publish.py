"""`make publish`, to a registry (Debian's docker-registry) and an index (pypiserver) of the test's own."""

from __future__ import annotations

import json
import os
import sys
import tomllib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from hashlib import sha256
from pathlib import Path

import pytest

from tests.container.sidecars import fetch
from tests.kit.eventwatch import started
from tests.kit.images import PYTHON, RELEASE, TOOLS, ensure_base, fetched
from tests.kit.mongod import free_port
from tests.kit.processes import ROOT, run, system_environment
from tests.kit.waiting import eventually

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
#: Seconds for a build of everything on a slow machine.
LONGEST = 840.0


@contextmanager
def registry(folder: Path) -> Iterator[str]:
    """Its address, which Docker takes without TLS as it is on loopback."""
    program, address = fetched("registry", RELEASE, "docker-registry") / "usr/bin/docker-registry", free_port()
    storage = {"filesystem": {"rootdirectory": str(folder / "images")}}
    config = {"version": "0.1", "storage": storage, "http": {"addr": f"127.0.0.1:{address}"}}
    (folder / "registry.yaml").write_text(json.dumps(config))  # JSON is YAML
    with closing(started(program, "serve", folder / "registry.yaml", env=os.environ, cwd=folder)):
        yield f"127.0.0.1:{address}"


@contextmanager
def index(folder: Path) -> Iterator[str]:
    packages, port = folder / "packages", free_port()
    packages.mkdir()
    command = (sys.executable, "-m", "pypiserver", "run", "-i", "127.0.0.1", "-p", str(port), "-a", ".", "-P", ".")
    with closing(started(*command, packages, env=os.environ, cwd=folder)):
        yield f"http://127.0.0.1:{port}"


@pytest.mark.timeout(900)
async def test_one_command_builds_tries_and_uploads_a_version_once(tmp_path: Path) -> None:
    ensure_base()
    with registry(tmp_path) as images, index(tmp_path) as packages:
        await eventually(lambda: answers(f"http://{images}/v2/"), 30)
        await eventually(lambda: answers(f"{packages}/"), 30)
        name, dist = f"{images}/eventwatch", tmp_path / "dist"
        env = {
            "BUILD_IMAGE": TOOLS,
            "RUNTIME_IMAGE": PYTHON,
            "BUILD_OPTIONS": "--network host",
            "DOCKER_BUILDKIT": "0",
            "DIST": str(dist),
            "DIRTY": "yes",
            "PYTHON": sys.executable,
            "TWINE_USERNAME": "anybody",
            "TWINE_PASSWORD": "anything",
        }
        command = ("make", "--no-print-directory", "publish", f"IMAGE={name}", f"INDEX={packages}/")
        try:
            done = run(*command, env=system_environment(**env), within=LONGEST, check=False)
            assert done.code == 0, done.output
            wheel, sdist = f"eventwatch-{VERSION}-py3-none-any.whl", f"eventwatch-{VERSION}.tar.gz"
            for file in (wheel, sdist):
                assert sha256((tmp_path / "packages" / file).read_bytes()).digest() == digest(dist / file)
            assert await tags(images) == [VERSION]
            assert f"{name}@sha256:" in done.stdout.splitlines()[-1]
            # What is there already is left as it is.
            again = run(*command, env=system_environment(**env), check=False)
            assert (again.code, f"error: {dist} is there already" in again.output) == (2, True)
        finally:
            run("docker", "rmi", "-f", f"{name}:{VERSION}", check=False)


def digest(file: Path) -> bytes:
    return sha256(file.read_bytes()).digest()


async def answers(url: str) -> bool:
    return (await fetch(url))[0] == 200


async def tags(address: str) -> list[str]:
    return list(json.loads((await fetch(f"http://{address}/v2/eventwatch/tags/list"))[1])["tags"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["INDEX=https://index.example/"], "say where to: make publish IMAGE=REGISTRY/NAME INDEX=URL"),
        (["IMAGE=a/b:1", "INDEX=https://index.example/"], "IMAGE is without a tag, which is the version: a/b:1"),
    ],
)
def test_without_a_place_nothing_is_built(words: list[str], told: str, tmp_path: Path) -> None:
    done = run(
        "make",
        "--no-print-directory",
        "publish",
        *words,
        env=system_environment(DIST=str(tmp_path / "dist")),
        check=False,
    )
    assert (done.code, done.output.splitlines()[0]) == (2, f"error: {told}")
    assert not (tmp_path / "dist").exists()
