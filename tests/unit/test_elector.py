"""What a holder concludes from a renewal that fails, when it may have slept in the middle of asking."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from eventwatch.core.clock import VirtualClock
from eventwatch.core.errors import CheckerDeletedError, LeaseLostError
from eventwatch.pipeline.elector import RENEWALS, SECOND_LOOK, LeaderElector
from eventwatch.store.connection import Store
from eventwatch.store.documents import NodeChecker
from eventwatch.store.rows import Lease
from tests.kit.waiting import SLOW

DURATION = 15.0
LEASE = Lease(manager_id="us", engine_id="engine", epoch=3, cursor=None)


class ForgetfulStore:
    """A database in which the checker's document is gone, and which takes `asleep` seconds to say so.

    `returns`: how often it has been away by the second look. `remembers` what else was written with the lease.
    """

    def __init__(
        self, clock: VirtualClock, *, asleep: float = 0.0, returns: int = 0, remembers: bool = True
    ) -> None:
        self.returns = 0
        self._clock = clock
        self._asleep = asleep
        self._later = returns
        self._remembers = remembers

    async def acquire_lease(self, *_: object, **__: object) -> Lease:
        return LEASE

    async def renew_lease(self, *_: object, **__: object) -> bool:
        return False

    async def lease_is_gone(self, _: Lease) -> bool:
        self._clock.advance(self._asleep)
        self.returns = self._later
        return True

    async def remembers(self, _: Lease) -> bool:
        return self._remembers


async def conclude(**store: Any) -> None:
    """Acquire the lease, have its renewal fail, and raise what the holder concludes."""
    clock = VirtualClock()
    checker = NodeChecker.model_construct(manager_id="us")
    database = cast("Store", ForgetfulStore(clock, **store))
    elector = LeaderElector(store=database, checker=checker, duration=DURATION, clock=clock)
    lease = await elector.acquire("engine")
    assert elector.holds()
    keeping = asyncio.create_task(elector.renew_until_lost(lease, lambda: None))
    await asyncio.sleep(0)
    clock.advance(DURATION / RENEWALS)
    async with asyncio.timeout(5 * SLOW):
        while not keeping.done():
            await asyncio.sleep(0)
            if clock.next_due() is not None:
                clock.advance(DURATION * SECOND_LOOK)
        await keeping


async def test_a_document_that_is_gone_was_deleted_by_an_operator() -> None:
    with pytest.raises(CheckerDeletedError):
        await conclude()


@pytest.mark.parametrize(
    "store",
    [
        pytest.param({"asleep": DURATION}, id="another may have taken it meanwhile, and released it again"),
        pytest.param({"returns": 1}, id="the database was away just now"),
        pytest.param({"remembers": False}, id="what was written with it is gone too"),
    ],
)
async def test_a_document_that_is_gone_for_another_reason_is_taken_again(store: dict[str, Any]) -> None:
    with pytest.raises(LeaseLostError):
        await conclude(**store)
