"""What a holder concludes from a renewal that fails, when it may have slept in the middle of asking."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from eventwatch.clock import VirtualClock
from eventwatch.documents import NodeChecker
from eventwatch.elector import RENEWALS, TRUSTED, Elector
from eventwatch.errors import CheckerDeletedError, EventwatchError, LeaseLostError
from eventwatch.store import Lease, Store

DURATION = 15.0
LEASE = Lease(manager_id="us", engine_id="engine", epoch=3, cursor=None)


class ForgetfulStore:
    """A database in which the checker's document is gone, and which takes `asleep` seconds to say so."""

    def __init__(self, clock: VirtualClock, asleep: float) -> None:
        self._clock = clock
        self._asleep = asleep

    async def acquire_lease(self, *_: object, **__: object) -> Lease:
        return LEASE

    async def renew_lease(self, *_: object, **__: object) -> bool:
        return False

    async def lease_is_gone(self, _: Lease) -> bool:
        self._clock.advance(self._asleep)
        return True


@pytest.mark.parametrize(
    ("asleep", "conclusion"),
    [
        pytest.param(0.0, CheckerDeletedError, id="nobody else can have taken it: an operator deleted it"),
        pytest.param(DURATION, LeaseLostError, id="another may have taken it, and released it again"),
    ],
)
async def test_a_document_that_is_gone_was_deleted_only_if_nobody_can_have_taken_the_lease_meanwhile(
    asleep: float, conclusion: type[EventwatchError]
) -> None:
    clock = VirtualClock()
    store = cast("Store", ForgetfulStore(clock, asleep))
    checker = NodeChecker.model_construct(manager_id="us")
    elector = Elector(store=store, checker=checker, duration=DURATION, clock=clock)
    lease = await elector.acquire("engine")
    assert elector.holds()
    keeping = asyncio.create_task(elector.keep(lease, lambda: None))
    await asyncio.sleep(0)
    clock.advance(DURATION / RENEWALS)
    assert DURATION / RENEWALS < DURATION * TRUSTED
    with pytest.raises(conclusion):
        await asyncio.wait_for(keeping, 5)
