"""Why each node is as it is, as events and inspections have told this process. State, no I/O.

Contract: `on_event` and `on_inspection` cost a few microseconds and never raise on what they are told; they are
called where no event may be held up. What is kept of a node is bounded, and goes when the node does. A node's end
is told once (`on_end`, one line of the log, one count), when an inspection has explained it.

What came before this process looked is `recall`ed from the history: who asked for an end, and since when a node
has been unhealthy. Not promised: to know it where no eventwatch looked, or the history lacks it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from loguru import logger

from eventwatch.core.clock import Clock
from eventwatch.core.details import (
    Details,
    End,
    Looks,
    OnRecord,
    asked_by,
    brief_row,
    details_of,
    die_reason,
    end_kind,
    end_on_record,
    end_reason,
    full_row,
    is_crash_loop,
    look_at_restarts,
)
from eventwatch.core.facts import ENDED, Cause, Ending, Event, Observation, Write
from eventwatch.core.metrics import Metrics

#: An end that is this much older than the event of one is an end before it (the engine's clock is one).
SAME_END: Final = timedelta(seconds=2)
_NO_DETAILS: Final = Details()


@dataclass(slots=True)
class _Node:
    """What was told of one container."""

    details: Details = _NO_DETAILS
    looks: Looks = ()
    #: Who asked for its end, since its last start.
    asked: str = ""
    #: That eventwatch itself stops it, and why.
    own: str = ""
    exit_code: str = ""
    died_at: datetime | None = None
    #: Whether its end is written, and still to be told.
    untold: bool = False
    #: Whether its document says `unhealthy`, and no inspection since has told why.
    unhealthy_untold: bool = False
    #: When the end was that was told last.
    told: datetime | None = None
    #: Monotonic, s.
    unhealthy_since: float | None = None
    #: Whether its health has been seen.
    health_told: bool = False
    #: What the history has of it: its last status, and since when it has been unhealthy (monotonic, s).
    record: OnRecord | None = None
    unhealthy_on_record: float | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """A node's end, once it is explained."""

    node_id: str
    at: datetime | None
    kind: End
    reason: str
    #: Who asked for it; empty: nobody.
    asked: str = ""


class Reasons:
    """What is known of the nodes besides their documents. `health_check`: whether their health counts."""

    def __init__(self, *, clock: Clock, metrics: Metrics, health_check: bool = True) -> None:
        self._clock = clock
        self._metrics = metrics
        self._health_check = health_check
        self._nodes: dict[str, _Node] = {}
        #: Called with each end, once it is explained.
        self.on_end: list[Callable[[Ended], object]] = []
        #: Called with a node's id and the reason, once it is explained why that is unhealthy.
        self.on_unhealthy: list[Callable[[str, str], object]] = []

    # -- what is told --------------------------------------------------------------------------------

    def on_event(self, event: Event) -> None:
        """Take in an event of a node."""
        match event.action:
            case "kill":
                self._node(event.node_id).asked = asked_by(event.detail) or self._node(event.node_id).asked
            case "die":
                node = self._node(event.node_id)
                node.exit_code, node.unhealthy_since, node.unhealthy_on_record = event.detail, None, None
                node.details = replace(node.details, ending=None)  # that of an earlier run
                node.died_at = datetime.fromtimestamp(event.time_nano / 1e9, UTC)
            case "start":
                node = self._node(event.node_id)
                node.asked = node.own = node.exit_code = ""
                node.record = None
                node.details = replace(node.details, ending=None)
                node.died_at = None
            case "health_status":
                self._note_health(self._node(event.node_id), unhealthy=event.health == "unhealthy")

    def on_inspection(self, seen: Observation) -> None:
        """Take in what an inspection says of a node."""
        if not seen.found:
            return
        node = self._node(seen.node_id)
        node.details = details_of(seen, node.details)
        if not node.looks or seen.restart_count != node.looks[-1][1]:
            started = seen.started_at
            since = self._clock.time_ns() / 1e9 - started.timestamp() if started else None
            node.looks = look_at_restarts(node.looks, seen, now=self._clock.monotonic(), since_start=since)
        self._note_health(node, unhealthy=seen.status == "running" and seen.health == "unhealthy")
        if node.untold:
            self._tell(seen.node_id, node)
        if node.unhealthy_untold:
            self._tell_unhealthy(seen.node_id, node)

    def recall(self, node_id: str, last: OnRecord | None, *, unhealthy_since: datetime | None = None) -> None:
        """Take in what the history has: the last change of its status, and when it last became unhealthy."""
        node = self._node(node_id)
        if not node.died_at:
            node.record = last
        if unhealthy_since and not (node.health_told and node.unhealthy_since is None):
            since = self._clock.monotonic() - max(0.0, self._clock.time_ns() / 1e9 - unhealthy_since.timestamp())
            node.unhealthy_on_record = since
            if node.unhealthy_since is not None:
                node.unhealthy_since = min(node.unhealthy_since, since)

    def will_stop(self, node_id: str, why: str) -> None:
        """We are about to stop it; empty: we are not any more."""
        self._node(node_id).own = why

    def forget(self, node_id: str) -> None:
        """It is no node any more."""
        self._nodes.pop(node_id, None)

    def _node(self, node_id: str) -> _Node:
        node = self._nodes.get(node_id)
        if node is None:
            node = self._nodes[node_id] = _Node()
        return node

    def _note_health(self, node: _Node, *, unhealthy: bool) -> None:
        node.health_told = True
        if not (unhealthy and self._health_check):
            node.unhealthy_untold = False
            node.unhealthy_since = node.unhealthy_on_record = None
        elif node.unhealthy_since is None:
            before = node.unhealthy_on_record
            node.unhealthy_since = self._clock.monotonic() if before is None else before

    # -- what is written -----------------------------------------------------------------------------

    def of_change(self, write: Write, status: object) -> str:
        """Why a document is changed so, as far as that is known now; `status` is what it says from now on."""
        node = self._nodes.get(write.node_id, _Node())
        if write.delete:
            return "its container was removed" + (f"; {self._end_of(node)}" if node.died_at else "")
        if status == "stopping":
            return node.own
        if status == "restarting":
            return f"restarted {node.details.restart_count} times by its restart policy; {self._end_of(node)}"
        if status in ENDED:
            return self._end_of(node)
        # What is known when an event comes is of an inspection before it.
        by_inspection = write.cause is not Cause.EVENT and write.fields.get("health") == "unhealthy"
        return self._why_unhealthy(node) if by_inspection else ""

    def unhealthy(self, node_id: str, cause: Cause) -> None:
        """Its document says that it is unhealthy: tell why, now or when an inspection explains it."""
        node = self._node(node_id)
        node.unhealthy_untold = True
        if cause is not Cause.EVENT:
            self._tell_unhealthy(node_id, node)

    def _tell_unhealthy(self, node_id: str, node: _Node) -> None:
        reason = self._why_unhealthy(node)
        if not reason:
            return
        node.unhealthy_untold = False
        named = f" ({node.details.name})" if node.details.name else ""
        logger.bind(node=node_id, name=node.details.name).info(
            "Node {}{} is unhealthy: {}", node_id[:12], named, reason
        )
        for listener in self.on_unhealthy:
            listener(node_id, reason)

    def on_written(self, node_id: str, new: Mapping[str, str | int], cause: Cause) -> None:
        """Take in what a document says from now on, and did not say before."""
        if new.get("status") in ENDED:
            self.ended(node_id)
        elif new.get("status") == "running":
            self.runs(node_id)
        if new.get("health") == "unhealthy":
            self.unhealthy(node_id, cause)

    def runs(self, node_id: str) -> None:
        """Its document says that it runs: what the history has of an end or a stop is of before."""
        self._node(node_id).record = None

    def ended(self, node_id: str) -> None:
        """Its end is written: tell it, now or when an inspection explains it."""
        node = self._node(node_id)
        node.untold = True
        self._tell(node_id, node)

    def _tell(self, node_id: str, node: _Node) -> None:
        ending, kind, reason = self._ending(node), self._kind(node), self._end_of(node)
        if ending is None or kind is None:
            return
        node.untold = False
        if ending.finished_at and ending.finished_at == node.told:
            return  # somebody had put an older status back
        node.told = ending.finished_at
        self._metrics.ends.labels(str(kind)).inc()
        told = logger.bind(node=node_id, end=str(kind), exit_code=ending.exit_code, name=node.details.name)
        named = f" ({node.details.name})" if node.details.name else ""
        told.info("Node {}{} ended: {}", node_id[:12], named, reason)
        for listener in self.on_end:
            listener(Ended(node_id, ending.finished_at, kind, reason, self._asked(node)))

    def _ending(self, node: _Node) -> Ending | None:
        """How it ended, if an inspection has told of this end, not only of one before."""
        ending = node.details.ending
        if ending and node.died_at and (ending.finished_at or node.died_at) < node.died_at - SAME_END:
            return None
        return ending

    def _asked(self, node: _Node) -> str:
        past = end_on_record(node.record, node.details)
        return node.own or node.asked or (past[1] if past else "")

    def _kind(self, node: _Node) -> End | None:
        ending = self._ending(node)
        if ending is None:
            return None
        past = end_on_record(node.record, node.details)
        if past and not (node.own or node.asked):
            return past[0]
        return end_kind(ending, asked=True if self._asked(node) else False if node.died_at else None)

    def _end_of(self, node: _Node) -> str:
        ending = self._ending(node)
        if ending is None:
            return die_reason(node.exit_code, asked=self._asked(node))
        return end_reason(ending, ran=node.details.ran, asked=self._asked(node))

    # -- what is shown -------------------------------------------------------------------------------

    def details(self, node_id: str) -> Details:
        """The container as last inspected; empty fields before that."""
        node = self._nodes.get(node_id)
        return node.details if node else _NO_DETAILS

    def row(self, node_id: str) -> dict[str, Any]:
        """What a list of nodes shows of it."""
        node = self._nodes.get(node_id) or _Node()
        now = self._clock.monotonic()
        kind = self._kind(node)
        return brief_row(node.details) | {
            "crash_loop": is_crash_loop(node.looks, now=now),
            "unhealthy_for": None if node.unhealthy_since is None else now - node.unhealthy_since,
            "end": kind and str(kind),
            "reason": self._reason(node),
        }

    def full_row(self, node_id: str) -> dict[str, Any]:
        """What is shown of one node besides."""
        return full_row(self.details(node_id))

    def _reason(self, node: _Node) -> str:
        if node.details.ending or node.died_at:
            return self._end_of(node)
        if node.own:
            return node.own
        return self._why_unhealthy(node)

    def _why_unhealthy(self, node: _Node) -> str:
        failures = node.details.failures if node.unhealthy_since is not None else ()
        return str(failures[0]) if failures else ""

    def crash_looping(self) -> int:
        """How many nodes start again and again."""
        now = self._clock.monotonic()
        return sum(is_crash_loop(node.looks, now=now) for node in self._nodes.values())

    def longest_unhealthy(self) -> float:
        """For how long (s) the node has been unhealthy that has been so the longest; 0 without one."""
        now = self._clock.monotonic()
        return max(self._unhealthy(now), default=0.0)

    def _unhealthy(self, now: float) -> Iterable[float]:
        return (now - node.unhealthy_since for node in self._nodes.values() if node.unhealthy_since is not None)
