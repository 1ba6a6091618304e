from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import free_port
from tests.container.sidecars import START, Container, socket_of
from tests.container.standin import SIDECAR, output, sh
from tests.e2e.watching import World, eventually

pytestmark = pytest.mark.usefixtures("sidecar")

STACK = "ew-stack"
#: The README's stack file, in the host's network, where the tests' database is.
STACK_FILE = """\
version: "3.8"
services:
  eventwatch:
    image: {image}
    user: "65532:{group}"
    read_only: true
    cap_drop: [ALL]
    stop_grace_period: 15s
    deploy:
      mode: global
    networks: [host]
    volumes: ["{folder}:/engine:ro"]
    environment:
      DOCKER_HOST: unix:///engine/{socket}
      EVENTWATCH_MONGO_URL: {mongo_url}
      EVENTWATCH_MONGO_DATABASE: {database}
      EVENTWATCH_NODE_NETWORK: {network}
      EVENTWATCH_HTTP_LISTEN: 127.0.0.1:{port}
networks:
  host:
    external: true
"""


@pytest.fixture
def swarm(docker_url: str) -> Iterator[None]:
    output("docker", "swarm", "init", "--advertise-addr", "127.0.0.1")
    try:
        yield
    finally:
        sh("docker", "stack", "rm", STACK, check=False)
        sh("docker", "swarm", "leave", "--force", check=False)
        # The network that a swarm leaves behind.
        sh("docker", "network", "rm", "docker_gwbridge", check=False)


@pytest.mark.usefixtures("swarm")
async def test_a_global_service_runs_one_sidecar_on_each_host_of_a_swarm(
    world: World, docker_url: str, tmp_path: Path
) -> None:
    socket, port = socket_of(docker_url), free_port()
    file = tmp_path / "stack.yaml"
    file.write_text(
        STACK_FILE.format(
            image=SIDECAR,
            group=socket.stat().st_gid,
            folder=socket.parent,
            socket=socket.name,
            mongo_url=world.mongo_url,
            database=world.database_name,
            network=world.nodes.network,
            port=port,
        )
    )
    output("docker", "stack", "deploy", "--resolve-image", "never", "-c", file, STACK)

    def tasks() -> list[str]:
        return output("docker", "ps", "-q", "-f", f"label=com.docker.stack.namespace={STACK}").split()

    await eventually(tasks, START)
    assert len(tasks()) == 1
    await Container(tasks()[0], f"http://127.0.0.1:{port}").wait_ready()
    node = await world.start("swarmed")
    await world.becomes_true()
    await node.kill()
    await world.becomes_true()
    output("docker", "stack", "rm", STACK)
    await eventually(lambda: not tasks(), START)
    assert await world.checkers.count_documents({}) == 0
