"""What is written of a start is asked for before the event of it, so that the answer is there when it comes.

The engine tells that a container is connected to its network 17 to 300 ms before it tells of its `start`. At the
`connect` one of two questions is asked:

- of the network, which address the container has. It waits for no container, and the answer is there before the
  `start` (54 of 54 on three engines), which proves the rest: it is written a millisecond earlier than by an
  inspection. The settle behind it confirms it.
- Where that is not enough, or not to be had, of the container: an inspection. The engine holds the container's
  lock until the start is done, so the answer comes right behind the `start`, a third to a half of a millisecond
  earlier than one that is asked for then.

Contract: an address is that of the endpoint that the `connect` told of, and counts for one start. An inspection is
taken for a start only if it shows the container running since a moment between what was known of it at the
`connect` and that `start`, on the engine's own clock: it is about this run of it. (Not since the `connect`: of
Engine 28.5, that comes 160 ms behind the moment since when the container then runs.) What may have changed the
node since (its end, a pause, its health, its networks), and every new connection of the stream, drops the
question. A start for which no answer comes within `PATIENCE` is inspected as if nothing had been asked. A
`connect` behind which no start comes (of a container that cannot be started) costs that one question. Of many
inspections at once, `MOST` are asked for, and no others: each takes a connection to the engine until the start is
done.

The network is asked only about a node of which an earlier inspection told whether it has a health check, while
there are no more than `FEW` nodes, as it tells of all that is on it, and not again after it refused (a proxy may),
or came too late for `LATE` starts in a row, until the stream is opened anew.

Not here: `unpause` and `restart`. Nothing is told before the first, and the second comes after its `start`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from eventwatch.core.clock import Clock, Timer
from eventwatch.core.errors import EngineError
from eventwatch.core.facts import STOPPING, Event, Observation
from eventwatch.core.policy import is_run_of
from eventwatch.engine.protocol import Engine
from eventwatch.pipeline.addresses import Addresses
from eventwatch.pipeline.roster import Roster

#: Inspections under way at once.
MOST: Final = 8
#: Nodes with which the network is still asked: it answers with 250 bytes for each.
FEW: Final = 250
#: Seconds until a question behind which no start came is dropped: a start takes as long in a burst.
LONGEST: Final = 10.0
#: Seconds that an answer waits for its start, which is told at the same moment: 0.6 ms apart were measured.
KEPT: Final = 0.05
#: Seconds that a start waits for the answer, before it is asked about anew.
PATIENCE: Final = 0.02
#: Starts in a row that waited in vain for the network, after which it is asked no more.
LATE: Final = 3

#: What may have made the node another than it was asked about. What ends a run, its start need not wait for.
_ENDING: Final = frozenset({"die", "pause", "destroy", "unpause"})
_ALIVE: Final = frozenset({"running", "paused", STOPPING})
_DROPPING: Final = _ENDING | {"health_status", "disconnect"}


@dataclass(slots=True)
class _Question:
    """What was asked about one node. `connected` and `started` are engine times (ns)."""

    node_id: str
    connected: int
    #: As of when (engine time, ns) it was known what came before.
    before: int
    #: Whether the network is asked, not the container.
    by_network: bool
    task: asyncio.Task[None] | None = None
    timer: Timer | None = None
    #: The address, where the network was asked.
    answer: Observation | str | None = None
    started: int | None = None

    def wait(self, timer: Timer) -> None:
        if self.timer:
            self.timer.cancel()
        self.timer = timer


class Foresight:
    """`on_answer` takes the id of a node that has started, what proves it, and the engine time of the start (ns).

    What proves it is an inspection, or the node's address on `network`. `on_none` takes the id of a node whose
    start has to be inspected after all.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        roster: Roster,
        network: str,
        on_answer: Callable[[str, Observation | str, int], object],
        on_none: Callable[[str], object],
        clock: Clock,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._engine = engine
        self._roster = roster
        self._network = network
        self._on_answer = on_answer
        self._on_none = on_none
        self._clock = clock
        self._tasks = tasks
        self._questions: dict[str, _Question] = {}
        self._addresses = Addresses(engine=engine, tasks=tasks)
        #: How many more starts may wait for the network in vain.
        self._chances = LATE

    def __len__(self) -> int:
        """How many questions are under way, or answered and waiting for their start."""
        return len(self._questions)

    def on_event(self, event: Event, *, stale: bool = False) -> None:
        """Take in any event of a node; `stale`: older than what is known of it, so that its start is over, too.

        What calls for an inspection goes to `expect` as well.
        """
        if event.action == "connect":
            if not stale:
                self._ask_early(event)
        elif event.action in _DROPPING and self.drop(event.node_id) and event.action not in _ENDING:
            self._on_none(event.node_id)

    def awaits(self, node_id: str) -> bool:
        """Whether a start of this node is ahead: until then, its lock holds up whoever asks about it."""
        return node_id in self._questions

    def _ask_early(self, event: Event) -> None:
        node_id = event.node_id
        known = self._roster.known.get(node_id)
        if known is not None and known.status in _ALIVE:
            return  # another network for one that runs
        state = self._roster.state(node_id)
        by_network = state.checked is not None and len(self._roster.known) <= FEW and self._chances > 0
        if by_network and event.network != self._network:
            return
        if question := self._questions.get(node_id):
            if not by_network:
                return
            self._give_up(question)  # it is of another endpoint
        if not by_network and not self._may_inspect():
            return
        question = self._questions[node_id] = _Question(node_id, event.time_nano, state.as_of, by_network)
        question.wait(self._clock.call_later(LONGEST, lambda: self._give_up(question)))
        asking = self._ask_network(question, event.detail) if by_network else self._inspect(question)
        question.task = self._tasks.create_task(asking, name=f"foresight-{node_id[:12]}")

    def _may_inspect(self) -> bool:
        return sum(not question.by_network for question in self._questions.values()) < MOST

    async def _ask_network(self, question: _Question, network_id: str) -> None:
        address = await self._addresses.of(network_id, question.node_id)
        if address is None:
            self._chances = 0
        if address:
            question.task = None
            if question.started is None:
                question.answer, self._chances = address, LATE
            else:
                self._end(question, address, question.started)
        elif self._may_inspect():
            question.by_network = False
            await self._inspect(question)
        else:
            question.task = None
            self._give_up(question)

    async def _inspect(self, question: _Question) -> None:
        try:
            seen = await self._engine.inspect(question.node_id, as_of=self._roster.newest)
        except EngineError:  # whoever asks next tells of it
            question.task = None
            self._give_up(question)
            return
        if self._questions.get(question.node_id) is not question:
            return
        question.task = None
        if question.started is not None:
            self._end(question, seen, question.started)
        elif is_run_of(seen, since=question.before):
            question.answer = seen
            question.wait(self._clock.call_later(KEPT, lambda: self._give_up(question)))
        else:
            self.drop(question.node_id)

    def expect(self, event: Event) -> bool:
        """Whether the answer to a `start` is there, or soon will be; else the node is to be inspected."""
        question = self._questions.get(event.node_id)
        if question is None or event.time_nano < question.connected:
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
        if question.by_network:
            self._chances -= 1
        question.wait(self._clock.call_later(LONGEST, lambda: self._give_up(question)))
        self._on_none(question.node_id)

    def _end(self, question: _Question, seen: Observation | str, started: int) -> None:
        self.drop(question.node_id)
        if isinstance(seen, str) or is_run_of(seen, since=question.before, until=started):
            self._on_answer(question.node_id, seen, started)
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
        self._chances = LATE
        for question in list(self._questions.values()):
            self._give_up(question)
        self._addresses.end()
