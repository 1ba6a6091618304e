"""Records what a live engine says: its events, an inspection after each, and the truth at the end.

The stream is the watcher's own: same filter, same resuming, same dropping of duplicates, so a recording holds
what a watcher is told. Whether a watcher runs beside it makes no difference to either.

That no event is lost: the reader only appends to a queue in memory. Inspections run beside it, one in flight
per container; lines are formatted and written by a thread. So neither a slow engine nor a slow disk ever
stalls the reading, which is what makes an engine drop events.

Order in the file: events as received, each with its inspection right behind it. A line therefore waits for the
answers before it, some 30 s at most, and `FILE` exists only once it is complete (until then it is `FILE.part`).

At the end the stream is closed first and every container is inspected once more; those inspections are the
last lines as well as the truth beside the file, so the two cannot disagree.

Not promised: one inspection per event. Events that arrive while their container is being inspected share the
next answer, which is newer than all of them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, Final

from loguru import logger

from eventwatch.core.clock import Clock, SystemClock
from eventwatch.core.errors import EngineError, EventwatchError
from eventwatch.core.facts import Event
from eventwatch.core.metrics import Metrics
from eventwatch.core.policy import KNOWN_ACTIONS
from eventwatch.core.workqueue import WorkQueue
from eventwatch.engine.docker import DockerEngine
from eventwatch.engine.wire import parse_container
from eventwatch.pipeline.watcher import Watcher
from eventwatch.replay.recording import (
    RecordingWriter,
    Truth,
    disconnect_record,
    event_record,
    expected_path,
    header_record,
    inspect_record,
    truth_of,
    write_truth,
)
from eventwatch.settings.model import Settings

#: Inspections in flight; each may block for seconds on its container's lock.
CONCURRENCY: Final = 32


@dataclass(slots=True)
class _Entry:
    """A line, or none, and the inspection that belongs right behind it, once that is answered."""

    record: Mapping[str, Any] | None
    answered: bool = False
    answer: Mapping[str, Any] | None = None

    def records(self) -> Iterable[Mapping[str, Any]]:
        return (record for record in (self.record, self.answer) if record is not None)


class Recorder:
    """One recording of one engine. `run` it once; `stop` may be called from a signal handler."""

    def __init__(
        self,
        settings: Settings,
        path: Path,
        *,
        engine: DockerEngine | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._settings = settings
        self._clock = clock or SystemClock()
        self._engine = engine or DockerEngine(settings)
        self._path = path
        self._entries: deque[_Entry] = deque()
        self._progress = asyncio.Event()
        self._questions: WorkQueue[str] = WorkQueue()
        self._waiting: dict[str, list[_Entry]] = {}
        self._known: dict[str, Mapping[str, Any] | None] = {}
        self._failed: set[str] = set()
        self._away = True
        self._ended = False
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Ask `run` to complete the recording and return."""
        self._stopping.set()

    async def run(self) -> Mapping[str, int]:
        """Record until `stop`. Returns how many lines of each kind were written.

        Raises EngineError when the engine cannot be reached at the start, or not at the end: then the
        recording is complete, but there is no truth beside it.
        """
        try:
            info = await self._engine.identify()
            writer = await asyncio.to_thread(RecordingWriter, self._path)
            try:
                header = header_record(
                    version=info.version,
                    api_version=info.api_version,
                    network=self._settings.node_network,
                    started_at=self._clock.time_ns(),
                )
                writer.write([header])
                await self._record(writer)
            finally:
                writer.abandon()
        finally:
            await self._engine.close()
        return writer.counts

    async def _record(self, writer: RecordingWriter) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                watcher = Watcher(
                    engine=self._engine,
                    on_event=self._on_event,
                    on_connect=self._look_at_all,
                    on_break=self._break,
                    clock=self._clock,
                    metrics=Metrics(KNOWN_ACTIONS),
                    tasks=tasks,
                )
                watching = tasks.create_task(watcher.run(), name="watcher")
                tasks.create_task(self._write(writer), name="writer")
                inspectors = [
                    tasks.create_task(self._inspect(), name=f"inspector-{number}") for number in range(CONCURRENCY)
                ]
                await self._stopping.wait()
                watching.cancel()
                await asyncio.wait({watching})
                await self._questions.wait_idle()
                truth = await self._learn_truth()
                for task in inspectors:
                    task.cancel()
                self._ended = True
                self._progress.set()
        except* EventwatchError as group:
            raise _first(group) from None
        await asyncio.to_thread(self._complete, writer, truth)

    # -- intake ------------------------------------------------------------------------------------------

    def _on_event(self, event: Event) -> None:
        self._enter(event_record(self._clock.time_ns(), event.raw), event.node_id)

    def _break(self, reason: str) -> None:
        if not self._away:
            self._away = True
            self._enter(disconnect_record(self._clock.time_ns(), reason))

    async def _look_at_all(self) -> None:
        # Also called when a connection is merely renewed; nothing was missed then.
        if self._away:
            listed = await self._engine.list_all()
            self._away = False
            self._look_at({*self._known, *listed})

    def _look_at(self, node_ids: Iterable[str]) -> None:
        for node_id in sorted(node_ids):
            self._enter(None, node_id)

    def _enter(self, record: Mapping[str, Any] | None, node_id: str | None = None) -> None:
        entry = _Entry(record, answered=node_id is None)
        self._entries.append(entry)
        if node_id is None or not self._questions.add(node_id):
            entry.answered = True
            self._progress.set()
            return
        self._known.setdefault(node_id, None)
        self._waiting.setdefault(node_id, []).append(entry)

    # -- inspections and lines ---------------------------------------------------------------------------

    async def _inspect(self) -> None:
        while True:
            node_id, _ = await self._questions.get()
            entries = self._waiting.pop(node_id, [])
            try:
                container = await self._engine.container(node_id)
                self._answer(node_id, container, entries)
            except EngineError as error:
                if node_id not in self._failed:
                    logger.warning("Failed to get node info from docker: {}", node_id)
                    logger.warning("{}", error)
                self._failed.add(node_id)
            finally:
                for entry in entries:
                    entry.answered = True
                self._progress.set()
                self._questions.done(node_id)

    def _answer(self, node_id: str, container: Mapping[str, Any] | None, entries: list[_Entry]) -> None:
        self._failed.discard(node_id)
        if container is None:
            self._known.pop(node_id, None)  # an id never comes back
        elif node_id in self._known:
            self._known[node_id] = container
        record = inspect_record(self._clock.time_ns(), node_id, container)
        for entry in entries:
            entry.answer = record

    async def _write(self, writer: RecordingWriter) -> None:
        while self._entries or not self._ended:
            await self._progress.wait()
            self._progress.clear()
            ready = list(takewhile(lambda entry: entry.answered, self._entries))
            if ready:
                await asyncio.to_thread(writer.write, [r for entry in ready for r in entry.records()])
                for _ in ready:
                    self._entries.popleft()

    # -- the end -----------------------------------------------------------------------------------------

    async def _learn_truth(self) -> Truth:
        self._look_at(self._known)
        await self._questions.wait_idle()
        network = self._settings.node_network
        return {i: truth_of(parse_container(c, network=network)) for i, c in self._known.items() if c}

    def _complete(self, writer: RecordingWriter, truth: Truth) -> None:
        writer.finish()
        beside = expected_path(self._path)
        unknown = self._failed & self._known.keys()
        if unknown:
            beside.unlink(missing_ok=True)
            raise EngineError(
                f"{self._path} is complete, but {len(unknown)} containers could not be inspected at the end: "
                f"{beside.name} is not written"
            )
        write_truth(beside, truth)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
