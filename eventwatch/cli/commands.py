"""What the commands do; `main.py` parses them and turns their errors into exit codes.

A module of its own because it pulls in everything: the probe that runs every half minute must not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import pkgutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from getpass import getpass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from loguru import logger
from rich.live import Live

from eventwatch.app import MOST_ENGINES
from eventwatch.calls.waiting import wait_for
from eventwatch.checks import Manner, one_off_sweeper
from eventwatch.cli.doctor import examine
from eventwatch.cli.engines import describe, engine_table, examine_forgetting
from eventwatch.cli.nodes import (
    NodeReport,
    compare_nodes,
    explain_node,
    identity_of,
    is_terminal,
    select_nodes,
    settings_in_force,
    show,
    show_table,
    terminal_table,
)
from eventwatch.cli.output import say
from eventwatch.cli.replays import record_file, replay_file
from eventwatch.core.errors import ConfigError, EngineError, EventwatchError, NodeGoneError, StoreError
from eventwatch.core.facts import is_container_id
from eventwatch.core.text import json_text, printable
from eventwatch.engine.docker import DockerEngine
from eventwatch.pipeline.fleet import as_json, ordered
from eventwatch.settings.model import EMBEDDED, Settings
from eventwatch.store.connection import Store, create_user, open_store
from eventwatch.store.embedded import EmbeddedMongo, running_url

#: Characters shown of a name that was asked for.
NAMED: Final = 80
#: Columns of a table of engines in a file.
WIDE: Final = 200

#: Seconds that a database which is just starting is waited for.
DATABASE_START: Final = 60.0


@asynccontextmanager
async def database_url(settings: Settings) -> AsyncIterator[str]:
    """Where the database is; an embedded one is that of a running eventwatch, or started for the block."""
    url = settings.mongo_url.get_secret_value()
    if url != EMBEDDED:
        yield url
    elif (beside := running_url()) is not None:
        yield beside
    else:
        async with EmbeddedMongo() as mongo:
            yield mongo.url


async def sweep(arguments: argparse.Namespace, settings: Settings) -> None:
    """`eventwatch sweep`."""
    if arguments.dry_run:
        settings = settings.model_copy(update={"dry_run": True})
    async with database_url(settings) as url, closing(DockerEngine(settings)) as engine:
        await engine.identify()
        async with (
            open_store(url, settings.mongo_database),
            one_off_sweeper(engine, settings, manner=Manner.BY_HAND) as sweeper,
        ):
            report = await sweeper.sweep(force=arguments.force)
    if arguments.json:
        say(json.dumps(asdict(report) | {"dry_run": settings.dry_run}))
    else:
        say(f"{'Dry run: ' if settings.dry_run else ''}{report}")
    if report.braked:
        raise EventwatchError(
            f"{report.braked} containers are gone, more than delete_limit: nothing was deleted. "
            "Is this the right engine? Then eventwatch sweep --force"
        )
    if report.failed:
        raise EventwatchError(f"{report.failed} of {report.checked} nodes could not be inspected")


@asynccontextmanager
async def _both(settings: Settings) -> AsyncIterator[tuple[Store, DockerEngine]]:
    async with (
        database_url(settings) as url,
        closing(DockerEngine(settings)) as engine,
        open_store(url, settings.mongo_database) as store,
    ):
        yield store, engine


async def status(arguments: argparse.Namespace, settings: Settings) -> None:
    """`eventwatch status`."""
    async with _both(settings) as (store, engine):
        engine_id = await identity_of(engine)
        settings = await settings_in_force(store, engine_id, settings)

        async def look() -> list[NodeReport]:
            found = await compare_nodes(store, engine, settings, engine_id=engine_id)
            return select_nodes(
                found,
                unhealthy=arguments.unhealthy,
                statuses=arguments.status or (),
                since=arguments.since,
                sort=arguments.sort,
            )

        if arguments.watch and not arguments.json and is_terminal():
            with Live(terminal_table([], arguments.columns), auto_refresh=False) as live:
                while True:
                    live.update(terminal_table(await look(), arguments.columns), refresh=True)
                    await asyncio.sleep(1.0)
        while True:
            reports = await look()
            if arguments.json:
                say(json.dumps([report.as_json() for report in reports], default=json_text))
            else:
                show(reports, arguments.columns)
            if not arguments.watch:
                break
            await asyncio.sleep(1.0)
    wrong = sum(report.agrees is False for report in reports)
    silent = sum(report.agrees is None and not report.elsewhere for report in reports)
    if wrong or silent or not engine_id:
        away = "the engine does not answer" if not engine_id else f"the engine does not answer for {silent} nodes"
        disagree = f"{wrong} of {len(reports)} nodes disagree with the engine"
        raise EventwatchError("; ".join([disagree] * (wrong > 0) + [away] * (silent > 0 or not engine_id)))


async def top(_: argparse.Namespace, settings: Settings) -> None:
    """`eventwatch top`."""
    if find_spec("textual") is None:
        raise ConfigError("top needs the extra `top` (textual); without it there is eventwatch status --watch")
    if not (sys.stdout.isatty() and sys.stdin.isatty()):
        raise ConfigError("top needs a terminal; elsewhere: eventwatch status")
    logger.remove()  # a line of the log would be one in the middle of the screen
    view = pkgutil.resolve_name("eventwatch.cli.top:TopView")
    async with _both(settings) as (store, engine):
        await view(store, engine, settings).run_async()


async def completion(arguments: argparse.Namespace, _: Settings) -> None:
    """`eventwatch completion`."""
    if find_spec("shtab") is None:
        raise ConfigError("completion needs the extra `completion` (shtab)")
    script = str(pkgutil.resolve_name("shtab:complete")(arguments.parser(), arguments.shell))
    # shtab takes `source <(...)` for being loaded from fpath, and would complete at once.
    script = script.replace("[[ $zsh_eval_context[-1] == eval ]]", "[[ $zsh_eval_context[-1] == (eval|file) ]]")
    print(script)  # noqa: T201


async def engines(arguments: argparse.Namespace, settings: Settings) -> None:
    """`eventwatch engines`."""
    async with database_url(settings) as url, open_store(url, settings.mongo_database) as store:
        records = ordered(await store.read_engines(MOST_ENGINES))
    if arguments.json:
        say(json.dumps([as_json(record) for record in records]))
    else:
        show_table(engine_table(records), width=WIDE)


async def forget(arguments: argparse.Namespace, settings: Settings) -> None:
    """`eventwatch engines forget`."""
    async with _both(settings) as (store, engine):
        record, count = await examine_forgetting(arguments.id, store, engine)
        say(describe(record, count))
        if not arguments.yes:
            if not sys.stdin.isatty():
                raise ConfigError("nothing is deleted: give --yes, or answer at a terminal")
            if (await asyncio.to_thread(input, "Delete them for good? [y/N] ")).strip().lower() not in {
                "y",
                "yes",
            }:
                raise EventwatchError("nothing is deleted")
        say(f"{await store.forget_engine(record.engine_id)} documents are deleted")


async def explain(arguments: argparse.Namespace, settings: Settings) -> None:
    """`eventwatch explain`."""
    async with _both(settings) as (store, engine):
        explanation = await explain_node(arguments.id, store, engine, settings)
    if arguments.json:
        say(json.dumps(explanation.as_json(), default=json_text))
        return
    for line in explanation.lines():
        say(line)


async def wait(arguments: argparse.Namespace, settings: Settings) -> None:
    """`eventwatch wait`."""
    async with _both(settings) as (store, engine):
        node_id = await _node_called(arguments.name, store, engine)
        if node_id is None and arguments.condition != "deleted":
            raise NodeGoneError(f"no document and no container is called {printable(arguments.name, NAMED)}")
        node = node_id and await wait_for(node_id, arguments.condition, arguments.timeout, engine=engine)
        if not node:
            say(f"{printable(arguments.name, NAMED)} has no document")
            return
        say(printable(f"{node.id[:12]} is {node.status}, health {node.health}, at {node.ip or '-'}:{node.port}"))


async def _node_called(name: str, store: Store, engine: DockerEngine) -> str | None:
    """The node with that id, beginning of an id, or name of its container. ConfigError when there are several."""
    if is_container_id(name):
        return name
    recorded = await store.find(name)
    try:
        named = await engine.resolve(name)
    except EngineError:  # it is away, or knows several containers, of which one is a node
        if recorded is None:
            raise
        return recorded.node_id
    if recorded and named and recorded.node_id != named:
        ids = f"{recorded.node_id[:12]} begins with it, {named[:12]} is called so"
        raise ConfigError(f"{printable(name, NAMED)}: two nodes go by it, give more of the id: {ids}")
    return recorded.node_id if recorded else named


async def replay(arguments: argparse.Namespace, settings: Settings) -> None:
    """`eventwatch replay`."""
    await replay_file(arguments, settings, database_url)


async def doctor(arguments: argparse.Namespace, settings: Settings) -> None:
    """`eventwatch doctor`."""
    if arguments.create_user:
        await _create_user(arguments.create_user, arguments.password_file, settings)
        return
    failed = 0
    findings = []
    async with database_url(settings) as url, closing(DockerEngine(settings)) as engine:
        async for finding in examine(settings, engine, url):
            findings.append(finding)
            failed += finding.failed
            if not arguments.json:
                say(str(finding))
    if arguments.json:
        say(json.dumps([asdict(finding) for finding in findings]))
    if failed:
        raise EventwatchError(f"{failed} of the above must be mended")


async def _create_user(name: str, password_file: Path | None, settings: Settings) -> None:
    """Make the user that a sidecar logs in as; waits for a database that is just starting."""
    password = await asyncio.to_thread(_read_password, password_file)
    database = settings.mongo_database
    async with database_url(settings) as url:
        deadline = asyncio.get_running_loop().time() + DATABASE_START
        while True:
            try:
                created = await create_user(url, database, name=name, password=password)
                break
            except StoreError as error:
                if error.permanent or asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(0.5)
    was_made = "created" if created else "is there already"
    say(f"User {name} {was_made}: may read and write database {database}, nothing else")


def _read_password(file: Path | None) -> str:
    try:
        if file is not None:
            password = file.read_text(encoding="utf-8").strip()
        elif sys.stdin.isatty():
            password = getpass("Password of the new user: ")
        else:
            password = sys.stdin.readline().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the password cannot be read: {error}") from None
    if not password:
        raise ConfigError("the new user's password is empty: give it on standard input, or name its file")
    return password


async def record(arguments: argparse.Namespace, settings: Settings) -> None:
    """`eventwatch record`."""
    await record_file(arguments, settings)


@asynccontextmanager
async def closing(engine: DockerEngine) -> AsyncIterator[DockerEngine]:
    """Close the engine's connections at the end of the block."""
    try:
        yield engine
    finally:
        await engine.close()
