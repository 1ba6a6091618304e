"""Waiting until a node is what a manager needs it to be.

Contract: `wait_for` returns the document as soon as it was read to be so, and a condition that holds already is
met at once. It ends early, with an error that tells why, when the condition cannot come true any more: the
document was deleted, or the node ended, which the engine is asked to confirm and to explain. What a document says
for a moment is not taken for an end: a container that starts again by its restart policy is waited for.

Not promised: that a state which lasted for milliseconds is seen.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Literal, Protocol
from weakref import WeakKeyDictionary

import pymongo
from pydantic import ValidationError

from eventwatch.calls.follower import DEADLINE, UNREADABLE, Followed, Follower, get_follower, reason_of
from eventwatch.calls.here import get_here
from eventwatch.core.durations import parse_duration
from eventwatch.core.errors import (
    ConfigError,
    EngineError,
    NodeDiedError,
    NodeGoneError,
    StoreError,
    WaitTimeoutError,
)
from eventwatch.core.facts import CONDITIONS, ENDED, Ending, is_container_id
from eventwatch.core.text import printable
from eventwatch.engine.docker import DockerEngine
from eventwatch.engine.wire import parse_ending
from eventwatch.settings.model import load_settings
from eventwatch.store.documents import ToolServerNode, node_collection, tolerant

Condition = Literal["healthy", "running", "exited", "deleted"] | Callable[[ToolServerNode], bool]
#: Seconds in which a document may still come, and in which an end that no engine confirms may pass.
APPEARANCE: Final = 2.0
UNCONFIRMED: Final = 2.0
#: Seconds between two looks at the engine, of which both must find that the node has ended.
SECOND_LOOK: Final = 0.2
ENGINE_DEADLINE: Final = 5.0
NOT_AWAITED: Final = "a condition is a plain function of the document: a coroutine function would not be awaited"
#: Seconds after which the engine is asked again about a node whose document says that it ended.
LOOK_AGAIN: Final = 1.0


class Inspecting(Protocol):
    """What is asked of an engine here."""

    async def container(self, node_id: str) -> Mapping[str, Any] | None:
        """An inspection in the engine's own words; None when there is no such container."""
        ...


async def wait_for(
    node_id: str,
    condition: Condition,
    timeout: float | timedelta | None = 30.0,  # noqa: ASYNC109 - the error that it ends with is ours
    *,
    engine: Inspecting | None = None,
) -> ToolServerNode | None:
    """Wait until a node's document meets a condition, and return it as it then is (None for `deleted`).

    `node_id` is the full container id, `timeout` is in seconds, or a timedelta (None: for ever; 0: look once, and
    at nothing but the document). `condition` is `healthy` (it runs, and its health check says so), `running`,
    `exited` (it has ended) or `deleted` (it has no document), or a function of the document. `engine` is asked why
    a node ended: that of `watch()`, else that of the settings.

    Raises WaitTimeoutError; NodeGoneError when there is no document, or it was deleted; NodeDiedError when the
    node ended, with exit code and last health output; StoreError when Beanie is not initialised or the document
    cannot be read; ValueError for what is no container id, condition or timeout, TypeError for a coroutine
    function. What a function raises passes through.
    """
    if not is_container_id(node_id):
        raise ValueError(f"{node_id!r:.80} is no full container id")
    if not callable(condition) and condition not in CONDITIONS:
        raise ValueError(f"{condition!r:.80} is no condition: use one of {', '.join(CONDITIONS)}, or a function")
    if inspect.iscoroutinefunction(condition):
        raise TypeError(NOT_AWAITED)
    seconds = None if timeout is None or timeout == math.inf else _seconds(timeout)
    follower = get_follower()
    if seconds == 0:
        return await _look_once(node_id, condition)
    async with follower.following(node_id) as followed:
        waiter = _Waiter(followed, condition, engine)
        try:
            async with asyncio.timeout(seconds) as deadline:
                return await waiter.wait()
        except TimeoutError:
            if not deadline.expired():
                raise
            raise WaitTimeoutError(_late(followed, condition, seconds or 0, follower)) from None


def _seconds(timeout: object) -> float:
    try:
        return parse_duration(timeout)
    except ValueError as error:
        raise ValueError(f"{timeout!r:.80} is no timeout: it {error}") from None


async def _look_once(node_id: str, condition: Condition) -> ToolServerNode | None:
    node = await find_node(node_id)
    if node is None and condition == "deleted":
        return None
    if node is None:
        raise NodeGoneError(f"Node {node_id[:12]} has no document")
    if not meets(node, condition):
        raise WaitTimeoutError(
            f"Node {node_id[:12]} is not {_wanted(condition)} now: {_state(dict(node), condition)}"
        )
    return node


class _Waiter:
    def __init__(self, followed: Followed, condition: Condition, engine: Inspecting | None) -> None:
        self._followed = followed
        self._condition = condition
        self._engine = engine
        self._loop = asyncio.get_running_loop()

    async def wait(self) -> ToolServerNode | None:
        followed, came = self._followed, False
        await followed.changed.wait()
        began = self._loop.time()
        while True:
            followed.changed.clear()
            look_again: float | None = None
            if followed.document is None:
                if self._condition == "deleted":
                    return None
                if came:
                    raise NodeGoneError(f"Node {followed.node_id[:12]} was deleted: its container is gone")
                look_again = began + APPEARANCE - self._loop.time()
                if look_again <= 0:
                    raise NodeGoneError(f"Node {followed.node_id[:12]} has no document")
            else:
                came = True
                node = read_node(followed.document)
                if meets(node, self._condition):
                    return node
                if node.status in ENDED and self._condition != "deleted":
                    await self._raise_if_ended(node)
                    look_again = LOOK_AGAIN
            await self._changes_within(look_again)

    async def _raise_if_ended(self, node: ToolServerNode) -> None:
        """NodeDiedError if the node has ended, as the engine says too or cannot say."""
        try:
            ending, began = await _ending(node.id, self._engine)
            if ending is not None:
                await asyncio.sleep(SECOND_LOOK)  # `docker restart` ends it as well, for an instant
                ending, _ = await _ending(node.id, self._engine, not_before=began + SECOND_LOOK)
        except EngineError as error:
            if await self._changes_within(UNCONFIRMED):
                return
            raise NodeDiedError(
                f"Node {node.id[:12]} has ended ({node.status}); the engine cannot be asked why: {error}"
            ) from None
        if ending is not None:
            raise NodeDiedError(f"Node {node.id[:12]} has ended: {ending}")

    async def _changes_within(self, seconds: float | None) -> bool:
        """Wait until the document changed, for so long at most; whether it did."""
        try:
            async with asyncio.timeout(seconds) as deadline:
                await self._followed.changed.wait()
        except TimeoutError:
            if not deadline.expired():
                raise
            return False
        return True


@dataclass(frozen=True, slots=True)
class _Look:
    """An inspection of a node that is said to have ended, and when it began (the loop's time, s)."""

    began: float
    task: asyncio.Task[Ending | None]


#: Those under way, by node and engine.
_looks: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, int], _Look]] = WeakKeyDictionary()


async def _ending(
    node_id: str, engine: Inspecting | None, *, not_before: float = -math.inf
) -> tuple[Ending | None, float]:
    """How it ended, and when that was asked: once for all who ask at the same time, not before that moment.

    None: it did not end, or is gone, which its document will tell. Raises EngineError.
    """
    loop = asyncio.get_running_loop()
    looks, key = _looks.setdefault(loop, {}), (node_id, id(engine))
    look = looks.get(key)
    if look is None or look.task.done() or look.began < not_before:
        task = asyncio.create_task(_look(node_id, engine), name="node-ending", context=contextvars.Context())
        look = looks[key] = _Look(loop.time(), task)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # which maybe nobody awaits
    try:
        return await asyncio.shield(look.task), look.began
    finally:
        if look.task.done() and looks.get(key) is look:
            del looks[key]


async def _look(node_id: str, engine: Inspecting | None) -> Ending | None:
    try:
        async with asyncio.timeout(ENGINE_DEADLINE):
            container = await _inspect(node_id, engine)
    except TimeoutError:
        raise EngineError(f"it did not answer within {ENGINE_DEADLINE:.0f} s") from None
    if container is None:
        raise EngineError("it has no such container")
    try:
        return parse_ending(container)
    except (KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"its answer is no inspection: {printable(repr(error), 80)}") from None


async def _inspect(node_id: str, engine: Inspecting | None) -> Mapping[str, Any] | None:
    here = get_here()
    if engine is None and here is not None and isinstance(here.engine, DockerEngine):
        engine = here.engine
    if engine is not None:
        return await engine.container(node_id)
    try:
        own = DockerEngine(here.settings if here else load_settings())
    except ConfigError as error:
        raise EngineError(str(error)) from None
    try:
        return await own.container(node_id)
    finally:
        await own.close()


def meets(node: ToolServerNode, condition: Condition) -> bool:
    """Whether a document that is there meets a condition."""
    match condition:
        case "running":
            return node.status == "running"
        case "healthy":
            return node.status == "running" and node.health == "healthy"
        case "exited":
            return node.status in ENDED
        case "deleted":
            return False
    answer = condition(node)
    if inspect.isawaitable(answer):
        if inspect.iscoroutine(answer):
            answer.close()
        raise TypeError(NOT_AWAITED)
    return bool(answer)


async def find_ids(beginning: str) -> list[str]:
    """The ids of nodes, two at most, that begin with these hex digits, whoever has them. Raises StoreError."""
    whole = f"^{beginning}[0-9a-f]{{{64 - len(beginning)}}}$"
    try:
        with pymongo.timeout(DEADLINE):
            rows = await node_collection().find({"_id": {"$regex": whole}}, {"_id": 1}).to_list(2)
    except UNREADABLE as error:
        raise StoreError(f"Node {beginning} cannot be looked for: {reason_of(error)}") from None
    return [row["_id"] for row in rows]


async def find_node(node_id: str) -> ToolServerNode | None:
    """A node's document as it is; None: there is none. Raises StoreError."""
    try:
        with pymongo.timeout(DEADLINE):
            document = await tolerant(node_collection()).find_one({"_id": node_id})
    except UNREADABLE as error:
        raise StoreError(f"Node {node_id[:12]} cannot be read: {reason_of(error)}") from None
    return None if document is None else read_node(document)


def read_node(document: Mapping[str, Any]) -> ToolServerNode:
    """The Beanie document of a row. Raises StoreError naming the fields that are odd."""
    try:
        node: ToolServerNode = ToolServerNode.model_validate(document)
    except ValidationError as error:
        fields = ", ".join(sorted({str(part["loc"][0]) for part in error.errors() if part["loc"]}))
        raise StoreError(
            f"The document of node {str(document.get('_id'))[:12]} cannot be read: {printable(fields, 80)}"
        ) from None
    return node


def _late(followed: Followed, condition: Condition, timeout: float, follower: Follower) -> str:
    text = f"Node {followed.node_id[:12]} is not {_wanted(condition)} after {timeout:g} s"
    if follower.trouble or not followed.was_read:
        return f"{text}: its document cannot be read: {follower.trouble or 'the database does not answer'}"
    document = followed.document
    if document is None:
        return f"{text}: it has no document"
    return f"{text}: {_state(document, condition)}"


def _wanted(condition: Condition) -> str:
    return condition if isinstance(condition, str) else "what was asked for"


def _state(document: Mapping[str, Any], condition: Condition) -> str:
    status, health = (printable(document.get(name), 20) for name in ("status", "health"))
    hint = "; it has no health check: wait for running" if (condition, health) == ("healthy", "none") else ""
    return f"status {status}, health {health}{hint}"
