"""How to wait: always for something, with a deadline.

A deadline is far above what a healthy run needs: it bounds a failure and is no measurement. On a machine that is
known to be slow, `EVENTWATCH_TEST_SLOW=3` makes all of them three times as long.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
from collections.abc import Callable
from typing import Any, Final

#: How many times slower than usual the machine may be: whatever a test waits for has that much longer.
SLOW: Final = float(os.environ.get("EVENTWATCH_TEST_SLOW", "1"))
PATIENCE: Final = 10.0
#: A sweep or a settle that a test wants to rule out as the cause comes later than any test lasts.
NEVER: Final = 600.0


async def eventually(
    probe: Callable[[], Any],
    within: float = PATIENCE,
    *,
    what: Callable[[], str] | str = "",
    instead: Callable[[], str] = str,
) -> Any:
    """Wait until `probe` (plain or async) gives something true, and return that.

    A failure tells `what` was waited for, by default the probe's source; when `instead` says that it will never
    come, and why, the wait fails at once.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within * SLOW) as limit:
            # Asked as well: pymongo on Python 3.11 loses a cancellation now and then.
            while not limit.expired():
                hopeless = instead()
                found = probe()
                if inspect.isawaitable(found):
                    found = await found
                if found:
                    return found
                if hopeless:
                    raise AssertionError(hopeless)
                await asyncio.sleep(0.01)
    text = what() if callable(what) else what
    text = text or inspect.getsource(getattr(probe, "func", probe)).strip()
    raise AssertionError(f"not within {within:.0f} s: {text}")


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks until they have ended: pymongo on Python 3.11 loses a cancellation now and then."""
    while left := [task for task in tasks if not task.done()]:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=1)
