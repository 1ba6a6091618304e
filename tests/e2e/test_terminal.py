"""What reaches a terminal: text from documents is shown and not obeyed; a closed pipe and Ctrl-C end quietly."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import pytest

from tests.e2e.test_operator import ask
from tests.kit.eventwatch import program
from tests.kit.waiting import eventually
from tests.kit.world import World

HOSTILE = {
    "markup": {"short_id": "[bold red]x[/bold red]", "status": "[link=http://evil.example]click[/link]"},
    "closing": {"short_id": "[/red]", "status": "[/]"},
    "escapes": {"short_id": "\x1b]0;t\x07\x1b[2J", "status": "\x1b[8m", "ip": "1\r2", "health": "\x1b]52;c\x07"},
    "lines": {"short_id": "a\nb", "health": "x\nOwner: forged", "engine_id": "e\n  2026-01-01 status a -> b"},
}


@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE)
async def test_text_from_a_document_is_only_shown(world: World, tmp_path: Path, fields: dict[str, str]) -> None:
    document = {"_id": "c" * 64, "status": "running", "health": "none", "last_req_time": datetime(2026, 1, 1)}  # noqa: DTZ001
    await world.collection.insert_one(document | fields)
    for words in (["status"], ["explain", "c" * 64], ["sweep"]):
        code, text = await ask(world, tmp_path, *words, COLUMNS="300", NO_COLOR="1")
        # There is no such container here, nor does another host have it unless the document says so.
        assert code == (1 if words == ["status"] and "engine_id" not in fields else 0), text
        assert all(char.isprintable() or char == "\n" for char in text)
        assert not any(line.startswith(("Owner: forged", "  2026-01-01")) for line in text.splitlines())
        if words == ["status"] and "[" in fields["short_id"] and "\x1b" not in fields["short_id"]:
            assert fields["short_id"] in text
            assert fields["status"] in text


@pytest.mark.parametrize("words", [["config"], ["status"], ["status", "--json"], ["doctor"]])
async def test_a_reader_that_has_seen_enough_ends_it_quietly(
    world: World, tmp_path: Path, words: list[str]
) -> None:
    env = os.environ | {
        "EVENTWATCH_MONGO_URL": world.mongo_url,
        "EVENTWATCH_MONGO_DATABASE": world.database.name,
        "EVENTWATCH_NODE_NETWORK": world.nodes.network,
    }
    reading, writing = os.pipe()
    os.close(reading)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "eventwatch", *words, env=env, cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE
    )
    os.close(writing)
    _, errors = await process.communicate()
    assert (process.returncode, errors) == (141, b"")


@pytest.mark.parametrize("after", [0.15, 0.3, 0.5, 0.8, 1.2, 2.0])
async def test_ctrl_c_is_quiet_however_early(world: World, tmp_path: Path, after: float) -> None:
    env = os.environ | {"EVENTWATCH_MONGO_URL": world.mongo_url, "EVENTWATCH_MONGO_DATABASE": world.database.name}
    async with program("-m", "eventwatch", "status", "--watch", env=env, cwd=tmp_path) as process:
        await asyncio.sleep(after)
        # Python's own start loses one now and then (2 of 697 on a loaded machine), and has a traceback of its own.
        while process.running:
            process.send(signal.SIGINT)
            with suppress(AssertionError):
                await process.ends(within=5)
        assert await process.ends() in {1, 130, -signal.SIGINT}  # a shell shows the last two as 130
        assert "eventwatch/cli/main.py" not in process.output


async def test_a_log_that_nobody_reads_holds_nothing_up(world: World, tmp_path: Path) -> None:
    node = await world.start("one")
    env = os.environ | {
        "EVENTWATCH_MONGO_URL": world.mongo_url,
        "EVENTWATCH_MONGO_DATABASE": world.database.name,
        "EVENTWATCH_NODE_NETWORK": world.nodes.network,
        "EVENTWATCH_HTTP_LISTEN": "",
    }
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(4096))
    os.set_blocking(writing, True)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "eventwatch", "run", env=env, cwd=tmp_path, stderr=writing
    )
    await eventually(lambda: world.says(node, status="running"), 20)
    await node.kill()
    await eventually(lambda: world.says(node, status="exited"))
    process.terminate()
    assert await asyncio.wait_for(process.wait(), 20) == 0
    os.close(writing)
    os.close(reading)
