"""The two Beanie documents, shared with the manager: a contract, so fields are only ever added.

eventwatch itself reads by projection and writes by guarded `$set` (see store/nodes.py); these classes define the
collections, the types and what a host application or a manager imports. Never call `save()` or `replace()`
on a `ToolServerNode`: both write every field, and so take back a `last_req_time` that somebody else wrote.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any
from uuid import uuid4

from beanie import Document
from beanie.exceptions import CollectionWasNotInitialized
from bson.codec_options import DatetimeConversion
from pydantic import ConfigDict, Field
from pymongo import ReadPreference
from pymongo.asynchronous.collection import AsyncCollection

from eventwatch.core.errors import StoreError


class ToolServerNode(Document):
    """One node: a container that the manager started for a session. `_id` is the full container id."""

    model_config = ConfigDict(extra="allow")

    id: str  # type: ignore[assignment]  # Beanie's is an ObjectId
    short_id: str = ""
    status: str = "created"
    """Docker's state of the container, or `stopping` while an idle stop is under way."""
    health: str = "none"
    """`starting`, `healthy`, `unhealthy`, or `none` for a container without health check."""
    ip: str = ""
    """Address on the node network while running or paused, else empty."""
    port: int = 31942
    last_req_time: datetime | None = None
    """UTC; the manager's, never written by eventwatch."""
    engine_id: str | None = None
    epoch: int | None = None

    class Settings:
        name = "ToolServerNode"


class NodeChecker(Document):
    """Who watches an engine: one document per engine, and the lease on it. Delete it to stop the checker."""

    model_config = ConfigDict(extra="allow")

    manager_id: Annotated[str, Field(default_factory=lambda: uuid4().hex)]
    interval: float = 30.0
    """Seconds between sweeps."""
    pid: int = 0
    engine_id: str | None = None
    host: str | None = None
    version: str | None = None
    renewed_at: datetime | None = None
    expires_at: datetime | None = None
    epoch: int | None = None
    """Grows with each takeover; a write of an earlier epoch matches no document."""
    format: int | None = None
    """Of what is on record of the engine; an eventwatch that knows no format so late refuses to watch it."""
    life: dict[str, Any] | None = None
    """By what its holder can be seen to have ended: container, process, boot."""
    cursor: int | None = None
    """`timeNano` of the last event fully applied, ns."""
    page: dict[str, Any] | None = None
    """Where its status page is (`url`, empty if on its machine only), and by whom that was told (`manager_id`)."""
    settings: dict[str, Any] | None = None
    """The settings by which nodes are judged, for `status` and `explain`."""

    class Settings:
        name = "NodeChecker"


def node_collection() -> AsyncCollection[dict[str, Any]]:
    """The collection of the node documents. StoreError while Beanie is not initialised."""
    return _collection_of(ToolServerNode)


def checker_collection() -> AsyncCollection[dict[str, Any]]:
    """The collection of the checkers. StoreError while Beanie is not initialised."""
    return _collection_of(NodeChecker)


def _collection_of(model: type[Document]) -> AsyncCollection[dict[str, Any]]:
    try:
        collection: AsyncCollection[dict[str, Any]] = model.get_pymongo_collection()
    except CollectionWasNotInitialized:
        raise StoreError(
            "Beanie is not initialised: call this inside `async with watch()`, or after"
            " init_beanie(..., document_models=[ToolServerNode, NodeChecker])"
        ) from None
    return collection


def tolerant(collection: AsyncCollection[dict[str, Any]]) -> AsyncCollection[dict[str, Any]]:
    """The collection, read from the primary, whose odd values come out as something harmless and end no query.

    Such as dates beyond the year 9999, and broken text.
    """
    return collection.with_options(
        codec_options=collection.codec_options.with_options(
            tz_aware=False,
            datetime_conversion=DatetimeConversion.DATETIME_AUTO,
            unicode_decode_error_handler="replace",
        ),
        read_preference=ReadPreference.PRIMARY,
    )
