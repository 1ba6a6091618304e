from __future__ import annotations

import json
import re
import sys
import time
import tomllib
from pathlib import Path

import pytest

from tests.container.sidecars import hardened, running
from tests.kit.images import PYTHON, build_arguments, compose_and_buildx
from tests.kit.mongod import free_port
from tests.kit.processes import ROOT, output
from tests.kit.waiting import eventually
from tests.kit.world import World

pytestmark = pytest.mark.usefixtures("sidecar")

#: What is not ours to shrink is the base image; ours is the difference.
LARGEST = 70_000_000
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
BUILDX_TAG = "eventwatch-standin/sidecar:buildx"


def in_image(image: str, script: str) -> str:
    return output("docker", "run", "--rm", "--read-only", "--entrypoint", "sh", image, "-c", script)


def settings_of(world: World, **more: str) -> dict[str, str]:
    return {
        "EVENTWATCH_MONGO_URL": world.mongo_url,
        "EVENTWATCH_MONGO_DATABASE": world.database_name,
        "EVENTWATCH_NODE_NETWORK": world.nodes.network,
        **more,
    }


async def test_a_hardened_container_watches_the_engine_it_is_mounted_into(
    world: World, docker_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ("--health-interval", "1s")
    with running(*hardened(docker_url), *quick, env=settings_of(world), port=free_port()) as container:
        began = time.monotonic()
        await container.wait_ready()
        ready = time.monotonic() - began
        node = await world.start("watched")
        await eventually(lambda: world.says(node, status="running"))
        await world.becomes_true()
        await eventually(lambda: container.inspect()["State"]["Health"]["Status"] == "healthy", 30)
        # By what the kernel says, without capabilities, as the health check does it.
        nearby = "from eventwatch.http.nearby import ask_nearby; print(ask_nearby())"
        assert container.run("python", "-c", nearby)[1] == "ready\n"
        assert container.inspect()["Config"]["User"] == "65532:65532"
        assert container.run("id", "-u")[1].strip() == "65532"
        assert container.run("touch", "/opt/eventwatch/new", check=False)[0] != 0
        with capsys.disabled():
            usage = output("docker", "stats", "--no-stream", "--format", "{{.MemUsage}}", container.name)
            sys.stdout.write(f"\nready {ready:.1f} s after `docker run`; memory in the container: {usage}\n")
        code, seconds = container.stop()
        assert code == 0, container.logs()
        assert seconds < 8
        assert "SIGTERM: finishing what is pending" in container.logs()
        assert await world.checkers.count_documents({}) == 0


def test_the_image_has_what_is_pinned_and_nothing_that_installs_or_compiles(sidecar: str) -> None:
    pins = dict(re.findall(r"^([\w.-]+)==(\S+) \\$", (ROOT / ".ci/requirements.txt").read_text(), re.MULTILINE))
    listing = (
        "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    )
    listed = json.loads(in_image(sidecar, f"/opt/eventwatch/bin/python -c '{listing}'"))
    found = {name.lower().replace("_", "-"): version for name, version in listed.items()}
    assert found.pop("eventwatch") == VERSION
    assert found == pins
    tools = in_image(
        sidecar, "command -v pip pip3 gcc cc mongod || true; find / -xdev -name pip -type d 2>/dev/null || true"
    )
    assert tools == ""


def test_the_image_adds_little_to_its_base_and_says_what_it_is(
    sidecar: str, capsys: pytest.CaptureFixture[str]
) -> None:
    image = json.loads(output("docker", "image", "inspect", sidecar))[0]
    base = json.loads(output("docker", "image", "inspect", PYTHON))[0]
    with capsys.disabled():
        sys.stdout.write(f"\nimage: {image['Size'] / 1e6:.0f} MB, of which the base {base['Size'] / 1e6:.0f} MB\n")
    assert image["Size"] - base["Size"] < LARGEST
    labels = image["Config"]["Labels"]
    assert labels["org.opencontainers.image.title"] == "eventwatch"
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["org.opencontainers.image.version"] == VERSION
    assert image["Config"]["Healthcheck"]["Test"] == ["CMD", "eventwatch", "healthcheck"]
    assert "Volumes" not in image["Config"] or not image["Config"]["Volumes"]


def test_buildx_builds_the_same_image(tmp_path: Path) -> None:
    _, buildx = compose_and_buildx()
    command: tuple[str | Path, ...] = (buildx, "build", *build_arguments(), "--load", "-t", BUILDX_TAG, ROOT)
    try:
        output(*command, within=300, BUILDX_CONFIG=str(tmp_path))
        assert output("docker", "run", "--rm", BUILDX_TAG, "--version") == f"eventwatch {VERSION}"
    finally:
        output("docker", "rmi", "-f", BUILDX_TAG)


def test_a_socket_without_permission_ends_the_container_with_one_line(world: World, docker_url: str) -> None:
    options = list(hardened(docker_url))
    at = options.index("--group-add")
    del options[at : at + 2]
    with running(*options, env=settings_of(world), port=free_port()) as container:
        assert output("docker", "wait", container.name) == "2"
        assert container.logs().endswith("or `group_add` in compose")
