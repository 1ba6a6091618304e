"""Sees to the indexes by which the cost of a query stays that of the own documents, and never waits for them.

Why beside everything else: to build an index takes a server as long as there are documents, and to ask for one
that is there takes a place in the queue with everybody who came back at the same moment. All works without them.

Not promised: that a first sweep after an update finds the indexes that it brings; it reads more, once.
"""

from __future__ import annotations

from typing import Final

from loguru import logger

from eventwatch.core.backoff import Pace
from eventwatch.core.clock import Clock
from eventwatch.core.errors import StoreError
from eventwatch.store.connection import Store

#: Seconds between two looks, and between attempts.
INTERVAL: Final = 3600.0
RETRY: Final = Pace(base=1.0, cap=60.0)


async def create_indexes(store: Store) -> None:
    """Create the indexes that are not there. Raises StoreError.

    A login that may not is a warning: all works without them, and slows down with every other engine. So is a
    server that takes its time over it.
    """
    try:
        problems = await store.create_indexes()
    except StoreError as error:
        if not (error.timed_out or error.permanent):
            raise
        problems = [str(error)]
    for problem in problems:
        logger.warning("An index cannot be created, so queries read every engine's documents: {}", problem)


async def keep_indexes(store: Store, clock: Clock) -> None:
    """As `create_indexes`, now and every hour: a collection may be dropped. Never ends."""
    backoff = RETRY.start()
    while True:
        try:
            await create_indexes(store)
        except StoreError as error:
            logger.debug("Whether the indexes are there is not known: {}", error)
            await clock.sleep(backoff.next_delay())
        else:
            backoff.succeeded_for(0)
            await clock.sleep(INTERVAL)
