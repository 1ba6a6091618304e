"""What is known of each container: its document as last read or written, and what orders the facts of it.

State alone: nothing here reads or writes. `known` remembers documents for three purposes only: to tell nodes from
other containers without a query, to log the old value, and to count. No decision about a settle or a sweep relies
on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from eventwatch.core.clock import Timer
from eventwatch.core.facts import Observation, Recorded
from eventwatch.core.policy import IDLE_LABEL, Fields, start_as_use
from eventwatch.core.reasons import Reasons
from eventwatch.pipeline.inspections import Inspections


@dataclass(slots=True)
class NodeState:
    """What orders the facts of one container. Counters grow, so that a later look can tell what came between."""

    as_of: int = 0
    events: int = 0
    status_hints: int = 0
    health_hints: int = 0
    answers: int = 0
    health: str = ""
    first_event: float | None = None
    last_event: float = 0.0
    settle: Timer | None = None
    elsewhere: bool = False
    looked: bool = False
    started_at: datetime | None = None
    used_at: datetime | None = None
    worked_at: datetime | None = None
    idle_label: str | None = None
    #: Whether it has a health check, None until it was inspected; a container keeps what it was made with.
    checked: bool | None = None
    #: What the last inspections say of the document's fields, unless an event came since; and since when.
    observed: Fields | None = None
    observed_at: int = 0
    #: `timeNano` of the events that wait for an inspection.
    waiting: list[int] = field(default_factory=list)


class Roster:
    """The containers of one engine. `engine_id` and `host` (the engine's name) say which."""

    def __init__(self, *, reasons: Reasons, inspections: Inspections, engine_id: str = "", host: str = "") -> None:
        self.engine_id = engine_id
        self.host = host
        self.known: dict[str, Recorded] = {}
        #: Whether a pass has told which documents there are; until then, one that is not known proves nothing.
        self.has_learned = False
        #: Why the nodes are as they are.
        self.reasons = reasons
        #: Engine time (ns) of the newest event received: whatever is asked now is at least as new.
        self.newest = 0
        self._inspections = inspections
        self._states: dict[str, NodeState] = {}

    def state(self, node_id: str) -> NodeState:
        """The state of a container, from now on."""
        state = self._states.get(node_id)
        if state is None:
            state = self._states[node_id] = NodeState()
        return state

    def forget(self, node_id: str) -> None:
        """A container has no document any more."""
        self.known.pop(node_id, None)
        self.drop_state(node_id)

    def drop_state(self, node_id: str) -> None:
        """Remember nothing of a container but its document."""
        self._inspections.forget(node_id)
        self.reasons.forget(node_id)
        state = self._states.pop(node_id, None)
        if state and state.settle:
            state.settle.cancel()

    def replace_known(self, documents: Mapping[str, Recorded], *, known_before: Mapping[str, Recorded]) -> None:
        """Take over a read of all members; `known_before` is a copy of `known` from when it began.

        What was written or deleted since is newer than the read.
        """
        self.has_learned = True
        for node_id in known_before.keys() - documents.keys():
            self.forget(node_id)
        for node_id, recorded in documents.items():
            if self.known.get(node_id) is known_before.get(node_id):
                self.known[node_id] = recorded

    def take_settling(self) -> list[str]:
        """The containers that wait until they are quiet; they wait no longer."""
        settling = [node_id for node_id, state in self._states.items() if state.settle]
        for node_id in settling:
            state = self._states[node_id]
            if state.settle:
                state.settle.cancel()
                state.settle = None
        return settling

    def note_start(self, seen: Observation) -> NodeState:
        """Remember when the container started, and whether that start was a use of the node."""
        state = self.state(seen.node_id)
        state.started_at = seen.started_at
        state.used_at = start_as_use(seen, state.used_at)
        state.idle_label = seen.labels.get(IDLE_LABEL)
        state.checked = seen.checked
        self.reasons.on_inspection(seen)
        return state

    def note_work(self, node_id: str, moment: datetime) -> None:
        """Count what the node did as a use of it (aware UTC)."""
        self.state(node_id).worked_at = moment

    def events_seen(self, node_id: str) -> int:
        """How many facts (events, answers taken) this node has had; a sweep remembers it before it inspects."""
        state = self._states.get(node_id)
        return state.events + state.answers if state else 0

    def started_at(self, node_id: str) -> datetime | None:
        """When the container started, by the last inspection of it."""
        state = self._states.get(node_id)
        return state.started_at if state else None

    def used_at(self, node_id: str) -> datetime | None:
        """The container's last start by a person or a manager, or work of its own, as far as we were told."""
        state = self._states.get(node_id)
        if state is None or state.worked_at is None:
            return state.used_at if state else None
        return max(state.used_at, state.worked_at) if state.used_at else state.worked_at

    def idle_label(self, node_id: str) -> dict[str, str]:
        """The container's label about its idle time, as far as inspections told; empty without one."""
        state = self._states.get(node_id)
        return {IDLE_LABEL: state.idle_label} if state and state.idle_label is not None else {}

    def observed(self, node_id: str) -> tuple[Fields | None, int]:
        """What inspections say the document should hold, unless an event came since; since when (Unix, ns)."""
        state = self._states.get(node_id)
        return (state.observed, state.observed_at) if state else (None, 0)
