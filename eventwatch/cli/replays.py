"""The commands `record` and `replay`: their options, what they print, and when they fail.

`replay` ends well only when every document says the truth at the end, or when there was no truth to compare
with. Whatever is wrong with the files is found before a database is even looked for.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from typing import Any, Final

from loguru import logger
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from eventwatch.cli.output import say
from eventwatch.core.errors import ConfigError, EventwatchError
from eventwatch.core.text import printable
from eventwatch.replay.player import Divergence, Replay, Report, Tier, open_replay
from eventwatch.replay.recorder import Recorder
from eventwatch.replay.recording import expected_path, read_expected, read_recording
from eventwatch.settings.model import Settings

PERCENTILES: Final = (50, 90, 99)
#: Modules that log a line for each change or end.
_LOUD: Final = ("eventwatch.pipeline.writer", "eventwatch.core.reasons")


# -- record -------------------------------------------------------------------------------------------------


async def record_file(arguments: argparse.Namespace, settings: Settings) -> None:
    """`eventwatch record`: until Ctrl-C or SIGTERM, or for `--duration`."""
    beside = expected_path(arguments.file)
    if not arguments.force and (there := next((p for p in (arguments.file, beside) if p.is_file()), None)):
        raise ConfigError(f"{there}: is there already: choose another name, or use --force to overwrite it")
    recorder = Recorder(settings, arguments.file)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, _stop, recorder, number)
    timer = None if arguments.duration is None else loop.call_later(arguments.duration, recorder.stop)
    logger.info("Recording to {} {}", arguments.file, "for a while" if timer else "until Ctrl-C")
    try:
        counts = await recorder.run()
    finally:
        if timer:
            timer.cancel()
    logger.info(
        "Recorded {} events and {} inspections to {}, and the truth to {}",
        counts.get("event", 0),
        counts.get("inspect", 0),
        arguments.file,
        beside.name,
    )


def _stop(recorder: Recorder, number: signal.Signals) -> None:
    logger.info("{}: completing the recording; once more to give it up", number.name)
    recorder.stop()
    for again in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().remove_signal_handler(again)


# -- replay -------------------------------------------------------------------------------------------------


async def replay_file(
    arguments: argparse.Namespace,
    settings: Settings,
    database: Callable[[Settings], AbstractAsyncContextManager[str]],
) -> None:
    """`eventwatch replay`. Raises EventwatchError when a document diverges."""
    recording = read_recording(arguments.file)
    beside = expected_path(arguments.file)
    expected: Path | None = arguments.expect or (beside if beside.exists() else None)
    truth = read_expected(expected, recording) if expected else None
    tiers = Tier(arguments.tiers)
    async with (
        database(settings) as url,
        open_replay(
            recording,
            settings,
            url=url,
            truth=truth,
            speed=arguments.speed,
            tiers=tiers,
            force=arguments.force,
            hurry=True,
        ) as running,
    ):
        with _quietly(settings), _progress(running):
            report = await running.finish()
    if arguments.json:
        origin = {
            "recording": str(arguments.file),
            "expected": str(expected) if expected else None,
            "speed": arguments.speed,
            "tiers": int(tiers),
        }
        say(json.dumps(origin | as_json(report)))
    else:
        for line in as_lines(report):
            say(line)
    if wrong := report.wrong:
        raise EventwatchError(f"{wrong} of {report.containers} documents diverge from {expected}")


@contextmanager
def _quietly(settings: Settings) -> Iterator[None]:
    """Leave out the line that is logged for each change, unless details are wanted."""
    if settings.log_level in {"TRACE", "DEBUG"}:
        yield
        return
    for module in _LOUD:
        logger.disable(module)
    try:
        yield
    finally:
        for module in _LOUD:
            logger.enable(module)


@contextmanager
def _progress(running: Replay) -> Iterator[None]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(
            escape(printable(running.recording.path.name, 80)), total=running.recording.events
        )
        running.engine.listeners.append(lambda _: progress.advance(task))
        yield


def as_json(report: Report) -> dict[str, Any]:
    """All that is known of a replay, for machines."""
    return {
        "containers": report.containers,
        "recorded_seconds": report.recorded_seconds,
        "seconds": report.seconds,
        "events": report.events,
        "events_per_second": report.events_per_second,
        "latency_ms": {f"p{percent}": _milliseconds(report, percent) for percent in PERCENTILES},
        "divergences": _listed(report.divergences),
        "divergences_before_final_sweep": _listed(report.before_sweep),
        "drift": report.drift,
        "sweep_corrections": report.sweep_corrections,
    }


def _listed(divergences: list[Divergence] | None) -> list[dict[str, str]] | None:
    if divergences is None:
        return None
    return [{"id": d.node_id, "field": d.field, "expected": d.expected, "found": d.found} for d in divergences]


def _milliseconds(report: Report, percent: int) -> float | None:
    seconds = report.percentile(percent)
    return None if seconds is None else round(seconds * 1000, 3)


def as_lines(report: Report) -> Iterator[str]:
    """The same for people: each divergence, then the summary."""
    for divergence in report.divergences or ():
        yield str(divergence)
    yield (
        f"{report.events} events of {report.containers} containers, {report.recorded_seconds:.1f} s recorded: "
        f"{report.seconds:.2f} s, {report.events_per_second:.0f} events/s"
    )
    if report.latencies:
        values = (f"p{percent} {_milliseconds(report, percent)} ms" for percent in PERCENTILES)
        yield f"From event to acknowledged write: {', '.join(values)}"
    yield f"Drift: {len(report.drift)} documents that only the final sweep put right"
    if report.divergences is None:
        yield "Divergence: unknown, there is no expected file beside the recording"
    else:
        yield f"Divergence: {report.wrong} of {report.containers} documents"


# -- arguments ----------------------------------------------------------------------------------------------
