"""`python -m tests.demo`: eventwatch beside two nodes that something keeps happening to.

When nodes already run on the engine, eventwatch watches those, and the demo makes none and touches nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import signal
import sys
from typing import TYPE_CHECKING

from aiodocker import Docker, DockerError

from tests.nodes import CALL_TIMEOUT, NODE_LABEL, NODE_NETWORK, Node, Nodes, purge

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import Awaitable, Callable, Mapping, Sequence

DEMO_LABEL = "eventwatch.demo"
FIRST_CHANGE_S = 3.0
NEXT_CHANGE_S = 10.0
PAUSED_S = 4.0
STOPPED_S = 4.0
DRAIN_LIMIT_S = 30.0
# make passes a signal on that the terminal or a supervisor has also sent to the whole process group.
SAME_REQUEST_S = 1.0


def say(text: str) -> None:
    sys.stdout.write(f"==> demo: {text}\n")
    sys.stdout.flush()


class Stop:
    """The wish to end: remembered, and handed to the child once per request."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.child: Process | None = None
        self._last_at = float("-inf")

    def request(self, signum: signal.Signals) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._last_at < SAME_REQUEST_S:
            return
        self._last_at = now
        self.asked.set()
        if self.child is not None:
            with contextlib.suppress(ProcessLookupError):
                self.child.send_signal(signum)

    async def rest(self, seconds: float | None) -> None:
        """Sleep, for ever when `seconds` is None, but no longer than until the end is asked for."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.asked.wait()


async def supervise(
    command: Sequence[str], environment: Mapping[str, str], stop: Stop, *, duration: float | None
) -> int:
    """Run the child until it ends by itself, is asked to, or time is up; its exit code, as a shell has it."""
    if stop.asked.is_set():
        return 0
    # A session of its own, so that Ctrl-C reaches the child through us only.
    child = await asyncio.create_subprocess_exec(*command, env=environment, start_new_session=True)
    stop.child = child
    try:
        async with asyncio.TaskGroup() as tasks:
            ending = tasks.create_task(end(child, stop, duration=duration), name="end")
            await child.wait()
            ending.cancel()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    code = await child.wait()
    return code if code >= 0 else 128 - code


async def end(child: Process, stop: Stop, *, duration: float | None) -> None:
    await stop.rest(duration)
    if not stop.asked.is_set():
        stop.request(signal.SIGTERM)
    await asyncio.sleep(DRAIN_LIMIT_S)
    say(f"the command still runs {DRAIN_LIMIT_S:.0f} s after it was asked to end: killing it")
    child.kill()


async def disturb(steady: Node, other: Node, stop: Stop) -> None:
    """Let one thing after the other happen to the nodes until the end is asked for."""
    happenings: tuple[Callable[[], Awaitable[None]], ...] = (
        lambda: pause_for_a_while(steady, stop),
        lambda: restart(other),
        lambda: kill_and_start(steady, stop),
    )
    await stop.rest(FIRST_CHANGE_S)
    for happen in itertools.cycle(happenings):
        if stop.asked.is_set():
            return
        try:
            await happen()
        except (DockerError, TimeoutError) as error:
            say(f"that failed: {error or 'no answer from the engine'}")
        await stop.rest(NEXT_CHANGE_S)


async def pause_for_a_while(node: Node, stop: Stop) -> None:
    say(f"pausing {node.name}")
    await node.pause()
    await stop.rest(PAUSED_S)
    say(f"unpausing {node.name}")
    await node.unpause()


async def restart(node: Node) -> None:
    say(f"restarting {node.name}")
    await node.restart()


async def kill_and_start(node: Node, stop: Stop) -> None:
    say(f"killing {node.name}")
    await node.kill()
    await stop.rest(STOPPED_S)
    say(f"starting {node.name}")
    await node.start()


async def count_running_nodes(docker: Docker) -> int:
    async with asyncio.timeout(CALL_TIMEOUT):
        return len(await docker.containers.list(filters={"label": [NODE_LABEL]}))


async def demo(
    command: Sequence[str], environment: Mapping[str, str], stop: Stop, *, duration: float | None
) -> int:
    url = environment.get("EVENTWATCH_DOCKER_HOST") or environment.get("DOCKER_HOST")
    async with Docker(url=url or "unix:///var/run/docker.sock") as docker:
        running = await count_running_nodes(docker)
        if running:
            say(f"nodes already running: {running}; watching them, touching nothing")
            return await supervise(command, environment, stop, duration=duration)
        await purge(docker, DEMO_LABEL)  # of a demo that was killed
        network = environment.get("EVENTWATCH_NODE_NETWORK", NODE_NETWORK)
        say(f"starting the nodes demo-1 and demo-2 on {network}")
        async with Nodes(docker, prefix="", network=network, labels={DEMO_LABEL: "yes"}) as nodes:
            first = await nodes.start("demo-1", healthcheck="ok")
            second = await nodes.start("demo-2")
            async with asyncio.TaskGroup() as tasks:
                disturbing = tasks.create_task(disturb(first, second, stop), name="disturb")
                code = await supervise(command, environment, stop, duration=duration)
                disturbing.cancel()
            say("removing demo-1 and demo-2")
        return code


async def run(command: Sequence[str], *, duration: float | None) -> int:
    stop = Stop()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, stop.request, signum)
    # A closed terminal ends the demo, while SIGHUP would only make eventwatch sweep.
    loop.add_signal_handler(signal.SIGHUP, stop.request, signal.SIGTERM)
    environment = {"EVENTWATCH_REGISTER_LABEL": NODE_LABEL, **os.environ}
    return await demo(command, environment, stop, duration=duration)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.demo", description=__doc__)
    parser.add_argument("--duration", type=float, metavar="SECONDS", help="end by itself after this time")
    parser.add_argument("command", nargs="*", default=[], help="what to run instead of `eventwatch run`, after --")
    return parser.parse_args(argv)


def main() -> int:
    options = arguments()
    command = options.command or [sys.executable, "-m", "eventwatch", "run"]
    return asyncio.run(run(command, duration=options.duration))


if __name__ == "__main__":
    sys.exit(main())
