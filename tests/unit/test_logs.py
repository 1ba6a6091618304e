"""Logs: one line per message for people and as JSON, whatever is in it."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

from eventwatch.cli.main import main
from eventwatch.core.logs import MOST_WAITING, configure_logging, tell_failure, use_standard_logging

FORGED = "a\x1b]0;title\x07\n18:00:00.000 INFO    forged \u202e\u2028<red>x</red>{extra}"
SHOWN = r"a\x1b]0;title\x07\n18:00:00.000 INFO    forged \u202e\u2028<red>x</red>{extra}"


class Errors:
    """What came to standard error."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self._text = ""

    def text(self) -> str:
        """Ends the logging, so that all is written."""
        logger.remove()
        self._text += self._capsys.readouterr().err
        return self._text

    def lines(self) -> list[str]:
        return self.text().splitlines()


@pytest.fixture
def errors(capsys: pytest.CaptureFixture[str]) -> Iterator[Errors]:
    before, showwarning = logging.root.handlers[:], warnings.showwarning
    yield Errors(capsys)
    logger.remove()
    logging.captureWarnings(False)
    logging.root.handlers[:] = before
    warnings.showwarning = showwarning


def fail() -> None:
    try:
        raise ValueError(FORGED)  # noqa: TRY301
    except ValueError:
        logger.exception("failed: {}", FORGED)


def rows(errors: Errors) -> list[dict[str, Any]]:
    return [json.loads(line) for line in errors.lines()]


def test_for_people_a_message_is_one_line(errors: Errors) -> None:
    configure_logging("INFO", as_json=False)
    logger.info("{}", FORGED)
    logger.info(FORGED)
    lines = errors.lines()
    assert [line.split(maxsplit=2)[2] for line in lines] == [SHOWN, SHOWN]


def test_for_people_no_line_of_a_traceback_can_pass_for_a_message(errors: Errors) -> None:
    configure_logging("INFO", as_json=False)
    fail()
    first, *lines = errors.lines()
    assert first.endswith(f"failed: {SHOWN}")
    assert lines[0] == "  Traceback (most recent call last):"
    assert all(line.startswith("  ") and line.isprintable() for line in lines)


def test_json_is_flat_with_what_was_bound_and_the_traceback(errors: Errors) -> None:
    configure_logging("INFO", as_json=True)
    logger.bind(node="n", field="ip", old=None, new=FORGED).info("moved {}", FORGED)
    fail()
    moved, failed = rows(errors)
    assert list(moved) == ["time", "level", "message", "node", "field", "old", "new"]
    assert (moved["message"], moved["old"], moved["new"]) == (f"moved {SHOWN}", None, SHOWN)
    assert list(failed) == ["time", "level", "message", "exception"]
    assert failed["exception"].startswith("Traceback (most recent call last):\n")


@pytest.mark.parametrize("as_json", [True, False])
def test_libraries_log_the_same_way(errors: Errors, as_json: bool) -> None:
    for _ in range(2):  # configured twice, told once
        configure_logging("INFO", as_json=as_json)
    logging.getLogger("asyncio").error("lost %s", FORGED)
    logging.getLogger("pymongo").info("of no interest")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn(FORGED, stacklevel=1)
    lines = errors.lines()
    assert len(lines) == 2
    if as_json:
        assert [(row["level"], row["logger"]) for row in rows(errors)] == [
            ("ERROR", "asyncio"),
            ("WARNING", "py.warnings"),
        ]
    assert "lost a" in lines[0]


@pytest.mark.parametrize("as_json", [True, False])
def test_what_ends_a_command_is_one_line(errors: Errors, as_json: bool) -> None:
    tell_failure(FORGED, as_json=as_json)
    if as_json:
        assert [(row["level"], row["message"]) for row in rows(errors)] == [("ERROR", SHOWN)]
    else:
        assert errors.text() == f"eventwatch: {SHOWN}\n"


def test_nobody_who_logs_waits_for_who_reads(errors: Errors, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    line, count = "x" * 1000, 3 * MOST_WAITING // 1000
    with monkeypatch.context() as patch, os.fdopen(writing, "w") as stream, os.fdopen(reading) as log:
        patch.setattr(sys, "stderr", stream)
        configure_logging("INFO", as_json=True)

        def tell() -> None:
            for number in range(count):
                logger.bind(number=number).info(line)

        caller = threading.Thread(target=tell, daemon=True)
        caller.start()
        caller.join(30)
        assert not caller.is_alive()
        read: list[dict[str, Any]] = []
        while not read or "missing" not in read[-1]["message"]:
            read.append(json.loads(log.readline()))
        logger.remove()
    *told, missing = read
    assert [row["number"] for row in told] == list(range(len(told)))
    assert missing["message"] == f"{count - len(told)} messages are missing here: nobody read standard error"
    assert len(told) * 1000 > MOST_WAITING / 2


def test_what_waits_is_written_at_the_end_if_somebody_reads(
    errors: Errors, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    with monkeypatch.context() as patch, os.fdopen(writing, "w") as stream:
        patch.setattr(sys, "stderr", stream)
        configure_logging("INFO", as_json=True)
        logger.info("one")
        tell_failure("two", as_json=False)
    with os.fdopen(reading) as log:
        one, two = log.read().splitlines()
    assert json.loads(one)["message"] == "one"
    assert two == "eventwatch: two"


def test_a_closed_standard_error_is_no_error(errors: Errors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    configure_logging("INFO", as_json=False)
    logger.info("to nobody")
    tell_failure("to nobody", as_json=False)


def test_a_host_gets_it_in_the_standard_librarys_logging(
    errors: Errors, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    logger.remove()
    use_standard_logging()
    caplog.set_level("INFO", "eventwatch")
    ours = logger.patch(lambda record: record.__setitem__("name", "eventwatch.pipeline.reconciler"))
    ours.bind(node="n", old=None, new=FORGED, name="x").success("moved {}", FORGED)
    ours.debug("below the host's level")
    logger.info("of the host's own")
    try:
        raise ValueError(FORGED)  # noqa: TRY301
    except ValueError:
        ours.exception("failed")
    moved, failed = caplog.records
    assert (moved.name, moved.levelname, moved.getMessage()) == (
        "eventwatch.pipeline.reconciler",
        "SUCCESS",
        f"moved {SHOWN}",
    )
    assert vars(moved)["new"] == SHOWN
    assert failed.exc_info
    assert failed.exc_info[0] is ValueError
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("as_json", [True, False])
def test_a_fault_of_ours_is_logged_in_one_piece(
    errors: Errors, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, as_json: bool
) -> None:
    def broken(*_: object) -> Any:
        raise ValueError(FORGED)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVENTWATCH_LOG_FORMAT", "json" if as_json else "console")
    monkeypatch.setattr("eventwatch.cli.main.config", broken)
    with pytest.raises(SystemExit) as ended:
        main(["config"])
    assert ended.value.code == 1
    if as_json:
        (row,) = rows(errors)
        assert row["message"] == f"eventwatch has a fault: ValueError: {SHOWN}"
        assert "in broken" in row["exception"]
    else:
        first, *others = errors.lines()
        assert first.endswith(SHOWN)
        assert all(line.startswith("  ") for line in others)
