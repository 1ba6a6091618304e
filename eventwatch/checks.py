"""The checker functions that managers know: a pass over one node, over all, again and again.

Inside `watch()` they go through the running watcher, so there is still one writer; on a standby and between two
terms they work with its settings and its engine. Elsewhere they build what they need for the call from the engine
and settings passed by name, or from the environment.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from enum import Enum, auto
from weakref import WeakKeyDictionary

from loguru import logger

from eventwatch.calls.here import get_here
from eventwatch.core.clock import KindestClock, SystemClock
from eventwatch.core.errors import ConfigError, EngineChangedError, EngineError, LeaseLostError
from eventwatch.engine.docker import DockerClient, DockerEngine, as_engine
from eventwatch.engine.protocol import Engine
from eventwatch.pipeline.pipeline import Brakes, Care, Pipeline
from eventwatch.pipeline.sweeper import Sweeper, SweepReport, bring_up_to_date, warn_of
from eventwatch.settings.model import Settings, load_settings
from eventwatch.store.connection import Store
from eventwatch.store.documents import NodeChecker, ToolServerNode, node_collection


class Manner(Enum):
    """How a pass outside a watcher treats what many nodes, or nobody, are concerned by."""

    #: A manager asks: what is gone is deleted, what is idle is stopped.
    ASKED = auto()
    #: A manager asks again and again: brakes hold mass deletions and mass stops.
    LOOP = auto()
    #: An operator sweeps by hand: as in a loop, and nobody's leftovers are left alone.
    BY_HAND = auto()


#: Those of the passes that a host asks for outside `watch()`, by event loop, database and engine.
_brakes: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, ...], Brakes]] = WeakKeyDictionary()


def _brakes_of(engine: Engine | DockerClient | None, settings: Settings | None) -> Brakes:
    engine_name = str(getattr(engine, "docker_host", "")) or (settings or load_settings()).docker_host or ""
    mine = _brakes.setdefault(asyncio.get_running_loop(), {})
    return mine.setdefault((node_collection().full_name, engine_name), Brakes())


@asynccontextmanager
async def one_off_sweeper(
    engine: Engine | DockerClient | None = None,
    settings: Settings | None = None,
    *,
    manner: Manner = Manner.ASKED,
    brakes: Brakes | None = None,
) -> AsyncIterator[Sweeper]:
    """A sweeper of one's own, on the database that Beanie is initialised with; waits for its idle stops.

    `brakes` are those of earlier passes; without them, only a pass that is not `ASKED` has any.
    """
    settings = settings or load_settings()
    own = DockerEngine(settings) if engine is None else None
    used = own or as_engine(engine, settings)  # type: ignore[arg-type]  # one of the two is there
    clock = SystemClock()
    if brakes is None and manner is not Manner.ASKED:
        brakes = Brakes()
    try:
        async with asyncio.TaskGroup() as tasks:
            yield Pipeline(
                engine=used,
                store=Store(),
                settings=settings,
                clock=clock,
                time=KindestClock(clock, settings.idle_timeout),
                tasks=tasks,
                care=Care(brakes, grace=None if manner is Manner.BY_HAND else 0.0),
                looks=False,
            ).sweeper
    except BaseExceptionGroup as group:
        # What the caller's block raised, and nothing else, is not to come back wrapped.
        raise group.exceptions[0] if len(group.exceptions) == 1 else group from None
    finally:
        if own:
            await own.close()


@asynccontextmanager
async def _sweeper(
    engine: Engine | DockerClient | None, settings: Settings | None, *, braked: bool = False
) -> AsyncIterator[Sweeper]:
    if (here := get_here()) and engine is None and settings is None:
        if sweeper := here.sweeper():
            yield sweeper
            return
        engine, settings = here.engine, here.settings
    brakes = _brakes_of(engine, settings) if braked else None
    async with one_off_sweeper(engine, settings, brakes=brakes) as own:
        yield own


async def update_node_status(
    node: ToolServerNode,
    *,
    engine: Engine | DockerClient | None = None,
    settings: Settings | None = None,
) -> None:
    """Make one node's document equal to its container, delete it if that is gone, stop it if it sat idle.

    An engine that does not answer is logged as a warning and changes nothing. Raises StoreError when the
    database does not answer, or has records of a later version that this one would misread. Outside `watch()`,
    returns when a stop that it began has ended.
    """
    async with _sweeper(engine, settings) as sweeper:
        try:
            await sweeper.check(node)
        except LeaseLostError as error:
            warn_of(node.id, error)
    if sweeper.is_one_off and (written := (await Store().read([node.id])).get(node.id)):
        bring_up_to_date(node, written)  # a stop that it began has ended since


async def check_nodes_status(
    *, engine: Engine | DockerClient | None = None, settings: Settings | None = None
) -> SweepReport:
    """`update_node_status` for every document: inspections ten at a time, the changes in one bulk write.

    As in `watch()`, a pass that would delete or stop many nodes at once does so only when others agree: the third
    in a row, a minute after the first, in the same process. Raises StoreError as `update_node_status` does.
    """
    async with _sweeper(engine, settings, braked=True) as sweeper:
        return await _pass(sweeper)


async def _pass(sweeper: Sweeper) -> SweepReport:
    try:
        return await sweeper.sweep()
    except (EngineError, EngineChangedError, ConfigError, LeaseLostError) as error:
        return await sweeper.unanswered(error)


async def check_nodes_status_loop(
    checker: NodeChecker,
    *,
    engine: Engine | DockerClient | None = None,
    settings: Settings | None = None,
) -> None:
    """Repeat `check_nodes_status` every `checker.interval` seconds, until the checker's document is gone.

    A pass that fails is logged with its traceback, and the loop goes on.
    """
    logger.info("Nodes status checker started.")
    logger.info("Checker id: {}", checker.manager_id)
    store = Store()
    async with AsyncExitStack() as stack:
        own = None
        if engine is not None or settings is not None or get_here() is None:
            own = await stack.enter_async_context(one_off_sweeper(engine, settings, manner=Manner.LOOP))
        while True:
            try:
                if not await store.checker_exists(checker.manager_id):
                    break
                await (_pass(own) if own else check_nodes_status())
            except Exception:  # noqa: BLE001 - whatever it was, the next pass may do better
                logger.exception("Nodes status check failed, the next one is in {} s", checker.interval)
            await asyncio.sleep(checker.interval)
    logger.info("Nodes status checker stopped.")
