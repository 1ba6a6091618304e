from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from ipaddress import ip_network

import pytest
from yarl import URL

from tests.container.sidecars import START, Container, socket_of
from tests.faults.proxies import Wire
from tests.kit.images import SIDECAR
from tests.kit.mongod import free_port
from tests.kit.processes import ROOT, output, run, system_environment
from tests.kit.waiting import eventually
from tests.kit.world import World

pytestmark = pytest.mark.usefixtures("sidecar")

STACK = "ew-stack"
FILE = ROOT / "deploy" / "stack.yaml"


@pytest.fixture
def swarm(docker_url: str) -> Iterator[None]:
    output("docker", "swarm", "init", "--advertise-addr", "127.0.0.1")
    try:
        yield
    finally:
        run("docker", "stack", "rm", STACK, check=False)
        run("docker", "swarm", "leave", "--force", check=False)
        # The network that a swarm leaves behind.
        run("docker", "network", "rm", "docker_gwbridge", check=False)


@pytest.fixture
async def wire(world: World) -> AsyncIterator[Wire]:
    """The way to the tests' database for those on the bridge."""
    subnet = output("docker", "network", "inspect", "-f", "{{(index .IPAM.Config 0).Subnet}}", "bridge")
    async with Wire(URL(world.mongo_url).port or 0, str(ip_network(subnet)[1])) as made:
        yield made


def tasks() -> list[str]:
    return output("docker", "ps", "-q", "-f", f"label=com.docker.stack.namespace={STACK}").split()


@pytest.mark.usefixtures("swarm")
@pytest.mark.parametrize("order", ["stop-first", "start-first"])
async def test_a_global_service_runs_one_sidecar_on_each_host_of_a_swarm_and_is_updated(
    world: World, wire: Wire, docker_url: str, order: str
) -> None:
    socket, port = socket_of(docker_url), free_port()
    env = {
        "SIDECAR_IMAGE": SIDECAR,
        "DOCKER_GID": str(socket.stat().st_gid),
        "DOCKER_SOCKET_FOLDER": str(socket.parent),
        "EVENTWATCH_MONGO_URL": world.mongo_url,
        "EVENTWATCH_MONGO_DATABASE": world.database_name,
        "EVENTWATCH_NODE_NETWORK": world.nodes.network,
        "EVENTWATCH_HTTP_LISTEN": f"127.0.0.1:{port}",
        "EVENTWATCH_LOG_FORMAT": "json",
    }
    if order == "start-first":
        env |= {
            "STACK_UPDATE": order,
            "STACK_NETWORK": "bridge",
            "EVENTWATCH_HTTP_LISTEN": f"0.0.0.0:{port}",
            "EVENTWATCH_MONGO_URL": f"{wire.url.replace('tcp', 'mongodb', 1)}/?directConnection=true",
        }
    run("docker", "stack", "deploy", "--resolve-image", "never", "-c", FILE, STACK, env=system_environment(**env))

    def sidecar(task: str) -> Container:
        """Where its HTTP is: on the host's loopback, or at its own address."""
        address = output("docker", "inspect", "-f", "{{.NetworkSettings.IPAddress}}", task) or "127.0.0.1"
        return Container(task, f"http://{address}:{port}")

    await eventually(tasks, START)
    [before] = tasks()
    await sidecar(before).wait_ready()
    assert sidecar(before).logs().startswith("{")  # each setting gets there, that of the log's format as well
    node = await world.start("swarmed")
    await world.becomes_true()
    await node.kill()
    await world.becomes_true()
    # An update: the new one takes the lease of the old one, and its port where both are on the host's network.
    update = ("docker", "service", "update", "--force", "--detach", "--no-resolve-image", f"{STACK}_eventwatch")
    output(*update, within=120)
    running = [before]

    def replaced() -> bool:
        if tasks() != running[-1:]:
            running.extend(task for task in tasks() if task not in running)
            overlapping.append(len(tasks()))
        return tasks() == running[-1:] != [before]

    overlapping: list[int] = []
    await eventually(replaced, 2 * START)
    assert (2 in overlapping) is (order == "start-first")
    await sidecar(running[-1]).wait_ready()
    await node.start()
    await world.becomes_true()
    output("docker", "stack", "rm", STACK)
    await eventually(lambda: not tasks(), START)
    assert await world.checkers.count_documents({}) == 0
