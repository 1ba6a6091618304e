"""`eventwatch top`: every node on a full screen, renewed each second, and one of them in full.

Contract: once a second the documents of this engine are read, whatever is shown; of nodes that changed also the
last line of their history, for names and reasons. Only the selected node is inspected, and of those without a
known name some at a time, once each. While the database is away, what was read last stays, and the first line
tells so. Nothing is ever written.

Not promised: more rows than `MOST_ROWS`; the filter finds among all.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, ClassVar, Final

from rich.text import Text
from textual import work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.widgets import DataTable, Footer, Input, Static

from eventwatch.cli.nodes import STATUS_COLOURS, explain_node, identity_of
from eventwatch.core.durations import about
from eventwatch.core.errors import EngineError, EventwatchError
from eventwatch.core.facts import ENDED, Recorded
from eventwatch.core.policy import as_utc
from eventwatch.core.text import printable
from eventwatch.engine.protocol import Engine
from eventwatch.settings.model import Settings
from eventwatch.store.history import read_last_changes
from eventwatch.store.nodes import Store

#: Seconds between two reads of the documents, and of the selected node.
RENEWED: Final = 1.0
#: Rows that are shown at once.
MOST_ROWS: Final = 1000
#: Nodes whose histories, and whose names, are asked for at once.
HISTORIES: Final = 1000
NAMES: Final = 5
#: How often the history of a node is read after a change of it.
LOOKS: Final = 5
#: Characters of a cell.
CELL: Final = 60


@dataclass(frozen=True, slots=True)
class Row:
    """A node as it is shown. `requested` is when its last request came in."""

    node_id: str
    short_id: str
    name: str = ""
    image: str = ""
    status: str = ""
    health: str = ""
    address: str = ""
    requested: datetime | None = None
    reason: str = ""

    @property
    def unhealthy(self) -> bool:
        """Whether it has not ended, and its health check fails."""
        return self.health == "unhealthy" and self.status not in ENDED

    def cells(self) -> tuple[str, ...]:
        """Its texts, by `HEADINGS`."""
        idle = about((datetime.now(UTC) - self.requested).total_seconds()) if self.requested else "never"
        return (self.short_id, self.name, self.status, self.health, self.address, idle, self.reason)


HEADINGS: Final = ("node", "name", "status", "health", "address", "last request", "reason")
_LONG_AGO: Final = datetime(1, 1, 1, tzinfo=UTC)
#: What rows are sorted by, in turn.
SORTS: Final[Mapping[str, Callable[[Row], Any]]] = {
    "name": lambda row: (row.name or row.short_id, row.node_id),
    "status": lambda row: (row.status, row.name, row.node_id),
    "health": lambda row: (row.health, row.name, row.node_id),
    "last request": lambda row: (row.requested or _LONG_AGO, row.node_id),
}
_FIELDS: Final = ("name", "image", "status", "health", "address", "reason")


def row_of(recorded: Recorded, *, name: str = "", image: str = "", reason: str = "") -> Row:
    """A document as a row."""
    return Row(
        node_id=recorded.node_id,
        short_id=recorded.short_id,
        name=name,
        image=image,
        status=recorded.status or "",
        health=recorded.health or "",
        address=f"{recorded.ip}:{recorded.port}" if recorded.ip else "",
        requested=as_utc(recorded.last_req_time) if recorded.last_req_time else None,
        reason=reason,
    )


def matches(row: Row, text: str) -> bool:
    """Whether a row has every word of a filter: anywhere, or `FIELD:WORD` in that field (`id` for its id)."""
    try:
        words = shlex.split(text.lower())
    except ValueError:  # a quote that is still open
        words = text.lower().split()
    texts = {field: getattr(row, field).lower() for field in _FIELDS} | {"id": row.node_id, "node": row.short_id}
    for word in words:
        field, separator, value = word.partition(":")
        if separator and field in texts:
            if not (texts[field].startswith(value) if field != "reason" else value in texts[field]):
                return False
        elif not any(word in each for each in texts.values()):
            return False
    return True


def summary(rows: Collection[Row], shown: int, *, trouble: str = "", sort: str = "") -> str:
    """The first line: how many nodes there are, of which kinds, and what is wrong with the view itself."""
    counts = Counter(row.status or "?" for row in rows)
    kinds = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    unhealthy = sum(row.unhealthy for row in rows)
    parts = [f"{len(rows)} nodes" + (f": {kinds}" if kinds else "")]
    parts += [f"{unhealthy} unhealthy"] if unhealthy else []
    parts += [f"{shown} shown"] if shown != len(rows) else []
    parts += [f"by {sort}", f"{datetime.now(UTC):%H:%M:%S} UTC"]
    return " · ".join([*parts, *([trouble] if trouble else [])])


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
        Binding("escape", "leave", "Back", show=False),
    ]
    ENABLE_COMMAND_PALETTE = False

    def __init__(self, store: Store, engine: Engine, settings: Settings) -> None:
        super().__init__()
        self._store = store
        self._engine = engine
        self._settings = settings
        self._rows: dict[str, Row] = {}
        self._shown: list[str] = []
        self._unnamed: set[str] = set()
        #: How often the history of each node was read since it changed.
        self._looks: Counter[str] = Counter()
        self._sort, self._reversed, self._only_unhealthy, self._filter = "name", False, False, ""
        self._trouble = self._engine_id = ""
        self._renewing = self._wanted = False

    def compose(self) -> ComposeResult:
        """The parts from top to bottom."""
        yield Static("reading the documents ...", id="summary", markup=False)
        yield Input(placeholder="words, or status:exited health:unhealthy name:...", id="filter")
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
            self._trouble = ""
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
        changed = [i for i, recorded in documents.items() if self._is_changed(recorded)]
        last = await read_last_changes(self._store, changed[:HISTORIES]) if changed else {}
        rows = {}
        for node_id, recorded in documents.items():
            before, change = self._rows.get(node_id), last.get(node_id)
            rows[node_id] = row_of(
                recorded,
                name=(change.name if change else "") or (before.name if before else ""),
                image=(change.image if change else "") or (before.image if before else ""),
                reason=change.reason if change else before.reason if before and node_id not in changed else "",
            )
        self._rows = rows
        self._unnamed &= rows.keys()
        self._looks = Counter({i: looks for i, looks in self._looks.items() if i in rows})
        await self._name_some()

    def _is_changed(self, recorded: Recorded) -> bool:
        """Whether its history may tell something new: that is written a second after the change, or later."""
        before = self._rows.get(recorded.node_id)
        now = row_of(recorded)
        if before is None or (before.status, before.health) != (now.status, now.health):
            self._looks[recorded.node_id] = 0
        self._looks[recorded.node_id] += 1
        return self._looks[recorded.node_id] <= LOOKS

    async def _name_some(self) -> None:
        """Ask the engine for the names of some nodes of which no history tells, once each."""
        unnamed = [i for i, row in self._rows.items() if not row.name and i not in self._unnamed][:NAMES]
        self._unnamed.update(unnamed)
        for node_id in unnamed:
            try:
                seen = await self._engine.inspect(node_id)
            except EngineError:
                continue
            self._rows[node_id] = replace(self._rows[node_id], name=seen.name, image=seen.image)

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
                table.add_row(*_texts(row), key=row.node_id)
            self._shown = ids
            if selected in ids:
                table.move_cursor(row=ids.index(selected))
            return
        for row in rows:
            for heading, text in zip(HEADINGS, _texts(row), strict=True):
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


def _texts(row: Row) -> tuple[Text, ...]:
    """The cells of a row, of which none is markup or obeyed by a terminal."""
    styles = {"status": STATUS_COLOURS.get(row.status, ""), "health": "red" if row.unhealthy else ""}
    return tuple(
        Text(printable(cell, CELL if heading != "reason" else 2 * CELL), styles.get(heading, ""))
        for heading, cell in zip(HEADINGS, row.cells(), strict=True)
    )
