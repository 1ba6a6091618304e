from __future__ import annotations

import json
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median

import aiohttp
import pytest
from aiodocker import Docker
from pymongo import AsyncMongoClient
from pymongo.errors import OperationFailure
from yarl import URL

from tests.container.sidecars import START, Container, Project, fetch, project, stir
from tests.kit.engines import PrivateEngine
from tests.kit.mongod import free_port
from tests.kit.nodes import NODE_NETWORK, Node, Nodes
from tests.kit.processes import ROOT, output
from tests.kit.truth import Document, ago
from tests.kit.waiting import eventually
from tests.kit.world import World

pytestmark = pytest.mark.usefixtures("services")

DATABASE = "ToolServers"
PASSWORD = "plant3d-in-a-file"
#: Of compose.yaml; those that end by themselves come last.
SERVICES = ("eventwatch", "engine-proxy", "mongo", "passwords", "database-user")
ONCE = SERVICES[-2:]
#: Seconds for which haproxy, left to itself, holds back a small piece of an answer.
HELD_BACK = 0.2
#: What a stolen sidecar would try first, and how it would try to get around the patterns.
FORBIDDEN = (
    ("POST", "/containers/create"),
    ("POST", "/v1.41/containers/create?name=x"),
    ("POST", "/containers/{id}/exec"),
    ("POST", "/containers/{id}/start"),
    ("POST", "/containers/{id}/kill"),
    ("POST", "/containers/{id}/stop/../kill"),
    ("POST", "/containers/{id}%2Fkill?/stop"),
    ("POST", "//containers/{id}/stop"),
    ("PUT", "/containers/{id}/archive?path=/"),
    ("DELETE", "/containers/{id}"),
    ("GET", "/containers/{id}/logs?stdout=1"),
    ("GET", "/containers/{id}/archive?path=/etc"),
    ("GET", "/images/json"),
    ("POST", "/images/create?fromImage=x"),
    ("POST", "/build"),
    ("GET", "/networks"),
    ("GET", "/networks/bridge"),
    ("DELETE", "/networks/{id}"),
    ("GET", "/secrets"),
    ("POST", "/swarm/init"),
    ("HEAD", "/containers/json"),
)
ALLOWED = ("/version", "/v1.41/info", "/_ping", "/containers/json?all=1", "/containers/{id}/json")


@asynccontextmanager
async def composed(folder: Path, docker_url: str, *added: str, **env: str) -> AsyncIterator[Project]:
    base = {"DB_COLLECTION": DATABASE, "EVENTWATCH_SWEEP_INTERVAL": "1s", "EVENTWATCH_STOP_TIMEOUT": "1s"}
    async with project(folder, free_port(), docker_url, *added, **base, **env) as made:
        yield made


@asynccontextmanager
async def world_of(made: Project, docker: Docker, nodes: Nodes) -> AsyncIterator[World]:
    """The database of a project, as a manager that has joined its network sees it."""
    url = made.database_url()
    async with AsyncMongoClient[Document](url) as client:
        yield World(docker, nodes, client, url, DATABASE)


async def test_nodes_start_documents_follow_and_down_leaves_nothing(
    docker: Docker, nodes: Nodes, docker_url: str, tmp_path: Path
) -> None:
    async with composed(tmp_path, docker_url, "sample") as made:
        made.up()
        await made.container("eventwatch").wait_ready()
        sample = made.container("node").inspect()
        async with world_of(made, docker, nodes) as world:

            async def says(status: str, ip: str) -> bool:
                found = await world.collection.find_one({"_id": sample["Id"]})
                return found is not None and (found["status"], found["ip"]) == (status, ip)

            await eventually(
                lambda: says("running", sample["NetworkSettings"]["Networks"][f"{made.name}_nodes"]["IPAddress"])
            )
            output("docker", "kill", sample["Id"])
            await eventually(lambda: says("exited", ""))
        made.down()
        assert made.remains() == ""


async def test_the_proxy_refuses_everything_else_while_eventwatch_does_its_whole_job(
    docker: Docker, nodes: Nodes, docker_url: str, tmp_path: Path
) -> None:
    env = {"EVENTWATCH_NODE_NETWORK": nodes.network, "EVENTWATCH_IDLE_TIMEOUT": "8s"}
    async with composed(tmp_path, docker_url, **env) as made:
        made.up()
        sidecar = made.container("eventwatch")
        await sidecar.wait_ready()
        async with world_of(made, docker, nodes) as world:
            node = await world.start("proxied", healthcheck="ok")
            await eventually(lambda: world.says(node, health="healthy"))
            await refused(made, node.id)
            assert await world.status(node) == "running"
            await no_event_is_held_back(sidecar, node)
            code, said = sidecar.run("eventwatch", "doctor")
            assert (code, "FAIL" in said) == (0, False)
            await world.collection.update_one({"_id": node.id}, {"$set": {"last_req_time": ago(3600)}})
            await eventually(lambda: world.says(node, status="exited"))
            await node.remove()
            await eventually(lambda: gone(world, node.id))
        # No file and no environment variable of the sidecar leads to the engine but the proxy's address.
        assert all("docker.sock" not in json.dumps(mount) for mount in sidecar.inspect()["Mounts"])


async def no_event_is_held_back(sidecar: Container, node: Node) -> None:
    """Whatever lies between, a small event is passed on at once: what coalesces them holds each back for 0.2 s."""
    await stir(node, times=4)
    latencies = await sidecar.latencies()
    assert len(latencies) >= 4
    assert median(latencies) < HELD_BACK / 2, latencies


async def gone(world: World, node_id: str) -> bool:
    return await world.collection.find_one({"_id": node_id}) is None


async def refused(made: Project, node_id: str) -> None:
    proxy = f"http://{made.address('engine-proxy')}:2375"
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
        for method, path in FORBIDDEN:
            # A string that is already encoded, so that what is sent is what is written above.
            from_ours = URL(proxy + path.replace("{id}", node_id), encoded=True)
            async with session.request(method, from_ours) as answer:
                assert answer.status == 403, f"{method} {path}"
        for path in ALLOWED:
            async with session.get(proxy + path.replace("{id}", node_id)) as answer:
                assert answer.status == 200, path


async def test_with_stop_denied_only_idle_stops_are_lost_and_readiness_says_so(
    docker: Docker, nodes: Nodes, docker_url: str, tmp_path: Path
) -> None:
    env = {"EVENTWATCH_NODE_NETWORK": nodes.network, "EVENTWATCH_IDLE_TIMEOUT": "1s"}
    async with composed(tmp_path, docker_url, **env) as made:
        made.up()
        sidecar = made.container("eventwatch")
        await sidecar.wait_ready()
        _, said = sidecar.run("eventwatch", "doctor")
        assert "ok   POST /containers/{id}/stop: allowed" in said
        # New rules take effect on a running project.
        made.env["ALLOW_STOP"] = "false"
        made.up()
        assert made.container("eventwatch").name == sidecar.name
        async with world_of(made, docker, nodes) as world:
            idle, busy = await world.start("idle"), await world.start("busy")
            await world.collection.update_one({"_id": idle.id}, {"$set": {"last_req_time": ago(3600)}})
            await eventually(lambda: denied(sidecar), START)
            assert await world.status(idle) == "running"
            await eventually(lambda: world.says(idle, status="running"))
            await busy.pause()
            await eventually(lambda: world.says(busy, status="paused"))
        code, said = sidecar.run("eventwatch", "doctor", check=False)
        assert code == 1
        assert "FAIL POST /containers/{id}/stop" in said
        _, said = sidecar.run("env", "EVENTWATCH_IDLE_TIMEOUT=0", "eventwatch", "doctor")
        assert "ok   POST /containers/{id}/stop: denied, and not needed" in said


async def denied(sidecar: Container) -> bool:
    return "stop: the engine denies it, idle nodes keep running" in await sidecar.doubts()


async def test_without_the_proxy_a_sidecar_works_on_the_mounted_socket(
    docker: Docker, nodes: Nodes, docker_url: str, tmp_path: Path
) -> None:
    async with composed(tmp_path, docker_url, "direct", EVENTWATCH_NODE_NETWORK=nodes.network) as made:
        made.up()
        assert not made.container("engine-proxy").name
        sidecar = made.container("eventwatch")
        await sidecar.wait_ready()
        async with world_of(made, docker, nodes) as world:
            node = await world.start("direct")
            await world.becomes_true()
            await no_event_is_held_back(sidecar, node)
            code, said = sidecar.run("eventwatch", "doctor")
            assert (code, "is not mounted as a file" in said) == (0, True)
            await node.remove()
            await eventually(lambda: gone(world, node.id))


async def test_a_remote_engine_is_watched_over_tls(docker_url: str, tmp_path: Path) -> None:
    certificates = tmp_path / "certs"
    certificates.mkdir(mode=0o755)
    async with (
        PrivateEngine(remote=True) as remote,
        Docker(url=remote.url) as far_away,
        Nodes(far_away, prefix="remote-", network=NODE_NETWORK) as nodes,
    ):
        for name in ("ca.pem", "cert.pem", "key.pem"):
            shutil.copy(remote.certificates / name, certificates)
            (certificates / name).chmod(0o644)  # the sidecar's user is nobody here
        env = {"REMOTE_ENGINE": remote.remote_url, "DOCKER_CERT_PATH": "./certs"}
        async with composed(tmp_path, docker_url, "tls", **env) as made:
            made.up()
            sidecar = made.container("eventwatch")
            await sidecar.wait_ready()
            async with world_of(made, far_away, nodes) as world:
                node = await world.start("remote")
                await world.becomes_true()
                await no_event_is_held_back(sidecar, node)
                await node.kill()
                await eventually(lambda: world.says(node, status="exited", ip=""))


async def test_a_password_in_a_file_logs_in_and_shows_nowhere(docker_url: str, tmp_path: Path) -> None:
    """The administrator's, of which MongoDB's image must be given the file alone; eventwatch has its own login."""
    (tmp_path / "password").write_text(PASSWORD)
    env = {"DB_USERNAME": "admin", "DB_PASSWORD_FILE": "./password"}
    async with composed(tmp_path, docker_url, **env) as made:
        made.up()
        sidecar = made.container("eventwatch")
        await sidecar.wait_ready()
        code, said = sidecar.run("eventwatch", "config")
        user, own = sidecar.run("sh", "-c", "cat /run/secrets/db_username /run/secrets/db_password")[1].split()
        assert re.fullmatch(r"eventwatch-[0-9a-f]{12}", user)
        assert (code, f"mongodb://{user}:***@mongo:27017/" in said) == (0, True)
        async with AsyncMongoClient[Document](made.database_url()) as client:
            assert PASSWORD in made.database_url()
            found = await client.admin.command("usersInfo", user)
            assert [user["roles"] for user in found["users"]] == [[{"role": "readWrite", "db": DATABASE}]]
        async with AsyncMongoClient[Document](f"mongodb://{made.address('mongo')}:27017/") as client:
            with pytest.raises(OperationFailure, match="requires authentication"):
                await client[DATABASE]["ToolServerNode"].find_one({})
        shown = [(container.logs(), container.inspect()) for container in map(made.container, SERVICES)]
        assert [secret for secret in (PASSWORD, own) if secret in said + json.dumps(shown)] == []


async def test_a_password_and_its_file_exclude_each_other(docker_url: str, tmp_path: Path) -> None:
    (tmp_path / "password").write_text(PASSWORD)
    both = {"DB_PASSWORD": "another", "DB_PASSWORD_FILE": "./password"}
    async with composed(tmp_path, docker_url, **both) as made:
        made.compose("up", "-d", "--no-build", "passwords")
        assert output("docker", "wait", made.container("passwords").name) == "2"
        said = made.container("passwords").logs()
        assert said == "DB_PASSWORD and DB_PASSWORD_FILE are both set: remove one of them"


async def test_http_asks_for_the_token_of_a_file_and_another_database_gets_another_user(
    docker_url: str, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("t0ken-of-a-file\n")
    async with composed(tmp_path, docker_url, EVENTWATCH_HTTP_TOKEN_FILE="./token") as made:
        made.up()
        sidecar = made.container("eventwatch")
        await sidecar.wait_ready()
        assert (await fetch(f"{sidecar.http}/api/nodes"))[0] == 401
        assert (await fetch(f"{sidecar.http.replace('//', '//any:t0ken-of-a-file@')}/api/nodes"))[0] == 200
        _, first = sidecar.run("cat", "/run/secrets/db_username")
        made.up()
        assert made.container("eventwatch").name == sidecar.name
        made.env["DB_COLLECTION"] = "Another"
        made.up()
        sidecar = made.container("eventwatch")
        await sidecar.wait_ready()
        _, second = sidecar.run("cat", "/run/secrets/db_username")
        assert first != second
        async with AsyncMongoClient[Document](made.database_url()) as client:
            users = (await client.admin.command("usersInfo", {"forAllDBs": True}))["users"]
            rights = {user["user"]: user["roles"] for user in users if user["user"] != "root"}
        assert rights == {
            first.strip(): [{"role": "readWrite", "db": DATABASE}],
            second.strip(): [{"role": "readWrite", "db": "Another"}],
        }


async def test_every_service_is_hardened_and_comes_back_and_is_on_its_own_networks(
    docker_url: str, tmp_path: Path
) -> None:
    private = "a-token-of-the-manager"
    env = {"RAPIDAPI_KEY": private, "EVENTWATCH_IDLE_TIMEOUT": "45m"}
    async with composed(tmp_path, docker_url, "sample", **env) as made:
        made.up()
        for service in SERVICES:
            inspection = made.container(service).inspect()
            host = inspection["HostConfig"]
            assert host["ReadonlyRootfs"], service
            assert host["CapDrop"] == ["ALL"], service
            assert "no-new-privileges:true" in host["SecurityOpt"], service
            assert (host["Memory"] > 0, host["PidsLimit"] > 0) == (True, True), service
            assert host["RestartPolicy"]["Name"] == ("no" if service in ONCE else "always"), service
            assert host["LogConfig"]["Config"]["max-size"], service
            assert f"{made.name}_nodes" not in inspection["NetworkSettings"]["Networks"], service
            assert private not in json.dumps(inspection), service
        sidecar = made.container("eventwatch")
        _, said = sidecar.run("eventwatch", "config")
        assert "EVENTWATCH_IDLE_TIMEOUT=45m" in said
        ports = sidecar.inspect()["NetworkSettings"]["Ports"]["9471/tcp"]
        assert [port["HostIp"] for port in ports] == ["127.0.0.1"]
        made.down()
        assert made.remains() == ""


async def test_every_compose_file_is_sound(docker_url: str, tmp_path: Path) -> None:
    for number, added in enumerate([("direct",), ("tls",), ("direct", "sample")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        async with composed(folder, docker_url, *added, REMOTE_ENGINE="tcp://engine.example:2376") as made:
            made.compose("config", "--quiet")


def test_every_setting_reaches_the_sidecar() -> None:
    """But those that compose.yaml sets itself."""
    names = set(re.findall(r"^#(EVENTWATCH_\w+)=", (ROOT / "settings.env.example").read_text(), re.MULTILINE))
    for file in ("compose.yaml", "deploy/compose.manager.yaml", "deploy/stack.yaml"):
        passed = set(re.findall(r"^ +(EVENTWATCH_\w+):", (ROOT / file).read_text(), re.MULTILINE))
        assert names - passed == {"EVENTWATCH_DOCKER_HOST"}, file
