from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient
from pymongo.errors import PyMongoError

from tests.container.sidecars import Container, fetch, hardened, running
from tests.kit.certificates import make_certificates
from tests.kit.mongod import find_mongod, free_port
from tests.kit.processes import output
from tests.kit.truth import ago
from tests.kit.waiting import eventually
from tests.kit.world import World

pytestmark = pytest.mark.usefixtures("sidecar")

USER = "sidecar"
PASSWORD = "plant3d-in-the-url"
WRONG = "wr0ng-but-secret-too"
NODE_SECRET = "plant3d-in-a-node"


@contextlib.contextmanager
def guarded_mongod(folder: Path) -> Iterator[int]:
    """A mongod that wants TLS and a login; the port."""
    make_certificates(folder, "127.0.0.1")
    (folder / "data").mkdir()
    port = free_port()
    command: list[str | Path] = [
        *(find_mongod(), "--dbpath", folder / "data", "--port", str(port), "--bind_ip", "127.0.0.1", "--auth"),
        *("--tlsMode", "requireTLS", "--tlsCertificateKeyFile", folder / "server.pem", "--nounixsocket"),
        *("--tlsCAFile", folder / "ca.pem", "--tlsAllowConnectionsWithoutCertificates", "--quiet"),
        *("--wiredTigerCacheSizeGB", "0.25"),
    ]
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as process,
        MongoClient[dict[str, Any]](
            "127.0.0.1", port, tls=True, tlsCAFile=str(folder / "ca.pem"), serverSelectionTimeoutMS=20_000
        ) as client,
    ):
        try:
            client.admin.command("createUser", USER, pwd=PASSWORD, roles=["readWriteAnyDatabase"])
            yield port
        except PyMongoError as error:
            raise AssertionError(f"{error}\n{(folder / 'log').read_text()[-2000:]}") from None
        finally:
            process.kill()


def secret_files(folder: Path, port: int, password: str, certificates: Path) -> Path:
    """What is mounted as /run/secrets."""
    folder.mkdir()
    url = f"mongodb://{USER}:{password}@127.0.0.1:{port}/?authSource=admin&tls=true&tlsCAFile=/run/secrets/ca.pem"
    (folder / "mongo_url").write_text(url + "\n")
    (folder / "ca.pem").write_bytes((certificates / "ca.pem").read_bytes())
    folder.chmod(0o755)
    return folder


async def everything_said(container: Container, node_id: str) -> str:
    """All that comes out of a running sidecar."""
    pages = [
        (await fetch(container.http + path))[1] for path in ("/", "/readyz", "/livez", "/metrics", "/api/nodes")
    ]
    commands = (
        ("config",),
        ("doctor",),
        ("sweep",),
        ("status",),
        ("explain", node_id),
        ("record", "/dev/stdout", "--duration", "1"),
    )
    said = [container.run("eventwatch", *command, check=False)[1] for command in commands]
    return "\n".join([*pages, *said, json.dumps(container.inspect()), container.logs()])


async def test_no_secret_comes_out_of_a_container_that_logs_in_over_tls(
    world: World, docker_url: str, tmp_path: Path
) -> None:
    database = tmp_path / "database"
    database.mkdir()
    node = await world.nodes.start("secretive", env={"TOKEN": NODE_SECRET})
    with (
        guarded_mongod(database) as port,
        MongoClient[dict[str, Any]](
            "127.0.0.1", port, username=USER, password=PASSWORD, tls=True, tlsCAFile=str(database / "ca.pem")
        ) as client,
    ):
        mounted = secret_files(tmp_path / "right", port, PASSWORD, database)
        env = {
            "EVENTWATCH_MONGO_URL_FILE": "/run/secrets/mongo_url",
            "EVENTWATCH_NODE_NETWORK": world.nodes.network,
            "EVENTWATCH_LOG_LEVEL": "TRACE",
            "EVENTWATCH_LOG_FORMAT": "json",
        }
        options = (*hardened(docker_url), "-v", f"{mounted}:/run/secrets:ro")
        with running(*options, env=env, port=free_port()) as container:
            await container.wait_ready()
            nodes = client["TSM"]["ToolServerNode"]
            nodes.insert_one(
                {
                    "_id": node.id,
                    "short_id": node.id[:12],
                    "status": "created",
                    "health": "none",
                    "ip": "",
                    "port": 31942,
                    "last_req_time": ago(0),
                }
            )
            await node.pause()
            await eventually(lambda: (nodes.find_one({"_id": node.id}) or {}).get("status") == "paused")
            said = await everything_said(container, node.id)
            assert "database rights" in said
            assert f"mongodb://{USER}:***@127.0.0.1" in said
            assert [secret for secret in (PASSWORD, NODE_SECRET) if secret in said] == []


async def test_a_wrong_password_ends_the_container_with_one_line_that_does_not_tell_it(
    world: World, docker_url: str, tmp_path: Path
) -> None:
    database = tmp_path / "database"
    database.mkdir()
    with guarded_mongod(database) as port:
        mounted = secret_files(tmp_path / "wrong", port, WRONG, database)
        env = {"EVENTWATCH_MONGO_URL_FILE": "/run/secrets/mongo_url"}
        options = (*hardened(docker_url), "-v", f"{mounted}:/run/secrets:ro")
        with running(*options, env=env, port=free_port()) as container:
            assert output("docker", "wait", container.name) == "2"
            said = container.logs() + json.dumps(container.inspect())
    assert "Authentication failed" in said
    assert WRONG not in said
