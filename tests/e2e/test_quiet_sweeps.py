"""What this engine's list says of nodes that nothing happens to, and how rarely these are inspected."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import pytest
from aiohttp import web

from eventwatch.core.listing import shows_no_change
from eventwatch.engine.docker import DockerEngine
from tests.faults.proxies import EngineProxy
from tests.kit.waiting import eventually
from tests.kit.world import World

#: Passes that are watched.
PASSES = 30


@pytest.mark.needs("cgroups")
async def test_the_list_shows_no_change_until_there_is_one(world: World) -> None:
    engine = DockerEngine(world.settings())
    try:
        checked, plain = await world.start("checked", healthcheck="flag"), await world.start("plain")
        ended = await world.start("ended")
        await checked.set_healthy(True)
        await checked.wait_health("healthy", within_s=30)
        await ended.kill()
        nodes = (checked, plain, ended)
        seen = {node.id: await engine.inspect(node.id) for node in nodes}

        async def unchanged() -> set[str]:
            now = (await engine.identify()).system_time
            assert now is not None
            network = world.nodes.network
            rows = {row.node_id: row for row in await engine.list_rows()}
            return {i for i in seen if i in rows and shows_no_change(rows[i], seen[i], network=network, now=now)}

        async def changed(*which: str) -> bool:
            return await unchanged() == set(seen) - set(which)

        await eventually(changed)
        await plain.pause()
        await eventually(lambda: changed(plain.id))
        await plain.unpause()
        await eventually(changed)
        await ended.start()
        await checked.set_healthy(False)
        await checked.wait_health("unhealthy", within_s=30)
        await eventually(lambda: changed(ended.id, checked.id))
        await plain.remove()
        await eventually(lambda: changed(*seen))
    finally:
        await engine.close()


async def test_quiet_nodes_are_inspected_in_a_tenth_of_the_passes_and_what_happens_is_seen_all_the_same(
    world: World, docker_url: str
) -> None:
    asked: Counter[str] = Counter()

    async def count(request: web.Request) -> None:
        parts = request.path.split("/")
        asked["list" if parts[-2] == "containers" else parts[-2] if parts[-1] == "json" else parts[-1]] += 1

    with tempfile.TemporaryDirectory(prefix="ew") as folder:
        async with EngineProxy(Path(folder), docker_url) as proxy:
            proxy.rules.append(count)
            nodes = [await world.start(f"quiet-{number}") for number in range(3)]
            async with world.watching(docker_host=proxy.url, sweep_interval=0.4):
                for node in nodes:
                    await eventually(lambda node=node: world.says(node, status="running"))  # type: ignore[misc]
                # Each is inspected by a pass once more, after what its start led to; then all is quiet.
                await eventually(lambda: enough(asked, 10))
                asked.clear()
                await eventually(lambda: enough(asked, PASSES), 120)
                inspected, passes = [asked[node.id] for node in nodes], asked["list"]
                # Of every ten passes, one inspects it; a busy machine may keep the ages apart for some more.
                assert all(PASSES / 10 - 1 <= count <= passes / 2 for count in inspected), (inspected, passes)
                await nodes[0].kill()
                await eventually(lambda: world.says(nodes[0], status="exited", ip=""))


async def enough(asked: Counter[str], passes: int) -> bool:
    return asked["list"] >= passes
