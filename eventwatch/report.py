"""What operators ask: which nodes are there, and why is this one as it is. Reads only, changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from eventwatch.engine import Engine
from eventwatch.errors import EngineError, EventwatchError
from eventwatch.history import PastChange, read_changes
from eventwatch.model import Observation, Owner, Recorded
from eventwatch.pipeline.members import Members
from eventwatch.policy import (
    as_utc,
    claim_on,
    desired_fields,
    difference,
    idle_timeout_of,
    idleness,
    why_not_to_stop,
)
from eventwatch.settings import Settings
from eventwatch.store import Store
from eventwatch.sweeper import CONCURRENCY
from eventwatch.text import printable

_COLOURS = {"running": "green", "stopping": "yellow", "paused": "yellow", "exited": "red", "dead": "red"}
#: Nodes that are listed when no engine says whose to list.
MOST: Final = 1000
#: Characters shown of one value.
CELL: Final = 200


@dataclass(frozen=True, slots=True)
class NodeReport:
    """A node as recorded, and as the engine sees it. `agrees` is None when the engine did not answer."""

    recorded: Recorded
    seen: Observation | None
    agrees: bool | None
    idle_left: float | None
    idle_reason: str

    def as_json(self) -> dict[str, Any]:
        """For machines; times in ISO 8601, `idle_left` in seconds."""
        row = asdict(self.recorded)
        row["id"] = row.pop("node_id")
        request = row["last_req_time"]
        row["last_req_time"] = as_utc(request).isoformat() if request else None
        return row | {"agrees": self.agrees, "idle_left": self.idle_left, "idle_reason": self.idle_reason}


async def report_nodes(store: Store, engine: Engine, settings: Settings) -> list[NodeReport]:
    """Every node of this engine; where it does not say who it is, of any engine, `MOST` of them."""
    slots = asyncio.Semaphore(CONCURRENCY)

    async def report(recorded: Recorded) -> NodeReport:
        async with slots:
            return await report_node(recorded, owners.get(recorded.node_id), engine, settings)

    documents = await _own_documents(store, engine)
    owners = await store.read_owners(documents)
    return list(await asyncio.gather(*(report(node) for node in documents.values())))


async def _own_documents(store: Store, engine: Engine) -> dict[str, Recorded]:
    try:
        engine_id = (await engine.identify()).id
        owned, _ = await store.read_owned(engine_id)
        return await Members(engine, store).find(engine_id, owned=owned)
    except EngineError:
        return await store.read_some(MOST)


async def report_node(recorded: Recorded, owner: Owner | None, engine: Engine, settings: Settings) -> NodeReport:
    """One node, compared with an inspection of now."""
    try:
        seen = await engine.inspect(recorded.node_id)
    except EngineError as error:
        return NodeReport(recorded, None, None, None, str(error))
    wanted = desired_fields(seen, node_port=settings.node_port, health_check=settings.health_check)
    agrees = seen.found and not difference(recorded, wanted, claim=claim_on(seen, recorded.claim))
    timeout = idle_timeout_of(recorded.idle_timeout, seen.labels, settings.idle_timeout).seconds
    idle = idleness(recorded, seen, now=datetime.now(UTC), timeout=timeout, owner=owner)
    never = why_not_to_stop(seen, network=settings.node_network, label=settings.register_label)
    if idle.left is not None and never:
        return NodeReport(recorded, seen, agrees, None, never)
    return NodeReport(recorded, seen, agrees, idle.left, idle.reason)


def node_table(reports: Iterable[NodeReport]) -> Table:
    """The node table for a terminal."""
    table = Table(title=f"Nodes at {datetime.now(UTC):%H:%M:%S} UTC", title_justify="left")
    for heading in ("node", "status", "health", "address", "idle left", "agrees"):
        table.add_column(heading, no_wrap=True)
    for report in reports:
        node = report.recorded
        colour = _COLOURS.get(node.status or "", "default")
        cells = (
            node.short_id,
            node.status,
            node.health,
            f"{node.ip}:{node.port}" if node.ip else "-",
            _left(report.idle_left) if report.idle_left is not None else "-",
            {True: "yes", False: "no", None: "no answer"}[report.agrees],
        )
        styles = ("", colour, "", "", "", "red" if report.agrees is False else "")
        # As texts: what is in brackets is no markup, whoever wrote it.
        table.add_row(*(Text(printable(cell, CELL), style) for cell, style in zip(cells, styles, strict=True)))
    return table


class _Screen(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the command line, which knows what to end with; rich ends the program with 1."""
        raise BrokenPipeError


def show(table: Table, *, width: int | None = None) -> None:
    """Print a table to standard output; where that is no terminal, so many columns wide."""
    screen = _Screen()
    if width is not None and not screen.is_terminal:
        screen.width = width
    screen.print(table)


async def explain_node(name: str, store: Store, engine: Engine, settings: Settings) -> list[str]:
    """All that is known of one node, line by line; `name` is an id, its beginning, or a container's name."""
    recorded = await store.find(name)
    if recorded is None:
        node_id = await engine.resolve(name)
        recorded = (await store.read([node_id])).get(node_id) if node_id else None
        if recorded is None and not (history := await read_changes(store, name, limit=10)):
            seen = _describe(await engine.inspect(node_id)) if node_id else "no container"
            raise EventwatchError(f"{name}: no document, {seen}")
        if recorded is None:
            return [f"Node {name} has no document any more.", *_changes(history)]
    owner = (await store.read_owners([recorded.node_id])).get(recorded.node_id)
    engine_id = (owner.engine_id if owner else None) or recorded.engine_id
    report = await report_node(recorded, owner, engine, settings)
    seen_text = _describe(report.seen) if report.seen else f"did not answer: {report.idle_reason}"
    verdict = {True: "They agree.", False: "They DISAGREE; the next settle or sweep puts it right.", None: ""}
    request = f"{as_utc(recorded.last_req_time):%Y-%m-%d %H:%M:%S} UTC" if recorded.last_req_time else "never"
    stop = "Idle stop: " + (
        f"in {_left(report.idle_left)}, unless a request comes in"
        if report.idle_left
        else "due at the next sweep" if report.idle_left == 0 else f"no, {report.idle_reason}"
    )  # fmt: skip
    health, address = _brief(recorded.health), _brief(recorded.ip or "-")
    return [
        f"Node      {recorded.node_id}",
        f"Docker    {seen_text}",
        f"Document  {_brief(recorded.status)}, health {health}, ip {address}, port {recorded.port}",
        *([verdict[report.agrees]] if verdict[report.agrees] else []),
        f"Last request: {request}. {stop}.",
        f"Owner: engine {_brief(engine_id or 'nobody yet')}, epoch {recorded.epoch or '-'}.",
        *_changes(await read_changes(store, recorded.node_id, limit=10)),
    ]


def _left(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _describe(seen: Observation) -> str:
    if not seen.found:
        return "knows no such container"
    since = f", started {seen.started_at:%Y-%m-%d %H:%M:%S} UTC" if seen.started_at else ""
    return f"{seen.status}, health {seen.health}, ip {seen.ip or '-'}{since} ({seen.name})"


def _changes(changes: list[PastChange]) -> list[str]:
    lines = [f"Last changes ({len(changes)}, newest first):" if changes else "No changes on record."]
    for change in changes:
        what = "document deleted" if change.deleted else ", ".join(
            f"{_brief(name)} {_brief(change.old.get(name))} -> {_brief(value)}"
            for name, value in change.new.items() if name not in {"engine_id", "epoch"}
        ) or "owner recorded"  # fmt: skip
        delay = f", {change.latency * 1000:.1f} ms after the event" if change.latency is not None else ""
        times = f", {change.count} times since {change.at:%Y-%m-%d %H:%M:%S}" if change.count > 1 else ""
        at = f"{change.until:%Y-%m-%d %H:%M:%S.%f}"
        lines.append(f"  {at} {what} (by {_brief(change.cause)}{delay}{times})")
    return lines


def _brief(value: object) -> str:
    return printable(value, CELL)
