"""`eventwatch top`: every node on a full screen, renewed each second, and one of them in full.

Contract: once a second the documents of this engine are read, whatever is shown; of nodes that changed also what
the history has of their last states, for reasons. Every few seconds one list of the engine's containers gives
names, images and labels, and tells which documents it disagrees with: only twice in a row counts, as a list may be
of a moment ago. Only the selected node is inspected. While the database or the engine is away, what was read last
stays, and the first line tells so. Nothing is ever written.

Not promised: more rows than `MOST_ROWS`; the filter finds among all.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from time import monotonic
from typing import Any, ClassVar, Final

from rich.text import Text
from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.widgets import DataTable, Footer, Input, Static

from eventwatch.cli.nodes import CUT, STATUS_COLOURS, explain_node, identity_of
from eventwatch.core.durations import about
from eventwatch.core.errors import EngineError, EventwatchError
from eventwatch.core.facts import ENDED, STOPPING, Recorded
from eventwatch.core.listing import Listed
from eventwatch.core.policy import as_utc, idle_timeout_of, recorded_idleness
from eventwatch.core.text import middle_cut, printable
from eventwatch.engine.docker import DockerEngine
from eventwatch.settings.model import Settings
from eventwatch.store.connection import Store
from eventwatch.store.history import State, read_states

#: Seconds between two reads of the documents, and of the selected node.
RENEWED: Final = 1.0
#: Rows that are shown at once.
MOST_ROWS: Final = 1000
#: Nodes whose histories are asked for at once.
HISTORIES: Final = 1000
#: Seconds between two lists of the containers; at least so many times as long as one takes.
LISTED: Final = 5.0
REST: Final = 20
#: Seconds for which a node counts as restarting that runs between two restarts.
RESTARTED: Final = 60.0
#: Columns that the arrow keys move the table by.
SIDEWAYS: Final = 16
#: How often the history of a node is read after a change of it.
LOOKS: Final = 5
#: Characters of a cell.
CELL: Final = 60


#: What may be wrong with a node, the worst first, and how the first line counts it.
PROBLEMS: Final[Mapping[str, str]] = {
    "out of memory": "out of memory",
    "died": "died",
    "restarting": "restarting",
    "unhealthy": "unhealthy",
    "disagrees": "disagree",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A node as it is shown: `changed` is when its status came, `requested` when its last request did.

    `agrees` is what the engine says of the status: `yes`, `no: ...`, or nothing where it has not been asked yet.
    """

    node_id: str
    short_id: str
    name: str = ""
    image: str = ""
    status: str = ""
    health: str = ""
    address: str = ""
    agrees: str = ""
    problem: str = ""
    changed: datetime | None = None
    requested: datetime | None = None
    idle_left: float | None = None
    reason: str = ""

    @property
    def unhealthy(self) -> bool:
        """Whether it has not ended, and its health check fails."""
        return self.health == "unhealthy" and self.status not in ENDED

    def cells(self) -> tuple[str, ...]:
        """Its texts, by `HEADINGS`."""
        left = "-" if self.idle_left is None else about(self.idle_left)
        return (
            self.short_id,
            self.name,
            self.status,
            _ago(self.changed),
            self.health,
            self.reason,
            self.address,
            _ago(self.requested),
            left,
            self.agrees,
            self.image,
        )


HEADINGS: Final = (
    "node",
    "name",
    "status",
    "age",
    "health",
    "reason",
    "address",
    "last request",
    "idle left",
    "agrees",
    "image",
)
_LONG_AGO: Final = datetime(1, 1, 1, tzinfo=UTC)
_WORST: Final = {problem: number for number, problem in enumerate(PROBLEMS)}
#: What rows are sorted by, in turn.
SORTS: Final[Mapping[str, Callable[[Row], Any]]] = {
    "problems": lambda row: (_WORST.get(row.problem, len(PROBLEMS)), row.name or row.short_id, row.node_id),
    "name": lambda row: (row.name or row.short_id, row.node_id),
    "status": lambda row: (row.status, row.name, row.node_id),
    "health": lambda row: (row.health, row.name, row.node_id),
    "last request": lambda row: (row.requested or _LONG_AGO, row.node_id),
    "age": lambda row: (-(row.changed or _LONG_AGO).timestamp(), row.node_id),
}
_FIELDS: Final = ("name", "image", "status", "health", "address", "agrees", "problem", "reason")


def _ago(moment: datetime | None) -> str:
    return about(max(0.0, (datetime.now(UTC) - moment).total_seconds())) if moment else "-"


def row_of(
    recorded: Recorded,
    *,
    now: datetime,
    before: Row | None = None,
    state: State | None = None,
    listed: Listed | None = None,
    agrees: str = "",
    idle_timeout: float = 0.0,
) -> Row:
    """A document as a row, with what the history and the engine's list tell, and `before` of what they do not."""
    row = before or Row(recorded.node_id, recorded.short_id)
    status, health = recorded.status or "", recorded.health or ""
    last = state.status if state and state.status and state.status.status == status else None
    changed = last.at if last else row.changed if row.status == status else None
    reason = last.reason if last else row.reason if row.status == status else ""
    again = (
        row.problem == "restarting"
        and status == "running"
        and (changed is None or (now - changed).total_seconds() < RESTARTED)
    )
    unhealthy = health == "unhealthy" and status == "running"
    problem = next(
        (
            name
            for name, so in {
                "out of memory": status in ENDED
                and (last.end == "oom" if last else row.problem == "out of memory"),
                "died": status in ENDED and (last.end == "failed" if last else row.problem == "died"),
                "restarting": status == "restarting" or again,
                "unhealthy": unhealthy,
                "disagrees": agrees.startswith("no"),
            }.items()
            if so
        ),
        "",
    )
    limit = idle_timeout_of(recorded.idle_timeout, listed.labels if listed else {}, idle_timeout).seconds
    used_at = changed if status == "running" else None
    return Row(
        node_id=recorded.node_id,
        short_id=recorded.short_id,
        name=(listed.name if listed else "") or (state.name if state else "") or row.name,
        image=(listed.image if listed else "") or (state.image if state else "") or row.image,
        status=status,
        health=health,
        address=f"{recorded.ip}:{recorded.port}" if recorded.ip else "",
        agrees=agrees,
        problem=problem,
        changed=changed,
        requested=as_utc(recorded.last_req_time) if recorded.last_req_time else None,
        idle_left=recorded_idleness(recorded, used_at, now, limit).left,
        reason=reason or (row.reason if again else state.why_unhealthy if state and unhealthy else ""),
    )


def matches(row: Row, text: str) -> bool:
    """Whether a row has each word of a filter, anywhere or (`FIELD:WORD`) there, and none with a `-` before."""
    try:
        words = shlex.split(text.lower())
    except ValueError:  # a quote that is still open
        words = text.lower().split()
    texts = {field: getattr(row, field).lower() for field in _FIELDS} | {"id": row.node_id, "node": row.short_id}
    return all(
        _has(texts, word[1:]) is False if word.startswith("-") and len(word) > 1 else _has(texts, word)
        for word in words
    )


def _has(texts: Mapping[str, str], word: str) -> bool:
    field, separator, value = word.partition(":")
    if not (separator and field in texts):
        return any(word in each for each in texts.values())
    return value in texts[field] if field in {"reason", "agrees", "problem"} else texts[field].startswith(value)


def summary(rows: Collection[Row], shown: int, *, trouble: str = "", sort: str = "") -> str:
    """The first line: how many nodes there are, of which kinds, what is wrong with them, and with the view."""
    counts, problems = Counter(row.status or "?" for row in rows), Counter(row.problem for row in rows)
    kinds = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    parts = [trouble] if trouble else []
    parts += [f"{len(rows)} nodes" + (f": {kinds}" if kinds else "")]
    wrong = ", ".join(f"{problems[name]} {word}" for name, word in PROBLEMS.items() if problems[name])
    parts += [wrong] if wrong else []
    parts += [f"{shown} shown"] if shown != len(rows) else []
    return " · ".join([*parts, f"by {sort}", f"{datetime.now(UTC):%H:%M:%S} UTC"])


def disagreement(recorded: Recorded, listed: Listed | None) -> str:
    """What a list of containers says of a document's status: `yes`, or what it says otherwise."""
    if listed is None:
        return "no: no such container"
    if recorded.status in {listed.state, STOPPING}:
        return "yes"
    return f"no: {printable(listed.state, CELL)}"


class TopView(App[None]):
    """The view; `settings` are those by which the selected node is judged."""

    CSS = """
    #summary { height: 1; background: $primary-background; }
    #summary.trouble { background: $error; }
    #filter { display: none; height: 3; }
    #filter.asked { display: block; }
    #details { display: none; height: 40%; border-top: solid $primary; }
    #details.asked { display: block; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"),
        Binding("slash", "filter", "Filter"),
        Binding("s", "sort", "Sort"),
        Binding("r", "reverse", "Reverse"),
        Binding("u", "unhealthy", "Unhealthy"),
        Binding("d", "details", "Details"),
        Binding("left", "sideways(-1)", "Sideways", show=False, priority=True),
        Binding("right", "sideways(1)", "Sideways", show=False, priority=True),
        Binding("escape", "leave", "Back", show=False),
    ]
    ENABLE_COMMAND_PALETTE = False

    def __init__(self, store: Store, engine: DockerEngine, settings: Settings) -> None:
        super().__init__()
        self._store = store
        self._engine = engine
        self._settings = settings
        self._rows: dict[str, Row] = {}
        self._shown: list[str] = []
        self._listed: dict[str, Listed] | None = None
        self._list_due = 0.0
        #: Why the engine did not answer, and what its last list said otherwise.
        self._away = ""
        self._doubtful: dict[str, str] = {}
        self._agrees: dict[str, str] = {}
        #: How often the history of each node was read since it changed.
        self._looks: Counter[str] = Counter()
        self._sort, self._reversed, self._only_unhealthy, self._filter = "problems", False, False, ""
        self._trouble = self._engine_id = ""
        self._renewing = self._wanted = False

    def compose(self) -> ComposeResult:
        """The parts from top to bottom."""
        yield Static("reading the documents ...", id="summary", markup=False)
        yield Input(
            placeholder="words, status:exited health:unhealthy name:... reason:..., and with - before: not",
            id="filter",
        )
        yield DataTable(id="nodes", cursor_type="row", zebra_stripes=True)
        with VerticalScroll(id="details"):
            yield Static("", id="text", markup=False)
        yield Footer()

    async def on_mount(self) -> None:
        """Begin to read."""
        table = self._table()
        for heading in HEADINGS:
            table.add_column(heading, key=heading)
        table.focus()
        self.set_interval(RENEWED, self.renew)
        self.renew()

    def _table(self) -> DataTable[Text]:
        table: DataTable[Text] = self.query_one("#nodes", DataTable)
        return table

    # -- reading -------------------------------------------------------------------------------------

    @work
    async def renew(self) -> None:
        """Read the documents and show them; of the selected node, all. One at a time, however slow it is."""
        self._wanted = True
        if self._renewing:
            return
        self._renewing = True
        try:
            while self._wanted:
                self._wanted = False
                await self._renew()
        finally:
            self._renewing = False

    async def _renew(self) -> None:
        try:
            await self._read()
        except EventwatchError as error:
            self._trouble = printable(f"as of before: {error}", 2 * CELL)
        else:
            away = f"Docker does not answer, what is shown is of before: {self._away}"
            self._trouble = printable(away, 2 * CELL) if self._away else ""
        self._show()
        await self._explain()

    async def _documents(self) -> dict[str, Recorded]:
        """Those of this engine and of nobody; while it does not say who it is, some of any engine."""
        if not self._engine_id:
            self._engine_id = await identity_of(self._engine)
        if self._engine_id:
            return await self._store.read_own(self._engine_id, (), leftovers=True)
        return await self._store.read_some(MOST_ROWS)

    async def _read(self) -> None:
        documents = await self._documents()
        changed = [i for i, recorded in documents.items() if self._is_changed(recorded)][:HISTORIES]
        states = await read_states(self._store, changed, limit=HISTORIES) if changed else {}
        await self._list(documents)
        now = datetime.now(UTC)
        self._rows = {
            node_id: row_of(
                recorded,
                now=now,
                before=self._rows.get(node_id),
                state=states.get(node_id),
                listed=(self._listed or {}).get(node_id),
                agrees=self._agrees.get(node_id, ""),
                idle_timeout=self._settings.idle_timeout,
            )
            for node_id, recorded in documents.items()
        }
        self._looks = Counter({i: looks for i, looks in self._looks.items() if i in documents})

    async def _list(self, documents: Mapping[str, Recorded]) -> None:
        """Ask the engine for its containers, if it is time to; what it says twice in a row counts."""
        began = monotonic()
        if began < self._list_due:
            return
        try:
            self._listed = {row.node_id: row for row in await self._engine.list_rows()}
        except EngineError as error:
            self._away, self._agrees, self._doubtful = str(error), {}, {}
            self._list_due = began + RENEWED
            return
        self._away = ""
        self._list_due = began + max(LISTED, REST * (monotonic() - began))
        said = {i: disagreement(recorded, self._listed.get(i)) for i, recorded in documents.items()}
        self._agrees = {
            i: word for i, word in said.items() if word == "yes" or self._doubtful.get(i, "").startswith("no")
        }
        self._doubtful = said

    def _is_changed(self, recorded: Recorded) -> bool:
        """Whether its history may tell something new: that is written a second after the change, or later."""
        before = self._rows.get(recorded.node_id)
        if before is None or (before.status, before.health) != (recorded.status or "", recorded.health or ""):
            self._looks[recorded.node_id] = 0
        self._looks[recorded.node_id] += 1
        return self._looks[recorded.node_id] <= LOOKS

    # -- showing -------------------------------------------------------------------------------------

    def _chosen(self) -> list[Row]:
        rows: Iterable[Row] = self._rows.values()
        rows = [row for row in rows if matches(row, self._filter) and (row.unhealthy or not self._only_unhealthy)]
        return sorted(rows, key=SORTS[self._sort], reverse=self._reversed)

    def _show(self) -> None:
        rows, table = self._chosen(), self._table()
        line = self.query_one("#summary", Static)
        line.update(summary(self._rows.values(), len(rows), trouble=self._trouble, sort=self._sort))
        line.set_class(bool(self._trouble), "trouble")
        rows = rows[:MOST_ROWS]
        ids = [row.node_id for row in rows]
        if ids != self._shown:
            selected = self.selected
            table.clear()
            for row in rows:
                table.add_row(*_texts(row, self.size.width), key=row.node_id)
            self._shown = ids
            if selected in ids:
                table.move_cursor(row=ids.index(selected))
            return
        for row in rows:
            for heading, text in zip(HEADINGS, _texts(row, self.size.width), strict=True):
                if table.get_cell(row.node_id, heading) != text:
                    table.update_cell(row.node_id, heading, text, update_width=True)

    @property
    def selected(self) -> str:
        """The id of the node under the cursor; empty without one."""
        number = self._table().cursor_row
        return self._shown[number] if 0 <= number < len(self._shown) else ""

    async def _explain(self) -> None:
        pane, node_id = self.query_one("#details", VerticalScroll), self.selected
        if not pane.has_class("asked"):
            return
        lines: Sequence[str] = ("No node is selected.",)
        if node_id:
            try:
                lines = (await explain_node(node_id, self._store, self._engine, self._settings)).lines()
            except EventwatchError as error:
                lines = (str(error),)
        self.query_one("#text", Static).update("\n".join(map(printable, lines)))

    # -- keys ----------------------------------------------------------------------------------------

    def action_filter(self) -> None:
        """Ask for words that the nodes must have."""
        field = self.query_one("#filter", Input)
        field.add_class("asked")
        field.focus()

    def action_leave(self) -> None:
        """Drop the filter, or close the details."""
        field = self.query_one("#filter", Input)
        if field.has_class("asked"):
            field.remove_class("asked")
            field.value = ""
        else:
            self.query_one("#details").remove_class("asked")
        self._table().focus()

    def action_sort(self) -> None:
        """Sort by the next of the columns."""
        names = list(SORTS)
        self._sort = names[(names.index(self._sort) + 1) % len(names)]
        self._show()

    def action_reverse(self) -> None:
        """Sort the other way round."""
        self._reversed = not self._reversed
        self._show()

    def action_unhealthy(self) -> None:
        """Show only unhealthy nodes, or all again."""
        self._only_unhealthy = not self._only_unhealthy
        self._show()

    def action_sideways(self, step: int) -> None:
        """Move the table to a side; in the filter, the cursor."""
        field = self.query_one("#filter", Input)
        if field.has_focus:
            field.cursor_position += step
        else:
            self._table().scroll_relative(x=SIDEWAYS * step, animate=False)

    def action_details(self) -> None:
        """Open or close the pane that tells all of the selected node."""
        self.query_one("#details").toggle_class("asked")
        self.renew()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Filter while it is typed."""
        self._filter = event.value
        self._show()

    def on_input_submitted(self) -> None:
        """Back to the table, with the filter."""
        self._table().focus()

    def on_data_table_row_selected(self) -> None:
        """Enter on a row opens its details."""
        self.query_one("#details").add_class("asked")
        self.renew()

    def on_data_table_row_highlighted(self) -> None:
        """The cursor has moved: the details follow."""
        if self.query_one("#details").has_class("asked"):
            self.renew()


#: Where a text is cut: names and images in the middle; what is longest leaves room for the rest.
LONGEST: Final[Mapping[str, int]] = {"name": 32, "image": 32, "reason": 2 * CELL}
_MIDDLE: Final = {"name", "image"}


def _texts(row: Row, width: int) -> tuple[Text, ...]:
    """The cells of a row on a screen so wide, of which none is markup or obeyed by a terminal."""
    red = {"out of memory": "status", "died": "status", "restarting": "status", "disagrees": "agrees"}
    styles = {"status": STATUS_COLOURS.get(row.status, ""), "health": "red" if row.unhealthy else ""}
    styles |= {red[row.problem]: "red"} if row.problem in red else {}
    if row.status in ENDED and not row.problem:
        styles["status"] = ""  # an end that was asked for is calm
    texts = []
    for heading, cell in zip(HEADINGS, row.cells(), strict=True):
        longest = LONGEST.get(heading, CELL)
        if heading in _MIDDLE:
            longest = max(CUT[heading], min(longest, width // 4))
        text = printable(cell, None if heading in _MIDDLE else longest)
        texts.append(Text(middle_cut(text, longest) if heading in _MIDDLE else text, styles.get(heading, "")))
    return tuple(texts)
