"""Notices that somebody else writes what is ours again and again, and does not fight about it without end.

Why: a poller that a manager left running beside eventwatch writes a status at each of its passes, and a manager
that saves whole documents from its memory does so at each request. Looks undo that each time: at the cost of an
inspection, a write and a line in the log, for ever, and nobody would know that it should be turned off.

How: of each node the writes that looks undid are counted since its container last changed. `MANY` of them within
`SPAN`, over more than `LASTING`, by when a write that is merely stale is over, are a dispute: it is warned of once
and noted, and from then on looks put its nodes right at most every `PAUSE` each, and `PER_SECOND` a second of all.
What an event or a sweep tells is written as ever. A dispute is over when for `SPAN` there was nothing to undo.

Not promised: to tell who it is that writes.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Final

from loguru import logger

from eventwatch.core.clock import Clock
from eventwatch.core.facts import Cause, Change

#: So many undone writes to a node, within and over more than so many seconds.
MANY: Final = 8
SPAN: Final = 60.0
LASTING: Final = 15.0
#: Seconds between two times that a disputed node is put right, and how many are in a second.
PAUSE: Final = 1.0
PER_SECOND: Final = 10.0
#: Nodes that are named.
NAMED: Final = 10
FIX: Final = "turn off the manager's own poller, and have it write only its own fields"


@dataclass(slots=True)
class _Undone:
    """When writes to a node were undone (monotonic, s), the last `MANY` of them, and whether it is in dispute."""

    began: float
    at: deque[float] = field(default_factory=lambda: deque(maxlen=MANY))
    disputed: bool = False
    rests_until: float = 0.0


class Disputes:
    """What others write into the documents of one watcher."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        #: Of each node whose document looks have put right lately, the one that was so the longest ago first.
        self._undone: OrderedDict[str, _Undone] = OrderedDict()
        self._told = False

    def note(self, change: Change) -> None:
        """Take in a change that we wrote."""
        if change.cause is Cause.SWEEP and not change.deleted:
            return  # which may have undone the same
        if change.cause is not Cause.LOOK or change.deleted:
            self._undone.pop(change.node_id, None)  # another may have written what was true before
            return
        now = self._clock.monotonic()
        self._end_old(now)
        undone = self._undone.setdefault(change.node_id, _Undone(now))
        self._undone.move_to_end(change.node_id)
        undone.at.append(now)
        lasts = len(undone.at) == MANY and undone.at[0] > now - SPAN and undone.began < now - LASTING
        undone.disputed |= lasts
        if undone.disputed:
            undone.rests_until = now + max(PAUSE, len(self._disputed()) / PER_SECOND)
            self._tell_of(change)

    def rests(self, node_id: str) -> bool:
        """Whether what others wrote into this node's document is to be left there for now."""
        undone = self._undone.get(node_id)
        return undone is not None and self._clock.monotonic() < undone.rests_until

    def notes(self) -> list[str]:
        """What to tell of the disputes there are; empty without any."""
        self._end_old(self._clock.monotonic())
        if not (disputed := self._disputed()):
            return []
        names = ", ".join(node_id[:12] for node_id in disputed[:NAMED])
        more = ", ..." if len(disputed) > NAMED else ""
        whose = f"what is eventwatch's into the documents of {len(disputed)} again and again: {names}{more}"
        return [f"nodes: somebody else writes {whose}: {FIX}"]

    def _disputed(self) -> list[str]:
        return [node_id for node_id, undone in self._undone.items() if undone.disputed]

    def _end_old(self, now: float) -> None:
        while self._undone:
            oldest = next(iter(self._undone.values()))
            if max(oldest.at[-1], oldest.rests_until) >= now - SPAN:
                return
            self._undone.popitem(last=False)

    def _tell_of(self, change: Change) -> None:
        if self._told:
            return
        self._told = True
        logger.warning(
            "Somebody else writes {} of node {} again and again, undone at most once in {:.0f} s from now on: {}",
            " and ".join(sorted(change.new)),
            change.short_id,
            PAUSE,
            FIX,
        )
