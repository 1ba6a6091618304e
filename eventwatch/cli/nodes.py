"""What operators ask: which nodes are there, and why is this one as it is. Reads only, changes nothing.

Contract: a node is compared as the running eventwatch compares it, by the settings which that publishes beside its
lease; where they differ from those at hand, that is told. A node of another host is told as such: this engine
knows nothing of it. Text from outside is cleaned, and cut where it is shown on a terminal; what is piped is whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

from loguru import logger
from rich.console import Console
from rich.table import Table
from rich.text import Text

from eventwatch.cli.main import SHOWN_COLUMNS
from eventwatch.core.details import (
    Details,
    brief_row,
    details_of,
    end_on_record,
    end_reason,
    full_row,
    is_crash_loop,
    look_at_restarts,
)
from eventwatch.core.durations import about
from eventwatch.core.errors import ConfigError, EngineError, EventwatchError, StoreError
from eventwatch.core.facts import ENDED, STOPPING, Observation, Owner, Recorded
from eventwatch.core.policy import (
    AT_WORK,
    Ownership,
    Timeout,
    as_utc,
    claim_on,
    desired_fields,
    difference,
    idle_timeout_of,
    idleness,
    ownership,
    stop_timeout_of,
    why_not_to_stop,
)
from eventwatch.core.text import middle_cut, printable
from eventwatch.engine.protocol import Engine
from eventwatch.pipeline.members import Members
from eventwatch.pipeline.sweeper import CONCURRENCY
from eventwatch.settings.model import JUDGING, Settings
from eventwatch.store.changes import HISTORY_CHANGES
from eventwatch.store.connection import Store
from eventwatch.store.history import Named, PastChange, State, parse_name, read_changes, read_states, state_of

STATUS_COLOURS: Final = {
    "running": "green",
    "stopping": "yellow",
    "paused": "yellow",
    "exited": "red",
    "dead": "red",
}
#: Nodes that are listed when no engine says whose to list.
MOST: Final = 1000
#: Characters shown of one value on a terminal.
CELL: Final = 200
#: Changes that `explain` tells of.
CHANGES: Final = 10
#: How often a node is looked at again before it is said to disagree, and after how many seconds at most.
LOOKS: Final = 2
LOOK_AGAIN: Final = 1.0
#: What is said of a stop without a record of its cause.
STOPPED: Final = "eventwatch stops it"
#: Removed nodes of one name that are looked for.
NAMESAKES: Final = 20


@dataclass(frozen=True, slots=True)
class NodeReport:
    """A node as recorded, and as the engine sees it.

    `agrees` is None when the engine did not answer, or has no say, as the node is `elsewhere`: the host, or the
    engine's id, that has it. `differs` is what the engine says otherwise.
    """

    recorded: Recorded
    seen: Observation | None
    agrees: bool | None
    idle_left: float | None
    idle_reason: str
    limit: Timeout = field(default_factory=lambda: Timeout(0.0))
    elsewhere: str = ""
    differs: Mapping[str, Any] = field(default_factory=dict)
    past: State = field(default_factory=State)
    #: Seconds that the container is given to end by itself.
    grace: float = 0.0

    @property
    def details(self) -> Details | None:
        """The container as inspected; None when it was not."""
        return details_of(self.seen) if self.seen and self.seen.found else None

    @property
    def verdict(self) -> str:
        """Whether the engine agrees, and if not, what it says."""
        if self.elsewhere:
            return f"on {self.elsewhere}"
        if self.agrees is None:
            return "no answer"
        if self.agrees:
            return "yes"
        if self.seen is None or not self.seen.found:
            return "no: no such container"
        return "no: " + ", ".join(f"{name} {value or '-'}" for name, value in self.differs.items())

    @property
    def changed_at(self) -> datetime | None:
        """Since when the container runs, or has ended."""
        if self.seen is None:
            return None
        return self.seen.finished_at if self.seen.ending else self.seen.started_at

    @property
    def is_stopping(self) -> bool:
        """Whether eventwatch stops it, and it has not ended yet."""
        return self.recorded.status == STOPPING and self.seen is not None and self.seen.status in AT_WORK

    @property
    def crash_loop(self) -> bool:
        """Whether its restart policy starts it again and again, as far as one look tells."""
        if self.seen is None:
            return False
        started = self.seen.started_at
        ran = (datetime.now(UTC) - started).total_seconds() if started else None
        return is_crash_loop(look_at_restarts((), self.seen, now=0.0, since_start=ran), now=0.0)

    @property
    def _loop(self) -> str:
        count = self.seen.restart_count if self.seen else 0
        return f"crash loop, restarted {count} times by its restart policy" if self.crash_loop else ""

    @property
    def reason(self) -> str:
        """Why the container ended, or is not healthy, by the engine; and by the history who asked for it."""
        details, last = self.details, self.past.status
        if details is None:  # what was last on record is all that there is
            return last.reason if last and last.status == self.recorded.status else ""
        if details.ending:
            past = end_on_record(last, details)
            reason = end_reason(details.ending, ran=details.ran, asked=past[1] if past else "")
            return f"{self._loop}; {reason}" if self._loop else reason
        if self.is_stopping:
            why = f"{last.reason}; since {last.at:%H:%M:%S} UTC" if last and last.status == STOPPING else STOPPED
            return f"{why}, killed {about(self.grace)} after that if it has not ended by then"
        if self._loop:
            return self._loop
        return str(details.failures[0]) if details.failures else ""

    def as_json(self) -> dict[str, Any]:
        """For machines; `idle_left` in seconds, times as `datetime`."""
        row = asdict(self.recorded)
        row["id"] = row.pop("node_id")
        details = self.details
        return row | {
            "agrees": self.agrees,
            "verdict": self.verdict,
            "elsewhere": self.elsewhere or None,
            "idle_left": self.idle_left,
            "idle_reason": self.idle_reason,
            **(brief_row(details) if details else {}),
            "crash_loop": self.crash_loop,
            "reason": self.reason,
        }


# -- the settings in force ----------------------------------------------------------------------------------


async def settings_in_force(store: Store, engine_id: str, settings: Settings) -> Settings:
    """Ours, with those of the eventwatch that holds the engine's lease in their place; tells where they differ."""
    found = await store.settings_of_holder(engine_id) if engine_id else None
    if found is None:
        return settings
    host, theirs = found
    ours = settings.judging()
    different = {
        name: theirs[name]
        for name in JUDGING
        if name in theirs and theirs[name] != ours[name] and _fits(name, theirs[name], ours[name])
    }
    if not different:
        return settings
    words = ", ".join(f"{name} {_brief(value)} (here {ours[name]})" for name, value in different.items())
    logger.warning("The running eventwatch (host {}) has other settings, which are used: {}", _brief(host), words)
    return settings.model_copy(update=different)


def _fits(name: str, value: object, ours: object) -> bool:
    """Whether a published value is of the kind that the setting is."""
    if name == "register_label":  # may be absent on either side
        return value is None or isinstance(value, str)
    return isinstance(value, (int, float) if isinstance(ours, float) else type(ours))


# -- all nodes ----------------------------------------------------------------------------------------------


async def identity_of(engine: Engine) -> str:
    """The engine's id; empty while it does not answer."""
    try:
        return (await engine.identify()).id
    except EngineError:
        return ""


async def compare_nodes(store: Store, engine: Engine, settings: Settings, *, engine_id: str) -> list[NodeReport]:
    """Every node of this engine, by these settings; where it does not answer, of any engine, `MOST` of them."""
    slots = asyncio.Semaphore(CONCURRENCY)

    async def report(recorded: Recorded) -> NodeReport:
        async with slots:
            owner = owners.get(recorded.node_id)
            return await report_node(recorded, owner, engine, settings, engine_id=engine_id)

    documents = await _documents_of(engine_id, store, engine)
    owners = await store.read_owners(documents)
    reports = list(await asyncio.gather(*(report(node) for node in documents.values())))
    return await _with_their_past(store, await _look_again(reports, report, store, settings))


async def _look_again(
    reports: list[NodeReport], look: Callable[[Recorded], Awaitable[NodeReport]], store: Store, settings: Settings
) -> list[NodeReport]:
    """The same, but nodes that disagree only once they did at each of several looks: one that flaps may always.

    Each document is read anew, right before its inspection. Those that are gone by then are left out.
    """
    for _ in range(LOOKS):
        doubtful = [report.recorded.node_id for report in reports if report.agrees is False]
        if not doubtful:
            break
        await asyncio.sleep(min(LOOK_AGAIN, 2 * settings.settle_delay))
        again = await asyncio.gather(*(look(node) for node in (await store.read(doubtful)).values()))
        newer: dict[str, NodeReport | None] = dict.fromkeys(doubtful)
        newer |= {report.recorded.node_id: report for report in again}
        looked = (newer.get(report.recorded.node_id, report) for report in reports)
        reports = [report for report in looked if report]
    return reports


async def _with_their_past(store: Store, reports: list[NodeReport]) -> list[NodeReport]:
    """With what the history has of those that end or cannot be asked about; no matter if it cannot be read."""
    wanted = [
        report.recorded.node_id
        for report in reports
        if report.seen is None or not report.seen.found or report.seen.ending or report.is_stopping
    ]
    try:
        states = await read_states(store, wanted, limit=len(wanted)) if wanted else {}
    except StoreError as error:
        logger.warning("Who asked for the nodes' ends is not known: {}", error)
        return reports
    return [replace(report, past=states.get(report.recorded.node_id, report.past)) for report in reports]


async def _documents_of(engine_id: str, store: Store, engine: Engine) -> dict[str, Recorded]:
    try:
        if engine_id:
            owned, _ = await store.read_owned(engine_id)
            return await Members(engine, store).find(engine_id, owned=owned)
    except EngineError as error:
        logger.debug("The nodes are those of any engine: {}", error)
    return await store.read_some(MOST)


async def report_node(
    recorded: Recorded, owner: Owner | None, engine: Engine, settings: Settings, *, engine_id: str
) -> NodeReport:
    """One node, compared with an inspection of now."""
    others = bool(engine_id) and ownership(recorded, owner, engine_id=engine_id) is Ownership.OTHERS
    try:
        seen = await engine.inspect(recorded.node_id)
    except EngineError as error:
        seen, reason = None, str(error)
    if others and (seen is None or not seen.found):
        host = (owner.host if owner else None) or f"engine {(owner and owner.engine_id) or recorded.engine_id}"
        return NodeReport(recorded, None, None, None, "another host has it", elsewhere=printable(host, CELL))
    if seen is None:
        return NodeReport(recorded, None, None, None, reason)
    wanted = desired_fields(seen, node_port=settings.node_port, health_check=settings.health_check)
    differs = difference(recorded, wanted, claim=claim_on(seen, recorded.claim)) if seen.found else {}
    limit = idle_timeout_of(recorded.idle_timeout, seen.labels, settings.idle_timeout)
    idle = idleness(recorded, seen, now=datetime.now(UTC), timeout=limit.seconds, owner=owner)
    never = why_not_to_stop(seen, network=settings.node_network, label=settings.register_label)
    agrees, reason = seen.found and not differs, never if idle.left is not None and never else idle.reason
    left = None if idle.left is not None and never else idle.left
    grace = stop_timeout_of(seen.labels, settings.stop_timeout).seconds
    found = NodeReport(recorded, seen, agrees, left, reason, limit=limit, differs=differs, grace=grace)
    return replace(found, idle_left=None, idle_reason="it is being stopped") if found.is_stopping else found


# -- the table ----------------------------------------------------------------------------------------------

#: What can be shown of a node and sorted by: its text, and by what it sorts.
Column = tuple[Callable[[NodeReport], str], Callable[[NodeReport], Any]]


def _text(cell: Callable[[NodeReport], str]) -> Column:
    return cell, cell


def _address(report: NodeReport) -> str:
    return f"{report.recorded.ip}:{report.recorded.port}" if report.recorded.ip else "-"


def _moment(report: NodeReport) -> float:
    return report.changed_at.timestamp() if report.changed_at else 0.0


def _age(report: NodeReport) -> str:
    return about(max(0.0, datetime.now(UTC).timestamp() - _moment(report))) if report.changed_at else "-"


def _name(report: NodeReport) -> str:
    return (report.seen.name if report.seen else "") or report.past.name or "-"


def _image(report: NodeReport) -> str:
    return (report.seen.image if report.seen else "") or report.past.image or "-"


COLUMNS: Final[Mapping[str, Column]] = {
    "node": _text(lambda report: report.recorded.short_id),
    "id": _text(lambda report: report.recorded.node_id),
    "name": _text(_name),
    "image": _text(_image),
    "status": _text(lambda report: report.recorded.status or "-"),
    "age": (_age, lambda report: -_moment(report)),
    "health": _text(lambda report: report.recorded.health or "-"),
    "address": _text(_address),
    "idle": (
        lambda report: about(report.idle_left) if report.idle_left is not None else "-",
        lambda report: report.idle_left if report.idle_left is not None else float("inf"),
    ),
    "restarts": (
        lambda report: str(report.seen.restart_count) if report.seen else "-",
        lambda report: -report.seen.restart_count if report.seen else 1,
    ),
    "agrees": _text(lambda report: report.verdict),
    "reason": _text(lambda report: report.reason or "-"),
}


def select_nodes(
    reports: Iterable[NodeReport],
    *,
    unhealthy: bool = False,
    statuses: Sequence[str] = (),
    since: float | None = None,
    sort: str | None = None,
) -> list[NodeReport]:
    """Those that are unhealthy, of these statuses, and started or ended in the last `since` seconds; sorted."""
    horizon = datetime.now(UTC).timestamp() - since if since is not None else None
    found = [
        report
        for report in reports
        if (not unhealthy or (report.recorded.health == "unhealthy" and report.recorded.status not in ENDED))
        and (not statuses or report.recorded.status in statuses)
        and (horizon is None or _moment(report) >= horizon)
    ]
    return sorted(found, key=COLUMNS[sort][1]) if sort else found


#: Columns whose texts are cut where a terminal is narrow, and the characters that are left to them at least.
CUT: Final[Mapping[str, int]] = {"name": 16, "image": 10, "agrees": 6, "reason": 16}
#: Those that go there unless somebody asked for them, the first first; spaces between two columns.
DROPPED: Final = ("image", "address", "idle", "age")
GAP: Final = 2


def fit(natural: Mapping[str, int], width: int, *, may_go: Iterable[str] = ()) -> dict[str, int]:
    """How wide each column is on a terminal of this width; what is not in it has no room.

    `natural` is how wide it would be. Ids, states and addresses are never cut; if they alone take more, they do.
    """
    widths = dict(natural)

    def total(*, least: bool) -> int:
        sizes = (min(size, CUT.get(name, size)) if least else size for name, size in widths.items())
        return sum(sizes) + GAP * (len(widths) - 1)

    for name in may_go:
        if total(least=True) > width:
            widths.pop(name, None)
    while total(least=False) > width:
        longer = [name for name, least in CUT.items() if widths.get(name, 0) > least]
        if not longer:
            break
        widths[max(longer, key=widths.__getitem__)] -= 1
    return widths


def node_table(
    reports: Iterable[NodeReport], columns: Sequence[str], *, width: int, may_go: Iterable[str] = ()
) -> Table:
    """The node table for a terminal so many columns wide, a node a line; ids are never cut."""
    reports = list(reports)
    rows = [{name: printable(COLUMNS[name][0](report), CELL) for name in columns} for report in reports]
    widths = fit(
        {name: max(len(name), *(len(row[name]) for row in rows), 0) for name in columns}, width, may_go=may_go
    )
    missing = [name for name in columns if name not in widths]
    table = Table(
        title=f"Nodes at {datetime.now(UTC):%H:%M:%S} UTC",
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, GAP, 0, 0),
        caption=f"No room for {', '.join(missing)}: --columns shows them" if missing else None,
        caption_justify="left",
    )
    for name, size in widths.items():
        table.add_column(name, no_wrap=True, width=size, overflow="ellipsis")
    for report, row in zip(reports, rows, strict=True):
        styles = {
            "status": STATUS_COLOURS.get(report.recorded.status or "", "default"),
            "agrees": "red" if report.agrees is False else "",
        }
        # As texts: what is in brackets is no markup, whoever wrote it.
        table.add_row(*(Text(_cut(name, row[name], size), styles.get(name, "")) for name, size in widths.items()))
    return table


def _cut(name: str, text: str, size: int) -> str:
    return (
        middle_cut(text, size)
        if name in {"name", "image"}
        else printable(text, size - 1 if len(text) > size else None)
    )


def node_lines(reports: Iterable[NodeReport], columns: Sequence[str]) -> list[str]:
    """The node table for a pipe: whole texts in columns, two spaces apart."""
    rows = [list(columns), *([printable(COLUMNS[name][0](report)) for name in columns] for report in reports)]
    widths = [max(len(row[number]) for row in rows) for number in range(len(columns))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


class _Screen(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the command line, which knows what to end with; rich ends the program with 1."""
        raise BrokenPipeError


def is_terminal() -> bool:
    """Whether standard output is a terminal, or is to be treated like one (FORCE_COLOR)."""
    return _Screen().is_terminal


def show(reports: Sequence[NodeReport], columns: Sequence[str]) -> None:
    """Print the nodes: as a table to a terminal, as plain lines elsewhere."""
    screen = _Screen()
    if screen.is_terminal:
        print_whole(terminal_table(reports, columns), screen)
    else:
        print("\n".join(node_lines(reports, columns)), flush=True)  # noqa: T201


def print_whole(table: Table, screen: Console) -> None:
    """Print a table whose columns have widths, whole even if the terminal must wrap its lines."""
    screen.width = max(screen.width, sum((column.width or 0) + GAP for column in table.columns))
    screen.print(table)


def terminal_table(reports: Iterable[NodeReport], columns: Sequence[str]) -> Table:
    """The node table for this terminal."""
    may_go = DROPPED if tuple(columns) == SHOWN_COLUMNS else ()
    return node_table(reports, columns, width=_Screen().width, may_go=may_go)


def show_table(table: Table, *, width: int) -> None:
    """Print a table to standard output; where that is no terminal, so many columns wide."""
    screen = _Screen()
    if not screen.is_terminal:
        screen.width = width
    screen.print(table)


# -- one node -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Explanation:
    """All that is known of one node. `report` is None for one without a document."""

    node_id: str
    name: str
    image: str
    report: NodeReport | None
    owner: Owner | None
    changes: Sequence[PastChange]

    def as_json(self) -> dict[str, Any]:
        """For machines; times as `datetime`."""
        report = self.report
        details, seen = (report.details, report.seen) if report else (None, None)
        docker = brief_row(details) | full_row(details) | {"status": seen.status} if details and seen else None
        idle = report and {
            "left": report.idle_left,
            "reason": report.idle_reason,
            "limit": report.limit.seconds if report.limit.seconds != float("inf") else None,
            "source": report.limit.source,
        }
        return {
            "id": self.node_id,
            "name": self.name,
            "image": self.image,
            "document": report.as_json() if report else None,
            "docker": docker,
            "idle": idle,
            "owner": asdict(self.owner) if self.owner else None,
            "changes": [asdict(change) for change in self.changes],
        }

    def lines(self) -> list[str]:
        """For people, line by line."""
        if self.report is None:
            called = f" ({', '.join(filter(None, (self.name, self.image)))})" if self.name or self.image else ""
            return [f"Node {self.node_id}{called} has no document any more.", *_changes(self.changes)]
        report, recorded = self.report, self.report.recorded
        engine_id = (self.owner.engine_id if self.owner else None) or recorded.engine_id or "nobody yet"
        host = f" (host {_brief(self.owner.host)})" if self.owner and self.owner.host else ""
        return [
            f"Node      {recorded.node_id}",
            *([f"Container {self.name}, image {self.image}"] if self.name else []),
            f"Docker    {_engine_line(report)}",
            *([f"Why       {report.reason}"] if report.reason else []),
            f"Document  {_document_line(recorded)}",
            *_verdict_lines(report),
            f"Last request: {_request(recorded)}. Idle stop: {_idle(report)}.",
            f"Owner: engine {_brief(engine_id)}{host}, epoch {recorded.epoch or '-'}.",
            *_changes(self.changes),
        ]


async def explain_node(name: str, store: Store, engine: Engine, settings: Settings) -> Explanation:
    """All that is known of one node; `name` is an id, its beginning, or a container's name, also of one removed.

    Raises EventwatchError when nobody knows it, ConfigError when it stands for several.
    """
    found = await _look_up(name, store, engine)
    recorded = found.recorded
    if recorded is None:
        return await _explain_removed(name, found, store, engine)
    engine_id = await identity_of(engine)
    settings = await settings_in_force(store, engine_id, settings)
    owner = (await store.read_owners([recorded.node_id])).get(recorded.node_id)
    look = partial(report_node, owner=owner, engine=engine, settings=settings, engine_id=engine_id)
    report = await look(recorded)
    report = next(iter(await _look_again([report], look, store, settings)), report)
    changes = await read_changes(store, recorded.node_id, limit=HISTORY_CHANGES)
    report = replace(report, past=state_of(changes))
    details = report.details
    last = changes[0] if changes else None
    return Explanation(
        node_id=recorded.node_id,
        name=(details.name if details else "") or (last.name if last else ""),
        image=(details.image if details else "") or (last.image if last else ""),
        report=report,
        owner=owner,
        changes=changes[:CHANGES],
    )


@dataclass(frozen=True, slots=True)
class _Found:
    """What goes by a name: a document, else what the history has, and the engine's container (`node_id`).

    `trouble` is why the engine could not be asked.
    """

    recorded: Recorded | None
    node_id: str | None = None
    past: Named | None = None
    trouble: str = ""


async def _look_up(name: str, store: Store, engine: Engine) -> _Found:
    """Whose document it is by id or name. The history's names do where the engine has none, or is away.

    Of several removed nodes that had the name one after another it is the last.
    """
    node_id, trouble = None, ""
    recorded = await store.find(name)
    if recorded is None:
        try:
            node_id = await engine.resolve(name)
        except EngineError as error:
            trouble = str(error)
    if node_id:
        recorded = await store.find(node_id)
    rows = [] if recorded or not name else await store.find_history(name, limit=NAMESAKES)
    past = [row for row in map(parse_name, rows) if row]
    past = [row for row in past if row.name == name] or past
    if past and not node_id:
        documents = await store.read([row.node_id for row in past])
        past = [row for row in past if row.node_id in documents] or past
        recorded = documents.get(past[0].node_id)
    one_by_one = recorded is None and past and past[0].name == name
    if len(past) > 1 and not one_by_one:
        told = ", ".join(f"{row.node_id[:12]} ({row.name or 'no name'}, {row.at:%Y-%m-%d %H:%M})" for row in past)
        raise ConfigError(f"{printable(name, CELL)}: several nodes begin with it: {told}")
    if recorded is None and past:
        recorded = await store.find(past[0].node_id)  # says so if its document is an odd one
    if recorded:
        recorded = (await store.read([recorded.node_id])).get(recorded.node_id, recorded)  # with its claim
    elif trouble:
        logger.warning("Containers' names cannot be looked up: {}", trouble)
    return _Found(recorded, node_id, past[0] if past else None, trouble)


async def _explain_removed(name: str, found: _Found, store: Store, engine: Engine) -> Explanation:
    """What the history tells of a node without document."""
    past, node_id = found.past, found.node_id
    removed = past.node_id if past else node_id or name
    changes = await read_changes(store, removed, limit=CHANGES)
    if not changes:
        seen = _describe(await engine.inspect(node_id)) if node_id else "no container"
        raise EventwatchError(f"{name}: no document, {'Docker does not answer' if found.trouble else seen}")
    return Explanation(removed, past.name if past else "", past.image if past else "", None, None, changes)


def _engine_line(report: NodeReport) -> str:
    if report.elsewhere:
        return f"on another host: {report.elsewhere}"
    return _describe(report.seen) if report.seen else f"did not answer: {report.idle_reason}"


def _document_line(recorded: Recorded) -> str:
    health, address = _brief(recorded.health), _brief(recorded.ip or "-")
    return f"{_brief(recorded.status)}, health {health}, ip {address}, port {recorded.port}"


def _verdict_lines(report: NodeReport) -> list[str]:
    if report.agrees is None:
        return []
    if report.agrees:
        return ["They agree."]
    said = _brief(report.verdict.removeprefix("no: "))
    return [f"They DISAGREE (Docker: {said}); the next settle or sweep puts it right."]


def _request(recorded: Recorded) -> str:
    return f"{as_utc(recorded.last_req_time):%Y-%m-%d %H:%M:%S} UTC" if recorded.last_req_time else "never"


def _idle(report: NodeReport) -> str:
    if report.is_stopping:
        return "under way"
    limit = f" (limit {about(report.limit.seconds)} by {report.limit.source})" if report.limit.source else ""
    if report.idle_left:
        return f"in {about(report.idle_left)}, unless a request comes in{limit}"
    return f"due at the next sweep{limit}" if report.idle_left == 0 else f"no, {_brief(report.idle_reason)}"


def _describe(seen: Observation) -> str:
    if not seen.found:
        return "knows no such container"
    since = f", started {seen.started_at:%Y-%m-%d %H:%M:%S} UTC" if seen.started_at else ""
    ended = f", ended {seen.finished_at:%Y-%m-%d %H:%M:%S} UTC" if seen.ending and seen.finished_at else ""
    restarts = f", restarted {seen.restart_count} times by its policy" if seen.restart_count else ""
    return (
        f"{seen.status}, health {seen.health}, ip {seen.ip or '-'}{since}{ended}{restarts} ({_brief(seen.name)})"
    )


def _changes(changes: Sequence[PastChange]) -> list[str]:
    lines = [f"Last changes ({len(changes)}, newest first):" if changes else "No changes on record."]
    for change in changes:
        what = (
            "document deleted"
            if change.deleted
            else ", ".join(
                f"{_brief(name)} {_brief(change.old.get(name))} -> {_brief(value)}"
                for name, value in change.new.items()
                if name not in {"engine_id", "epoch"}
            )
            or "owner recorded"
        )
        delay = f", {change.latency * 1000:.1f} ms after the event" if change.latency is not None else ""
        times = f", {change.count} times since {change.at:%Y-%m-%d %H:%M:%S}" if change.count > 1 else ""
        why = f": {change.reason}" if change.reason else ""
        at = f"{change.until:%Y-%m-%d %H:%M:%S.%f}"
        lines.append(f"  {at} {what} (by {_brief(change.cause)}{delay}{times}){why}")
    return lines


def _brief(value: object) -> str:
    return printable(value, CELL)
