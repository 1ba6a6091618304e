"""The command line: parse, configure logging, run, and turn what went wrong into one line and an exit code.

Exit codes: 0 done, 1 failed, 2 bad configuration or usage; as ever in a shell 130 at Ctrl-C, 141 at a closed pipe.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import pkgutil
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn, TypeAlias

from eventwatch.cli.output import say
from eventwatch.core.durations import parse_duration
from eventwatch.core.errors import ConfigError, EventwatchError
from eventwatch.core.facts import CONDITIONS, STATUSES
from eventwatch.core.logs import LONGEST, configure_logging, tell_bug, tell_failure
from eventwatch.core.readiness import is_standby, summary
from eventwatch.core.text import printable
from eventwatch.core.version import eventwatch_version
from eventwatch.http.probe import ask_readiness
from eventwatch.settings.model import Settings, load_settings

SHELLS: Final = ("bash", "zsh")
#: The columns of `status`, and those that it shows unless told otherwise.
NODE_COLUMNS: Final = (
    "node",
    "id",
    "name",
    "image",
    "status",
    "age",
    "health",
    "address",
    "idle",
    "restarts",
    "agrees",
    "reason",
)
SHOWN_COLUMNS: Final = ("node", "name", "image", "status", "age", "health", "address", "idle", "agrees")
#: The fastest replay that still follows the clock.
FASTEST: Final = 1_000_000.0
Command: TypeAlias = Callable[[argparse.Namespace, Settings], Coroutine[Any, Any, None]]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `eventwatch` command."""
    as_json = os.environ.get("EVENTWATCH_LOG_FORMAT") == "json"  # until the settings are read
    try:
        arguments = _parser().parse_args(argv)
        settings = load_settings(arguments.env_file)
        as_json = settings.log_format == "json"
        configure_logging(settings.log_level, as_json=as_json)
        command = _imported(arguments.command)
        if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        gc.freeze()  # what was imported stays, and need not be looked through again and again
        gc.enable()
        asyncio.run(command(arguments, settings))
    except EventwatchError as error:
        tell_failure(str(error), as_json=as_json)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes nowhere at exit
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:  # noqa: BLE001 - the last place where it can be logged in one piece
        tell_bug(error, as_json=as_json)
        sys.exit(1)


def _imported(name: str) -> Command:
    """The command of that name, without what takes aiohttp longest: it makes a TLS context as it is imported.

    For which it reads all authorities that the machine trusts. Nobody uses it: engine/docker.py makes its own.
    """
    before = os.environ.get("SSL_CERT_FILE")
    os.environ["SSL_CERT_FILE"] = os.devnull
    try:
        command: Command = pkgutil.resolve_name(name)
    finally:
        del os.environ["SSL_CERT_FILE"]
        if before is not None:
            os.environ["SSL_CERT_FILE"] = before
    return command


class _Parser(argparse.ArgumentParser):
    """Cites wrong arguments in one harmless line."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message, LONGEST))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="eventwatch",
        description="Keeps the node documents of a ToolServerManager in MongoDB true to their Docker containers.",
        epilog="Settings are EVENTWATCH_* variables or lines of .env; `eventwatch config` prints them all. "
        "Exit codes: 0 done, 1 failed, 2 wrong settings or usage; 130 where Ctrl-C cuts one off.",
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"eventwatch {eventwatch_version()}",
        help="print the version and exit",
    )
    parser.add_argument(
        "--env-file", default=".env", metavar="FILE", help="read settings from FILE (default: .env)"
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, text: str, home: str = "eventwatch.cli.commands") -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(command=f"{home}:{name}")  # imported when it is called
        return sub

    add("run", "watch the engine and keep the documents true, until SIGTERM or Ctrl-C", "eventwatch.cli.run")
    sweep_parser = add("sweep", "inspect every node once, put its document right, and print the counts")
    sweep_parser.add_argument(
        "--dry-run", action="store_true", help="say what would be written, deleted and stopped; do none of it"
    )
    sweep_parser.add_argument(
        "--force",
        action="store_true",
        help="past the brakes: delete and stop however many there are of this engine's own nodes, and no others",
    )
    sweep_parser.add_argument("--json", action="store_true", help="print the counts as one JSON object")
    _add_status_options(add("status", "list the nodes, their idle time left, and whether the engine agrees"))
    add("top", "show the nodes on a full screen, renewed each second: sort, filter, and one node in full")
    explain_parser = add("explain", "tell what Docker and the document say of one node, and what changed it when")
    explain_parser.add_argument(
        "id", metavar="ID", type=_name, help="a container's id, the beginning of its id, or its name"
    )
    explain_parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    _add_engines_options(add("engines", "list every engine on record, who watches it, and how it is"))
    _add_wait_options(add("wait", "wait until a node is healthy, running, exited or deleted"))
    _add_record_options(add("record", "record events and inspections to a file for replays"))
    _add_replay_options(add("replay", "replay a recording into the database and compare it with the truth"))
    _add_doctor_options(
        add("doctor", "check engine, permissions, database and clocks: one line each, with the cure")
    )
    add("healthcheck", "for HEALTHCHECK: end with 0 if eventwatch runs here and is ready or standing by", __name__)
    add("config", "print every setting with its value, secrets masked", __name__)
    completion_parser = add("completion", "print a script that completes eventwatch's words in a shell")
    completion_parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help="bash or zsh")
    completion_parser.epilog = (
        "For this shell: source <(eventwatch completion SHELL); for each one: that line at the end of ~/.bashrc "
        "or, below compinit, ~/.zshrc. Needs the extra `completion`."
    )
    completion_parser.set_defaults(parser=_parser)
    return parser


def _add_status_options(parser: argparse.ArgumentParser) -> None:
    """Tell the parser of `status` what it takes."""
    parser.add_argument("--json", action="store_true", help="print a JSON list, on one line, instead of the table")
    parser.add_argument("--watch", action="store_true", help="renew it every second, until Ctrl-C")
    parser.add_argument("--unhealthy", action="store_true", help="only unhealthy nodes that have not ended")
    parser.add_argument(
        "--status",
        action="append",
        choices=STATUSES,
        metavar="STATUS",
        help=f"only nodes of this status; may be repeated: {', '.join(STATUSES)}",
    )
    parser.add_argument(
        "--since", type=_duration, metavar="TIME", help="only nodes that started or ended in this time, e.g. 10m"
    )
    parser.add_argument(
        "--sort",
        choices=NODE_COLUMNS,
        metavar="COLUMN",
        help="sort by a column: age, idle and restarts by size",
    )
    parser.add_argument(
        "--columns",
        type=_columns,
        default=SHOWN_COLUMNS,
        metavar="COLUMNS",
        help=f"which columns, with commas between: {', '.join(NODE_COLUMNS)} (default: {','.join(SHOWN_COLUMNS)})",
    )
    parser.epilog = (
        "Exit codes: 0 the engine agrees with each of them, 1 it does not, or does not answer. "
        "Nodes of other hosts do not count."
    )


def _columns(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in NODE_COLUMNS]:
        raise argparse.ArgumentTypeError(f"no column is called {unknown[0]!r}")
    return names


def _add_doctor_options(parser: argparse.ArgumentParser) -> None:
    """Tell the parser of `doctor` what it takes."""
    parser.add_argument("--json", action="store_true", help="print a JSON list, on one line, at the end")
    parser.add_argument(
        "--create-user",
        metavar="NAME",
        help="check nothing: make a database user who may read and write eventwatch's database and nothing else, "
        "as whoever EVENTWATCH_MONGO_URL or DB_USERNAME logs in",
    )
    parser.add_argument(
        "--password-file",
        type=Path,
        metavar="FILE",
        help="holds that user's password (default: one line of standard input)",
    )


def _add_engines_options(parser: argparse.ArgumentParser) -> None:
    """Tell the parser of `engines` what it takes."""
    parser.add_argument("--json", action="store_true", help="print a JSON list, on one line, instead of the table")
    actions = parser.add_subparsers(title="commands", metavar="COMMAND")
    text = "delete the documents of an engine that is gone for good, after saying how many and asking"
    forget = actions.add_parser("forget", help=text, description=text[0].upper() + text[1:] + ".")
    forget.add_argument("id", metavar="ID", help="the engine's whole id, as `eventwatch engines --json` has it")
    forget.add_argument("--yes", action="store_true", help="do not ask")
    forget.set_defaults(command="eventwatch.cli.commands:forget")


def _add_wait_options(parser: argparse.ArgumentParser) -> None:
    """Tell the parser of `wait` what it takes."""
    parser.add_argument(
        "name", metavar="NAME", type=_name, help="a container's id, the beginning of its id, or its name"
    )
    parser.add_argument(
        "--for",
        dest="condition",
        choices=CONDITIONS,
        default="healthy",
        metavar="STATE",
        help="healthy, running, exited or deleted (default: healthy)",
    )
    parser.add_argument(
        "--timeout", type=_duration, default=30.0, metavar="TIME", help="for how long, e.g. 2m (default: 30s)"
    )
    parser.epilog = "Exit codes: 0 it is so, 1 not in time, 3 it ended or has no document."


def _add_record_options(parser: argparse.ArgumentParser) -> None:
    """Tell the parser of `record` what it takes."""
    parser.add_argument(
        "file", metavar="FILE", type=Path, help="the recording, NAME.jsonl; the truth goes to NAME.expected.json"
    )
    parser.add_argument(
        "--duration", type=_duration, metavar="TIME", help="end after this time, e.g. 90s (default: at Ctrl-C)"
    )
    parser.add_argument("--force", action="store_true", help="overwrite a recording of that name")


def _add_replay_options(parser: argparse.ArgumentParser) -> None:
    """Tell the parser of `replay` what it takes."""
    parser.add_argument("file", metavar="FILE", type=Path, help="the recording (NAME.jsonl)")
    parser.add_argument(
        "--speed",
        type=_speed,
        default=1.0,
        metavar="N",
        help="N times as fast as recorded; 0: as fast as possible (default: 1)",
    )
    parser.add_argument(
        "--expect", type=Path, metavar="FILE", help="the truth to compare with (default: NAME.expected.json)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument(
        "--force",
        action="store_true",
        help="replay even if the database holds other nodes, which are left alone, or documents of this "
        "recording's nodes that no replay made, which are deleted",
    )
    parser.add_argument(
        "--tiers",
        type=int,
        choices=[1, 2, 3],
        default=3,
        metavar="N",
        help="1: hints only; 2: settling too; 3: sweeps too (default: 3)",
    )


def _name(text: str) -> str:
    if not text.strip():  # a script's variable that is not set
        raise argparse.ArgumentTypeError("it is empty")
    return text


def _duration(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:  # argparse shows the text of its own error only
        raise argparse.ArgumentTypeError(str(error)) from None


def _speed(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = -1.0
    if not 0 <= factor <= FASTEST:  # also refuses nan
        raise argparse.ArgumentTypeError(f"must be 0 (as fast as it can) or up to {FASTEST:.0f} times real time")
    return factor


async def healthcheck(_: argparse.Namespace, settings: Settings) -> None:
    """`eventwatch healthcheck`."""
    if settings.http_address is None:
        raise ConfigError(
            "EVENTWATCH_HTTP_LISTEN: is off, so health cannot be asked for; set it, e.g. 127.0.0.1:9471"
        )
    ready, reasons = ask_readiness(
        *settings.http_address, watched=settings.watched, certificate=settings.http_tls_cert_file
    )
    if not ready and not is_standby(reasons):
        raise EventwatchError("not ready: " + "; ".join(reasons))
    say(summary(ready, reasons))


async def config(_: argparse.Namespace, settings: Settings) -> None:
    """`eventwatch config`."""
    for name, value in settings.effective().items():
        say(f"{name}={value}")
