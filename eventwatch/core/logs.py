"""What is logged, on standard error: for people, or as one flat JSON object per line.

Contract: each message is one line whatever names, documents and errors are in it, and shown, not obeyed, by a
terminal. Only a traceback takes more: for people its lines are indented, so that none can pass for a message; in
JSON it is the text `exception`. What the libraries log (aiohttp, asyncio, pymongo) comes out the same way.

Logging never waits for whoever reads standard error: a thread writes, and while nobody reads, what is beyond
`MOST_WAITING` characters is dropped, and the number told once somebody reads again. Not promised: that the last
lines of a process that is killed are written.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import math
import os
import sys
import threading
import traceback
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, TextIO

from loguru import logger

from eventwatch.core.text import printable

if TYPE_CHECKING:
    from loguru import Message, Record

#: Characters of a message, and of a traceback's line.
LONGEST: Final = 4000
#: Characters that wait to be written at most: some 10,000 lines.
MOST_WAITING: Final = 1_000_000
_LAST_WORDS_TIMEOUT: Final = 1.0  # seconds, at exit
_CONSOLE: Final = "<green>{time:HH:mm:ss.SSS}</green> <level>{level: <7}</level> {message}{extra[traceback]}\n"


def configure_logging(level: str, *, as_json: bool) -> None:
    """Log to standard error from this level on, and the warnings of the libraries too."""
    logger.remove()
    # diagnose=False: it would print the values of variables, and so secrets, below a traceback.
    logger.add(
        _Writer(sys.stderr),
        level=level,
        format=_as_json if as_json else _for_people,
        backtrace=False,
        diagnose=False,
    )
    for handler in [handler for handler in logging.root.handlers if isinstance(handler, _ToLoguru)]:
        logging.root.removeHandler(handler)
    logging.root.addHandler(_ToLoguru(logging.WARNING))
    logging.captureWarnings(True)


def use_standard_logging() -> None:
    """Give what eventwatch logs to the standard library's `logging`, for a host application that configures it.

    Loggers are named by module (`eventwatch.pipeline.writer`); the host's levels, handlers and formats hold.
    What is known of a change (node, field, old, new, cause) are attributes of the record. loguru's own default
    handler, which writes everything to standard error, is removed; handlers that the host gave loguru stay.
    """
    with contextlib.suppress(ValueError):  # removed already
        logger.remove(0)
    logger.add(_to_standard_logging, level=0, format="{message}", filter="eventwatch")


def _to_standard_logging(message: Message) -> None:
    told = message.record
    target, level = logging.getLogger(told["name"]), told["level"].no
    if not target.isEnabledFor(level):
        return
    failure = told["exception"]
    record = target.makeRecord(
        target.name,
        level,
        told["file"].path,
        told["line"],
        printable(told["message"], LONGEST),
        (),
        (failure.type, failure.value, failure.traceback) if failure and failure.type and failure.value else None,
        told["function"],
    )
    record.levelname = told["level"].name
    for name, value in _flat(told["extra"]).items():
        if not hasattr(record, name):
            setattr(record, name, value)
    target.handle(record)


def tell_failure(message: str, *, as_json: bool) -> None:
    """Tell what ended a command, on standard error: one line."""
    line = printable(message, LONGEST)
    logger.remove()  # what is logged already comes first
    writer = _Writer(sys.stderr)
    if as_json:
        logger.add(writer, format=_as_json, backtrace=False, diagnose=False)
        logger.error("{}", line)
        logger.remove()
    else:
        writer.write(f"eventwatch: {line}\n")
        writer.stop()


def tell_bug(error: Exception, *, as_json: bool) -> None:
    """Tell what nobody expected to end a command, on standard error, with the traceback."""
    configure_logging("ERROR", as_json=as_json)
    logger.opt(exception=error).critical("eventwatch has a fault: {}: {}", type(error).__name__, error)
    logger.remove()


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
    }
    row |= {f"{name}_" if name in row else name: value for name, value in _flat(record["extra"]).items()}
    if lines := _traceback(record):
        row["exception"] = "\n".join(lines)
    record["extra"]["json"] = json.dumps(row)
    return "{extra[json]}\n"


def _flat(extra: Mapping[str, Any]) -> dict[str, Any]:
    """What was bound to a message, as JSON has it."""
    return {
        name: value if value is None or _is_number(value) else printable(value, LONGEST)
        for name, value in extra.items()
        if name not in {"json", "traceback"}
    }


def _is_number(value: object) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def _traceback(record: Record) -> list[str]:
    exception = record["exception"]
    if exception is None or exception.value is None:
        return []
    text = "".join(traceback.format_exception(exception.type, exception.value, exception.traceback))
    return [printable(line, LONGEST) for line in text.rstrip().split("\n")]


class _Writer:
    """A stream that is written by a thread, so that `write` never waits."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._changed = threading.Condition()
        self._waiting: deque[str] = deque()
        self._size = 0
        self._dropped = 0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="eventwatch-log", daemon=True)
        self._thread.start()
        atexit.register(self.stop)

    def write(self, text: str) -> None:
        """Have a text written, or drop it if too much waits."""
        with self._changed:
            if self._size + len(text) > MOST_WAITING:
                self._dropped += 1
                return
            self._waiting.append(text)
            self._size += len(text)
            self._changed.notify()

    def isatty(self) -> bool:
        """Whether colours are seen."""
        return self._stream is not None and self._stream.isatty()

    def stop(self) -> None:
        """Write what waits, if somebody reads it, and end."""
        atexit.unregister(self.stop)
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(_LAST_WORDS_TIMEOUT)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                if not self._waiting:
                    return
                batch = "".join(self._waiting)
                self._waiting.clear()
            self._put(batch)
            # What waits is counted until it is written, or twice as much could wait.
            with self._changed:
                self._size -= len(batch)
                dropped, self._dropped = self._dropped, 0
            if dropped:
                logger.warning("{} messages are missing here: nobody read standard error", dropped)

    def _put(self, text: str) -> None:
        """Write past the stream's own buffer: its lock, held by a thread that waits, would break the exit."""
        if self._stream is None:  # closed before we began
            return
        try:
            try:
                number = self._stream.fileno()
            except (OSError, ValueError):  # a stream in memory
                self._stream.write(text)
                return
            left = text.encode(errors="backslashreplace")
            while left:
                left = left[os.write(number, left) :]
        except (OSError, ValueError):
            """Nobody will read it any more, and there is nowhere to tell it."""


class _ToLoguru(logging.Handler):
    """Passes what the standard library's `logging` is told."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.partition(".")[0] == "eventwatch":  # it comes from there
            return
        level = record.levelname if record.levelname in _LEVELS else "WARNING"
        try:
            text = record.getMessage()
        except Exception:  # noqa: BLE001 - a library's mistake, which its caller must not meet
            text = f"{record.msg} {record.args!r}"
        logger.bind(logger=record.name).opt(exception=record.exc_info).log(level, "{}", text)


_LEVELS: Final = frozenset({"DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"})
