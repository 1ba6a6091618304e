"""Which nodes are to be inspected, and which the engine does not answer for.

A node whose inspection fails is inspected again by one timer, and of many that fail at once only some are: when
one succeeds again, the others have their turn; else the next sweep asks for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from loguru import logger

from eventwatch.core.backoff import Backoff, Pace
from eventwatch.core.clock import Clock, Timer
from eventwatch.core.errors import EngineError
from eventwatch.core.workqueue import WorkQueue

#: Inspections in flight. An inspection may block for seconds on one container's lock; others must not wait.
INSPECTORS: Final = 32
#: Nodes that are inspected again and again while their inspections fail; of more, the sweeps ask.
RETRIED: Final = 16
_RETRY: Final = Pace(base=0.1, cap=5.0)


@dataclass(slots=True)
class _Failures:
    """The failed inspections of one node since the last that succeeded."""

    count: int = 0
    timer: Timer | None = None
    backoff: Backoff = field(default_factory=_RETRY.start)


class Inspections(WorkQueue[str]):
    """The queue of the inspectors. `request_sweep` is called when it is full."""

    def __init__(self, clock: Clock, request_sweep: Callable[[], object]) -> None:
        super().__init__()
        self._clock = clock
        self._request_sweep = request_sweep
        self._failures: dict[str, _Failures] = {}
        #: Nodes whose last inspection failed, the longest first.
        self.unanswered: dict[str, None] = {}

    def soon(self, node_id: str, *, urgent: bool = False) -> None:
        """Queue an inspection of this node, before all that are not urgent if it is."""
        if not self.add(node_id, urgent=urgent):
            self._request_sweep()

    def failed(self, node_id: str, error: EngineError, *, urgent: bool = False) -> None:
        """Have the node inspected again later, unless many others wait for that already."""
        self.unanswered[node_id] = None
        failures = self._failures.get(node_id)
        if failures is None:
            if len(self._failures) >= RETRIED:
                return
            failures = self._failures[node_id] = _Failures()
        failures.count += 1
        # An engine that is away is the watcher's to tell of. Else: the 1st, 2nd, 4th, 8th ... time.
        if not error.unreachable and failures.count & (failures.count - 1) == 0:
            logger.warning("Failed to get node info from docker: {}", node_id)
            logger.warning("{}{}", error, f" ({failures.count} times by now)" if failures.count > 1 else "")
        if failures.timer is None:
            delay = failures.backoff.next_delay()
            failures.timer = self._clock.call_later(delay, lambda: self._retry(node_id, failures, urgent=urgent))

    def _retry(self, node_id: str, failures: _Failures, *, urgent: bool) -> None:
        failures.timer = None
        self.soon(node_id, urgent=urgent)

    def succeeded(self, node_id: str) -> None:
        """The engine has answered for the node, and maybe does again for those that wait for that."""
        if node_id not in self.unanswered:
            return
        del self.unanswered[node_id]
        # A timer that is set goes on: whether this answer counts, only who asked for it knows.
        self._failures.pop(node_id, None)
        for waiting in [i for i in self.unanswered if i not in self._failures][:INSPECTORS]:
            self.soon(waiting)

    def forget(self, node_id: str) -> None:
        """Wait no longer for the engine to answer for this node."""
        self.unanswered.pop(node_id, None)
        failures = self._failures.pop(node_id, None)
        if failures and failures.timer:
            failures.timer.cancel()
