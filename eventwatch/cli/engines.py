"""What operators ask of a fleet: which engines there are, how they are, and whether a dead one may be forgotten.

Contract of `forget`: deletes the documents of one engine that nobody watches, and nothing else; never those of an
engine that lives, that has a live lease or a standby, that showed a sign of life lately, that never had a watcher
(its manager may use the checker functions alone), or of one's own. A
document that another engine has taken over meanwhile stays, and so does all that a watcher which comes back in the
middle of it has stamped anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Final

from rich.table import Table
from rich.text import Text

from eventwatch.core.errors import ConfigError
from eventwatch.core.text import printable
from eventwatch.engine.protocol import Engine
from eventwatch.pipeline.fleet import SILENCE, state_of
from eventwatch.store.nodes import EngineRecord, Store

_COLOURS: Final = {"ready": "green", "unready": "red", "unwatched": "", "away": "yellow", "dead": "red"}
#: Characters shown of one value.
CELL: Final = 60


def engine_table(records: Iterable[EngineRecord]) -> Table:
    """The engines for a terminal."""
    table = Table(title="Engines", title_justify="left")
    for heading in ("host", "engine", "state", "nodes", "seen", "sweep", "drift", "p50 / p99", "version", "why"):
        table.add_column(heading, no_wrap=heading != "why")
    for record in records:
        state = state_of(record)
        standbys = f" +{len(record.standbys)}" if record.standbys else ""
        cells = (
            record.host + standbys,
            record.engine_id[:12],
            state,
            ", ".join(f"{count} {status}" for status, count in record.nodes.items()) or "-",
            ago(record.age),
            ago(record.sweep_age),
            "-" if record.drift is None else str(record.drift),
            f"{_milliseconds(record.p50)} / {_milliseconds(record.p99)}",
            record.version,
            "; ".join(record.reasons),
        )
        styles = ("", "", _COLOURS[state], *[""] * 7)
        # As texts: what is in brackets is no markup, whoever wrote it.
        table.add_row(*(Text(printable(cell, CELL), style) for cell, style in zip(cells, styles, strict=True)))
    return table


async def examine_forgetting(engine_id: str, store: Store, engine: Engine) -> tuple[EngineRecord, int]:
    """What is on record of an engine that may be forgotten, and how many documents would go.

    Raises ConfigError for one that may not, EngineError where our own does not say who it is.
    """
    if (await engine.identify()).id == engine_id:
        raise ConfigError("that is the engine which these settings name: its documents are kept true")
    record = await store.read_engine(engine_id)
    count = await store.count_to_forget(engine_id)
    if record is None and not count:
        raise ConfigError(f"no engine {printable(engine_id, CELL)} is on record: `eventwatch engines` lists them")
    if record is not None and record.engine_id != engine_id:
        raise ConfigError(
            f"what is on record of engine {printable(engine_id, CELL)} names another: look into NodeChecker"
        )
    if record is not None and (record.alive or record.standbys):
        raise ConfigError(f"engine {printable(engine_id, CELL)} is watched by {printable(_watcher(record), CELL)}")
    if record is None or state_of(record) == "unwatched":
        raise ConfigError(
            f"engine {printable(engine_id, CELL)} had no watcher that is on record, and its manager may keep its "
            f"documents by itself: nothing is deleted ({count} documents)"
        )
    if state_of(record) != "dead":
        raise ConfigError(
            f"engine {printable(engine_id, CELL)} was seen {ago(record.age)} ago, and may just be restarting: "
            f"wait until that is {timedelta(seconds=SILENCE)}"
        )
    return record, count


def describe(record: EngineRecord, count: int) -> str:
    """What would be forgotten, in a line."""
    host = printable(record.host or "unknown", CELL)
    seen = f"last seen {ago(record.age)} ago" if record.age is not None else "never seen"
    return f"Engine {printable(record.engine_id, CELL)} (host {host}, {seen}): {count} documents would be deleted"


def ago(seconds: float | None) -> str:
    """A duration for people."""
    return "-" if seconds is None else str(timedelta(seconds=round(seconds)))


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.0f} ms"


def _watcher(record: EngineRecord) -> str:
    return record.host if record.alive else record.standbys[0]
