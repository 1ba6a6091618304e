"""What the status page shows while the engine or the database is away: what it knew last, and as of when."""

from __future__ import annotations

import asyncio
import secrets

from aiodocker import Docker

from tests.e2e.test_page import SOON, browser, complaints, opened_page, save, says, shows, text_of, visit
from tests.kit.engines import PrivateEngine
from tests.kit.mongod import PrivateMongo
from tests.kit.nodes import Nodes
from tests.kit.waiting import eventually
from tests.kit.world import opened_world


async def test_nodes_are_shown_as_last_known_while_the_database_or_the_engine_is_frozen() -> None:
    prefix = f"ew-{secrets.token_hex(3)}"
    async with (
        PrivateEngine() as engine,
        PrivateMongo() as mongo,
        Docker(engine.url) as docker,
        Nodes(docker, f"{prefix}-", network=prefix) as nodes,
        opened_world(docker, nodes, mongo.url, prefix) as world,
        browser() as chrome,
    ):
        node = await world.start("kept")
        async with opened_page(world, chrome, docker_host=engine.url, lease_duration=3, idle_timeout=0) as driver:
            await shows(driver, node.id[:12], "running", node.name)
            for frozen in (mongo, engine):
                frozen.freeze()
                await says(driver, "readiness", "Not ready", "database" if frozen is mongo else "has not answered")
                await says(driver, "as-of", "nodes as of ")
                if frozen is mongo:
                    await says(driver, "head", "leads no more")  # its term is over, and with it all that it knew
                await asyncio.sleep(2.5)  # the page has asked again
                await shows(driver, node.id[:12], "running", node.name)
                assert text_of(driver, "shown") == "1 of 1 nodes shown."
                save(driver, f"{type(frozen).__name__}-frozen")
                if frozen is mongo:
                    await visit(driver, f"{driver.current_url.partition('#')[0]}#/node/{node.id[:12]}")
                    await says(driver, "node", node.name, "Its changes on record cannot be read now")
                    await visit(driver, driver.current_url.partition("#")[0])
                    await shows(driver, node.id[:12], "running")
                frozen.thaw()
                await eventually(lambda: text_of(driver, "readiness").startswith("Ready"), 2 * SOON)
                await eventually(lambda: text_of(driver, "as-of") == "", SOON)
                await shows(driver, node.id[:12], "running")
            assert all(" 503 " in line for line in complaints(driver))  # of the database that was away
