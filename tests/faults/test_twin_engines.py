"""Two engines with one id, as on cloned machines: the watchers find out, say so, and neither deletes anything."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import aiohttp
import pytest

from tests.faults.harness import World
from tests.kit.engines import PrivateEngine
from tests.kit.eventwatch import Eventwatch, run_program
from tests.kit.mongod import PrivateMongo, free_address

LEADS = "Nodes status checker started."
TWIN = "has the id of ours, no sweep deletes anything"
NODES = 4


@pytest.fixture
async def twins() -> AsyncIterator[tuple[PrivateEngine, PrivateEngine]]:
    async with PrivateEngine("28.5") as one, PrivateEngine("28.5") as other:
        await other.become_twin_of(one)
        yield one, other


async def reasons(address: str) -> list[str]:
    async with aiohttp.ClientSession() as session, session.get(f"http://{address}/readyz") as answer:
        assert answer.status == 503
        return [str(reason) for reason in json.loads(await answer.text())]


async def test_neither_of_two_engines_with_one_id_deletes_the_others_documents(
    twins: tuple[PrivateEngine, PrivateEngine], mongo: PrivateMongo, tmp_path: Path
) -> None:
    one, other = twins
    addresses = (free_address(), free_address())
    async with World(one.url, mongo.url) as a, World(other.url, mongo.url, seed=1, database=a.database) as b:
        quick = {"sweep_interval": "1s", "lease_duration": "2s"}
        settings = [
            world.settings(http_listen=where, **quick) for world, where in zip((a, b), addresses, strict=True)
        ]
        with (
            closing(Eventwatch(tmp_path, settings[0], name="leader")) as leader,
            closing(Eventwatch(tmp_path, settings[1], name="standby")) as standby,
        ):
            leader.start()
            await leader.says(LEADS)
            await a.populate(NODES)
            standby.start()
            await standby.says("Standing by")
            await b.populate(NODES)
            everybody = NODES * 2
            for watcher, address in zip((leader, standby), addresses, strict=True):
                await watcher.says(TWIN, within=30)
                (twin,) = [reason for reason in await reasons(address) if reason.startswith("twin:")]
                assert "/var/lib/docker/engine-id" in twin
            env = {f"EVENTWATCH_{name.upper()}": value for name, value in settings[1].items()}
            code, said = await run_program("-m", "eventwatch", "doctor", env=env, cwd=tmp_path)
            assert code == 1
            assert "FAIL engine's id: that of another engine too" in said
            code, said = await run_program("-m", "eventwatch", "sweep", "--force", env=env, cwd=tmp_path)
            assert code == 0, said
            assert await a.documents.count_documents({}) == everybody, said
            # The other one leads now, and takes all that it does not know for gone.
            assert await leader.stop() == 0
            await standby.says(LEADS)
            await asyncio.sleep(3)
            assert await a.documents.count_documents({}) == everybody, standby.tail()
            leader.start()
            await leader.says("Standing by")
            await asyncio.sleep(2)
            assert await a.documents.count_documents({}) == everybody, standby.tail()
            # What an engine itself tells to be gone goes all the same.
            gone = next(iter(b.nodes.values()))
            await gone.remove()
            await standby.says(f"Node deleted from db: {gone.id}")
            assert await a.documents.count_documents({}) == everybody - 1, standby.tail()
