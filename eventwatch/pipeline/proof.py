"""Finds out whether the holder of the lease has provably ended, so that its successor need not wait.

Why: after a SIGKILL nobody releases the lease, and all documents would be unattended until it expires.

How: a holder leaves in its NodeChecker by what it can be seen to have ended (`Life`): its process, and its
container if it runs in one of the engine that it watches. A candidate on the same machine, not booted since,
believes
- the kernel, about a process of its own pid and time namespace: there is no such process, or only a zombie of it,
  or one of that number that started at another time;
- else the engine, about the container: its `die` event, or an inspection that says that it has ended or was
  started anew, unless that was before the holder last renewed its lease: then it is another engine of the same id
  that speaks of a copy. That there is no such container proves nothing.
A `die` event and the end of the process are waited for, and so are known at once; events are asked for from the
last renewal on.

A process that is stopped, and a container that is paused, are alive. Host names and bare process ids prove
nothing, nor does a record that is odd in any way. All else waits for the lease to expire: another machine, another
pid namespace without the engine's word, a machine that was booted since.

Not promised: exclusion. A copy of a machine that runs on as it was copied, or of an engine's data where a copy of
the holder's container starts or dies just now, could prove what is not so; then, too, the epoch in every write's
filter lets only one of the two write.
"""

from __future__ import annotations

import asyncio
import os
import re
import select
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from eventwatch.core.backoff import Pace
from eventwatch.core.clock import Clock
from eventwatch.core.errors import EngineError
from eventwatch.core.facts import ENDED, Observation, nanos
from eventwatch.engine.protocol import Engine
from eventwatch.pipeline.essentials import own_container_ids
from eventwatch.store.nodes import NO_LIFE, Life, Peer

#: Seconds for what the engine says of one container: it may be locked for long.
INSPECT_DEADLINE: Final = 1.0
#: Nanoseconds by which the kernel's time of a start may be late, and from a process's to its container's start.
ROUNDING: Final = 50_000_000
START_LASTS: Final = 30_000_000_000
#: Nanoseconds by which a container may have ended before its holder's last renewal as it is told: what rounding,
#: and two clocks that run, make of it.
RENEWAL_ROUNDING: Final = 1_000_000_000
#: States in which no process of a container runs.
WITHOUT_PROCESS: Final = ENDED | {"restarting", "removing"}
#: Between attempts to follow the engine's events (s).
RETRY: Final = Pace(base=0.5, cap=5.0)
_BOOT_ID: Final = re.compile(r"[0-9a-f-]{36}")
#: Where the fields of /proc/PID/stat go on behind the name, the start time is this one.
_START_TIME: Final = 19


@dataclass(frozen=True, slots=True)
class Finding:
    """Whether a holder has ended, and how that is known; `dead` is None when it is not."""

    dead: bool | None
    reason: str = ""


class DeathWatch:
    """One candidate's eyes on whoever holds the lease of its engine. `introduce` comes first, `end` last."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock
        self._own = NO_LIFE
        self._wake = asyncio.Event()
        #: Whom we watch, with what: the events of the engine, and the process.
        self._watched = NO_LIFE
        self._events: asyncio.Task[None] | None = None
        self._process: int | None = None
        #: Whose container's `die` event came.
        self._died = NO_LIFE
        #: Whether what we are in may be a container of which the engine has not told yet.
        self.is_unsure = False

    async def introduce(self) -> Life:
        """By what we ourselves can be seen to have ended, as far as the engine tells within a moment."""
        self._own = own_process()
        ids = own_container_ids()
        self.is_unsure = len(ids) == 1
        with suppress(EngineError, TimeoutError):
            async with asyncio.timeout(INSPECT_DEADLINE):
                await self._find_own_container(ids)
        return self._own

    async def finish_introduction(self) -> Life:
        """As `introduce`, however long the engine takes."""
        backoff = RETRY.start()
        while self.is_unsure:
            with suppress(EngineError):
                await self._find_own_container(own_container_ids())
                break
            await self._clock.sleep(backoff.next_delay())
        return self._own

    async def _find_own_container(self, ids: frozenset[str]) -> None:
        if len(ids) == 1:
            (container,) = ids
            began = started_with_first_process(await self._engine.inspect(container))
            if began:
                self._own = replace(self._own, container=container, container_started=began)
        self.is_unsure = False

    async def judge(self, holder: Peer) -> Finding:
        """Whether the holder has ended, as far as it can be known."""
        process = process_has_ended(holder.life, self._own)
        if process is None:
            return await self._judge_container(holder)
        return Finding(process, "its process has ended" if process else "its process runs")

    async def _judge_container(self, holder: Peer) -> Finding:
        life = holder.life
        if not life.container or not life.boot_id or life.boot_id != self._own.boot_id:
            return Finding(dead=None)
        if life == self._died:
            return Finding(dead=True, reason="the engine says that its container died")
        now = self._clock.time_ns()
        try:
            async with asyncio.timeout(INSPECT_DEADLINE):
                seen = await self._engine.inspect(life.container)
        except (EngineError, TimeoutError):
            return Finding(dead=None)
        return _judge_seen(seen, holder, now)

    async def wait(self, holder: Peer, seconds: float) -> None:
        """Return when the holder may have ended, or after so many seconds."""
        if holder.life != self._watched:
            await self.end()
            self._watch(holder)
        timer = self._clock.call_later(seconds, self._wake.set)
        try:
            await self._wake.wait()
        finally:
            timer.cancel()
            self._wake.clear()

    def _watch(self, holder: Peer) -> None:
        self._watched = life = holder.life
        if not life.boot_id or life.boot_id != self._own.boot_id:
            return
        if life.container:
            renewed_at = _latest_renewal(holder, self._clock.time_ns())
            self._events = asyncio.create_task(self._follow(life, renewed_at), name="holder-events")
        if life.pid and life.namespaces == self._own.namespaces and life.pid != self._own.pid:
            with suppress(OSError):
                self._process = os.pidfd_open(life.pid)
                asyncio.get_running_loop().add_reader(self._process, self._process_ended)

    def _process_ended(self) -> None:
        self._forget_process()
        self._wake.set()

    def _forget_process(self) -> None:
        if self._process is not None:
            asyncio.get_running_loop().remove_reader(self._process)
            os.close(self._process)
            self._process = None

    async def _follow(self, life: Life, since: int | None) -> None:
        backoff = RETRY.start()
        while True:
            with suppress(EngineError):
                async with self._engine.events(since, lambda _: None) as events:
                    self._wake.set()  # an inspection may tell what no event does any more
                    async for event in events:
                        is_theirs = event.action == "die" and event.node_id == life.container
                        if is_theirs and event.time_nano >= life.container_started:
                            self._died = life
                            self._wake.set()
            await self._clock.sleep(backoff.next_delay())

    async def end(self) -> None:
        """Watch nobody any more."""
        self._forget_process()
        self._watched = NO_LIFE
        if self._events:
            self._events.cancel()
            await asyncio.gather(self._events, return_exceptions=True)
            self._events = None


def _judge_seen(seen: Observation, holder: Peer, now: int) -> Finding:
    """What an inspection proves that was asked for at `now` (ns since the epoch)."""
    if not seen.found:
        return Finding(dead=None)
    if seen.status in WITHOUT_PROCESS:
        ended_at, reason = seen.finished_at, f"the engine says that its container is {seen.status}"
    elif seen.started_at and nanos(seen.started_at) != holder.life.container_started:
        ended_at, reason = seen.started_at, "the engine says that its container was started anew"
    else:
        return Finding(dead=False, reason="its container runs")
    renewed_at = _latest_renewal(holder, now)
    if ended_at is None or renewed_at is None or nanos(ended_at) < renewed_at:
        return Finding(dead=None)
    return Finding(dead=True, reason=reason)


def _latest_renewal(holder: Peer, now: int) -> int | None:
    """When the holder last renewed its lease, by our clock (ns since the epoch) and not a moment too late."""
    if holder.renewed_ago is None:
        return None
    return now - round(holder.renewed_ago * 1e9) - RENEWAL_ROUNDING


def own_process(proc: Path = Path("/proc")) -> Life:
    """By what this process can be seen to have ended; nothing where the kernel does not tell all of it."""
    pid = os.getpid()
    try:
        boot_id = (proc / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        # Of another pid namespace's /proc the numbers mean nothing here.
        if (proc / "self").readlink().name != str(pid) or not _BOOT_ID.fullmatch(boot_id):
            return NO_LIFE
        spaces = proc / "self/ns"
        namespaces = " ".join(str((spaces / kind).readlink()) for kind in ("pid", "time"))
        os.close(os.pidfd_open(pid))
    except (OSError, AttributeError, UnicodeError):  # no Linux, or one without these
        return NO_LIFE
    started = start_time(pid, proc)
    return Life(boot_id, namespaces, pid, started) if started else NO_LIFE


def start_time(pid: int, proc: Path = Path("/proc")) -> int | None:
    """When a process started, in clock ticks since the machine was booted; None if that is not told."""
    try:
        behind_name = (proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
        return int(behind_name.split()[_START_TIME])
    except (OSError, ValueError, IndexError):
        return None


def started_with_first_process(seen: Observation, proc: Path = Path("/proc")) -> int | None:
    """When the container started (ns since the epoch), if the first process here is its own.

    A container that uses another's network has that one's files mounted, and so takes itself for it: but its first
    process begins after the other's start, where an engine puts a start on record just after the process began.
    """
    ticks = start_time(1, proc)
    if not (seen.found and seen.status == "running" and seen.started_at) or ticks is None:
        return None
    booted = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    lead = nanos(seen.started_at) - (booted + ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK"))
    return nanos(seen.started_at) if -ROUNDING < lead < START_LASTS else None


def process_has_ended(life: Life, own: Life) -> bool | None:
    """Whether that process has ended, as the kernel tells us (`own`); None if that cannot be told from here."""
    if not (own.pid and life.pid) or (life.boot_id, life.namespaces) != (own.boot_id, own.namespaces):
        return None
    try:
        process = os.pidfd_open(life.pid)
    except ProcessLookupError:
        return True
    except OSError:
        return None
    try:
        started = start_time(life.pid)
        poll = select.poll()
        poll.register(process, select.POLLIN)
        if poll.poll(0):  # also of a zombie
            return True
        return None if started is None else started != life.started
    finally:
        os.close(process)
