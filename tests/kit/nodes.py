"""Real ToolServer nodes for the demo and the end-to-end tests: containers that serve HTTP on the node port.

Everything made here carries the label `eventwatch.run`, by which it is found and removed again, even what an
interrupted call has left behind.
"""

from __future__ import annotations

import asyncio
import io
import secrets
import shutil
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, TypedDict, Unpack

from aiodocker import Docker, DockerError
from aiodocker.containers import DockerContainer

from tests.kit.waiting import SLOW, eventually

IMAGE = "eventwatch-node:1"
NODE_LABEL = "tool-server.node"
RUN_LABEL = "eventwatch.run"
NODE_NETWORK = "tool-server-network"
NODE_PORT = 31942
#: Podman's names of states that Docker calls otherwise, of which documents speak Docker's.
DOCKERS_WORDS = {
    "stopped": "exited",
    "configured": "created",
    "initialized": "created",
    "stopping": "running",
}
CALL_TIMEOUT = 30.0 * SLOW
BUILD_TIMEOUT = 120.0 * SLOW

# The shell is PID 1 because httpd would ignore SIGTERM there, and every stop would take the whole grace.
DOCKERFILE = f"""\
FROM scratch
COPY busybox /bin/busybox
RUN ["/bin/busybox", "--install", "-s", "/bin"]
WORKDIR /www
COPY index.html /www/index.html
CMD ["sh", "-c", "trap 'exit 0' TERM; httpd -f -p {NODE_PORT} & wait"]
"""

HEALTHY_FLAG = "/healthy"
HEALTH_COMMANDS = {
    "ok": ("wget", "-q", "-O", "/dev/null", f"http://127.0.0.1:{NODE_PORT}/"),
    "flag": ("test", "-e", HEALTHY_FLAG),
}

HealthCheck = Literal["ok", "flag"]


class NodeOptions(TypedDict, total=False):
    """What may be asked of a node; `node_config` has the meanings and defaults."""

    healthcheck: HealthCheck | None
    interval_s: float
    command: Sequence[str] | None
    restart: Literal["no", "on-failure", "always", "unless-stopped"]
    expose: Iterable[int]
    auto_remove: bool
    env: Mapping[str, str]


def node_config(
    *,
    network: str,
    labels: Mapping[str, str],
    healthcheck: HealthCheck | None = None,
    interval_s: float = 1.0,
    command: Sequence[str] | None = None,
    restart: Literal["no", "on-failure", "always", "unless-stopped"] = "no",
    expose: Iterable[int] = (NODE_PORT,),
    auto_remove: bool = False,
    env: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Build the engine's container configuration.

    The health check `ok` asks the node's own HTTP server; `flag` fails until `Node.set_healthy(True)`. One
    failed probe makes a node unhealthy.
    """
    config: dict[str, Any] = {
        "Image": IMAGE,
        "Labels": dict(labels),
        "Env": [f"{name}={value}" for name, value in (env or {}).items()],
        "ExposedPorts": {f"{port}/tcp": {} for port in expose},
        "HostConfig": {
            "NetworkMode": network,
            "RestartPolicy": {"Name": restart},
            "AutoRemove": auto_remove,
        },
    }
    if command is not None:
        config["Cmd"] = list(command)
    if healthcheck is not None:
        config["Healthcheck"] = {
            "Test": ["CMD", *HEALTH_COMMANDS[healthcheck]],
            "Interval": nanoseconds(interval_s),
            "Timeout": nanoseconds(5),
            "Retries": 1,
        }
    return config


def nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


class ExecResult(NamedTuple):
    """What a command run inside a node has left."""

    code: int
    output: str


@dataclass
class Node:
    """A container made by `Nodes`; every call has a deadline."""

    container: DockerContainer
    name: str
    prefix: str

    @property
    def id(self) -> str:
        """The full container id."""
        return self.container.id

    async def start(self) -> None:
        async with asyncio.timeout(CALL_TIMEOUT):
            await self.container.start()

    async def stop(self, grace_s: int = 5) -> None:
        async with asyncio.timeout(CALL_TIMEOUT + grace_s):
            await self.container.stop(t=grace_s)

    async def restart(self, grace_s: int = 5) -> None:
        async with asyncio.timeout(CALL_TIMEOUT + grace_s):
            await self.container.restart(t=grace_s)

    async def kill(self, signal: str = "SIGKILL") -> None:
        async with asyncio.timeout(CALL_TIMEOUT):
            await self.container.kill(signal=signal)

    async def pause(self) -> None:
        async with asyncio.timeout(CALL_TIMEOUT):
            await self.container.pause()

    async def unpause(self) -> None:
        async with asyncio.timeout(CALL_TIMEOUT):
            await self.container.unpause()

    async def rename(self, name: str) -> None:
        """Rename the container to the run's prefix plus `name`."""
        async with asyncio.timeout(CALL_TIMEOUT):
            await self.container.rename(self.prefix + name)
        self.name = self.prefix + name

    async def remove(self, *, force: bool = True) -> None:
        async with asyncio.timeout(CALL_TIMEOUT):
            await self.container.delete(force=force)

    async def inspect(self) -> dict[str, Any]:
        async with asyncio.timeout(CALL_TIMEOUT):
            container: dict[str, Any] = await self.container.show()
        status = container["State"]["Status"]
        container["State"]["Status"] = DOCKERS_WORDS.get(status, status)
        return container

    async def exec(self, command: Sequence[str], *, check: bool = True) -> ExecResult:
        """Run a command in the container to its end; with `check`, a code other than 0 raises."""
        async with asyncio.timeout(CALL_TIMEOUT):
            process = await self.container.exec(command)
            output = b""
            async with process.start() as stream:
                while (message := await stream.read_out()) is not None:
                    output += message.data
            result = ExecResult((await process.inspect())["ExitCode"], output.decode())
        if check and result.code != 0:
            raise RuntimeError(f"{command} in {self.name} ended with {result.code}: {result.output}")
        return result

    async def set_healthy(self, healthy: bool) -> None:
        """Decide what the next probe of the health check `flag` finds."""
        await self.exec(["touch", HEALTHY_FLAG] if healthy else ["rm", "-f", HEALTHY_FLAG])

    async def wait_health(self, health: str, *, within_s: float = 15.0) -> None:
        """Wait until the engine's own health status says `health`."""

        async def says_so() -> bool:
            state = (await self.inspect())["State"]
            return bool(state.get("Health", {}).get("Status") == health)

        await eventually(says_so, within_s, what=f"{self.name} is {health}")


class Nodes:
    """Makes nodes on one network, and removes them all, and the network if it made it, at exit."""

    def __init__(
        self,
        docker: Docker,
        prefix: str,
        *,
        network: str = NODE_NETWORK,
        node_label: str = NODE_LABEL,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        self.docker = docker
        self.prefix = prefix
        self.network = network
        self.node_label = node_label
        self.run = secrets.token_hex(8)
        self.labels = {**(labels or {}), RUN_LABEL: self.run}

    async def __aenter__(self) -> Self:
        try:
            await ensure_image(self.docker)
            await ensure_network(self.docker, self.network, labels=self.labels)
        except BaseException:
            await purge(self.docker, f"{RUN_LABEL}={self.run}")
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await purge(self.docker, f"{RUN_LABEL}={self.run}")

    async def create(
        self,
        name: str,
        *,
        network: str | None = None,
        labels: Mapping[str, str] | None = None,
        **options: Unpack[NodeOptions],
    ) -> Node:
        """Create a node without starting it; its container is named the run's prefix plus `name`."""
        config = node_config(
            network=network or self.network,
            labels={self.node_label: name, **(labels or {}), **self.labels},
            **options,
        )
        async with asyncio.timeout(CALL_TIMEOUT):
            container = await self.docker.containers.create(config, name=self.prefix + name)
        return Node(container, self.prefix + name, self.prefix)

    async def start(
        self,
        name: str,
        *,
        network: str | None = None,
        labels: Mapping[str, str] | None = None,
        **options: Unpack[NodeOptions],
    ) -> Node:
        """Create a node and start it."""
        node = await self.create(name, network=network, labels=labels, **options)
        await node.start()
        return node


async def ensure_image(docker: Docker) -> None:
    """Build the node image from the machine's static busybox, unless the engine has it."""
    async with asyncio.timeout(BUILD_TIMEOUT):
        try:
            await docker.images.inspect(IMAGE)
        except DockerError as error:
            if error.status != 404:
                raise
        else:
            return
        busybox = find_busybox()
        try:
            await docker.images.build(fileobj=build_context(busybox), encoding="identity", tag=IMAGE)
        except DockerError as error:
            raise RuntimeError(
                f"the engine cannot make a node of {busybox} (is it static? Debian: busybox-static): {error}"
            ) from error


def find_busybox() -> Path:
    """Find the machine's static busybox (`.ci/engine` sees to it that there is one)."""
    path = shutil.which("busybox.static") or shutil.which("busybox")
    if path is None:
        raise RuntimeError("no busybox on PATH: run .ci/engine, or install busybox-static")
    return Path(path)


def build_context(busybox: Path) -> io.BytesIO:
    files = {
        "Dockerfile": (DOCKERFILE.encode(), 0o644),
        "index.html": (b"a node\n", 0o644),
        "busybox": (busybox.read_bytes(), 0o755),
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, (data, mode) in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            entry.mode = mode
            archive.addfile(entry, io.BytesIO(data))
    buffer.seek(0)
    return buffer


async def ensure_network(docker: Docker, name: str, *, labels: Mapping[str, str]) -> None:
    """Create the network with these labels; one of that name that is already there stays as it is."""
    async with asyncio.timeout(CALL_TIMEOUT):
        try:
            await docker.networks.create({"Name": name, "CheckDuplicate": True, "Labels": dict(labels)})
        except DockerError as error:
            if error.status != 409:
                raise


async def purge(docker: Docker, label: str) -> None:
    """Remove every container and network with this label (`name` or `name=value`)."""
    filters = {"label": [label]}
    async with asyncio.timeout(2 * CALL_TIMEOUT):
        while containers := await docker.containers.list(all=True, filters=filters):
            for container in containers:  # one by one: Engine 20.10 can lock up when many go at once
                await remove_container(container)
        for network in await docker.networks.list(filters=filters):
            await remove_network(docker, network["Id"])


async def remove_container(container: DockerContainer) -> None:
    try:
        await container.delete(force=True)
    except DockerError as error:
        if error.status == 409:  # the engine is removing it already
            await asyncio.sleep(0.1)
        elif error.status != 404:
            raise


async def remove_network(docker: Docker, network_id: str) -> None:
    try:
        await (await docker.networks.get(network_id)).delete()
    except DockerError as error:
        # 403: a container of somebody else has joined it meanwhile, so that it is theirs now.
        if error.status not in {403, 404}:
            raise
