"""deploy/compose.manager.yaml beside a manager's own compose file, which has the names, networks and login of the
known one. The manager itself is played by this test: it makes nodes on the stack's network, and their documents.
"""

from __future__ import annotations

import json
import re
import secrets
from pathlib import Path

import pytest
from aiodocker import Docker
from pymongo import AsyncMongoClient

from tests.container.sidecars import Project, project
from tests.kit.images import MONGO
from tests.kit.mongod import free_port
from tests.kit.nodes import IMAGE, Nodes
from tests.kit.processes import ROOT
from tests.kit.truth import Document
from tests.kit.waiting import eventually
from tests.kit.world import World

pytestmark = pytest.mark.usefixtures("services")

PASSWORD = "a-managers-password"
PRIVATE = "another-secret-of-the-manager"
MANAGER = f"""\
services:
  manager:
    image: {IMAGE}
    depends_on: [db]
  db:
    image: {MONGO}
    environment:
      MONGO_INITDB_ROOT_USERNAME: ${{DB_USERNAME}}
      MONGO_INITDB_ROOT_PASSWORD: ${{DB_PASSWORD}}
    volumes: ["managers:/data/db"]
volumes:
  managers:
networks:
  default:
    name: ${{EVENTWATCH_NODE_NETWORK}}
"""


async def test_eventwatch_joins_a_managers_stack_and_no_node_reaches_it(
    docker: Docker, docker_url: str, tmp_path: Path
) -> None:
    network = f"ew-manager-{secrets.token_hex(4)}"
    (tmp_path / "docker-compose.yml").write_text(MANAGER)
    env = {
        "DB_USERNAME": "admin",
        "DB_PASSWORD": PASSWORD,
        "DB_COLLECTION": "TSM",
        "CONFIG_FILE": PRIVATE,
        "EVENTWATCH_NODE_NETWORK": network,
        "EVENTWATCH_SWEEP_INTERVAL": "1s",
    }
    async with project(tmp_path, free_port(), docker_url, **env) as made:
        made.files = ("docker-compose.yml", "deploy/compose.manager.yaml")
        made.up()
        sidecar = made.container("eventwatch")
        await sidecar.wait_ready()
        assert network not in sidecar.inspect()["NetworkSettings"]["Networks"]
        inspections = json.dumps([made.container(name).inspect() for name in ("eventwatch", "engine-proxy")])
        assert [secret for secret in (PASSWORD, PRIVATE) if secret in inspections] == []
        url = f"mongodb://admin:{PASSWORD}@{database_address(made)}:27017/"
        async with (
            AsyncMongoClient[Document](url) as client,
            Nodes(docker, prefix=f"{network}-", network=network) as nodes,
        ):
            world = World(docker, nodes, client, url, "TSM")
            node = await world.start("session")
            await world.becomes_true()
            for address in (sidecar.name, "eventwatch", *addresses(made, "eventwatch")):
                reached = await node.exec(
                    ["wget", "-q", "-T", "2", "-O", "-", f"http://{address}:9471/livez"], check=False
                )
                assert (reached.code != 0, "ok" in reached.output) == (True, False), address
            code, said = sidecar.run("eventwatch", "doctor", check=False)
            assert "FAIL" not in said, said
            assert (code, "documents: 0 of the 0" in said or "documents: 1 of" in said) == (0, True)
            await node.kill()
            await eventually(lambda: world.says(node, status="exited", ip=""))
        made.down()


def addresses(made: Project, service: str) -> list[str]:
    networks = made.container(service).inspect()["NetworkSettings"]["Networks"]
    return [network["IPAddress"] for network in networks.values()]


def database_address(made: Project) -> str:
    networks = made.container("db").inspect()["NetworkSettings"]["Networks"]
    return str(networks[f"{made.name}_database"]["IPAddress"])


def test_both_compose_files_have_the_same_eventwatch_and_proxy() -> None:
    assert shared("compose.yaml") == shared("deploy/compose.manager.yaml")


def shared(file: str) -> tuple[str, str]:
    """What is the same in both: what stands before the services, and the proxy."""
    before, _, services = (ROOT / file).read_text().partition("\nservices:\n")
    before = re.sub(r"^#.*\n|context: .*", "", before, flags=re.MULTILINE).strip()
    proxy = re.search(r"\n  engine-proxy:\n.*?\n\n", services, re.DOTALL)
    assert proxy is not None
    return before, proxy[0]
