"""Sees to it that at most one process writes for an engine: the lease, taken and renewed in the database.

The lease runs on the database's clock. Its holder believes in it only until a deadline on its own monotonic
clock, counted from *before* the renewal was sent, so a holder that was slow, cut off or asleep stops writing
before anyone else may begin. A process can still be paused between that check and its write; the epoch in
every write's filter stops that one (see store/leases.py).

A holder that has provably ended (see pipeline/proof.py) is not waited for. One that has not been seen alive yet,
by such a proof or by a renewal, is no reason to be called a standby: it may be our own predecessor.

Not promised: mutual exclusion while nothing is written. Two processes may both watch; only one writes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

from loguru import logger

from eventwatch.core.backoff import Pace
from eventwatch.core.clock import Clock
from eventwatch.core.errors import CheckerDeletedError, LeaseLostError, StoreError
from eventwatch.core.readiness import standing_by
from eventwatch.pipeline.indexes import create_indexes
from eventwatch.pipeline.proof import DeathWatch
from eventwatch.pipeline.twins import Lookout, TwinWatch
from eventwatch.store.connection import Store
from eventwatch.store.documents import NodeChecker
from eventwatch.store.rows import NO_LIFE, UNSEEN, Lease, Life, Peer, Witness

#: Seconds between two looks at the engine while standing by.
LOOK_INTERVAL: Final = 5.0
#: Renewals per lease duration, and the part of it that a holder trusts by its own clock.
RENEWALS: Final = 3
TRUSTED: Final = 0.9
#: The part of the lease duration until a second look at a checker document that is gone: the driver tells of a
#: failover up to a second late.
SECOND_LOOK: Final = 0.1


class LeaderElector:
    """Candidate for, then holder of, the lease on one engine. `duration` in seconds.

    `lookout` tells what we see on our engine, for others to compare; `twins` compares what the holder sees.
    """

    def __init__(
        self,
        *,
        store: Store,
        checker: NodeChecker,
        duration: float,
        clock: Clock,
        deaths: DeathWatch | None = None,
        lookout: Lookout | None = None,
        twins: TwinWatch | None = None,
    ) -> None:
        self._store = store
        self._checker = checker
        self._duration = duration
        self._clock = clock
        self._deaths = deaths
        self._lookout = lookout
        self._twins = twins
        self._witness = UNSEEN
        self._looked_at = float("-inf")
        self._chores: asyncio.Task[None] | None = None
        self._holder_lives = False
        #: Of whose end was told.
        self._dead_told = ""
        self._trusted_until = float("-inf")
        #: When the renewal was sent that the database answered last (monotonic, s).
        self.renewed_at = float("-inf")
        #: Whether the database did not answer the last time that it was asked.
        self.database_away = False
        self.holder: Peer | None = None
        self._away_at = float("-inf")
        self._returns = 0

    def unready_reasons(self) -> list[str]:
        """Why we may not write right now, or soon; empty when we may."""
        if self.holder is not None:
            if self._holder_lives:
                return [standing_by(self.holder.manager_id)]
            return [f"lease: held by checker {self.holder.manager_id}, of which nothing was seen yet"]
        reasons = ["database: it does not answer, the lease cannot be renewed"] if self.database_away else []
        return reasons if self.holds() else [*reasons, "lease: not held, nothing is written"]

    def holds(self) -> bool:
        """Whether the lease is certainly ours right now."""
        return self._clock.monotonic() < self._trusted_until

    def seconds_left(self) -> float:
        """For how long the lease is certainly ours without another renewal; 0 when it is not."""
        return max(0.0, self._trusted_until - self._clock.monotonic())

    async def acquire(self, engine_id: str) -> Lease:
        """Wait for the lease, for as long as it takes."""
        try:
            return await self._acquire(engine_id)
        finally:
            if self._deaths:
                await self._deaths.end()
            if self._chores:
                self._chores.cancel()
                await asyncio.gather(self._chores, return_exceptions=True)
                self._chores = None

    async def _acquire(self, engine_id: str) -> Lease:
        backoff = Pace(base=0.1, cap=1.0).start()
        life = await self._deaths.introduce() if self._deaths else NO_LIFE
        dead: Peer | None = None
        while True:
            asked = self._clock.monotonic()
            try:
                answer = await self._store.acquire_lease(
                    self._checker,
                    engine_id=engine_id,
                    duration=self._duration,
                    witness=self._witness,
                    life=life,
                    dead=dead,
                )
            except StoreError as error:
                if error.permanent:
                    raise
                self.database_away = True
                if not backoff.failures:
                    logger.warning("{}. Retrying until it is back", error)
                # Maybe for want of an index, which only a leader would make.
                if error.timed_out and backoff.failures > 1:
                    with suppress(StoreError):
                        await create_indexes(self._store)
                await self._clock.sleep(backoff.next_delay(took=self._clock.monotonic() - asked))
                continue
            self.database_away = False
            backoff.succeeded_for(0)
            if isinstance(answer, Lease):
                self.holder = None
                self._trusted_until = asked + self._duration * TRUSTED
                self.renewed_at = asked
                self._note_return()
                return answer
            if await self._has_ended(answer) and not (dead and _same_term(dead, answer)):
                dead = answer
                continue
            await self._stand_by(answer, engine_id)

    async def _has_ended(self, holder: Peer) -> bool:
        """Whether the holder has provably ended; if not, tell of it."""
        found = await self._deaths.judge(holder) if self._deaths else None
        before = self.holder
        is_new = before is None or before.manager_id != holder.manager_id
        if is_new:
            self._holder_lives = False
        self.holder = holder
        name = f"checker {holder.manager_id} (host {holder.host}, pid {holder.pid})"
        if found and found.dead:
            if self._dead_told != holder.manager_id:
                logger.info("Taking over at once from {}: {}", name, found.reason)
            self._dead_told = holder.manager_id
            return True
        renewed = before is not None and not is_new and before.renewed_at != holder.renewed_at
        if not self._holder_lives and (renewed or (found and found.dead is False)):
            self._holder_lives = True
            logger.info("Standing by: {} watches this engine", name)
        elif is_new:
            logger.info("Waiting for {} to renew its lease, or to lose it: nothing was seen of it yet", name)
        return False

    async def _stand_by(self, holder: Peer, engine_id: str) -> None:
        """Wait until it is time to ask again, or something happened to the holder."""
        if self._chores is None or self._chores.done():
            if self._chores:
                self._chores.result()
            # Beside the wait: an engine may be slow to tell of a container, most of all of one that just died.
            self._chores = asyncio.create_task(self._do_chores(holder, engine_id), name="standby-chores")
        seconds = min(1.0, self._duration / RENEWALS)
        if self._deaths:
            await self._deaths.wait(holder, seconds)
        else:
            await self._clock.sleep(seconds)

    async def _do_chores(self, holder: Peer, engine_id: str) -> None:
        if self._lookout and self._clock.monotonic() - self._looked_at >= LOOK_INTERVAL:
            self._witness, self._looked_at = await self._lookout.look(), self._clock.monotonic()
        if self._twins:
            with suppress(StoreError):  # the next round tries again
                await self._twins.meet([holder], engine_id=engine_id)

    async def renew_until_lost(
        self,
        lease: Lease,
        cursor: Callable[[], int | None],
        witness: Callable[[], Witness] = lambda: UNSEEN,
        report: Callable[[], Mapping[str, Any] | None] = lambda: None,
    ) -> None:
        """Renew the lease until it cannot be, and tell with each renewal what `report` says.

        Raises CheckerDeletedError when its document was deleted, LeaseLostError when another took it, when it ran
        out while the database was away, or when the database has lost it.
        """
        introduction = None
        if self._deaths and self._deaths.is_unsure:  # what was not known when the lease was taken
            introduction = asyncio.create_task(self._deaths.finish_introduction(), name="introduction")
        try:
            await self._renew(lease, cursor, witness, report, introduction)
        finally:
            if introduction:
                introduction.cancel()
                await asyncio.gather(introduction, return_exceptions=True)

    async def _renew(
        self,
        lease: Lease,
        cursor: Callable[[], int | None],
        witness: Callable[[], Witness],
        report: Callable[[], Mapping[str, Any] | None],
        introduction: asyncio.Task[Life] | None,
    ) -> None:
        backoff = Pace(base=0.1, cap=1.0).start()
        delay = self._duration / RENEWALS
        while True:
            await self._clock.sleep(delay)
            asked = self._clock.monotonic()
            try:
                renewed = await self._store.renew_lease(
                    lease,
                    duration=self._duration,
                    cursor=cursor(),
                    witness=witness(),
                    report=report(),
                    life=introduction.result() if introduction and introduction.done() else None,
                )
                gone = not renewed and await self._is_deleted(lease)
            except StoreError as error:
                self.database_away = True
                self._away_at = self._clock.monotonic()
                if not backoff.failures:
                    logger.warning("The lease could not be renewed: {}", error)
                    backoff.next_delay()
                delay = backoff.next_delay(took=self._clock.monotonic() - asked)
                if not self.holds():
                    raise LeaseLostError("The lease ran out while the database was away") from None
                continue
            self.database_away = False
            # Asked after the answers: if we slept beyond the lease in the middle of it, another may have taken it.
            if gone and self.holds():
                raise CheckerDeletedError("The checker's document was deleted")
            if not renewed:
                raise LeaseLostError("Another checker took the lease, or the database lost it")
            backoff.succeeded_for(0)
            delay = self._duration / RENEWALS
            self._note_return()
            self._trusted_until = asked + self._duration * TRUSTED
            self.renewed_at = asked

    def _note_return(self) -> None:
        if self._store.returns != self._returns:
            self._returns = self._store.returns
            self._away_at = self._clock.monotonic()

    async def _is_deleted(self, lease: Lease) -> bool:
        """Whether an operator deleted our checker document; not so when the database lost it by itself.

        A failover may roll it back and a restore may lack it: then what else was written with it is gone too, or
        the database was away just before.
        """
        if not await self._store.lease_is_gone(lease) or not await self._store.remembers(lease):
            return False
        await self._clock.sleep(self._duration * SECOND_LOOK)
        self._note_return()
        was_away = self._clock.monotonic() - self._away_at < self._duration
        return not was_away and await self._store.lease_is_gone(lease)

    async def release(self, lease: Lease) -> None:
        """Give the lease back at once; without this a standby waits until it expires."""
        self._trusted_until = float("-inf")
        try:
            await self._store.release_lease(lease)
        except StoreError as error:
            logger.warning("The lease was not released and will expire: {}", error)


def _same_term(one: Peer, other: Peer) -> bool:
    return (one.manager_id, one.epoch) == (other.manager_id, other.epoch)
