"""The command line: parse, configure logging, run, and turn what went wrong into one line and an exit code.

Exit codes: 0 done, 1 failed, 2 bad configuration or usage.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from loguru import logger
from rich.console import Console
from rich.live import Live

from eventwatch.app import Application, eventwatch_version
from eventwatch.doctor import examine
from eventwatch.embedded import EmbeddedMongo, running_url
from eventwatch.engine import DockerEngine
from eventwatch.errors import ConfigError, EventwatchError
from eventwatch.playback import add_record_options, add_replay_options, record_file, replay_file
from eventwatch.report import explain_node, node_table, report_nodes
from eventwatch.settings import EMBEDDED, Settings, load_settings
from eventwatch.store import Store, open_store
from eventwatch.sweeper import one_off_sweeper
from eventwatch.web import ask_readiness, is_standby

_CONSOLE = "<green>{time:HH:mm:ss.SSS}</green> <level>{level: <7}</level> {message}"
Command = Callable[[argparse.Namespace, Settings], Awaitable[None]]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `eventwatch` command."""
    arguments = _parser().parse_args(argv)
    try:
        settings = load_settings(arguments.env_file)
        configure_logging(settings)
        asyncio.run(arguments.command(arguments, settings))
    except EventwatchError as error:
        print(f"eventwatch: {error}", file=sys.stderr)  # noqa: T201 - the command's one line
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="eventwatch",
        description="Keeps ToolServer node documents true to their containers.",
        epilog="Settings come from EVENTWATCH_* variables and .env; `eventwatch config` shows them all.",
    )
    parser.add_argument("--version", action="version", version=f"eventwatch {eventwatch_version()}")
    parser.add_argument(
        "--env-file", default=".env", metavar="FILE", help="read settings from FILE (default: .env)"
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(command=command)
        return sub

    add("run", run, "watch the engine and keep the documents true until stopped")
    sweep_parser = add("sweep", sweep, "check every node once and print what was changed")
    sweep_parser.add_argument("--dry-run", action="store_true", help="say what would be changed, change nothing")
    sweep_parser.add_argument(
        "--force", action="store_true", help="delete documents whatever engine is on record as their owner"
    )
    status_parser = add("status", status, "show the nodes: status, health, address, idle time left")
    status_parser.add_argument("--json", action="store_true", help="print a JSON list")
    status_parser.add_argument("--watch", action="store_true", help="keep showing, until Ctrl-C")
    explain_parser = add("explain", explain, "tell all that is known of one node, and why it is as it is")
    explain_parser.add_argument("id", metavar="ID", help="id, beginning of an id, or container name")
    add_record_options(add("record", record_file, "record what the engine says, for replays"))
    add_replay_options(add("replay", replay, "replay a recording into the database and compare with the truth"))
    add("doctor", doctor, "check all that is needed: engine, permissions, database, clocks")
    add("healthcheck", healthcheck, "exit 0 if the running eventwatch is ready or standing by (for HEALTHCHECK)")
    add("config", config, "print the effective settings, secrets masked")
    return parser


def configure_logging(settings: Settings) -> None:
    """Log to standard error, for people or as one JSON object per line."""
    logger.remove()
    as_json = settings.log_format == "json"
    # diagnose=False: it would print the values of variables, and so secrets, below a traceback.
    logger.add(
        sys.stderr,
        level=settings.log_level,
        format="{message}" if as_json else _CONSOLE,
        serialize=as_json,
        backtrace=False,
        diagnose=False,
    )


async def run(_: argparse.Namespace, settings: Settings) -> None:
    """`eventwatch run`."""
    app = Application(settings)
    loop = asyncio.get_running_loop()

    def stop(number: signal.Signals) -> None:
        logger.info("{}: finishing what is pending; once more to exit at once", number.name)
        app.stop()
        for again in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(again, os._exit, 128 + again)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    loop.add_signal_handler(signal.SIGHUP, app.sweep_now)
    await app.run()


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
        async with open_store(url, settings.mongo_database), one_off_sweeper(engine, settings) as sweeper:
            report = await sweeper.sweep(force=arguments.force)
    say(f"{'Dry run: ' if settings.dry_run else ''}{report}")
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
        if arguments.json:
            reports = await report_nodes(store, engine, settings)
            say(json.dumps([report.as_json() for report in reports]))
        elif not arguments.watch:
            Console().print(node_table(await report_nodes(store, engine, settings)))
        else:
            with Live(node_table([]), auto_refresh=False) as live:
                while True:
                    live.update(node_table(await report_nodes(store, engine, settings)), refresh=True)
                    await asyncio.sleep(1.0)


async def explain(arguments: argparse.Namespace, settings: Settings) -> None:
    """`eventwatch explain`."""
    async with _both(settings) as (store, engine):
        for line in await explain_node(arguments.id, store, engine, settings):
            say(line)


async def replay(arguments: argparse.Namespace, settings: Settings) -> None:
    """`eventwatch replay`."""
    await replay_file(arguments, settings, database_url)


async def doctor(_: argparse.Namespace, settings: Settings) -> None:
    """`eventwatch doctor`."""
    failed = 0
    async with database_url(settings) as url, closing(DockerEngine(settings)) as engine:
        async for finding in examine(settings, engine, url):
            say(str(finding))
            failed += finding.failed
    if failed:
        raise EventwatchError(f"{failed} of the above must be mended")


async def healthcheck(_: argparse.Namespace, settings: Settings) -> None:
    """`eventwatch healthcheck`."""
    if settings.http_address is None:
        raise ConfigError(
            "EVENTWATCH_HTTP_LISTEN: is off, so health cannot be asked for; set it, e.g. 127.0.0.1:9471"
        )
    reasons = await ask_readiness(*settings.http_address)
    if reasons and not is_standby(reasons):
        raise EventwatchError("not ready: " + "; ".join(reasons))
    say(reasons[0] if reasons else "ready")


async def config(_: argparse.Namespace, settings: Settings) -> None:
    """`eventwatch config`."""
    for name, value in settings.effective().items():
        say(f"{name}={value}")


def say(line: str) -> None:
    """Print one line of a command's output; what is logged goes to standard error."""
    print(line, flush=True)  # noqa: T201


@asynccontextmanager
async def closing(engine: DockerEngine) -> AsyncIterator[DockerEngine]:
    """Close the engine's connections at the end of the block."""
    try:
        yield engine
    finally:
        await engine.close()
