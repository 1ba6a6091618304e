"""Recordings: what an engine said, as JSON Lines, and the truth at the end beside it.

Why: a recording is the cheapest proof that the pipeline ends at the truth, so the format is a contract and a
file is checked as a whole before anyone acts on any of it.

A recording is an optional `header` line, then in order of receipt `event`, `inspect` and `disconnect` lines.
An inspect line stands right behind the event that asked for it, so its `at` (when the answer came) may be
later than that of lines behind it; `InspectLine.asked` is when the question was put. An inspect line with no
event before it is a look at a container for no reason that the stream tells: at the start, after a reconnect,
or at the end.

What is written passes through `clean_event` and `clean_container` first, which copy the contract's fields and
nothing else: no environment, command, mount, and no output of a health check ever reaches a file. Labels are
part of the contract, so a secret in a label is in the recording too.

Not promised: bounded memory. A recording is read as a whole (some 1 kB a line).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeAlias

from loguru import logger

from eventwatch.core.errors import ConfigError, EventwatchError
from eventwatch.core.facts import Event, Observation
from eventwatch.engine.wire import (
    CONTAINER_ACTIONS,
    NETWORK_ACTIONS,
    MalformedEventError,
    parse_container,
    parse_event,
)

VERSION: Final = 1
#: The fields that `NAME.expected.json` holds for each container that is left.
TRUTH: Final = ("status", "health", "ip")
ACTIONS: Final = frozenset({*CONTAINER_ACTIONS, *NETWORK_ACTIONS})

_EVENT_FIELDS: Final = ("status", "id", "from", "Type", "Action", "scope", "time", "timeNano")
_STATE_FIELDS: Final = (
    "Status",
    "Running",
    "Paused",
    "Restarting",
    "OOMKilled",
    "Dead",
    "Pid",
    "ExitCode",
    "StartedAt",
    "FinishedAt",
)
_HEALTH_FIELDS: Final = ("Status", "FailingStreak")
_CONFIG_FIELDS: Final = ("Image", "Labels", "ExposedPorts")
_OK: Final = 200
_NOT_FOUND: Final = 404

Truth: TypeAlias = dict[str, dict[str, str]]


class RecordingError(ConfigError):
    """A recording, or the expected file beside it, that cannot be used; tells the file and the line."""


@dataclass(frozen=True, slots=True)
class EventLine:
    """One event as the engine sent it. `at`: when it was received (ns). `event` is None when it is nobody's."""

    at: int
    raw: Mapping[str, Any]
    event: Event | None = None


@dataclass(frozen=True, slots=True)
class InspectLine:
    """One answer to an inspection, received `at`, asked for at `asked` (ns); `container` is None for a 404."""

    at: int
    node_id: str
    container: Mapping[str, Any] | None
    asked: int = 0

    def observe(self, network: str, *, as_of: int = 0) -> Observation:
        """Read the answer in the documents' terms."""
        if self.container is None:
            return Observation(node_id=self.node_id, found=False, time_nano=as_of)
        return parse_container(self.container, network=network, as_of=as_of)


@dataclass(frozen=True, slots=True)
class DisconnectLine:
    """The event stream ended; the engine counts as away until the next line."""

    at: int
    reason: str = ""


Line: TypeAlias = EventLine | InspectLine | DisconnectLine


@dataclass(frozen=True, slots=True)
class Header:
    """Who was recorded. `network` is the one on which nodes have their ip; empty means: as configured."""

    engine_version: str = ""
    api_version: str = ""
    network: str = ""
    started_at: int = 0


@dataclass(frozen=True, eq=False)
class Recording:
    """A checked recording. Times are ns since 1970 on the recorder's clock."""

    path: Path
    header: Header
    lines: tuple[Line, ...]

    @cached_property
    def started_at(self) -> int:
        """When it began."""
        first = min((line.at for line in self.lines), default=self.header.started_at)
        return min(first, self.header.started_at or first)

    @cached_property
    def ended_at(self) -> int:
        """When the last event or answer came."""
        return max((line.at for line in self.lines), default=self.started_at)

    @cached_property
    def events(self) -> int:
        """How many events a watcher is told of."""
        return sum(1 for line in self.lines if isinstance(line, EventLine) and subject(line))

    @cached_property
    def first_seen(self) -> dict[str, int]:
        """Every container of the recording, and when it was first heard of."""
        seen: dict[str, int] = {}
        for line in self.lines:
            node_id = subject(line)
            if node_id and (node_id in seen or not _is_missing(line)):
                at = line.asked if isinstance(line, InspectLine) else line.at
                seen[node_id] = min(at, seen.get(node_id, at))
        return seen


def subject(line: Line) -> str | None:
    """The container that a line is about, if the watcher would be told of it at all."""
    if isinstance(line, InspectLine):
        return line.node_id
    if isinstance(line, EventLine) and line.event and line.event.action in ACTIONS:
        return line.event.node_id
    return None


def _is_missing(line: Line) -> bool:
    return isinstance(line, InspectLine) and line.container is None


# -- reading ------------------------------------------------------------------------------------------------


def read_recording(path: Path | str) -> Recording:
    """Read and check a whole recording. Raises RecordingError, naming the line, for any that is wrong.

    A last line that was cut off (no line end, and no JSON) is left out with a warning.
    """
    path = Path(path)
    content = _read_bytes(path)
    if not content.strip():
        raise RecordingError(f"{path}:1: is empty, a recording has at least one line")
    header, lines = Header(), []
    for number, record in _records(path, content):
        try:
            if number == 1 and record.get("kind") == "header":
                header = _parse_header(record)
            else:
                lines.append(_parse_line(record))
        except _WrongLineError as error:
            raise RecordingError(f"{path}:{number}: {error}") from None
    return Recording(path, header, tuple(_with_questions(lines)))


class _WrongLineError(ValueError):
    """What is wrong with a line, without saying where it is."""


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RecordingError(f"{path}: cannot be read: {error.strerror or error}") from None


def _records(path: Path, content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = content.split(b"\n")
    for number, row in enumerate(rows, 1):
        if not row.strip():
            continue
        try:
            record = _parse_json(row)
        except _WrongLineError as error:
            if number == len(rows) and number > 1:
                logger.warning("{}:{}: the last line is cut off and left out", path, number)
                return
            raise RecordingError(f"{path}:{number}: {error}") from None
        if not isinstance(record, dict):
            raise RecordingError(f"{path}:{number}: not a JSON object")
        yield number, record


def _parse_json(content: bytes) -> object:
    try:
        return json.loads(content.decode())
    except json.JSONDecodeError as error:
        raise _WrongLineError(f"not JSON: {error.msg}") from None
    except UnicodeDecodeError:
        raise _WrongLineError("not UTF-8 text") from None
    except RecursionError:
        raise _WrongLineError("nested too deeply") from None


def _parse_header(record: Mapping[str, Any]) -> Header:
    version = _field(record, "version", int)
    if version != VERSION:
        raise _WrongLineError(f"version {version} is unknown, this eventwatch reads version {VERSION}")
    engine = record.get("engine")
    engine = engine if isinstance(engine, dict) else {}
    started_at = record.get("started_at")
    return Header(
        engine_version=str(engine.get("version") or ""),
        api_version=str(engine.get("api_version") or ""),
        network=str(record.get("network") or ""),
        started_at=started_at if isinstance(started_at, int) and not isinstance(started_at, bool) else 0,
    )


def _parse_line(record: Mapping[str, Any]) -> Line:
    kind = _field(record, "kind", str)
    if kind not in _PARSERS:
        raise _WrongLineError(f"kind {kind!r} is none of {', '.join(_PARSERS)}, or a header in the first line")
    at = _field(record, "at", int)
    if at < 0:
        raise _WrongLineError("at is negative")
    return _PARSERS[kind](at, record)


def _parse_event_line(at: int, record: Mapping[str, Any]) -> EventLine:
    raw = _field(record, "event", dict)
    try:
        return EventLine(at, raw, parse_event(raw))
    except MalformedEventError as error:
        raise _WrongLineError(f"event is no event ({error})") from None


def _parse_inspect_line(at: int, record: Mapping[str, Any]) -> InspectLine:
    node_id, status = _field(record, "id", str), _field(record, "status", int)
    if status == _NOT_FOUND:
        return InspectLine(at, node_id, None, asked=at)
    if status != _OK:
        raise _WrongLineError(f"status {status} is neither {_OK} nor {_NOT_FOUND}")
    container = _field(record, "container", dict)
    try:
        seen = parse_container(container, network="")
    except (KeyError, TypeError, AttributeError) as error:
        raise _WrongLineError(f"container is no inspection ({type(error).__name__}: {error})") from None
    if seen.node_id != node_id:
        raise _WrongLineError(f"container is {seen.node_id!r}, not {node_id!r}")
    return InspectLine(at, node_id, container, asked=at)


def _parse_disconnect_line(at: int, record: Mapping[str, Any]) -> DisconnectLine:
    return DisconnectLine(at, str(record.get("reason") or ""))


_PARSERS: Final[Mapping[str, Callable[[int, Mapping[str, Any]], Line]]] = {
    "event": _parse_event_line,
    "inspect": _parse_inspect_line,
    "disconnect": _parse_disconnect_line,
}


def _field(record: Mapping[str, Any], name: str, kind: type) -> Any:
    if name not in record:
        raise _WrongLineError(f"field {name!r} is missing")
    value = record[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _WrongLineError(f"field {name!r} must be {_JSON_NAMES[kind]}, not {json.dumps(value)[:40]}")
    return value


_JSON_NAMES: Final = {str: "a text", int: "a whole number", dict: "an object"}


def _with_questions(lines: Iterable[Line]) -> Iterator[Line]:
    """Fill in when each inspection was asked for: with the first event since the last look, else with none.

    After a reconnect every look counts as asked for when the engine came back: an older answer would be one
    from before the engine went away.
    """
    lines = list(lines)
    asked: dict[str, int] = {}
    back_at: int | None = None
    looked: set[str] = set()
    for number, line in enumerate(lines):
        node_id = subject(line)
        if isinstance(line, DisconnectLine):
            asked.clear()
            looked.clear()
            back_at = engine_is_back(lines, number)
        elif isinstance(line, InspectLine):
            candidates = [line.at]
            if line.node_id in asked:
                candidates.append(asked.pop(line.node_id))
            if back_at is not None and line.node_id not in looked:
                candidates.append(back_at)
            looked.add(line.node_id)
            yield replace(line, asked=min(candidates))
            continue
        elif node_id:
            asked.setdefault(node_id, line.at)
        yield line


def engine_is_back(lines: Sequence[Line], disconnect: int) -> int | None:
    """When the engine answered again after line number `disconnect`; None when the recording ends without."""
    behind = []
    for line in lines[disconnect + 1 :]:
        if isinstance(line, DisconnectLine):
            break
        behind.append(line.at)
    return max(lines[disconnect].at, min(behind)) if behind else None


# -- the truth at the end -----------------------------------------------------------------------------------


def expected_path(recording: Path | str) -> Path:
    """Where the truth of a recording lies: `NAME.expected.json` beside `NAME.jsonl`."""
    recording = Path(recording)
    name = recording.name.removesuffix(".jsonl")
    return recording.with_name(f"{name}.expected.json")


def truth_of(seen: Observation) -> dict[str, str]:
    """What the document of a container must say."""
    return {"status": seen.status, "health": seen.health, "ip": seen.ip}


def read_expected(path: Path | str, recording: Recording) -> Truth:
    """Read the truth. Raises RecordingError when it is malformed or speaks of other containers."""
    path = Path(path)
    try:
        expected = json.loads(_read_bytes(path))
    except json.JSONDecodeError as error:
        raise RecordingError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except (UnicodeDecodeError, RecursionError):
        raise RecordingError(f"{path}:1: not JSON") from None
    if not isinstance(expected, dict):
        raise RecordingError(f"{path}:1: not a JSON object of container ids")
    for node_id, wanted in expected.items():
        if not isinstance(wanted, dict) or not all(isinstance(wanted.get(name), str) for name in TRUTH):
            raise RecordingError(f"{path}:1: {node_id} must have {', '.join(TRUTH)}, each a text")
    if unknown := expected.keys() - recording.first_seen.keys():
        raise RecordingError(f"{path}:1: {min(unknown)} is not in {recording.path.name}: is it for another one?")
    return {node_id: {name: wanted[name] for name in TRUTH} for node_id, wanted in expected.items()}


# -- writing ------------------------------------------------------------------------------------------------


def clean_event(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The contract's part of an event: what the engine says of every event, and the actor's attributes."""
    actor = raw.get("Actor") or {}
    kept = {name: raw[name] for name in _EVENT_FIELDS if name in raw}
    return {**kept, "Actor": {"ID": actor.get("ID"), "Attributes": dict(actor.get("Attributes") or {})}}


def clean_container(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The contract's part of an inspection.

    Of the state, neither `Error` (it may quote a command) nor the health check's log (it quotes its output).
    """
    state = raw.get("State") or {}
    kept = _pick(state, _STATE_FIELDS)
    for name in ("Health", "Healthcheck"):
        if isinstance(state.get(name), Mapping):
            kept[name] = _pick(state[name], _HEALTH_FIELDS)
    return {
        **_pick(raw, ("Id", "Name", "Created")),
        "State": kept,
        "Config": _pick(raw.get("Config") or {}, _CONFIG_FIELDS),
        "NetworkSettings": {"Networks": (raw.get("NetworkSettings") or {}).get("Networks") or {}},
    }


def _pick(source: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: source[name] for name in names if name in source}


def header_record(*, version: str, api_version: str, network: str, started_at: int) -> dict[str, Any]:
    """The first line."""
    engine = {"version": version, "api_version": api_version}
    return {
        "kind": "header",
        "version": VERSION,
        "engine": engine,
        "network": network,
        "started_at": started_at,
    }


def event_record(at: int, raw: Mapping[str, Any]) -> dict[str, Any]:
    """One event, cleaned."""
    return {"kind": "event", "at": at, "event": clean_event(raw)}


def inspect_record(at: int, node_id: str, raw: Mapping[str, Any] | None) -> dict[str, Any]:
    """One answer to an inspection, cleaned; `raw` is None for a 404."""
    if raw is None:
        return {"kind": "inspect", "at": at, "id": node_id, "status": _NOT_FOUND}
    return {"kind": "inspect", "at": at, "id": node_id, "status": _OK, "container": clean_container(raw)}


def disconnect_record(at: int, reason: str) -> dict[str, Any]:
    """The end of the event stream."""
    return {"kind": "disconnect", "at": at, "reason": reason}


class RecordingWriter:
    """Writes `path`, which appears only when it is complete: until then it is `path` with `.part` behind."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.part = path.with_name(path.name + ".part")
        #: Lines written so far, by kind.
        self.counts: dict[str, int] = {}
        try:
            self._file = self.part.open("w", encoding="utf-8", newline="\n")
        except OSError as error:
            raise RecordingError(f"{self.part}: cannot be written: {error.strerror or error}") from None

    def write(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append lines, and hand them to the operating system. May be called from a thread."""
        with _one_line(self.part):
            for record in records:
                kind = str(record["kind"])
                self.counts[kind] = self.counts.get(kind, 0) + 1
                self._file.write(to_json(record) + "\n")
            self._file.flush()

    def finish(self) -> None:
        """Make the file durable and visible under its name."""
        with _one_line(self.part):
            os.fsync(self._file.fileno())
            self._file.close()
            self.part.replace(self.path)

    def abandon(self) -> None:
        """Close the file and leave as `.part` what is there."""
        with contextlib.suppress(OSError):
            self._file.close()


def write_truth(path: Path, truth: Truth) -> None:
    """Write the expected file, whole or not at all."""
    part = path.with_name(path.name + ".part")
    with _one_line(part):
        with part.open("w", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(truth, indent=1, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EventwatchError(f"{path}: cannot be written: {error.strerror or error}") from None


def to_json(record: Mapping[str, Any]) -> str:
    """One line of JSON, as compact as the engine's own."""
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False)
