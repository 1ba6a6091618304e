"""What holds for any past of any containers, however their events reach us.

The real watcher, reconciler and sweeper in a simulated world (simulated.py), on virtual time.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loguru import logger

from eventwatch.core.facts import Recorded
from tests.unit.simulated import FIRST_PORT, GAPS, MS, OPERATIONS, START, Container, State, Stream, World

#: Operations that change something without an event of their own: only a sweep is sure to see them.
SILENT = {"give_up"}

EXAMPLES = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,  # the same examples each time: a failure is the change's fault
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
MORE_EXAMPLES = settings(EXAMPLES, max_examples=400)


@st.composite
def pasts(draw: st.DrawFn, *, silent: bool) -> list[Container]:
    """A few containers, and what happens to each."""
    operations = [name for name in OPERATIONS if silent or name not in SILENT]
    steps = st.lists(st.tuples(st.sampled_from(operations), st.sampled_from(GAPS)), max_size=8)
    made = []
    for number in range(draw(st.integers(1, 3))):
        chance = random.Random(draw(st.integers(0, 2**32)))
        container = Container(
            number, chance, checked=draw(st.booleans()), starts_at=START + draw(st.integers(1, 1500)) * MS
        )
        container.do("start", draw(st.sampled_from(GAPS)))
        for operation, gap in draw(steps):
            container.do(operation, gap)
        made.append(container)
    return made


def between(longest_ms: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(0, 5000), st.integers(1, longest_ms)).map(
        lambda pair: (START + pair[0] * MS, START + (pair[0] + pair[1]) * MS)
    )


@st.composite
def faults(draw: st.DrawFn) -> Stream:
    """A stream that is cut anywhere, repeats events, and loses a run of them."""
    return Stream(
        repeated=draw(st.sampled_from((0.0, 0.5))),
        away=draw(st.none() | between(2000)),
        forgets=draw(st.booleans()),
        dropped=draw(st.none() | between(3000)),
    )


def run(world: World, **options: Any) -> World:
    logger.disable("eventwatch")
    try:
        asyncio.run(world.run(**options))
    finally:
        logger.enable("eventwatch")
    return world


@MORE_EXAMPLES
@given(
    containers=pasts(silent=False),
    seed=st.integers(0, 2**32),
    repeated=st.sampled_from((0.0, 0.5)),
    refuses=st.none() | between(3000),
)
def test_events_alone_end_at_the_truth(
    containers: list[Container], seed: int, repeated: float, refuses: tuple[int, int] | None
) -> None:
    """However late and in whatever order they come, if all come and each change has one."""
    world = run(World(containers, Stream(repeated=repeated, refuses=refuses), seed, sweeps=False), after=8.0)
    assert world.wrong() == {}


@EXAMPLES
@given(containers=pasts(silent=True), stream=faults(), seed=st.integers(0, 2**32))
def test_whatever_is_lost_a_sweep_ends_at_the_truth(
    containers: list[Container], stream: Stream, seed: int
) -> None:
    world = run(World(containers, stream, seed))
    assert world.wrong() == {}


@EXAMPLES
@given(
    containers=pasts(silent=True),
    stream=faults(),
    seed=st.integers(0, 2**32),
    replaced_at=st.lists(st.integers(0, 6000), max_size=4),
)
def test_a_manager_that_writes_back_what_it_read_before_does_no_lasting_harm(
    containers: list[Container], stream: Stream, seed: int, replaced_at: list[int]
) -> None:
    world = World(containers, stream, seed)
    run(world, meanwhile=writing_back(world, replaced_at))
    assert world.wrong() == {}


@EXAMPLES
@given(
    containers=pasts(silent=False),
    seed=st.integers(0, 2**32),
    replaced_at=st.lists(st.integers(0, 6000), min_size=2, max_size=4),
)
def test_the_next_event_puts_right_what_a_manager_wrote_back(
    containers: list[Container], seed: int, replaced_at: list[int]
) -> None:
    for container in containers:
        container.do("rename", 6500)
    world = World(containers, Stream(), seed, sweeps=False)
    run(world, meanwhile=writing_back(world, replaced_at))
    assert world.wrong() == {}


def writing_back(world: World, times: list[int]) -> dict[int, Callable[[], object]]:
    """Be a manager that replaces whole documents, each time with what it read the time before."""
    read: dict[str, Recorded] = {}

    def write_back() -> None:
        for node_id, document in read.items():
            if node_id in world.store.documents:
                world.store.documents[node_id] = document
        read.clear()
        read.update(world.store.documents)

    return {START + at * MS: write_back for at in times}


# -- order --------------------------------------------------------------------------------------------------------

#: A hint cannot tell these apart, so neither does the order of facts.
DOWN = {"exited", "restarting", "removing"}


def kind(status: str | None) -> str:
    return "down" if status in DOWN else status or ""


@dataclass
class Order:
    """Watches the documents of one world: what each says must be true at no earlier time than what it said before.

    A hint's status or health fits several times of a container's past; it is taken for the earliest allowed. An
    inspection shows in a new port, and says from when on, at least, the hints after it must be: from the start or
    end that it shows, or the newest event that was known when it was asked for. Between that and the inspection
    itself, a pause or a change of health may be told late and be believed; no clock that we have could tell.
    """

    world: World
    positions: dict[tuple[str, str], int] = field(default_factory=dict)
    older: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def watch(self, document: Recorded) -> None:
        when = (self.world.clock.time_ns() - START) / MS
        self.said.append(f"{when:.3f} {document.status} {document.health} {document.ip} {document.port}")
        node_id, states = document.node_id, self._states(document.node_id)
        version = (document.port or FIRST_PORT) - FIRST_PORT
        before = self.positions.get((node_id, "version"), 0)
        self.positions[node_id, "version"] = version
        if version < before:
            self.older.append(f"{node_id}: an inspection of version {version} over one of {before}")
        if version > before:
            proven = self.world.engine.proven[node_id, version]
            position = sum(1 for state in states if state.at <= proven) - 1
            for name in ("status", "health"):
                self.positions[node_id, name] = max(position, self.positions.get((node_id, name), 0))
        else:
            self._advance(node_id, "status", [kind(state.status) for state in states], kind(document.status))
            if document.status == "running":  # else the documents' rule may have made something else of it
                self._advance(node_id, "health", [state.health for state in states], document.health)
        if document.status == "running" and document.ip:
            life = int(document.ip.split(".")[2])
            if life < states[self.positions.get((node_id, "status"), 0)].life:
                self.older.append(f"{node_id}: running with the address of an earlier life")

    def _states(self, node_id: str) -> list[State]:
        return next(container.states for container in self.world.containers if container.id == node_id)

    def _advance(self, node_id: str, name: str, past: list[str], says: str | None) -> None:
        before = position = self.positions.get((node_id, name), 0)
        states = self._states(node_id)
        while position < len(past) and past[position] != says:
            position += 1
        if position == len(past) or states[position].at > self.world.clock.time_ns():
            self.older.append(f"{node_id}: {name} {says} was not true at version {before} or later")
        else:
            self.positions[node_id, name] = position


def ordered(world: World) -> Order:
    order = Order(world)
    world.store.watchers.append(order.watch)
    return order


@MORE_EXAMPLES
@given(containers=pasts(silent=True), stream=faults(), seed=st.integers(0, 2**32))
def test_no_older_fact_overwrites_a_newer_one(containers: list[Container], stream: Stream, seed: int) -> None:
    """Hint against inspection, inspection against hint, sweep against both."""
    world = World(containers, stream, seed, settings=replace_interval(0.4))
    order = ordered(world)
    run(world)
    assert order.older == [], order.said


def replace_interval(seconds: float) -> Any:
    return World([], Stream(), 0).settings.model_copy(update={"sweep_interval": seconds})


@EXAMPLES
@given(containers=pasts(silent=True), stream=faults(), seed=st.integers(0, 2**32))
def test_a_document_is_deleted_when_its_container_is_gone_and_never_before(
    containers: list[Container], stream: Stream, seed: int
) -> None:
    world = World(containers, stream, seed)
    run(world)
    for container in containers:
        if container.id in world.store.deleted:
            assert not container.last.status
        if not container.last.status:
            assert container.id not in world.store.documents


@EXAMPLES
@given(containers=pasts(silent=True), stream=faults(), seed=st.integers(0, 2**32))
def test_no_document_ever_claims_what_a_node_that_is_down_cannot_have(
    containers: list[Container], stream: Stream, seed: int
) -> None:
    """Neither a health of `healthy`, nor an address, which may be another node's by then."""
    world = World(containers, stream, seed)
    claims: list[Recorded] = []

    def watch(document: Recorded) -> None:
        down = document.status not in {"running", "paused"}
        if (down and document.ip) or (document.status != "running" and document.health == "healthy"):
            claims.append(document)

    world.store.watchers.append(watch)
    run(world)
    assert claims == []
