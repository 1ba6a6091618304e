"""Why a node is as it is, from a real engine: in the log, the history, over HTTP, and for its own idle stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from eventwatch.store.base import HISTORY
from tests.e2e.test_events_to_documents import create_hungry
from tests.e2e.test_operator import ask
from tests.kit.mongod import free_address
from tests.kit.nodes import Node
from tests.kit.seen import logged, texts
from tests.kit.truth import ago
from tests.kit.waiting import NEVER, eventually
from tests.kit.world import World

SLOWLY = 20.0


async def shown(client: httpx.AsyncClient, node: Node) -> dict[str, Any]:
    row: dict[str, Any] = (await client.get(f"/api/nodes/{node.id}")).json()
    return row


async def changes_of(client: httpx.AsyncClient, node: Node) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = (await client.get(f"/api/nodes/{node.id}/changes")).json()
    return rows


@pytest.mark.needs("cgroups")
async def test_a_death_is_explained_everywhere(world: World) -> None:
    killed = await world.start("killed", healthcheck="flag", interval_s=0.2)
    failed = await world.start("failed", command=["sh", "-c", "until [ -e /go ]; do sleep 0.1; done; exit 3"])
    hungry = await create_hungry(world, "hungry")
    await hungry.start()
    await world.insert(hungry)
    address = free_address()
    with logged("INFO") as lines:
        async with (
            world.watching(http_listen=address) as watched,
            httpx.AsyncClient(base_url=f"http://{address}", timeout=SLOWLY) as client,
        ):
            await world.becomes_true()
            await killed.wait_health("unhealthy")

            async def told_unhealthy() -> bool:
                row = await shown(client, killed)
                return bool(row["unhealthy_for"] is not None and row["failures"])

            await eventually(told_unhealthy, within=SLOWLY)

            async def why_on_record() -> bool:
                rows = [row for row in await changes_of(client, killed) if row["new"].get("health") == "unhealthy"]
                return bool(rows and "health check" in rows[0]["reason"])

            await eventually(why_on_record, within=SLOWLY)
            await killed.kill()
            for node in (failed, hungry):
                await node.exec(["touch", "/go"], check=False)
            expected = [
                (killed, "asked", "exit code 137 (SIGKILL), after"),
                (failed, "failed", "exit code 3, after"),
                (hungry, "oom", "exit code 137 (SIGKILL), out of memory, after"),
            ]
            for node, end, reason in expected:

                async def explained(node: Node = node, end: str = end, reason: str = reason) -> bool:
                    row = await shown(client, node)
                    return bool(row["end"] == end and row["reason"].startswith(reason))

                await eventually(explained, within=SLOWLY)

                async def on_record(node: Node = node, reason: str = reason) -> bool:
                    rows = [row for row in await changes_of(client, node) if row["new"].get("status") == "exited"]
                    return bool(rows and rows[0]["reason"].startswith(reason) and rows[0]["name"] == node.name)

                await eventually(on_record, within=SLOWLY)
                assert watched.count("eventwatch_node_ends_total", kind=end) == 1
            row = await shown(client, killed)
            assert row["reason"].endswith("; stopped by a client of the engine (SIGKILL)")
            assert (row["name"], row["exit_code"], row["oom_killed"]) == (killed.name, 137, False)
            [listed] = [row for row in (await client.get("/api/nodes")).json() if row["name"] == hungry.name]
            assert (listed["end"], listed["oom_killed"]) == ("oom", True)
            await failed.remove()
            await eventually(lambda: gone(world, failed), within=SLOWLY)

            async def removal_on_record() -> bool:
                newest = (await changes_of(client, failed))[0]
                return bool(newest["deleted"] and newest["reason"].startswith("its container was removed"))

            await eventually(removal_on_record, within=SLOWLY)
    for node, _, _ in expected:
        said = [text for text in texts(lines) if text.startswith(f"Node {node.id[:12]} ({node.name}) ended: ")]
        assert len(said) == 1
    assert {"name", "image", "changes"} <= {*(await world.database[HISTORY].find_one({"_id": failed.id}) or ())}
    document = await world.document(killed)
    assert document is not None
    assert not {"name", "image", "reason", "exit_code"} & document.keys()


async def gone(world: World, node: Node) -> bool:
    return await world.document(node) is None


async def test_our_own_stop_tells_idle_time_limit_and_where_the_limit_comes_from(
    world: World, tmp_path: Path
) -> None:
    command = ["sh", "-c", 'trap "exit 1" TERM; while :; do sleep 0.1; done']
    node = await world.nodes.create("idle", command=command, labels={"eventwatch.idle-timeout": "2s"})
    await node.start()
    await world.insert(node, last_req_time=ago(60))
    address = free_address()
    async with (
        world.watching(http_listen=address, sweep_interval=1.0, idle_timeout=NEVER),
        httpx.AsyncClient(base_url=f"http://{address}", timeout=SLOWLY) as client,
    ):
        await eventually(lambda: world.says(node, status="exited"), within=SLOWLY)

        async def claimed() -> str:
            rows = [row for row in await changes_of(client, node) if row["new"].get("status") == "stopping"]
            return str(rows[0]["reason"]) if rows else ""

        asked = await eventually(claimed, within=SLOWLY)
        assert asked.startswith("stopped by eventwatch: idle for ")
        assert asked.endswith("limit 2s by label eventwatch.idle-timeout")

        async def explained() -> bool:
            row = await shown(client, node)
            return bool(row["end"] == "asked" and row["reason"].endswith(asked))

        await eventually(explained, within=SLOWLY)
        row = await shown(client, node)
        assert (row["idle_limit"], row["idle_source"]) == (2.0, "label eventwatch.idle-timeout")
    # What comes after it knows that from the history, and so does who asks at a terminal.
    async with (
        world.watching(http_listen=address) as watched,
        httpx.AsyncClient(base_url=f"http://{address}", timeout=SLOWLY) as client,
    ):
        await eventually(explained, within=SLOWLY)
        assert watched.app.rows.problems["died"] == 0
    code, text = await ask(world, tmp_path, "explain", node.name)
    assert code == 0
    [why] = [line for line in text.splitlines() if line.startswith("Why ")]
    assert why == f"Why       {row['reason']}"
    assert asked in (await ask(world, tmp_path, "status", "--columns", "name,reason"))[1]


async def test_what_the_first_sweep_of_a_new_database_writes_is_no_drift(world: World) -> None:
    node = await world.start("new")
    async with world.watching() as watched:
        await world.becomes_true()
        assert watched.count("eventwatch_writes_total", kind="sweep") >= 1
        assert watched.count("eventwatch_drift_corrections_total", field="status") == 0

        async def drifts() -> bool:
            """Whether a sweep has corrected what is wrong now; a look may come first, which is no drift."""
            await world.collection.update_one({"_id": node.id}, {"$set": {"status": "dead"}})
            watched.app.sweep_now()
            await eventually(lambda: world.says(node, status="running"), within=SLOWLY)
            return watched.count("eventwatch_drift_corrections_total", field="status") >= 1

        await eventually(drifts, within=2 * SLOWLY)
    await world.collection.update_one({"_id": node.id}, {"$set": {"status": "dead"}})
    async with world.watching() as watched:  # what went wrong while nobody watched is drift
        await eventually(
            lambda: watched.count("eventwatch_drift_corrections_total", field="status") == 1, within=SLOWLY
        )


async def test_a_crash_loop_is_told_and_counted(world: World) -> None:
    await world.start("looping", command=["sh", "-c", "exit 7"], restart="always")
    address = free_address()
    async with (
        world.watching(http_listen=address) as watched,
        httpx.AsyncClient(base_url=f"http://{address}", timeout=SLOWLY) as client,
    ):
        await eventually(lambda: watched.count("eventwatch_nodes_crash_looping") == 1, within=SLOWLY)
        [row] = (await client.get("/api/nodes")).json()
        assert row["crash_loop"]
        assert row["restart_count"] >= 3
