"""Which documents are an engine's business, without a database: who asks for what, and what is left out."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import cast

import pytest

from eventwatch.core.errors import EngineError
from eventwatch.core.facts import Recorded
from eventwatch.core.listing import Listed
from eventwatch.engine.protocol import Engine
from eventwatch.pipeline.members import LATELY_GONE, Members
from eventwatch.store.nodes import Store

US, ALIVE, DEAD = "us", "alive", "dead"


def ids(count: int, first: int = 0) -> list[str]:
    return [f"{number:064x}" for number in range(first, first + count)]


class Records:
    """Documents by their stamps, and what was asked."""

    def __init__(self, documents: dict[str, str | None], trace: str | None = None) -> None:
        self.documents = {i: Recorded(i, i[:12], engine_id=stamp) for i, stamp in documents.items()}
        self.trace = trace
        self.traced = 0
        self.asked: list[str] = []

    async def read_own(self, engine_id: str, node_ids: Collection[str], *, leftovers: bool) -> dict[str, Recorded]:
        self.asked = list(node_ids)
        found = {i: node for i, node in self.documents.items() if node.engine_id == engine_id or i in node_ids}
        return found | {i: node for i, node in self.documents.items() if leftovers and not node.engine_id}

    async def live_among(self, engine_ids: Collection[str]) -> frozenset[str]:
        return frozenset({ALIVE}.intersection(engine_ids))

    async def trace_of_others(self, _: str) -> str | None:
        self.traced += 1
        return self.trace


class Containers:
    """An engine that lists these, or fails."""

    def __init__(self, has: Iterable[str] = (), error: EngineError | None = None) -> None:
        self.has = list(has)
        self.error = error

    async def list_rows(self) -> list[Listed]:
        if self.error:
            raise self.error
        return [Listed(node_id) for node_id in self.has]


def members(records: Records, engine: Containers) -> Members:
    return Members(cast("Engine", engine), cast("Store", records))


async def test_what_the_engine_has_or_had_is_a_member_unless_a_live_engine_has_stamped_it() -> None:
    listed, foreign, orphaned, owned, stamped, others = ids(6)
    records = Records(
        {listed: None, foreign: ALIVE, orphaned: DEAD, owned: None, stamped: US, others: None}, trace=ALIVE
    )
    found = await members(records, Containers([listed, foreign, orphaned])).find(US, owned=[owned])
    assert set(found) == {listed, orphaned, owned, stamped}


@pytest.mark.parametrize("trace", [None, ALIVE])
async def test_what_bears_no_engines_id_is_a_member_only_where_no_other_engine_left_a_trace(
    trace: str | None,
) -> None:
    records = Records(dict.fromkeys(ids(3)), trace=trace)
    found = await members(records, Containers()).find(US, owned=())
    assert set(found) == (set() if trace else set(ids(3)))


async def test_a_trace_is_looked_for_until_there_is_one() -> None:
    records = Records({})
    own = members(records, Containers())
    for trace in (None, None, ALIVE, None, None):
        records.trace = trace
        await own.find(US, owned=())
    assert records.traced == 3


async def test_an_engine_that_does_not_list_leaves_the_rest_and_one_that_is_away_does_not() -> None:
    records = Records(dict.fromkeys(ids(2)), trace=ALIVE)
    found = await members(records, Containers(error=EngineError("denied", status=403))).find(US, owned=ids(1))
    assert set(found) == set(ids(1))
    with pytest.raises(EngineError, match="away"):
        await members(records, Containers(error=EngineError("away", unreachable=True))).find(US, owned=ids(1))


async def test_all_that_is_gone_is_looked_for_in_turn_and_the_newest_each_time() -> None:
    gone = ids(3 * LATELY_GONE + 7)
    records = Records({}, trace=ALIVE)
    own = members(records, Containers())
    seen: set[str] = set()
    for _ in range(3):
        await own.find(US, owned=(), gone=gone)
        assert len(records.asked) <= 2 * LATELY_GONE
        assert set(gone[-LATELY_GONE:]) <= set(records.asked)
        seen |= set(records.asked)
    assert seen == set(gone)
