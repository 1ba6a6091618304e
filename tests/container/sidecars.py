"""A running sidecar container, and the compose project around one."""

from __future__ import annotations

import asyncio
import json
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp

from tests.kit.images import MONGO, PROXY, SIDECAR, compose_and_buildx
from tests.kit.nodes import IMAGE, Node
from tests.kit.processes import ROOT, output, run
from tests.kit.waiting import eventually

#: Above what a loaded machine needs to start a container and the Python in it.
START: Final = 40.0


async def fetch(url: str) -> tuple[int, str]:
    """Status and body; (0, cause) when nobody answers."""
    try:
        timeout = aiohttp.ClientTimeout(total=5)
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url) as answer:
            return answer.status, await answer.text()
    except (aiohttp.ClientError, TimeoutError) as error:
        return 0, str(error)


@dataclass
class Container:
    """A container by its name or id, seen through the docker command."""

    name: str
    #: Where its HTTP is, from outside.
    http: str = ""

    def inspect(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(output("docker", "inspect", self.name))[0]
        return found

    def logs(self) -> str:
        return run("docker", "logs", self.name).output.strip()

    def run(self, *command: str, check: bool = True) -> tuple[int, str]:
        ended = run("docker", "exec", self.name, *command, check=check)
        return ended.code, ended.output

    async def doubts(self) -> list[str]:
        """What /readyz says."""
        status, body = await fetch(f"{self.http}/readyz")
        return list(json.loads(body)) if status else ["no answer"]

    async def wait_ready(self) -> None:
        async def ready() -> bool:
            return await self.doubts() == []

        try:
            await eventually(ready, START)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None

    async def latencies(self) -> list[float]:
        """Seconds from each event to its acknowledged write, of the last changes that an event made."""
        timeout = aiohttp.ClientTimeout(total=5)
        found: list[float] = []
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(f"{self.http}/api/changes") as answer,
        ):
            # The recent changes come at once; then the stream is silent.
            with suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    async for line in answer.content:
                        if line.startswith(b"data: "):
                            change = json.loads(line.removeprefix(b"data: "))
                            found += [change["latency"]] if change["latency"] is not None else []
        return found

    def stop(self) -> tuple[int, float]:
        """`docker stop`; its exit code, and the seconds that it took."""
        began = time.monotonic()
        output("docker", "stop", "-t", "20", self.name)
        return self.inspect()["State"]["ExitCode"], time.monotonic() - began


def socket_of(docker_url: str) -> Path:
    return Path(docker_url.removeprefix("unix://")).resolve()


def hardened(docker_url: str) -> tuple[str, ...]:
    """The options of `docker run` that README and compose.yaml recommend, on the engine's own socket."""
    socket = socket_of(docker_url)
    return (
        *("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges:true"),
        *("--group-add", str(socket.stat().st_gid), "-v", f"{socket.parent}:/engine:ro"),
        *("-e", f"DOCKER_HOST=unix:///engine/{socket.name}"),
    )


async def stir(node: Node, times: int = 6) -> None:
    """Pause a node and let it go on, again and again, each time after a silence."""
    for _ in range(times):
        await node.pause()
        await asyncio.sleep(0.5)
        await node.unpause()
        await asyncio.sleep(0.5)


@contextmanager
def running(*options: str, env: Mapping[str, str], port: int) -> Iterator[Container]:
    """A sidecar in the host's network, where the tests' database is; removed at exit."""
    container = Container(f"ew-sidecar-{secrets.token_hex(4)}", f"http://127.0.0.1:{port}")
    settings = [part for name, value in env.items() for part in ("-e", f"{name}={value}")]
    listen = ("-e", f"EVENTWATCH_HTTP_LISTEN=127.0.0.1:{port}")
    try:
        output(
            "docker",
            "run",
            "-d",
            "--name",
            container.name,
            "--network",
            "host",
            *options,
            *listen,
            *settings,
            SIDECAR,
        )
        yield container
    finally:
        run("docker", "rm", "-f", "-v", container.name, check=False)


@dataclass
class Project:
    """The project's compose files in a folder of their own, with stand-in images."""

    folder: Path
    name: str
    env: dict[str, str]
    files: tuple[str, ...] = ("compose.yaml",)

    def compose(self, *command: str, check: bool = True) -> str:
        compose, _ = compose_and_buildx()
        (self.folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in self.env.items()))
        files = [part for file in self.files for part in ("-f", file)]
        return run(compose, "-p", self.name, *files, *command, cwd=self.folder, within=120, check=check).output

    def up(self, *services: str) -> None:
        self.compose("up", "-d", "--no-build", *services)

    def down(self) -> None:
        self.compose("--profile", "*", "down", "-v", "--timeout", "15")

    def database_url(self) -> str:
        """The address of the bundled database, logged in as its administrator."""
        _, password = self.container("mongo").run("cat", "/run/administrator/db_password")
        return f"mongodb://{self.env.get('DB_USERNAME', 'root')}:{password.strip()}@{self.address('mongo')}:27017/"

    def container(self, service: str) -> Container:
        name = output("docker", "ps", "-aq", *self.filter(), "-f", f"label=com.docker.compose.service={service}")
        return Container(name, f"http://127.0.0.1:{self.env['HTTP_PORT']}")

    def address(self, service: str) -> str:
        networks = self.container(service).inspect()["NetworkSettings"]["Networks"]
        return str(next(iter(networks.values()))["IPAddress"])

    def filter(self) -> tuple[str, str]:
        return ("-f", f"label=com.docker.compose.project={self.name}")

    def remains(self) -> str:
        """What is left of it on the engine."""
        kinds = (("ps", "-aq"), ("network", "ls", "-q"), ("volume", "ls", "-q"))
        return " ".join(output("docker", *kind, *self.filter()) for kind in kinds).strip()


@asynccontextmanager
async def project(folder: Path, port: int, docker_url: str, *added: str, **env: str) -> AsyncIterator[Project]:
    """compose.yaml; `added` names files of deploy/ that change it: direct, tls, sample."""
    shutil.copy(ROOT / "compose.yaml", folder)
    shutil.copytree(ROOT / "deploy", folder / "deploy")
    images = {"SIDECAR_IMAGE": SIDECAR, "PROXY_IMAGE": PROXY, "MONGO_IMAGE": MONGO, "NODE_IMAGE": IMAGE}
    socket = socket_of(docker_url)
    place = {
        "HTTP_PORT": str(port),
        "DOCKER_SOCKET_FOLDER": str(socket.parent),
        "DOCKER_GID": str(socket.stat().st_gid),
    }
    files = ("compose.yaml", *(f"deploy/compose.{name}.yaml" for name in added))
    made = Project(folder, f"ew-compose-{secrets.token_hex(4)}", {**images, **place, **env}, files)
    try:
        yield made
    finally:
        made.down()
