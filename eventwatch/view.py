"""What is told of each node, to pages and to calls: its document, and what is known of it beside that.

Nothing here is remembered, and nothing decides: `policy` says how idle a node is, the pipeline's roster what is
known. One that stands by knows of no node, and tells what the database has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields, replace
from typing import Any, Final

from eventwatch.calls.waiting import find_node, wait_for
from eventwatch.core.clock import KindestClock
from eventwatch.core.facts import STOPPING, Recorded
from eventwatch.core.policy import Idleness, Timeout, idle_timeout_of, recorded_idleness, stop_timeout_of
from eventwatch.http.rows import Facts
from eventwatch.pipeline.pipeline import Pipeline
from eventwatch.settings.model import Settings
from eventwatch.store.documents import ToolServerNode

#: What a node's document says.
RECORDED: Final = tuple(field.name for field in fields(Recorded))


class NodeView:
    """The nodes of the pipeline that runs; `pipeline` says which does, None while none does."""

    def __init__(self, settings: Settings, time: KindestClock, pipeline: Callable[[], Pipeline | None]) -> None:
        self._settings = settings
        self._time = time
        self._pipeline = pipeline

    def ids(self) -> Iterable[str]:
        """The ids of the nodes that have a document."""
        pipeline = self._pipeline()
        return pipeline.roster.known if pipeline else ()

    def states(self) -> Iterable[tuple[str | None, str | None]]:
        """Status and health of each node."""
        pipeline = self._pipeline()
        return ((node.status, node.health) for node in (pipeline.roster.known.values() if pipeline else ()))

    def keeps(self, node_id: str) -> bool:
        """Whether that node is kept true now."""
        return node_id in self.ids()

    def node(self, node_id: str) -> dict[str, Any] | None:
        """A node's document as last read or written by us, and the idle time that is left to it (s)."""
        pipeline = self._pipeline()
        node = pipeline.roster.known.get(node_id) if pipeline else None
        if pipeline is None or node is None:
            return None
        shown = {name: getattr(node, name) for name in RECORDED}  # asdict copies deeply, at ten times the cost
        told = {"claim": node.claim and asdict(node.claim), "idle_left": self._idleness(pipeline, node).left}
        return shown | told | pipeline.roster.reasons.row(node_id)

    async def read(self, node_id: str) -> dict[str, Any] | None:
        """A node's row as the database has it, whoever keeps it; None: there is none. Raises StoreError."""
        document = await find_node(node_id)
        return None if document is None else self._row(document)

    async def wait(self, node_id: str, condition: str, seconds: float) -> dict[str, Any] | None:
        """A node's row once it meets a condition with a name; None once it is deleted. Raises as `wait_for`."""
        document = await wait_for(node_id, condition, seconds)  # type: ignore[arg-type]  # which it checks
        return None if document is None else self._row(document)

    def _row(self, document: ToolServerNode) -> dict[str, Any]:
        shown = self.node(document.id) or {}
        pipeline = self._pipeline()
        if pipeline and shown:
            known = replace(
                pipeline.roster.known[document.id], last_req_time=document.last_req_time, status=document.status
            )
            shown |= pipeline.roster.reasons.full_row(document.id) | self._idle_row(pipeline, known)
        return shown | {
            "node_id": document.id,
            **{name: getattr(document, name) for name in RECORDED if name in ToolServerNode.model_fields},
        }

    def facts(self, node_id: str) -> Facts | None:
        """What a row of the page is made of; None: there is no such node."""
        pipeline = self._pipeline()
        node = pipeline.roster.known.get(node_id) if pipeline else None
        if pipeline is None or node is None:
            return None
        roster = pipeline.roster
        told = roster.reasons.row(node_id)
        del told["unhealthy_for"]  # which changes all the time
        observed, observed_at = roster.observed(node_id)
        return Facts(
            recorded=node,
            told=told,
            stop_timeout=self._stop_timeout(pipeline, node_id) if node.status == STOPPING else 0.0,
            started_at=roster.started_at(node_id),
            used_at=roster.used_at(node_id),
            inspected=node_id not in pipeline.inspections.unanswered,
            observed=observed,
            observed_at=observed_at / 1e9,
        )

    def idle_at(self, node_id: str, _: Facts) -> dict[str, Any]:
        """When the node is idle as things stand (Unix time, s; null: never)."""
        pipeline = self._pipeline()
        node = pipeline.roster.known.get(node_id) if pipeline else None
        return {"idle_at": self._moment(self._idleness(pipeline, node)) if pipeline and node else None}

    def idle_timeout(self, node_id: str) -> float:
        """After how many seconds that node is idle, as far as is known; 0 or infinite: never."""
        pipeline = self._pipeline()
        return self._idle_limit(pipeline, node_id).seconds if pipeline else self._settings.idle_timeout

    def _moment(self, verdict: Idleness) -> int | None:
        return None if verdict.left is None else round(self._time.now().timestamp() + verdict.left)

    def _stop_timeout(self, pipeline: Pipeline, node_id: str) -> float:
        """From the claim of a node to when the engine kills it (s)."""
        labels = pipeline.roster.reasons.details(node_id).labels
        own = stop_timeout_of(labels, self._settings.stop_timeout)
        return self._settings.settle_delay + own.seconds

    def _idle_row(self, pipeline: Pipeline, node: Recorded) -> dict[str, Any]:
        """What decides when a node is idle: the limit (s; None: never), where that comes from, why not yet."""
        limit, verdict = self._idle_limit(pipeline, node.node_id), self._idleness(pipeline, node)
        seconds = limit.seconds if math.isfinite(limit.seconds) and limit.seconds else None
        idle = {"idle_left": verdict.left, "idle_at": self._moment(verdict)}
        return {**idle, "idle_limit": seconds, "idle_source": limit.source, "idle_reason": verdict.reason}

    def _idleness(self, pipeline: Pipeline, node: Recorded) -> Idleness:
        """How idle a node is, by what is known of it."""
        node_id = node.node_id
        used_at, owner = pipeline.roster.used_at(node_id), pipeline.owners.owned.get(node_id)
        limit = self._idle_limit(pipeline, node_id).seconds
        return recorded_idleness(node, used_at, self._time.now(), limit, owner)

    def _idle_limit(self, pipeline: Pipeline, node_id: str) -> Timeout:
        node = pipeline.roster.known.get(node_id)
        own = node.idle_timeout if node else None
        return idle_timeout_of(own, pipeline.roster.idle_label(node_id), self._settings.idle_timeout)
