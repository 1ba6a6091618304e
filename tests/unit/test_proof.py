"""What proves that the holder of a lease has ended, and what does not, however it is told."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, cast

import pytest

from eventwatch.core.clock import VirtualClock
from eventwatch.core.errors import EngineError
from eventwatch.core.facts import Event, Observation, nanos
from eventwatch.core.readiness import is_standby
from eventwatch.pipeline.elector import LeaderElector
from eventwatch.pipeline.proof import (
    DeathWatch,
    Finding,
    own_process,
    process_has_ended,
    start_time,
    started_with_first_process,
)
from eventwatch.store.connection import Store
from eventwatch.store.documents import NodeChecker
from eventwatch.store.rows import NO_LIFE, Lease, Life, Peer, Witness, parse_life
from tests.unit.simulated import UnaskedEngine

HOLDER, NODE = "a" * 64, "b" * 64
STARTED = datetime(2026, 1, 1, tzinfo=UTC)
OWN = own_process()
#: A holder in a container on this machine, in a pid namespace of its own.
CONTAINED = Life(OWN.boot_id, "pid:[1] time:[1]", 1, 5, HOLDER, nanos(STARTED))


# -- a process ----------------------------------------------------------------------------------------------


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


def life_of(child: subprocess.Popen[bytes]) -> Life:
    return replace(OWN, pid=child.pid, started=start_time(child.pid) or 0)


def test_a_process_that_runs_or_is_stopped_has_not_ended(child: subprocess.Popen[bytes]) -> None:
    assert OWN != NO_LIFE
    assert process_has_ended(life_of(child), OWN) is False
    child.send_signal(signal.SIGSTOP)
    assert process_has_ended(life_of(child), OWN) is False
    assert process_has_ended(OWN, OWN) is False


def test_a_process_that_was_killed_has_ended_even_while_it_is_a_zombie(child: subprocess.Popen[bytes]) -> None:
    life = life_of(child)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process_has_ended(life, OWN) is True
    child.wait()
    assert process_has_ended(life, OWN) is True


def test_another_process_of_the_same_number_is_another(child: subprocess.Popen[bytes]) -> None:
    assert process_has_ended(replace(life_of(child), started=1), OWN) is True


@pytest.mark.parametrize(
    "foreign",
    [
        {"boot_id": "00000000-0000-0000-0000-000000000000"},
        {"boot_id": ""},
        {"namespaces": "pid:[1] time:[1]"},
        {"pid": 0},
    ],
)
def test_what_is_not_known_from_here_is_left_open(foreign: dict[str, Any]) -> None:
    ended = replace(OWN, started=1)
    assert process_has_ended(ended, OWN) is True
    assert process_has_ended(replace(ended, **foreign), OWN) is None
    assert process_has_ended(ended, NO_LIFE) is None


# -- what is on record --------------------------------------------------------------------------------------


def test_what_a_holder_left_is_read_as_it_was_written() -> None:
    row = {"manager_id": "them", "life": {**asdict(CONTAINED), "manager_id": "them"}}
    assert parse_life(row) == CONTAINED


@pytest.mark.parametrize(
    "odd",
    [
        {"manager_id": "another, who had the lease before"},
        {"manager_id": None},
        {"pid": "1"},
        {"pid": 2**22 + 1},
        {"pid": -1},
        {"pid": True},
        {"started": 1.5},
        {"container": "../../containers/json"},
        {"container": {"$ne": ""}},
        {"container_started": None},
        {"boot_id": ["x"]},
        {"namespaces": 5},
    ],
)
def test_an_odd_record_proves_nothing(odd: dict[str, Any]) -> None:
    row = {"manager_id": "them", "life": {**asdict(CONTAINED), "manager_id": "them", **odd}}
    assert parse_life(row) == NO_LIFE


@pytest.mark.parametrize("life", [None, "dead", [], {}, 2**80])
def test_a_record_that_is_none_proves_nothing(life: object) -> None:
    assert parse_life({"manager_id": "them", "life": life}) == NO_LIFE


# -- a container --------------------------------------------------------------------------------------------


class ToldEngine(UnaskedEngine):
    """Says of containers what it was told to; events come when the test sends them."""

    def __init__(self, **states: Observation | None) -> None:
        self.states = states
        self.sent: asyncio.Queue[Event] = asyncio.Queue()
        self.listeners = 0
        self.since: int | None = None

    async def inspect(self, node_id: str, *, as_of: int = 0) -> Observation:  # noqa: ARG002
        seen = self.states.get(node_id, Observation(node_id, found=False))
        if seen is None:
            raise EngineError("broken")
        return seen

    @asynccontextmanager
    async def events(
        self,
        since: int | None,
        on_malformed: Callable[[str], object],  # noqa: ARG002
    ) -> AsyncIterator[AsyncIterator[Event]]:
        self.listeners += 1
        self.since = since
        try:
            yield self._sent()
        finally:
            self.listeners -= 1

    async def _sent(self) -> AsyncIterator[Event]:
        while True:
            yield await self.sent.get()


#: When a candidate judges; the holder renewed its lease four seconds before.
NOW: Final = datetime(2026, 1, 2, tzinfo=UTC)
AGO: Final = 4.0


def holder(life: Life = CONTAINED, **more: Any) -> Peer:
    told = {"renewed_ago": AGO, **more}
    return Peer("them", "host", 1, Witness((NODE, HOLDER), 1), holds=True, life=life, epoch=3, **told)


def ago(seconds: float) -> datetime:
    return NOW - timedelta(seconds=seconds)


def state(status: str, started: datetime = STARTED, finished: datetime | None = None) -> Observation:
    return Observation(HOLDER, status=status, started_at=started, finished_at=finished)


def clock() -> VirtualClock:
    return VirtualClock(nanos(NOW))


async def judge(holder: Peer, engine: ToldEngine) -> Finding:
    deaths = DeathWatch(engine, clock())
    await deaths.introduce()
    return await deaths.judge(holder)


@pytest.mark.parametrize(
    ("told", "dead"),
    [
        (state("running"), False),
        (state("paused"), False),
        (state("exited", finished=ago(2)), True),
        (state("dead", finished=ago(2)), True),
        (state("restarting", finished=ago(2)), True),
        (state("removing", finished=ago(2)), True),
        (state("running", ago(2)), True),
        (state("exited"), None),
        (None, None),
    ],
)
async def test_the_engine_says_whether_a_container_has_ended(told: Observation | None, dead: bool | None) -> None:
    assert (await judge(holder(), ToldEngine(**{HOLDER: told}))).dead is dead


@pytest.mark.parametrize("told", [state("exited", finished=ago(6)), state("running", ago(6))])
async def test_a_container_that_had_ended_before_its_holder_renewed_its_lease_is_a_copy(told: Observation) -> None:
    """As on an engine that was given another's data, and with that its id."""
    engine = ToldEngine(**{HOLDER: told})
    assert (await judge(holder(), engine)).dead is None
    assert (await judge(holder(renewed_ago=None), engine)).dead is None
    assert (await judge(holder(renewed_ago=-3600.0), engine)).dead is None
    assert (await judge(holder(renewed_ago=7.0), engine)).dead is True


async def test_a_container_that_is_gone_proves_nothing() -> None:
    """An engine that was given another's data may never have had it, though it has others of the holder's."""
    assert (await judge(holder(), ToldEngine(**{NODE: Observation(NODE, status="exited")}))).dead is None


async def test_a_container_proves_nothing_on_another_machine_or_after_another_boot() -> None:
    elsewhere = replace(CONTAINED, boot_id="00000000-0000-0000-0000-000000000000")
    for life in (elsewhere, replace(CONTAINED, boot_id=""), replace(CONTAINED, container=""), NO_LIFE):
        told = state("exited", finished=ago(2))
        assert (await judge(holder(life), ToldEngine(**{HOLDER: told}))).dead is None


async def test_the_kernel_counts_more_than_the_engine() -> None:
    """An engine may have lost a container whose process lives on."""
    living = replace(OWN, container=HOLDER, container_started=nanos(STARTED))
    assert (await judge(holder(living), ToldEngine(**{HOLDER: state("exited", finished=ago(2))}))).dead is False


async def test_the_end_of_a_container_ends_the_wait_and_is_proof() -> None:
    engine = ToldEngine(**{HOLDER: None})  # locked, as it dies
    deaths = DeathWatch(engine, clock())
    await deaths.introduce()
    await deaths.wait(holder(), 1000)  # ends as soon as events are listened to
    assert engine.since == nanos(ago(AGO + 1))  # for it may have died before that, and be gone
    waiting = asyncio.create_task(deaths.wait(holder(), 1000))
    for event in (
        Event("die", HOLDER, nanos(STARTED) - 1),  # of its earlier life
        Event("die", NODE, nanos(STARTED) + 1),
        Event("kill", HOLDER, nanos(STARTED) + 1),
    ):
        engine.sent.put_nowait(event)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not waiting.done()
    assert (await deaths.judge(holder())).dead is None
    engine.sent.put_nowait(Event("die", HOLDER, nanos(STARTED) + 1))
    async with asyncio.timeout(20):
        await waiting
    assert (await deaths.judge(holder())).dead is True
    # Of a later life of the container it says nothing.
    assert (await deaths.judge(holder(replace(CONTAINED, container_started=nanos(STARTED) + 5)))).dead is None
    await deaths.end()
    assert not engine.listeners


async def test_the_end_of_a_process_ends_the_wait(child: subprocess.Popen[bytes]) -> None:
    deaths = DeathWatch(ToldEngine(), VirtualClock())
    await deaths.introduce()
    waiting = asyncio.create_task(deaths.wait(holder(life_of(child)), 1000))
    await asyncio.sleep(0)
    assert not waiting.done()
    child.kill()
    async with asyncio.timeout(20):
        await waiting
    assert (await deaths.judge(holder(life_of(child)))).dead is True
    await deaths.end()


# -- what the candidate makes of it -------------------------------------------------------------------------


async def test_a_holder_whose_engine_is_slow_to_tell_of_its_container_leaves_that_with_a_later_renewal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    began = nanos(STARTED)
    monkeypatch.setattr("eventwatch.pipeline.proof.own_container_ids", lambda: frozenset({HOLDER}))
    monkeypatch.setattr("eventwatch.pipeline.proof.started_with_first_process", lambda _: began)
    engine, renewed = ToldEngine(**{HOLDER: None}), RenewedStore()
    virtual = clock()
    elector = LeaderElector(
        store=cast("Store", renewed),
        checker=NodeChecker.model_construct(manager_id="us"),
        duration=15.0,
        clock=virtual,
        deaths=DeathWatch(engine, virtual),
    )
    keeping = asyncio.create_task(elector.renew_until_lost(await elector.acquire("engine"), lambda: None))
    for told in (None, None, state("running"), state("running")):
        engine.states[HOLDER] = told
        await settle()
        virtual.advance(5.0)
        await settle()
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)
    assert not renewed.taken.container
    assert [life and life.container for life in renewed.lives] == [None, None, HOLDER, HOLDER]
    assert renewed.lives[-1] == replace(OWN, container=HOLDER, container_started=began)
    assert not any(task.get_name() == "introduction" for task in asyncio.all_tasks())


class RenewedStore:
    """A lease that is free, and stays ours."""

    def __init__(self) -> None:
        self.returns = 0
        self.taken = NO_LIFE
        self.lives: list[Life | None] = []

    async def acquire_lease(self, *_: object, life: Life, **__: object) -> Lease:
        self.taken = life
        return Lease("us", "engine", 4)

    async def renew_lease(self, *_: object, life: Life | None, **__: object) -> bool:
        self.lives.append(life)
        return True


class HeldStore:
    """A lease that `them` hold and renew, until a candidate says that this holder is dead."""

    def __init__(self, life: Life) -> None:
        self.returns = 0
        self.life = life
        self.renewed_at = STARTED
        self.proven: list[Peer] = []

    async def acquire_lease(self, *_: object, dead: Peer | None, **__: object) -> Lease | Peer:
        if dead:
            self.proven.append(dead)
            return Lease("us", "engine", 4)
        return holder(self.life, renewed_at=self.renewed_at)


async def candidate(store: HeldStore) -> tuple[LeaderElector, VirtualClock, asyncio.Task[Lease]]:
    clock = VirtualClock()
    elector = LeaderElector(
        store=cast("Store", store),
        checker=NodeChecker.model_construct(manager_id="us"),
        duration=15.0,
        clock=clock,
        deaths=DeathWatch(ToldEngine(), clock),
    )
    acquiring = asyncio.create_task(elector.acquire("engine"))
    await settle()
    return elector, clock, acquiring


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_holder_that_has_ended_is_succeeded_without_waiting() -> None:
    store = HeldStore(replace(OWN, started=1))
    _, _, acquiring = await candidate(store)
    assert (await acquiring).epoch == 4
    assert [(peer.manager_id, peer.epoch) for peer in store.proven] == [("them", 3)]


async def test_a_holder_of_which_nothing_is_known_is_no_reason_to_be_called_a_standby_until_it_renews() -> None:
    """It may be our own predecessor, and the health check must not call that healthy."""
    store = HeldStore(NO_LIFE)
    elector, clock, acquiring = await candidate(store)
    for _ in range(5):
        clock.advance(1.0)
        await settle()
        assert not is_standby(elector.unready_reasons())
        assert not elector.holds()
    store.renewed_at = STARTED.replace(second=5)
    clock.advance(1.0)
    await settle()
    assert is_standby(elector.unready_reasons())
    acquiring.cancel()
    await asyncio.gather(acquiring, return_exceptions=True)
    assert not store.proven


async def test_a_holder_that_lives_is_stood_by_for_at_once(child: subprocess.Popen[bytes]) -> None:
    child.send_signal(signal.SIGSTOP)  # alive, though it renews nothing
    store = HeldStore(life_of(child))
    elector, clock, acquiring = await candidate(store)
    assert is_standby(elector.unready_reasons())
    clock.advance(1.0)
    await settle()
    assert not acquiring.done()
    child.kill()
    async with asyncio.timeout(20):
        assert (await acquiring).epoch == 4


@pytest.mark.parametrize(
    ("after", "ours"),
    [
        pytest.param(0.3, True, id="the engine puts it on record just after its process began"),
        pytest.param(-0.4, False, id="of which another container uses the network, and began later"),
        pytest.param(3600.0, False, id="that was started anew since"),
    ],
)
def test_the_container_whose_files_are_mounted_is_ours_only_if_our_first_process_began_with_it(
    tmp_path: Path, after: float, ours: bool
) -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "stat").write_text(f"1 (sh) S {' '.join(['0'] * 18)} {1000 * ticks} 0 0\n")
    booted = (time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)) / 1e9
    seen = state("running", datetime.fromtimestamp(booted + 1000 + after, UTC))
    assert started_with_first_process(seen, tmp_path) == (
        nanos(seen.started_at) if ours and seen.started_at else None
    )
