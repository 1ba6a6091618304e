"""`python -m tests.demo`: eventwatch beside two nodes of its own that something keeps happening to.

Whatever else runs on the engine is left alone: the nodes, their network, the label by which they get documents,
and the database are the demo's. Settings come from the environment; `.env` is for the real thing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import os
import shutil
import signal
import socket
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from aiodocker import Docker, DockerError
from pydantic import ValidationError
from pymongo import AsyncMongoClient
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import PyMongoError

from eventwatch import Settings
from tests.kit.nodes import CALL_TIMEOUT, Node, Nodes, purge

DEMO_LABEL = "eventwatch.demo"
#: Another machine's demo may be at work on the same engine.
MACHINE = socket.gethostname()
OUR_LABEL = f"{DEMO_LABEL}={MACHINE}"
NETWORK = "eventwatch-demo"
DATABASE = "eventwatch-demo"
EMBEDDED = "embedded"
STATE = Path(__file__).resolve().parent.parent / ".cache" / "demo"
PAGE_PORT = 9471
FIRST_CHANGE_S = 5.0
NEXT_CHANGE_S = 10.0
PAUSED_S = 4.0
STOPPED_S = 4.0
DRAIN_LIMIT_S = 30.0
MONGO_LIMIT_MS = 5000
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


async def supervise(command: Sequence[str], stop: Stop, *, duration: float | None) -> int:
    """Run the child until it ends by itself, is asked to, or time is up; its exit code, as a shell has it."""
    if stop.asked.is_set():
        return 0
    # Should we be killed, the kernel ends the child: it would hold the database that the next demo needs.
    launcher = ("setpriv", "--pdeathsig", "KILL", "--") if shutil.which("setpriv") else ()
    # A session of its own, so that Ctrl-C reaches the child through us only.
    child = await asyncio.create_subprocess_exec(*launcher, *command, start_new_session=True)
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


def choose_settings() -> None:
    """Set in our environment, which the child inherits, what has to be the demo's or is left to it."""
    os.environ |= {
        "EVENTWATCH_NODE_NETWORK": NETWORK,
        "EVENTWATCH_REGISTER_LABEL": OUR_LABEL,
        "XDG_STATE_HOME": str(STATE),
    }
    if not os.environ.get("EVENTWATCH_MONGO_URL") and not os.environ.get("EVENTWATCH_MONGO_URL_FILE"):
        os.environ["EVENTWATCH_MONGO_URL"] = EMBEDDED
    if not os.environ.get("EVENTWATCH_MONGO_DATABASE"):
        os.environ["EVENTWATCH_MONGO_DATABASE"] = DATABASE
    # How long a demo after a killed one has to wait.
    os.environ.setdefault("EVENTWATCH_LEASE_DURATION", "3s")
    if "EVENTWATCH_HTTP_LISTEN" not in os.environ:
        os.environ["EVENTWATCH_HTTP_LISTEN"] = page_address()


def page_address() -> str:
    """Where the status page will be: at its usual port, or at a free one when something else has that."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", PAGE_PORT))
        except OSError:
            probe.bind(("127.0.0.1", 0))
            say(f"port {PAGE_PORT} is taken: the status page is on http://127.0.0.1:{probe.getsockname()[1]}/")
        return f"127.0.0.1:{probe.getsockname()[1]}"


@contextlib.contextmanager
def claimed(engine_id: str) -> Iterator[bool]:
    """Whether no other demo of this machine uses the engine; a killed demo's claim ends with it."""
    with socket.socket(socket.AF_UNIX) as claim:
        try:
            claim.bind(f"\0eventwatch-demo-{engine_id}")
        except OSError:
            yield False
        else:
            yield True


@contextlib.asynccontextmanager
async def documents(settings: Settings) -> AsyncIterator[AsyncCollection[dict[str, Any]]]:
    """The collection of the node documents, on the server that the user has named."""
    url = settings.mongo_url.get_secret_value()
    async with AsyncMongoClient[dict[str, Any]](url, serverSelectionTimeoutMS=MONGO_LIMIT_MS) as client:
        yield client[settings.mongo_database]["ToolServerNode"]


async def refusal(docker: Docker, settings: Settings) -> str:
    """Why eventwatch, with the demo's network, must not be let at this database; empty if it may."""
    if settings.mongo_url.get_secret_value() == EMBEDDED or settings.mongo_database == DATABASE:
        return ""
    async with asyncio.timeout(CALL_TIMEOUT):
        left = await docker.containers.list(all=True, filters={"label": [OUR_LABEL]})
    ours = [container.id for container in left]
    async with documents(settings) as nodes:
        others = await nodes.count_documents({"_id": {"$nin": ours}})
    if not others:
        return ""
    return f"the database {settings.mongo_database} has {others} documents that are not the demo's: name another"


async def forget(settings: Settings, *ours: Node) -> None:
    """Delete their documents from the user's server; on the private one the next demo's first sweep does it."""
    if settings.mongo_url.get_secret_value() != EMBEDDED:
        async with documents(settings) as nodes:
            await nodes.delete_many({"_id": {"$in": [node.id for node in ours]}})


async def show(
    docker: Docker, settings: Settings, command: Sequence[str], stop: Stop, *, duration: float | None
) -> int:
    """Make the nodes, and run the command beside them."""
    await purge(docker, OUR_LABEL)  # of a demo that was killed
    say(f"starting two nodes on the network {NETWORK}")
    async with Nodes(
        docker, prefix="eventwatch-demo-", network=NETWORK, node_label=DEMO_LABEL, labels={DEMO_LABEL: MACHINE}
    ) as nodes:
        first = await nodes.start("1", healthcheck="ok")
        second = await nodes.start("2")
        async with asyncio.TaskGroup() as tasks:
            disturbing = tasks.create_task(disturb(first, second, stop), name="disturb")
            code = await supervise(command, stop, duration=duration)
            disturbing.cancel()
        say("removing the nodes and the network")
        await forget(settings, first, second)
    return code


async def demo(command: Sequence[str], stop: Stop, *, duration: float | None) -> int:
    choose_settings()
    try:
        settings = Settings(_env_file=None)
    except ValidationError:
        return await supervise(command, stop, duration=duration)  # it says what is wrong, and ends
    async with Docker(url=settings.docker_host or "unix:///var/run/docker.sock") as docker:
        async with asyncio.timeout(CALL_TIMEOUT):
            engine_id = (await docker.system.info())["ID"]
        with claimed(engine_id) as alone:
            reason = await refusal(docker, settings) if alone else "another demo runs on this engine"
            if reason:
                say(f"{reason}; nothing is started")
                return 1
            url = settings.effective()["EVENTWATCH_MONGO_URL"]
            server = f"a private mongod, {STATE}" if url == EMBEDDED else url
            say(f"documents are in the database {settings.mongo_database} of {server}")
            return await show(docker, settings, command, stop, duration=duration)


async def run(command: Sequence[str], *, duration: float | None) -> int:
    stop = Stop()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, stop.request, signum)
    # A closed terminal ends the demo, while SIGHUP would only make eventwatch sweep.
    loop.add_signal_handler(signal.SIGHUP, stop.request, signal.SIGTERM)
    try:
        return await demo(command, stop, duration=duration)
    except (DockerError, PyMongoError, OSError) as error:  # TimeoutError is an OSError
        say(str(error) or "no answer from the engine")
        return 1


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.demo", description=__doc__)
    parser.add_argument("--duration", type=float, metavar="SECONDS", help="end by itself after this time")
    parser.add_argument("command", nargs="*", default=[], help="what to run instead of `eventwatch run`, after --")
    return parser.parse_args(argv)


def main() -> int:
    options = arguments()
    command = options.command or [sys.executable, "-m", "eventwatch", "--env-file", os.devnull, "run"]
    return asyncio.run(run(command, duration=options.duration))


if __name__ == "__main__":
    sys.exit(main())
