"""What the status page shows of each node: one row, made again only when something about the node has changed.

Why: a page that is open at 5,000 nodes asks every other second. Each row has the number of its last change; a page
names the highest number that it has, and gets what came after it: mostly nothing.

Contract: times are absolute (Unix times, s), so that a row does not change because time passes; the page counts.
Whoever asks with a number of another process, or of too long ago, is told to begin anew. `problems_of` decides
what an operator should look at, and what is calm: an end that was asked for is no problem.

Not promised: that each state between two questions is shown.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from eventwatch.core.clock import Slices
from eventwatch.core.facts import ENDED, STOPPING, Change, Recorded
from eventwatch.http.answers import MOMENT, dumps

#: Rows of one answer.
PAGE: Final = 500
#: Nodes that went whose ids are kept for those who ask, and moments of changes that are kept.
KEPT_GONE: Final = 10_000
KEPT_TIMES: Final = 20_000
#: Seconds after which a node that is still `removing`, or ought to have been killed by then, is stuck.
STUCK: Final = 120.0
#: Seconds for which a document may differ from the last inspection: a write is on its way.
ON_ITS_WAY: Final = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that a node's row depends on, but for time.

    `told` is what `Reasons.row` says, without what changes all the time. `observed` holds what inspections say of
    the document's fields, and `observed_at` since when (Unix time, s).
    """

    recorded: Recorded
    told: Mapping[str, Any] = field(default_factory=dict)
    #: Seconds that it is given to end by itself when we stop it.
    stop_timeout: float = 0.0
    started_at: datetime | None = None
    used_at: datetime | None = None
    inspected: bool = True
    observed: Mapping[str, str | int] | None = None
    observed_at: float = 0.0


def disagreement(facts: Facts, now: float) -> dict[str, str | int]:
    """What the engine said last of those fields of the document that say something else; empty when they agree."""
    recorded, observed = facts.recorded, facts.observed
    if observed is None or recorded.status == STOPPING or now - facts.observed_at < ON_ITS_WAY:
        return {}
    return {name: value for name, value in observed.items() if getattr(recorded, name) != value}


def stopped_by(facts: Facts, since: float | None) -> float | None:
    """When the engine kills a node that is being stopped (Unix time, s); None where nothing tells that."""
    return since + facts.stop_timeout if facts.recorded.status == STOPPING and since is not None else None


def problems_of(facts: Facts, now: float, since: float | None) -> tuple[str, ...]:
    """What about a node asks for attention; `since` is when its status came (Unix times, s)."""
    status, told = facts.recorded.status, facts.told
    end = told.get("end") if status in ENDED else None
    late = since and (stopped_by(facts, since) or since) + STUCK
    found = {
        "crash-looping": told.get("crash_loop"),
        "oom": end == "oom",
        "died": end == "failed" and not told.get("crash_loop"),
        "unhealthy": status == "running" and facts.recorded.health == "unhealthy",
        "stuck": status in {STOPPING, "removing"} and late is not None and now > late,
        "disagreeing": not facts.inspected or disagreement(facts, now),
    }
    return tuple(name for name, so in found.items() if so)


@dataclass(slots=True)
class _Row:
    facts: Facts
    problems: tuple[str, ...]
    number: int
    encoded: bytes


@dataclass(slots=True, kw_only=True)
class Rows:
    """The rows of all nodes. `more` tells the rest of a row; `now` is in Unix time (s).

    While `node_ids` are not all there are (not `whole`), the rows of others stay as they were.
    """

    node_ids: Callable[[], Iterable[str]]
    facts: Callable[[str], Facts | None]
    more: Callable[[str, Facts], Mapping[str, Any]]
    now: Callable[[], float] = time.time
    whole: Callable[[], bool] = lambda: True
    #: How many nodes have each status, and each problem.
    statuses: Counter[str] = field(default_factory=Counter)
    problems: Counter[str] = field(default_factory=Counter)
    _rows: OrderedDict[str, _Row] = field(default_factory=OrderedDict)
    _gone: OrderedDict[str, int] = field(default_factory=OrderedDict)
    _since: OrderedDict[str, float] = field(default_factory=OrderedDict)
    _run: str = field(default_factory=lambda: secrets.token_hex(4))
    _number: int = 0
    #: Whoever has no more than this number may lack that a node went.
    _forgotten: int = 0
    _fresh_until: float = 0.0
    _refreshing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def publish(self, change: Change) -> None:
        """Take one acknowledged change: it tells since when a node is as it is."""
        if change.deleted:
            self._since.pop(change.node_id, None)
        elif "status" in change.new:
            self._since[change.node_id] = (change.event_ns or change.at_ns) / 1e9
            self._since.move_to_end(change.node_id)
            if len(self._since) > KEPT_TIMES:
                self._since.popitem(last=False)

    def since(self, node_id: str, facts: Facts) -> float | None:
        """Since when a node has its status (Unix time, s); None: not known."""
        if node_id in self._since:
            return self._since[node_id]
        status = facts.recorded.status
        moment = facts.started_at if status == "running" else None
        if status in ENDED:
            moment = facts.told.get("finished_at")
        return moment.timestamp() if moment else None

    async def answer(self, have: str) -> bytes:
        """JSON: the rows after version `have` (all after an odd one), a page at most, and what went since then.

        `more` says that there are others after `version`; `reset`, that rows which are not told of are gone.
        """
        await self.refresh()
        found = re.fullmatch(rf"{self._run}-([0-9]{{1,15}})", have, re.ASCII)
        after = int(found[1]) if found else 0
        reset = after < self._forgotten or not found
        after = 0 if reset else after
        newer = []
        for row in reversed(self._rows.values()):
            if row.number <= after:
                break
            newer.append(row)
        chosen = newer[::-1][:PAGE]
        more = len(newer) > len(chosen)
        gone = [] if reset else [node_id for node_id, number in self._gone.items() if number > after]
        head = {
            "now": self.now(),
            "version": f"{self._run}-{chosen[-1].number if more else self._number}",
            "more": more,
            "reset": reset,
            "total": len(self._rows),
        }
        text = dumps({**head, "gone": gone}).encode()
        return text[:-1] + b', "rows": [' + b", ".join(row.encoded for row in chosen) + b"]}"

    async def refresh(self) -> None:
        """Look for what has changed, at most once a moment, and never for long without a pause."""
        async with self._refreshing:
            if time.monotonic() < self._fresh_until:
                return
            present = list(self.node_ids())
            slices = Slices()
            for node_id in present:
                self._look_at(node_id)
                await slices.turn()
            if self.whole():
                for node_id in self._rows.keys() - set(present):
                    self._forget(node_id)
            self._fresh_until = time.monotonic() + MOMENT

    def _look_at(self, node_id: str) -> None:
        facts, old = self.facts(node_id), self._rows.get(node_id)
        if facts is None:
            return
        since = self.since(node_id, facts)
        problems = problems_of(facts, self.now(), since)
        if old is not None and old.facts == facts and old.problems == problems:
            return
        self._uncount(old)
        self.statuses[str(facts.recorded.status)] += 1
        self.problems.update(problems)
        self._number += 1
        row = self.row(node_id, facts, problems, since)
        encoded = dumps(row).encode()
        self._rows[node_id] = _Row(facts, problems, self._number, encoded)
        self._rows.move_to_end(node_id)
        self._gone.pop(node_id, None)

    def row(self, node_id: str, facts: Facts, problems: tuple[str, ...], since: float | None) -> dict[str, Any]:
        """A node's row."""
        recorded = facts.recorded
        return {
            "node_id": node_id,
            "short_id": recorded.short_id,
            "name": facts.told.get("name", ""),
            "image": facts.told.get("image", ""),
            "status": recorded.status,
            "since": since,
            "health": recorded.health,
            "ip": recorded.ip,
            "port": recorded.port,
            "restarts": facts.told.get("restart_count", 0),
            "reason": facts.told.get("reason", ""),
            "stop_by": stopped_by(facts, since),
            "problems": problems,
            "disagreement": disagreement(facts, self.now()),
            **self.more(node_id, facts),
        }

    def _uncount(self, row: _Row | None) -> None:
        if row is not None:
            self.statuses[str(row.facts.recorded.status)] -= 1
            self.problems.subtract(row.problems)

    def _forget(self, node_id: str) -> None:
        self._uncount(self._rows.pop(node_id))
        self._since.pop(node_id, None)
        self._number += 1
        self._gone[node_id] = self._number
        self._gone.move_to_end(node_id)
        while len(self._gone) > KEPT_GONE:
            _, self._forgotten = self._gone.popitem(last=False)
