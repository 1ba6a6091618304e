"""`eventwatch top` on a real engine and a real database, driven by keys; and without its extra."""

from __future__ import annotations

import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import DataTable, Static

from eventwatch.cli.top import TopView
from eventwatch.core.errors import EngineError, StoreError
from eventwatch.engine.docker import DockerEngine
from eventwatch.store.connection import Store, open_store
from tests.e2e.test_operator import ask
from tests.kit.fakes import Failing
from tests.kit.processes import run
from tests.kit.truth import manager_document
from tests.kit.waiting import eventually
from tests.kit.world import World

SLOWLY = 30.0


@asynccontextmanager
async def shown(world: World) -> AsyncIterator[tuple[TopView, Pilot[None]]]:
    settings = world.settings()
    engine = DockerEngine(settings)
    try:
        async with open_store(world.mongo_url, world.database_name) as store:
            view = TopView(store, engine, settings)
            async with view.run_test(size=(160, 40)) as pilot:
                yield view, pilot
    finally:
        await engine.close()


def lines(view: TopView) -> list[str]:
    table = view.query_one("#nodes", DataTable)
    return ["  ".join(map(str, table.get_row_at(number))) for number in range(table.row_count)]


def text_of(view: TopView, name: str) -> str:
    return str(view.query_one(name, Static).render())


async def test_nodes_are_shown_sorted_filtered_and_explained(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    well = await world.start("b-well")
    dead = await world.start("a-dead", command=["sh", "-c", "until [ -e /go ]; do sleep 0.1; done; exit 3"])
    hostile = "e" * 64
    await world.collection.insert_one(
        manager_document(hostile, short_id="[red]x\x1b[2J", status="running", health="unhealthy")
    )
    async with world.watching():
        await eventually(lambda: world.says(dead, status="running"), within=SLOWLY)
        asked = Failing(monkeypatch).asked
        async with shown(world) as (view, pilot):
            await eventually(lambda: any(well.name in line for line in lines(view)), within=SLOWLY)
            await dead.exec(["touch", "/go"], check=False)
            await eventually(lambda: any("exit code 3, after" in line for line in lines(view)), within=SLOWLY)
            assert text_of(view, "#summary").startswith("3 nodes: 1 exited, 2 running · 1 died, 1 unhealthy")
            assert dead.id[:12] in lines(view)[0]
            await pilot.press("s")
            assert all(char.isprintable() for line in lines(view) for char in line)
            assert any(line.startswith(r"[red]x\x1b[2J") for line in lines(view))
            names = [line.split()[1] for line in lines(view) if "[red]" not in line]
            assert names == sorted(names)
            await pilot.press("s")
            assert "by status" in text_of(view, "#summary")
            assert dead.id[:12] in lines(view)[0]
            await pilot.press("r")
            assert dead.id[:12] in lines(view)[-1]
            await pilot.press("u")
            assert len(lines(view)) == 1
            await pilot.press("u", "slash", *"status:exited")
            await eventually(lambda: len(lines(view)) == 1, within=SLOWLY)
            asked.clear()
            await pilot.press("enter", "enter")
            await eventually(lambda: "Last changes" in text_of(view, "#text"), within=SLOWLY)
            assert f"Node      {dead.id}" in text_of(view, "#text")
            assert "Why       exit code 3, after" in text_of(view, "#text")
            assert set(asked) == {dead.id}  # the others are read, not inspected
            await pilot.press("escape", "escape")
            await eventually(lambda: len(lines(view)) == 3, within=SLOWLY)
            assert not view.query_one("#details").has_class("asked")
            await well.remove()
            await eventually(lambda: len(lines(view)) == 2, within=SLOWLY)
            await pilot.press("q")


async def test_without_a_database_what_was_read_stays_and_is_told_to_be_old(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.collection.insert_one(manager_document("a" * 64))
    real = Store.read_own
    async with shown(world) as (view, _):
        await eventually(lambda: len(lines(view)) == 1, within=SLOWLY)

        async def away(*_: object, **__: object) -> None:
            raise StoreError("Database is away")

        monkeypatch.setattr(Store, "read_own", away)
        await eventually(lambda: "as of before: Database is away" in text_of(view, "#summary"), within=SLOWLY)
        assert len(lines(view)) == 1
        monkeypatch.setattr(Store, "read_own", real)
        await eventually(partial(is_well, view), within=SLOWLY)


async def test_without_an_engine_what_was_read_stays_and_is_told_to_be_old(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eventwatch.cli.top.LISTED", 0.5)
    nodes = [await world.start(f"named-{number}") for number in range(8)]
    gone = "a" * 64
    await world.collection.insert_one(manager_document(gone, short_id=gone[:12], status="running"))
    real = DockerEngine.list_rows
    async with shown(world) as (view, pilot):
        # One list has the names of all, though no history tells any.
        await eventually(
            lambda: sum(node.name in text for text in lines(view) for node in nodes) == 8, within=SLOWLY
        )
        # What it says otherwise counts once it says so again.
        await eventually(lambda: "disagree" in text_of(view, "#summary"), within=SLOWLY)
        assert any("no: no such container" in text for text in lines(view))

        async def away(_: object) -> None:
            raise EngineError("Docker did not answer: connection refused")

        monkeypatch.setattr(DockerEngine, "list_rows", away)
        await eventually(lambda: text_of(view, "#summary").startswith("Docker does not answer"), within=SLOWLY)
        assert view.query_one("#summary").has_class("trouble")
        assert sum(node.name in text for text in lines(view) for node in nodes) == 8
        assert not any("no such container" in text for text in lines(view))
        monkeypatch.setattr(DockerEngine, "list_rows", real)
        await eventually(lambda: not view.query_one("#summary").has_class("trouble"), within=SLOWLY)
        await pilot.resize_terminal(60, 20)
        await pilot.press("right")
        await eventually(lambda: view.query_one("#nodes", DataTable).scroll_x > 1, within=SLOWLY)


def is_well(view: TopView) -> bool:
    return "as of before" not in text_of(view, "#summary")


@pytest.mark.parametrize("words", [("top",), ("completion", "bash")])
async def test_without_its_extra_a_command_says_so_in_one_line(
    world: World, tmp_path: Path, words: tuple[str, ...]
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules['textual'] = sys.modules['shtab'] = None\n"
    )
    code, text = await ask(world, tmp_path, *words, PYTHONPATH=f"{tmp_path}:{':'.join(filter(None, sys.path))}")
    assert code == 2
    assert text.count("\n") == 1
    assert f"eventwatch: {words[0]} needs the extra `{words[0]}`" in text


async def test_top_needs_a_terminal(world: World, tmp_path: Path) -> None:
    code, text = await ask(world, tmp_path, "top")
    assert (code, text) == (2, "eventwatch: top needs a terminal; elsewhere: eventwatch status\n")


@pytest.mark.skipif(shutil.which("zsh") is None, reason="without zsh its completion cannot be tried")
def test_zsh_takes_the_completion_from_a_file_a_variable_and_its_folder(tmp_path: Path) -> None:
    script = run(sys.executable, "-m", "eventwatch", "completion", "zsh", cwd=tmp_path).stdout
    (tmp_path / "_eventwatch").write_text(script)
    begun = "autoload -Uz compinit; compinit -u -D;"
    for words, name in (
        (f"{begun} source _eventwatch;", "_shtab_eventwatch"),
        (f'{begun} eval "$(<_eventwatch)";', "_shtab_eventwatch"),
        (f"fpath=({tmp_path} $fpath); {begun}", "_eventwatch"),
    ):
        assert run("zsh", "-f", "-c", f"{words} print $_comps[eventwatch]", cwd=tmp_path).output == f"{name}\n"
