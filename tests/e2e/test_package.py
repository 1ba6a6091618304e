"""What is published: the sdist has all that a reader needs, the wheel only the package, and it works as installed.

Both are built from a clean copy of the tree, the wheel from the unpacked sdist, as `python -m build` does it. The
wheel is installed with the extra `embedded` into an environment that has nothing else, and tried there, in a
folder from which the tree cannot be imported.

Not promised: any Python but the one that runs the tests, and any version of a dependency but the newest that the
package index has. Without an index these tests fail.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from tests.kit.eventwatch import started
from tests.kit.mongod import free_address
from tests.kit.processes import ROOT, run
from tests.kit.waiting import eventually

PROJECT: Final[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())
NAME: Final = f"eventwatch-{PROJECT['project']['version']}"
#: What lies in the tree and is nobody's source.
DERIVED: Final = (".git", *(line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()))
#: Beside the package, in the sdist: what it takes to test it, to build the image, and to run that.
NEEDED: Final = (
    *("README.md", "CHANGELOG.md", "SECURITY.md", "LICENSE", "pyproject.toml", "Makefile", "settings.env.example"),
    *("CONTRIBUTING.md", "Dockerfile", ".dockerignore", "compose.yaml"),
)
PIP: Final = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
#: Without a mongod on it, so that an embedded database is that of the extra.
SYSTEM_PATH: Final = "/usr/bin:/bin"

PROGRAM: Final = """\
from eventwatch import Settings, ToolServerNode, watch

async def first(settings: Settings) -> str | None:
    async with watch(settings) as app:
        node = await ToolServerNode.find_one()
        return app.doubts()[0] if settings.idle_timeout > 1.5 or node is None else node.status
"""


@dataclass(frozen=True)
class Built:
    """An unpacked sdist and the wheel that was built from it."""

    sdist: Path
    wheel: Path


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel and what it asks for."""

    python: Path
    folder: Path

    @property
    def env(self) -> dict[str, str]:
        """A user's, with a home of their own; the engine is the tests'."""
        engine = {name: value for name, value in os.environ.items() if name.startswith("DOCKER_")}
        return {"PATH": f"{self.python.parent}:{SYSTEM_PATH}", "HOME": str(self.folder), **engine}

    @property
    def script(self) -> Path:
        return self.python.parent / "eventwatch"

    def run(self, *command: str | Path) -> str:
        return run(*command, cwd=self.folder, env=self.env, within=120).stdout


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def clean_copy(folder: Path) -> Path:
    return Path(shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*DERIVED)))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("built")
    backend, dist = folder / "backend", folder / "dist"
    run(*PIP, "install", "--target", backend, *PROJECT["build-system"]["requires"], cwd=folder, within=120)

    def build(target: str, tree: Path) -> None:
        command = (sys.executable, "-m", "hatchling", "build", "-t", target, "-d", dist)
        run(*command, cwd=tree, within=120, env={"PATH": SYSTEM_PATH, "PYTHONPATH": str(backend)})

    build("sdist", clean_copy(folder / "tree"))
    with tarfile.open(dist / f"{NAME}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    build("wheel", folder / NAME)
    return Built(folder / NAME, dist / f"{NAME}-py3-none-any.whl")


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    folder = tmp_path_factory.mktemp("installed")
    python = folder / "venv" / "bin" / "python"
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    options = ("--no-compile", "--only-binary", ":all:")
    run(*PIP, "--python", python, "install", *options, f"{built.wheel}[embedded]", cwd=folder, within=120)
    yield Installed(python, folder)
    shutil.rmtree(folder / "venv")  # 200 MB, which pytest would keep for three runs


def test_the_sdist_has_all_that_a_reader_needs(built: Built) -> None:
    there = files(built.sdist)
    for folder in ("eventwatch", "tests", ".ci", "deploy", "docs"):
        copied = shutil.ignore_patterns(*DERIVED)
        wanted = {f"{folder}/{name}" for name in files_of_tree(ROOT / folder, copied)}
        assert wanted <= there, wanted - there
    assert set(NEEDED) <= there
    top = {name.partition("/")[0] for name in there}
    assert top == {"eventwatch", "tests", ".ci", "deploy", "docs", *NEEDED, "PKG-INFO", ".gitignore"}


def files_of_tree(folder: Path, ignored: Any) -> set[str]:
    found = set()
    for parent, folders, names in os.walk(folder):
        skipped = ignored(parent, [*folders, *names])
        folders[:] = [name for name in folders if name not in skipped]
        found |= {str((Path(parent) / name).relative_to(folder)) for name in names if name not in skipped}
    return found


def test_the_wheel_has_the_package_and_nothing_else(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        there = set(archive.namelist())
        metadata = archive.read(f"{NAME}.dist-info/METADATA").decode()
    assert {name.partition("/")[0] for name in there} == {"eventwatch", f"{NAME}.dist-info"}
    package = files(built.sdist / "eventwatch")
    assert {name.removeprefix("eventwatch/") for name in there if name.startswith("eventwatch/")} == package
    assert {"py.typed", "http/static/index.html", "monitoring/alerts.yaml", "monitoring/dashboard.json"} <= package
    assert f"{NAME}.dist-info/licenses/LICENSE" in there
    assert "License-Expression: Apache-2.0" in metadata
    assert (ROOT / "README.md").read_text().splitlines()[0] in metadata.splitlines()


def test_the_installed_commands_say_what_they_are(installed: Installed) -> None:
    assert installed.run(installed.script, "--version") == f"eventwatch {PROJECT['project']['version']}\n"
    shown = installed.run(installed.python, "-m", "eventwatch", "config")
    assert "EVENTWATCH_MONGO_URL=embedded\n" in shown
    place = installed.run(installed.python, "-c", "import eventwatch; print(eventwatch.__file__)")
    assert Path(place).is_relative_to(installed.folder / "venv")


async def test_it_watches_with_the_embedded_database_and_ends_on_sigterm(
    installed: Installed, docker_url: str
) -> None:
    assert shutil.which("mongod", path=SYSTEM_PATH) is None, "the extra's mongod would not be tried"
    address = free_address()
    env = {"EVENTWATCH_DOCKER_HOST": docker_url, "EVENTWATCH_HTTP_LISTEN": address}
    async with (
        started(installed.script, "run", env=installed.env | env, cwd=installed.folder) as running,
        httpx.AsyncClient(base_url=f"http://{address}") as client,
    ):
        await running.says("Embedded MongoDB answers at ", within=30)
        await running.says("Nodes status checker started.")

        async def ready() -> bool:
            doubts: list[str] = (await client.get("/readyz")).json()
            return not doubts

        await eventually(ready)
        assert "text/html" in (await client.get("/")).headers["content-type"]
        assert (await client.get("/static/main.js")).status_code == 200
        running.send(signal.SIGTERM)
        assert await running.ends() == 0
        assert "Traceback" not in running.output
    assert (installed.folder / ".local" / "state" / "eventwatch" / "mongo" / "db").is_dir()


@pytest.mark.parametrize(
    ("source", "code", "told"),
    [
        pytest.param(PROGRAM, 0, "Success: no issues found", id="right"),
        pytest.param(PROGRAM.replace("> 1.5", '> "1.5"'), 1, '"float" and "str"', id="wrong"),
    ],
)
def test_a_users_type_checker_sees_the_types(installed: Installed, source: str, code: int, told: str) -> None:
    (installed.folder / "mine.py").write_text(source)
    (installed.folder / "empty.ini").write_text("[mypy]\n")
    done = run(
        *(sys.executable, "-m", "mypy", "--strict", "--python-executable", installed.python),
        *("--config-file", "empty.ini", "--cache-dir", "types", "mine.py"),
        cwd=installed.folder,
        within=120,
        check=False,
    )
    assert (done.code, told in done.stdout) == (code, True), done.output
