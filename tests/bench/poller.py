"""The poller that eventwatch replaces, rebuilt: what every figure of freshness is compared with.

One pass a second: every document through Beanie, one inspection per node, one after the other, and the whole
document replaced when anything differs.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from aiodocker import Docker, DockerError
from beanie import init_beanie
from pymongo import AsyncMongoClient

from eventwatch.store.documents import ToolServerNode
from tests.bench.programs import DATABASE_VARIABLE, ENGINE_VARIABLE, MONGO_VARIABLE, NETWORK_VARIABLE, required

BETWEEN_PASSES: Final = 1.0


async def check(docker: Docker, node: ToolServerNode, network: str) -> None:
    try:
        seen = await docker.containers.container(node.id).show()
    except DockerError:
        return
    state = seen["State"]
    status, health = state["Status"], (state.get("Health") or {}).get("Status", "none")
    ip = seen["NetworkSettings"]["Networks"][network]["IPAddress"]
    if (node.status, node.health, node.ip) != (status, health, ip):
        node.status, node.health, node.ip = status, health, ip
        await node.replace()


async def poll() -> None:
    network = required(NETWORK_VARIABLE)
    async with (
        AsyncMongoClient[dict[str, Any]](required(MONGO_VARIABLE)) as client,
        Docker(url=required(ENGINE_VARIABLE)) as docker,
    ):
        await init_beanie(client[required(DATABASE_VARIABLE)], document_models=[ToolServerNode], skip_indexes=True)
        ready = False
        while True:
            for node in await ToolServerNode.find_all().to_list():
                await check(docker, node, network)
            if not ready:
                ready = True
                print("ready", flush=True)  # noqa: T201 - who started us waits for it
            await asyncio.sleep(BETWEEN_PASSES)


if __name__ == "__main__":
    asyncio.run(poll())
