"""Which documents of vanished containers may go: owners, graces, brakes and twins, without a database."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import cast

import pytest

from eventwatch.core.clock import VirtualClock
from eventwatch.core.errors import EngineError
from eventwatch.core.facts import Observation, Owner, Recorded
from eventwatch.engine.protocol import Engine, EngineInfo
from eventwatch.pipeline.deletion import (
    AGREEING_SECONDS,
    AGREEING_SWEEPS,
    LEFTOVER_GRACE,
    Deletions,
    MassBrake,
    Verdict,
)
from eventwatch.pipeline.twins import TWIN_MEMORY, TwinWatch
from eventwatch.store.connection import Store
from eventwatch.store.rows import Peer, Witness

US = EngineInfo("us", "host-a", "", "")
SWEEP = 30.0


def ids(count: int, first: int = 0) -> list[str]:
    return [f"{number:064x}" for number in range(first, first + count)]


class Records:
    """What the database says besides the documents."""

    def __init__(self) -> None:
        self.owners: dict[str, Owner] = {}
        self.present: list[Peer] = []
        self.trace: str | None = None
        self.renamed: list[tuple[str, str]] = []
        self.twin: str | None = None
        self.twin_age = 0.0

    async def note_twin(self, _: str, *, host: str) -> None:
        self.twin = host

    async def rename_host(self, _: str, old: str, new: str) -> None:
        self.renamed.append((old, new))

    async def twin_seen(self, _: str, *, within: float) -> str | None:
        return self.twin if within > self.twin_age else None

    async def read_owners(self, node_ids: Collection[str]) -> dict[str, Owner]:
        return {i: self.owners[i] for i in node_ids if i in self.owners}

    async def peers(self, _: str, *, besides: str) -> list[Peer]:
        return [peer for peer in self.present if peer.manager_id != besides]

    async def trace_of_others(self, _: str) -> str | None:
        return self.trace


class Containers:
    """An engine that has these, and says nothing while it is `away`."""

    def __init__(self, has: Iterable[str] = ()) -> None:
        self.has = set(has)
        self.away = False

    async def inspect(self, node_id: str) -> Observation:
        if self.away:
            raise EngineError("away")
        return Observation(node_id, found=node_id in self.has)


class Case:
    """One engine's deletions over some sweeps."""

    def __init__(self, *, limit: int | None = None, grace: float | None = LEFTOVER_GRACE) -> None:
        self.clock, self.records, self.engine = VirtualClock(), Records(), Containers()
        self.twins = TwinWatch(cast("Engine", self.engine), cast("Store", self.records))
        self.deletions = Deletions(
            store=cast("Store", self.records),
            clock=self.clock,
            twins=self.twins,
            delete_limit=limit,
            brake=MassBrake(),
            grace=grace,
        )

    async def sweep(
        self,
        missing: Iterable[str],
        *,
        stamp: str | None = None,
        found: Collection[str] = (),
        after: float = 0.0,
        asked: bool = False,
        force: bool = False,
    ) -> Verdict:
        self.clock.advance(after)
        documents = {i: Recorded(i, i[:12], engine_id=stamp) for i in missing}
        return await self.deletions.judge(
            documents, engine=US, found=found, manager_id="me", asked=asked, force=force
        )


# -- whose it is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "force"), [(True, False), (False, True), (False, False)], ids=["asked", "forced", "sweep"]
)
async def test_what_another_engine_had_is_never_deleted_whatever_a_replace_dropped(
    *, asked: bool, force: bool
) -> None:
    case = Case()
    (node,) = ids(1)
    case.records.owners[node] = Owner("them", "host-b")
    for stamp in (None, "us", "them"):
        for _ in range(10):
            verdict = await case.sweep([node], stamp=stamp, after=LEFTOVER_GRACE, asked=asked, force=force)
            assert verdict == Verdict(spared=1)


async def test_what_our_engine_had_is_deleted_at_once_though_a_replace_dropped_the_stamp() -> None:
    case = Case()
    (node,) = ids(1)
    case.records.owners[node] = Owner("us", "host-a")
    assert (await case.sweep([node])).allowed == {node}


# -- nobody's -----------------------------------------------------------------------------------------------


async def test_what_nobody_ever_owned_goes_after_the_grace_only() -> None:
    case = Case()
    (node,) = ids(1)
    assert await case.sweep([node]) == Verdict(spared=1)
    assert await case.sweep([node], after=LEFTOVER_GRACE - 1) == Verdict(spared=1)
    assert (await case.sweep([node], after=1)).allowed == {node}


async def test_the_grace_begins_anew_for_what_was_there_in_between() -> None:
    case = Case()
    (node,) = ids(1)
    await case.sweep([node])
    await case.sweep([], found=[node], after=LEFTOVER_GRACE)
    assert await case.sweep([node]) == Verdict(spared=1)


@pytest.mark.parametrize("asked", [True, False])
async def test_a_trace_of_another_engine_spares_what_nobody_owns(*, asked: bool) -> None:
    case = Case()
    (node,) = ids(1)
    case.records.trace = "them"
    for _ in range(3):
        assert await case.sweep([node], after=LEFTOVER_GRACE, asked=asked) == Verdict(spared=1)


async def test_a_manager_that_asks_by_itself_waits_for_no_grace() -> None:
    (node,) = ids(1)
    assert (await Case().sweep([node], asked=True)).allowed == {node}


async def test_a_sweep_by_hand_deletes_nothing_of_nobodys_however_often() -> None:
    case = Case(grace=None)
    (node,) = ids(1)
    for force in (False, True) * 3:
        assert await case.sweep([node], after=LEFTOVER_GRACE, force=force) == Verdict(spared=1)


# -- the brake ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pause", [0.1, SWEEP])
async def test_the_brake_releases_after_three_sweeps_and_a_minute(pause: float) -> None:
    case, gone = Case(), ids(6)
    sweeps, began = 1, case.clock.monotonic()
    while not (verdict := await case.sweep(gone, stamp="us", after=pause)).allowed:
        assert verdict.braked == 6
        sweeps += 1
    assert verdict.allowed == set(gone)
    assert sweeps >= AGREEING_SWEEPS
    assert case.clock.monotonic() - began - pause >= AGREEING_SECONDS - 1e-6


async def test_the_brake_releases_only_what_all_sweeps_agreed_on() -> None:
    case = Case()
    await case.sweep(ids(7), stamp="us")
    await case.sweep(ids(6), stamp="us", after=SWEEP)
    assert (await case.sweep(ids(8), stamp="us", after=SWEEP)).allowed == set(ids(6))


async def test_the_brake_begins_anew_after_a_sweep_without_much_to_delete() -> None:
    case = Case()
    for _ in range(2):
        await case.sweep(ids(6), stamp="us", after=SWEEP)
    await case.sweep([], after=SWEEP)
    for _ in range(2):
        assert (await case.sweep(ids(6), stamp="us", after=SWEEP)).braked == 6


async def test_documents_of_others_and_of_nobody_do_not_raise_the_brakes_limit() -> None:
    case = Case()
    others = ids(1000, first=100)
    case.records.owners |= dict.fromkeys(others[:500], Owner("them", "host-b"))
    documents = {i: Recorded(i, i[:12]) for i in others}
    documents |= {i: Recorded(i, i[:12], engine_id="us") for i in ids(60)}
    verdict = await case.deletions.judge(documents, engine=US, found=ids(40, first=60))
    assert (verdict.allowed, verdict.braked, verdict.spared) == (frozenset(), 60, 1000)


async def test_force_lifts_the_brake() -> None:
    assert (await Case().sweep(ids(6), stamp="us", force=True)).allowed == set(ids(6))


# -- one id, two engines ------------------------------------------------------------------------------------


def peer(containers: Iterable[str], look: int = 1) -> Peer:
    return Peer("them", "host-b", 1, Witness(tuple(containers), look))


async def test_a_peer_that_sees_none_of_our_containers_stops_deletions_and_is_named_at_its_next_look() -> None:
    case = Case()
    case.engine.has = set(ids(3))
    case.records.present = [peer(ids(2, first=50))]
    for force in (False, True):
        assert await case.sweep(ids(1, first=9), stamp="us", force=force) == Verdict(spared=1)
    assert case.twins.unready_reasons() == []
    case.records.present = [peer(ids(2, first=50), look=2)]
    assert await case.sweep(ids(1, first=9), stamp="us", asked=True) == Verdict(spared=1)
    (reason,) = case.twins.unready_reasons()
    assert "host-b" in reason
    assert "engine-id" in reason
    case.records.present = []  # its watcher is restarting, or has gone for good
    assert await case.sweep(ids(1, first=9), stamp="us") == Verdict(spared=1)
    assert len(case.twins.unready_reasons()) == 1
    case.records.twin_age = TWIN_MEMORY
    assert (await case.sweep(ids(1, first=9), stamp="us")).allowed == set(ids(1, first=9))
    assert case.twins.unready_reasons() == []


@pytest.mark.parametrize(
    ("engine_id", "spared"),
    [
        ("podman-localhost-0123456789ab", True),
        ("podman-localhost.localdomain-0123456789ab", True),
        ("podman--0123456789ab", True),
        ("podman-worker-7-0123456789ab", False),
        ("localhost", False),
    ],
)
async def test_another_podman_of_a_host_without_a_name_is_remembered_when_its_watcher_is_long_away(
    engine_id: str, spared: bool
) -> None:
    records = Records()
    records.twin, records.twin_age = "localhost", 7 * 24 * 3600
    twins = TwinWatch(cast("Engine", Containers()), cast("Store", records))
    assert await twins.may_delete(engine_id) is not spared


async def test_a_peer_of_the_same_engine_stops_nothing() -> None:
    case = Case()
    case.engine.has = set(ids(3))
    for look in range(3):
        case.records.present = [peer([*ids(1, first=50), *ids(1)], look)]
        assert (await case.sweep(ids(1, first=9), stamp="us")).allowed == set(ids(1, first=9))


async def test_an_engine_that_does_not_answer_makes_no_twin() -> None:
    case = Case()
    case.engine.away = True
    for look in range(3):
        case.records.present = [peer(ids(2, first=50), look)]
        await case.sweep([])
    assert not case.twins.doubtful


async def test_what_a_host_of_another_name_had_is_spared_unless_the_host_was_renamed() -> None:
    case = Case()
    gone, here = ids(2)
    case.records.owners = {gone: Owner("us", "host-b")}
    assert await case.sweep([gone], found=[here]) == Verdict(spared=1)
    case.records.owners[here] = Owner("us", "host-b")
    assert (await case.sweep([gone], found=[here])).allowed == {gone}
    assert case.records.renamed == [("host-b", "host-a")]


async def test_what_a_host_of_another_name_had_goes_when_forced_but_not_beside_a_twin() -> None:
    case, (gone,) = Case(), ids(1)
    case.records.owners = {gone: Owner("us", "host-b")}
    assert (await case.sweep([gone], force=True)).allowed == {gone}
    case.records.twin = "host-b"
    assert await case.sweep([gone], force=True) == Verdict(spared=1)
