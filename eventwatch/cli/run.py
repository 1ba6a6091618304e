"""What `eventwatch run` does.

A module of its own, beside the other commands: after a crash every tenth of a second counts, and what they import
takes some of them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import resource
import signal
from typing import Final

from loguru import logger

from eventwatch.app import Application
from eventwatch.settings.model import Settings

#: Descriptors that `run` asks for.
DESCRIPTORS: Final = 16_384


async def run(_: argparse.Namespace, settings: Settings) -> None:
    """`eventwatch run`."""
    # Each connection of a client that waits takes a descriptor; the usual limit of 1024 is for programs of old.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    app = Application(settings)
    loop = asyncio.get_running_loop()

    def stop(number: signal.Signals) -> None:
        logger.info("{}: finishing what is pending; once more to exit at once", number.name)
        app.stop()
        for again in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(again, os._exit, 128 + again)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    loop.add_signal_handler(signal.SIGHUP, app.sweep_now)
    await app.run()
