"""A poller of the manager's writes our fields at each pass: how often that is undone, and who is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
from loguru import logger

from eventwatch.core.clock import VirtualClock
from eventwatch.core.facts import Cause, Change
from eventwatch.core.metrics import totals
from eventwatch.pipeline.disputes import MANY, PER_SECOND, SPAN, Disputes
from tests.unit.test_afterlook import ended_node, put_back, world_of


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    lines: list[str] = []
    sink = logger.add(lambda line: lines.append(line.record["message"]), level="WARNING")
    yield lines
    logger.remove(sink)


def undone(number: int = 0, cause: Cause = Cause.LOOK, *, deleted: bool = False) -> Change:
    node_id = f"{number:064x}"
    return Change(node_id, node_id[:12], {"status": "running"}, {"status": "exited"}, deleted, cause, 0, None)


class Poller:
    """Writes into the documents of so many nodes each second; a look finds that every tenth of a second."""

    def __init__(self, nodes: int) -> None:
        self.clock = VirtualClock()
        self.disputes = Disputes(self.clock)
        self.undone: Counter[int] = Counter()
        self._nodes = nodes

    def go_on(self, seconds: int) -> None:
        for _ in range(seconds):
            wrong = set(range(self._nodes))
            for _ in range(10):
                self.clock.advance(0.1)
                for number in [i for i in wrong if not self.disputes.rests(undone(i).node_id)]:
                    wrong.remove(number)
                    self.undone[number] += 1
                    self.disputes.note(undone(number))


async def test_a_poller_is_told_of_once_and_its_node_is_still_put_right(warnings: list[str]) -> None:
    world = world_of(ended_node())
    await put_back(world, dict.fromkeys(range(5, 125), "running"))
    looks = [change for change in world.changes if change.cause is Cause.LOOK]
    assert 60 <= len(looks) <= 120
    assert world.store.documents[world.containers[0].id].status == "exited"
    (warning,) = [line for line in warnings if "again and again" in line]
    assert warning.startswith("Somebody else writes health and ip and status of node")
    ends = world.pipeline.metrics.ends
    assert sum(totals(ends).values()) == 1, "one end was told again and again"


@pytest.mark.parametrize("nodes", [1, 5, 300])
def test_writes_against_a_poller_are_bounded_whatever_it_writes(nodes: int) -> None:
    poller = Poller(nodes)
    poller.go_on(30)
    before = poller.undone.total()
    poller.go_on(60)
    each_second = (poller.undone.total() - before) / 60
    assert 0.4 * min(nodes, PER_SECOND) <= each_second <= min(nodes, PER_SECOND) * 1.1
    assert min(poller.undone.values()) >= MANY  # nobody is left out
    (note,) = poller.disputes.notes()
    assert f"the documents of {nodes} again" in note


def test_a_dispute_ends_when_nothing_is_undone_any_more_or_the_container_changes(warnings: list[str]) -> None:
    poller = Poller(2)
    poller.go_on(30)
    poller.disputes.note(undone(0, Cause.EVENT))
    assert not poller.disputes.rests(undone(0).node_id)
    assert poller.disputes.notes()
    poller.disputes.note(undone(1, Cause.SWEEP))
    poller.disputes.note(undone(1, Cause.SWEEP, deleted=True))
    assert not poller.disputes.notes()
    poller.go_on(30)
    assert poller.disputes.notes()
    poller.clock.advance(SPAN + 1)
    assert not poller.disputes.notes()
    assert len(warnings) == 1


def test_writes_that_are_merely_stale_are_no_dispute() -> None:
    poller = Poller(5)
    for _ in range(10):  # many, and for ten seconds after each change
        poller.go_on(10)
        for number in range(5):
            poller.disputes.note(undone(number, Cause.EVENT))
    assert not poller.disputes.notes()
    assert poller.undone.total() == 500
    for _ in range(10):  # now and then, for ever
        poller.go_on(1)
        poller.clock.advance(SPAN / (MANY - 1))
    assert not poller.disputes.notes()
