"""Inspections that are asked for before the event that calls for them, so that the answer is there when it comes.

The engine tells that a container is connected to its network 17 to 200 ms before it tells of its `start`, and
holds the container's lock in between: an inspection that is asked for at the `connect` is answered right behind
the `start`, a third to a half of a millisecond earlier than one that is asked for then.

Contract: an answer is taken for a start only if it shows the container running since a moment between that
`connect` and that `start`, on the engine's own clock: it is about this run of it. What may have changed the node
since (its end, a pause, its health, another network), and every new connection of the stream, drops the question.
A start for which no answer comes within `PATIENCE` is inspected as if nothing had been asked. A `connect` behind
which no start comes (of a container that runs, or that cannot be started) costs that one question. Of many at
once, `MOST` are asked about, and no others: each takes a connection to the engine until the start is done.

Not here: `unpause` and `restart`. Nothing is told before the first, and the second comes after its `start`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from eventwatch.core.clock import Clock, Timer
from eventwatch.core.errors import EngineError
from eventwatch.core.facts import Event, Observation
from eventwatch.core.policy import is_run_of
from eventwatch.engine.protocol import Engine
from eventwatch.pipeline.roster import Roster

#: Questions under way at once.
MOST: Final = 8
#: Seconds until a question behind which no start came is dropped: a start takes as long in a burst.
LONGEST: Final = 10.0
#: Seconds that an answer waits for its start, which is told at the same moment: 0.6 ms apart were measured.
KEPT: Final = 0.05
#: Seconds that a start waits for the answer, before it is asked about anew.
PATIENCE: Final = 0.02

#: What may have made the node another than it was asked about. What ends a run, its start need not wait for.
_ENDING: Final = frozenset({"die", "pause", "destroy", "unpause"})
_DROPPING: Final = _ENDING | {"health_status", "disconnect"}


@dataclass(slots=True)
class _Question:
    """What was asked about one node. `connected` and `started` are engine times (ns)."""

    node_id: str
    connected: int
    task: asyncio.Task[None] | None = None
    timer: Timer | None = None
    answer: Observation | None = None
    started: int | None = None

    def wait(self, timer: Timer) -> None:
        if self.timer:
            self.timer.cancel()
        self.timer = timer


class Foresight:
    """`on_answer` takes what proves a start (and the engine time of that, ns).

    `on_none` takes the id of a node whose start has to be inspected after all.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        roster: Roster,
        on_answer: Callable[[Observation, int], object],
        on_none: Callable[[str], object],
        clock: Clock,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._engine = engine
        self._roster = roster
        self._on_answer = on_answer
        self._on_none = on_none
        self._clock = clock
        self._tasks = tasks
        self._questions: dict[str, _Question] = {}

    def __len__(self) -> int:
        """How many questions are under way, or answered and waiting for their start."""
        return len(self._questions)

    def on_event(self, event: Event) -> None:
        """Take in any event of a node. What calls for an inspection goes to `expect`, too."""
        if event.action == "connect":
            self._ask_early(event)
        elif event.action in _DROPPING and self.drop(event.node_id) and event.action not in _ENDING:
            self._on_none(event.node_id)

    def _ask_early(self, event: Event) -> None:
        node_id = event.node_id
        if node_id in self._questions or len(self._questions) >= MOST:
            return
        question = self._questions[node_id] = _Question(node_id, event.time_nano)
        question.wait(self._clock.call_later(LONGEST, lambda: self._give_up(question)))
        question.task = self._tasks.create_task(self._ask(question), name=f"foresight-{node_id[:12]}")

    async def _ask(self, question: _Question) -> None:
        try:
            seen = await self._engine.inspect(question.node_id, as_of=self._roster.newest)
        except EngineError:  # whoever asks next tells of it
            question.task = None
            self._give_up(question)
            return
        question.task = None
        if self._questions.get(question.node_id) is not question:
            return
        if question.started is not None:
            self._end(question, seen, question.started)
        elif is_run_of(seen, since=question.connected):
            question.answer = seen
            question.wait(self._clock.call_later(KEPT, lambda: self._give_up(question)))
        else:
            self.drop(question.node_id)

    def expect(self, event: Event) -> bool:
        """Whether the answer to a `start` is there, or soon will be; else the node is to be inspected."""
        question = self._questions.get(event.node_id)
        if question is None:
            return False
        if question.started is not None:  # the end of the run before was not told
            self.drop(event.node_id)
            return False
        if question.answer is not None:
            self._end(question, question.answer, event.time_nano)
            return True
        question.started = event.time_nano
        question.wait(self._clock.call_later(PATIENCE, lambda: self._ask_anew(question)))
        return True

    def _ask_anew(self, question: _Question) -> None:
        question.wait(self._clock.call_later(LONGEST, lambda: self._give_up(question)))
        self._on_none(question.node_id)

    def _end(self, question: _Question, seen: Observation, started: int) -> None:
        self.drop(question.node_id)
        if is_run_of(seen, since=question.connected, until=started):
            self._on_answer(seen, started)
        else:
            self._on_none(question.node_id)

    def _give_up(self, question: _Question) -> None:
        if self._questions.get(question.node_id) is question and self.drop(question.node_id):
            self._on_none(question.node_id)

    def drop(self, node_id: str) -> bool:
        """Believe no answer about this node that was asked for by now. Whether a start waits for it."""
        question = self._questions.pop(node_id, None)
        if question is None:
            return False
        if question.timer:
            question.timer.cancel()
        if question.task:
            question.task.cancel()
        return question.started is not None

    def drop_all(self) -> None:
        """Believe no answer that was asked for by now; each start that waits is inspected."""
        for question in list(self._questions.values()):
            self._give_up(question)
