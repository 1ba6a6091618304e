"""An engine on another machine, as far as one machine allows: a dockerd behind its own network, TLS and all."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
import pytest_asyncio

from tests.faults.harness import RECOVERY, Oracle, World
from tests.kit.certificates import make_certificates
from tests.kit.engines import PrivateEngine
from tests.kit.eventwatch import Eventwatch
from tests.kit.mongod import PrivateMongo


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def remote() -> AsyncIterator[PrivateEngine]:
    async with PrivateEngine(remote=True) as engine:
        yield engine


def over_tls(certificates: Path) -> tuple[str, ...]:
    """What makes Docker's own commands speak TLS."""
    return ("env", "DOCKER_TLS_VERIFY=1", f"DOCKER_CERT_PATH={certificates}")


async def test_a_remote_engine_is_watched_over_tls_through_its_restart(
    remote: PrivateEngine, mongo: PrivateMongo, tmp_path: Path
) -> None:
    async with World(remote.url, mongo.url) as world:
        await world.populate(3)
        settings = world.settings(docker_host=remote.remote_url, sweep_interval="10m")
        with closing(Eventwatch(tmp_path, settings)) as watcher:
            watcher.start(within=over_tls(remote.certificates))
            await watcher.says("Nodes status checker started.")
            oracle = Oracle(world)
            await oracle.recovered()
            node = next(iter(world.nodes.values()))
            await node.kill()
            assert await oracle.recovered() <= RECOVERY
            await remote.stop()
            await remote.start()
            assert await oracle.recovered() <= RECOVERY
            await node.start()
            assert await oracle.recovered() <= RECOVERY
            assert await watcher.stop() == 0, watcher.tail()


@pytest.mark.parametrize("certificates", ["none", "another CA's", "of nobody"])
async def test_what_makes_tls_impossible_is_bad_configuration_in_one_line(
    remote: PrivateEngine, mongo: PrivateMongo, tmp_path: Path, certificates: str
) -> None:
    """Waiting cannot help: no certificates, a server that our CA does not know, a client that its CA does not."""
    folder = tmp_path / "certificates"
    folder.mkdir()
    if certificates != "none":
        make_certificates(folder, remote.remote_address)
    if certificates == "of nobody":
        (folder / "ca.pem").write_bytes((remote.certificates / "ca.pem").read_bytes())
    settings = {"docker_host": remote.remote_url, "mongo_url": mongo.url, "http_listen": ""}
    with closing(Eventwatch(tmp_path, settings)) as watcher:
        watcher.start(within=over_tls(folder))
        assert await watcher.ends() == 2, watcher.tail()
        line = watcher.output.splitlines()[-1]
        assert line.startswith("eventwatch: ")
        assert "DOCKER_CERT_PATH" in line
        assert "Traceback" not in watcher.output
