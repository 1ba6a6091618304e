"""Sees to it that at most one process writes for an engine: the lease, taken and renewed in the database.

The lease runs on the database's clock. Its holder believes in it only until a deadline on its own monotonic
clock, counted from *before* the renewal was sent, so a holder that was slow, cut off or asleep stops writing
before anyone else may begin. A process can still be paused between that check and its write; the epoch in
every write's filter stops that one (see store.py).

Not promised: mutual exclusion while nothing is written. Two processes may both watch; only one writes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

from loguru import logger

from eventwatch.backoff import Pace
from eventwatch.clock import Clock
from eventwatch.documents import NodeChecker
from eventwatch.errors import CheckerDeletedError, LeaseLostError, StoreError
from eventwatch.readiness import standing_by
from eventwatch.store import UNSEEN, Lease, Peer, Store, Witness

#: Seconds between two looks at the engine while standing by.
LOOK_INTERVAL: Final = 5.0
#: Renewals per lease duration, and the part of it that a holder trusts by its own clock.
RENEWALS: Final = 3
TRUSTED: Final = 0.9
#: The part of the lease duration until a second look at a checker document that is gone: the driver tells of a
#: failover up to a second late.
SECOND_LOOK: Final = 0.1


class Elector:
    """Candidate for, then holder of, the lease on one engine. `duration` in seconds."""

    def __init__(self, *, store: Store, checker: NodeChecker, duration: float, clock: Clock) -> None:
        self._store = store
        self._checker = checker
        self._duration = duration
        self._clock = clock
        self._trusted_until = float("-inf")
        #: Whether the database did not answer the last time that it was asked.
        self.unanswered = False
        self.holder: Peer | None = None
        self._away_at = float("-inf")
        self._returns = 0

    def doubts(self) -> list[str]:
        """Why we may not write right now, or soon; empty when we may."""
        if self.holder is not None:
            return [standing_by(self.holder.manager_id)]
        reasons = ["database: it does not answer, the lease cannot be renewed"] if self.unanswered else []
        return reasons if self.holds() else [*reasons, "lease: not held, nothing is written"]

    def holds(self) -> bool:
        """Whether the lease is certainly ours right now."""
        return self._clock.monotonic() < self._trusted_until

    def seconds_left(self) -> float:
        """For how long the lease is certainly ours without another renewal; 0 when it is not."""
        return max(0.0, self._trusted_until - self._clock.monotonic())

    async def acquire(
        self,
        engine_id: str,
        *,
        look: Callable[[], Awaitable[Witness]] | None = None,
        meet: Callable[[Sequence[Peer]], Awaitable[None]] | None = None,
    ) -> Lease:
        """Wait for the lease, for as long as it takes.

        `look` tells what we see on our engine, for others to compare; `meet` compares what the holder sees.
        """
        backoff = Pace(base=0.1, cap=1.0).start()
        witness, looked_at = UNSEEN, float("-inf")
        while True:
            asked = self._clock.monotonic()
            try:
                answer = await self._store.acquire_lease(
                    self._checker, engine_id=engine_id, duration=self._duration, witness=witness
                )
            except StoreError as error:
                if error.permanent:
                    raise
                self.unanswered = True
                if not backoff.failures:
                    logger.warning("{}. Retrying until it is back", error)
                await self._clock.sleep(backoff.next_delay())
                continue
            self.unanswered = False
            backoff.succeeded_for(0)
            if isinstance(answer, Lease):
                self.holder = None
                self._trusted_until = asked + self._duration * TRUSTED
                self._note_return()
                return answer
            if self.holder is None or self.holder.manager_id != answer.manager_id:
                logger.info(
                    "Standing by: checker {} (host {}, pid {}) watches this engine",
                    answer.manager_id, answer.host, answer.pid,
                )  # fmt: skip
            self.holder = answer
            if look and self._clock.monotonic() - looked_at >= LOOK_INTERVAL:
                witness, looked_at = await look(), self._clock.monotonic()
            if meet:
                await meet([answer])
            await self._clock.sleep(min(1.0, self._duration / RENEWALS))

    async def keep(
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
        backoff = Pace(base=0.1, cap=1.0).start()
        while True:
            await self._clock.sleep(self._duration / RENEWALS if not backoff.failures else backoff.next_delay())
            asked = self._clock.monotonic()
            try:
                renewed = await self._store.renew_lease(
                    lease, duration=self._duration, cursor=cursor(), witness=witness(), report=report()
                )
                gone = not renewed and await self._is_deleted(lease)
            except StoreError as error:
                self.unanswered = True
                self._away_at = self._clock.monotonic()
                if not backoff.failures:
                    logger.warning("The lease could not be renewed: {}", error)
                    backoff.next_delay()
                if not self.holds():
                    raise LeaseLostError("The lease ran out while the database was away") from None
                continue
            self.unanswered = False
            # Asked after the answers: if we slept beyond the lease in the middle of it, another may have taken it.
            if gone and self.holds():
                raise CheckerDeletedError("The checker's document was deleted")
            if not renewed:
                raise LeaseLostError("Another checker took the lease, or the database lost it")
            backoff.succeeded_for(0)
            self._note_return()
            self._trusted_until = asked + self._duration * TRUSTED

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
