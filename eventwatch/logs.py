"""What is logged, on standard error: for people, or as one flat JSON object per line.

Contract: each message is one line whatever names, documents and errors are in it, and shown, not obeyed, by a
terminal. Only a traceback takes more: for people its lines are indented, so that none can pass for a message; in
JSON it is the text `exception`. What the libraries log (aiohttp, asyncio, pymongo) comes out the same way.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from loguru import logger

from eventwatch.text import printable

if TYPE_CHECKING:
    from loguru import Record

#: Characters of a message, and of a traceback's line.
LONGEST: Final = 4000
_CONSOLE: Final = "<green>{time:HH:mm:ss.SSS}</green> <level>{level: <7}</level> {message}{extra[traceback]}\n"


def configure_logging(level: str, *, as_json: bool) -> None:
    """Log to standard error from this level on, and the warnings of the libraries too."""
    logger.remove()
    # diagnose=False: it would print the values of variables, and so secrets, below a traceback.
    logger.add(
        sys.stderr, level=level, format=_as_json if as_json else _for_people, backtrace=False, diagnose=False
    )
    for handler in [handler for handler in logging.root.handlers if isinstance(handler, _ToLoguru)]:
        logging.root.removeHandler(handler)
    logging.root.addHandler(_ToLoguru(logging.WARNING))
    logging.captureWarnings(True)


def tell_failure(message: str, *, as_json: bool) -> None:
    """Tell what ended a command, on standard error: one line."""
    line = printable(message, LONGEST)
    if as_json:
        logger.remove()
        logger.add(sys.stderr, format=_as_json, backtrace=False, diagnose=False)
        logger.error("{}", line)
    else:
        print(f"eventwatch: {line}", file=sys.stderr)  # noqa: T201 - the command's one line


def _for_people(record: Record) -> str:
    record["message"] = printable(record["message"], LONGEST)
    lines = _traceback(record)
    record["extra"]["traceback"] = "".join(f"\n  {line}" for line in lines)
    return _CONSOLE


def _as_json(record: Record) -> str:
    row: dict[str, Any] = {
        "time": record["time"].isoformat(timespec="milliseconds"),
        "level": record["level"].name,
        "message": printable(record["message"], LONGEST),
        **_flat(record["extra"]),
    }
    if lines := _traceback(record):
        row["exception"] = "\n".join(lines)
    record["extra"]["json"] = json.dumps(row)
    return "{extra[json]}\n"


def _flat(extra: Mapping[str, Any]) -> dict[str, Any]:
    """What was bound to a message, as JSON has it."""
    return {
        name: value if value is None or isinstance(value, (bool, int, float)) else printable(value, LONGEST)
        for name, value in extra.items()
        if name not in {"json", "traceback"}
    }


def _traceback(record: Record) -> list[str]:
    exception = record["exception"]
    if exception is None or exception.value is None:
        return []
    text = "".join(traceback.format_exception(exception.type, exception.value, exception.traceback))
    return [printable(line, LONGEST) for line in text.rstrip().split("\n")]


class _ToLoguru(logging.Handler):
    """Passes what the standard library's `logging` is told."""

    def emit(self, record: logging.LogRecord) -> None:
        level = record.levelname if record.levelname in _LEVELS else "WARNING"
        logger.bind(logger=record.name).opt(exception=record.exc_info).log(level, "{}", record.getMessage())


_LEVELS: Final = frozenset({"DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"})
