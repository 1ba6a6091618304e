from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import free_port
from tests.container.sidecars import START, Container, socket_of
from tests.container.standin import ROOT, SIDECAR, output, sh
from tests.e2e.watching import World, eventually

pytestmark = pytest.mark.usefixtures("sidecar")

STACK = "ew-stack"
FILE = ROOT / "deploy" / "stack.yaml"


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
async def test_a_global_service_runs_one_sidecar_on_each_host_of_a_swarm(world: World, docker_url: str) -> None:
    socket, port = socket_of(docker_url), free_port()
    env = {
        "SIDECAR_IMAGE": SIDECAR,
        "DOCKER_GID": str(socket.stat().st_gid),
        "DOCKER_SOCKET_FOLDER": str(socket.parent),
        "EVENTWATCH_MONGO_URL": world.mongo_url,
        "EVENTWATCH_MONGO_DATABASE": world.database_name,
        "EVENTWATCH_NODE_NETWORK": world.nodes.network,
        "EVENTWATCH_HTTP_LISTEN": f"127.0.0.1:{port}",
    }
    sh("docker", "stack", "deploy", "--resolve-image", "never", "-c", FILE, STACK, env=env)

    def tasks() -> list[str]:
        return output("docker", "ps", "-q", "-f", f"label=com.docker.stack.namespace={STACK}").split()

    await eventually(tasks, START)
    assert len(tasks()) == 1
    await Container(tasks()[0], f"http://127.0.0.1:{port}").wait_ready()
    node = await world.start("swarmed")
    await world.becomes_true()
    await node.kill()
    await world.becomes_true()
    # An update: the new one takes the lease and the port of the old one.
    [before] = tasks()
    update = ("docker", "service", "update", "--force", "--detach", "--no-resolve-image", f"{STACK}_eventwatch")
    output(*update, within=120)

    def successor() -> list[str]:
        return [task for task in tasks() if task != before]

    [after] = await eventually(successor, START)
    await Container(after, f"http://127.0.0.1:{port}").wait_ready()
    await node.start()
    await world.becomes_true()
    output("docker", "stack", "rm", STACK)
    await eventually(lambda: not tasks(), START)
    assert await world.checkers.count_documents({}) == 0
