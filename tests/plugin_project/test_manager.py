"""Somebody's own tests: nothing is imported or configured for the fixture `replay` but an installed eventwatch."""

from __future__ import annotations

from pathlib import Path

from eventwatch import Settings, ToolServerNode, update_node_status
from eventwatch.testing import Database, ReplayEngine, Replayer, VirtualClock, read_recording

RECORDING = Path("..") / "recordings" / "lifecycle.jsonl"


async def routable() -> set[str]:
    """The code under test: which nodes may be sent a request."""
    nodes = ToolServerNode.find(ToolServerNode.status == "running", ToolServerNode.health == "healthy")
    return {node.ip async for node in nodes}


async def test_only_healthy_nodes_are_routed_to(replay: Replayer) -> None:
    async with replay(RECORDING) as played:
        await played.until(1.0)
        assert await routable() == set()
        report = await played.finish()
        assert not report.divergences
        assert await routable() == {"172.31.0.3"}


async def test_each_test_has_a_database_of_its_own(replay: Replayer, eventwatch_database: Database) -> None:
    async with replay(RECORDING):
        assert await ToolServerNode.count() == 0
    assert eventwatch_database.name


async def test_the_engine_alone_answers_the_checker_functions(replay: Replayer) -> None:
    recording = read_recording(Path(__file__).parent / RECORDING)
    async with replay(RECORDING) as played:
        await played.finish()
        node = (await ToolServerNode.find_all().to_list())[0]
        truth = node.status
        await ToolServerNode.get_pymongo_collection().update_one({"_id": node.id}, {"$set": {"status": "dead"}})
        engine = ReplayEngine(recording, VirtualClock(recording.ended_at))
        await update_node_status(node, engine=engine, settings=Settings.model_construct(idle_timeout=0))
        found = await ToolServerNode.get(node.id)
        assert found is not None
        assert found.status == truth
