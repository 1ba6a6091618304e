"""An engine that says what a recording says.

How an inspection is answered: with the newest answer on record that was asked for by then, and not before the
time at which that answer came; an engine blocks on a container's lock just so. An answer is therefore never
older than an event that was delivered before the question, as with a real engine.

While the recorded stream was broken the engine is away: nothing can be asked, and no stream can be opened. A
stream that is opened again brings what is newer than its `since`, as far as it was recorded after the break.

Not promised: what a real engine would have said to a question that nobody put to it then; the nearest answer
on record stands for it.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from eventwatch.core.clock import Clock
from eventwatch.core.errors import EngineError
from eventwatch.core.facts import Event, Observation, Usage, nanos
from eventwatch.core.listing import Listed
from eventwatch.core.policy import label_matches
from eventwatch.engine.protocol import EngineInfo
from eventwatch.replay.recording import DisconnectLine, EventLine, InspectLine, Recording, engine_is_back, subject

ENGINE_ID: Final = "replay"
#: ns. A clock in float seconds may wake a sleeper this much early.
ROUNDING_NS: Final = 1_000


@dataclass(frozen=True, slots=True)
class _Connection:
    """A time in which the engine could be reached (ns), and the events that it sent then."""

    opens_at: int
    closes_at: int | None
    reason: str
    events: tuple[EventLine, ...]


class ReplayEngine:
    """An engine that says what a recording says, by the time of `clock`, whose `time_ns` is the recorder's time.

    Safe to be asked by several tasks. It cannot be told to do anything: `stop` raises EngineError.
    """

    def __init__(self, recording: Recording, clock: Clock, *, network: str = "") -> None:
        self.recording = recording
        #: Called with each event right before it is delivered.
        self.listeners: list[Callable[[Event], object]] = []
        self._clock = clock
        self._network = recording.header.network or network
        self._connections = _connections(recording)
        self._answers = _answers(recording)
        self._opened = False

    async def identify(self) -> EngineInfo:
        """Say who it is."""
        self._connection()
        header = self.recording.header
        return EngineInfo(ENGINE_ID, self.recording.path.stem, header.engine_version, header.api_version)

    @asynccontextmanager
    async def events(
        self, since: int | None, on_malformed: Callable[[str], object]
    ) -> AsyncIterator[AsyncIterator[Event]]:
        """Open the stream: the first time from the recording's first line, later as an engine does."""
        del on_malformed  # a recording has no malformed lines
        connection = self._connection()
        after = self._now() if self._opened and since is None else None
        self._opened = True
        yield self._read(connection, since=since, after=after)

    async def _read(
        self, connection: _Connection, *, since: int | None, after: int | None
    ) -> AsyncIterator[Event]:
        for line in connection.events:
            if line.event is None or (after is not None and line.at <= after):
                continue
            if since is not None and line.event.time_nano < since:
                continue
            await self._until(line.at)
            for listener in self.listeners:
                listener(line.event)
            yield line.event
        if connection.closes_at is None:
            await asyncio.Event().wait()  # the recording is over, the engine says nothing more
            return
        await self._until(connection.closes_at)
        raise EngineError(f"Event stream broke: {connection.reason or 'the recorded one did'}")

    async def inspect(self, node_id: str, *, as_of: int = 0) -> Observation:
        """Answer as the recorded engine did; a container that is nowhere in the recording is a 404."""
        connection = self._connection()
        line = self._answer(node_id)
        if line is None:
            return Observation(node_id=node_id, found=False, time_nano=as_of)
        if connection.closes_at is not None and line.at > connection.closes_at:
            await self._until(connection.closes_at)
            raise _away(f"while inspecting {node_id}")
        await self._until(line.at)
        return line.observe(self._network, as_of=as_of)

    async def resolve(self, name: str) -> str | None:
        """Id of the container that goes by this name, id or beginning of an id now; None when there is none."""
        seen = self._seen()
        exact = (each.node_id for each in seen if name in {each.node_id, each.name})
        begun = (each.node_id for each in seen if name and each.node_id.startswith(name))
        return next(exact, None) or next(begun, None)

    async def list_all(self) -> list[str]:
        """Ids of the containers that are there now."""
        return [each.node_id for each in self._seen()]

    async def list_rows(self) -> list[Listed]:
        """As `list_all`, with nothing that would prove anything: no recording has it."""
        return [Listed(each.node_id) for each in self._seen()]

    async def list_running(self, label: str | None = None) -> list[str]:
        """Ids of the containers that run now, or of those that carry `label`."""
        running = [each for each in self._seen() if each.status in {"running", "paused"}]
        return [each.node_id for each in running if label is None or label_matches(label, each.labels)]

    async def addresses(self, network_id: str) -> Mapping[str, str]:  # noqa: ARG002 - as an engine is asked
        """None: no recording has them."""
        return {}

    async def usage(self, node_id: str) -> Usage:  # noqa: ARG002 - as an engine is asked
        """Nothing: no recording has it."""
        return Usage()

    async def list_newest(self, limit: int) -> list[str]:
        """Ids of the containers that are there now and were created last."""
        newest = sorted(self._seen(), key=lambda each: nanos(each.created_at), reverse=True)
        return [each.node_id for each in newest[:limit]]

    async def stop(self, node_id: str, *, grace: float) -> None:
        """Refuse: what was recorded cannot be changed."""
        del grace
        raise EngineError(f"Container {node_id} is a recording and cannot be stopped")

    async def close(self) -> None:
        """Do nothing: there are no connections."""

    def _seen(self) -> list[Observation]:
        """What is there now."""
        self._connection()
        now = self._now()
        lines = (self._answer(node_id) for node_id in self._answers)
        seen = (line.observe(self._network) for line in lines if line and line.asked <= now)
        return [each for each in seen if each.found]

    def _answer(self, node_id: str) -> InspectLine | None:
        lines = self._answers.get(node_id)
        if not lines:
            return None
        number = bisect_right(lines, self._now(), key=lambda line: line.asked)
        return lines[max(number - 1, 0)]

    def _connection(self) -> _Connection:
        now = self._now()
        for connection in self._connections:
            if connection.opens_at <= now and (connection.closes_at is None or now < connection.closes_at):
                return connection
        raise _away("as it was when this was recorded")

    def _now(self) -> int:
        return self._clock.time_ns() + ROUNDING_NS

    async def _until(self, at: int) -> None:
        left = at - self._clock.time_ns()
        if left > 0:
            await self._clock.sleep(left / 1e9)


def _away(when: str) -> EngineError:
    return EngineError(f"Engine is away {when}", unreachable=True)


def _connections(recording: Recording) -> list[_Connection]:
    connections: list[_Connection] = []
    opens_at: int | None = recording.started_at
    events: list[EventLine] = []
    for number, line in enumerate(recording.lines):
        if isinstance(line, EventLine) and subject(line):
            events.append(line)
        elif isinstance(line, DisconnectLine):
            if opens_at is not None:
                connections.append(_Connection(opens_at, line.at, line.reason, tuple(events)))
            opens_at, events = engine_is_back(recording.lines, number), []
    if opens_at is not None:
        connections.append(_Connection(opens_at, None, "", tuple(events)))
    return connections


def _answers(recording: Recording) -> dict[str, list[InspectLine]]:
    answers: dict[str, list[InspectLine]] = {}
    for line in recording.lines:
        if isinstance(line, InspectLine):
            answers.setdefault(line.node_id, []).append(line)
    for lines in answers.values():
        lines.sort(key=lambda line: line.asked)  # stable: of two asked at once the later one is the newer
    return answers
