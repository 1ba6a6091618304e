"""From a URL to a `Store`: connecting, initialising Beanie, and noticing that the database was away.

On Python 3.11, two waits of the driver are replaced here, which a cancellation would leave locked for ever.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

from beanie import init_beanie
from pymongo import (
    AsyncMongoClient,
    ReadPreference,
)
from pymongo.asynchronous import pool, topology
from pymongo.errors import (
    ConfigurationError,
    InvalidURI,
    OperationFailure,
)
from pymongo.monitoring import (
    ServerClosedEvent,
    ServerDescriptionChangedEvent,
    ServerListener,
    ServerOpeningEvent,
)

from eventwatch.core.errors import ConfigError
from eventwatch.settings.model import mask_url
from eventwatch.store.base import REFUSED, deadline, first_line
from eventwatch.store.changes import RecordedChanges
from eventwatch.store.documents import NodeChecker, ToolServerNode, node_collection
from eventwatch.store.fleet import Fleet
from eventwatch.store.owners import Owners

SERVER_SELECTION_MS: Final = 3000
#: The oldest server that knows all that is asked of it.
OLDEST: Final = [4, 4]
#: The server's code for a user that exists.
USER_EXISTS: Final = 51003


class Store(Fleet, RecordedChanges, Owners):
    """All that is kept in the database. Use `open_store`, or construct after your own `init_beanie`."""


async def create_user(url: str, database: str, *, name: str, password: str) -> bool:
    """Make a user who may read and write this database, and nothing else; False if there is one already.

    `url` logs in as one who may do that. A user that exists is never changed: ConfigError unless it has this
    password and these rights. Raises ConfigError and StoreError as `open_store` does, too.
    """
    rights = [{"role": "readWrite", "db": database}]
    async with open_store(url, database), deadline(f"creating the user {name}"):
        admin = node_collection().database.client.get_database("admin")
        try:
            await admin.command("createUser", name, pwd=password, roles=rights)
        except OperationFailure as error:
            if error.code != USER_EXISTS:
                raise
        else:
            return True
    login: dict[str, Any] = {"username": name, "password": password, "authSource": "admin"}
    unlike = "password"
    async with (
        deadline(f"looking at the user {name}"),
        AsyncMongoClient[dict[str, Any]](url, serverSelectionTimeoutMS=SERVER_SELECTION_MS, **login) as client,
    ):
        try:
            status = await client.admin.command("connectionStatus")
        except OperationFailure as error:
            if error.code not in REFUSED:
                raise
        else:
            unlike = "" if status["authInfo"]["authenticatedUserRoles"] == rights else "rights"
    if unlike:
        raise ConfigError(
            f"User {name} is there already, with other {unlike}, and is left as it is: give another name"
        )
    return False


@asynccontextmanager
async def open_store(
    url: str, database: str, *, on_return: Callable[[], object] = lambda: None
) -> AsyncIterator[Store]:
    """Connect, initialise the Beanie documents on `database` and close at the end.

    `on_return` is called when the database accepts writes again after it did not. Raises ConfigError for a URL or
    login that can never work, StoreError while the server cannot be reached.
    Beanie's documents are bound to one database at a time in a process: the last to initialise wins.
    """
    returns = _Returns()
    try:
        client: AsyncMongoClient[dict[str, Any]] = AsyncMongoClient(
            url,
            appname="eventwatch",
            event_listeners=[returns],
            serverSelectionTimeoutMS=SERVER_SELECTION_MS,
            connectTimeoutMS=SERVER_SELECTION_MS,
        )
    except (InvalidURI, ConfigurationError, ValueError) as error:
        raise ConfigError(
            f"EVENTWATCH_MONGO_URL: {mask_url(url)} is not usable: {first_line(str(error))}"
        ) from None
    if not client.write_concern.acknowledged:
        await client.close()
        raise ConfigError(
            f"EVENTWATCH_MONGO_URL: {mask_url(url)} has w=0, with which no write is known to be done: remove it"
        )
    async with client:
        async with deadline(f"connecting to {mask_url(url)}"):
            await _refuse_old_server(client)
            await init_beanie(
                database=client.get_database(database, read_preference=ReadPreference.PRIMARY),
                document_models=[ToolServerNode, NodeChecker],
                skip_indexes=True,
            )
            # That asks for the server's version only; reading proves that the login may do its work.
            await node_collection().find_one({}, {"_id": 1}, sort=[("_id", 1)])
        store = Store(on_return=on_return)
        returns.watch_for(store)
        yield store


async def _refuse_old_server(client: AsyncMongoClient[dict[str, Any]]) -> None:
    try:
        told = await client.server_info()
    except ConfigurationError as error:  # too old even for the driver
        raise ConfigError(f"EVENTWATCH_MONGO_URL: the database cannot be used: {first_line(str(error))}") from None
    if told.get("versionArray", OLDEST) < OLDEST:
        raise ConfigError(
            f"EVENTWATCH_MONGO_URL: the database is MongoDB {told.get('version')}, eventwatch needs 4.4 or later"
        )


class _Returns(ServerListener):
    """Notices that a server became writable again: it was restarted, or another member of the set took over.

    A mongod without a replica set may have lost what it acknowledged last, for good, and a primary that failed
    over may have rolled it back; only a sweep finds out. The driver tells up to a second late.
    """

    def __init__(self) -> None:
        self._store: Store | None = None
        self._was_writable = False
        self._loop = asyncio.get_running_loop()

    def watch_for(self, store: Store) -> None:
        """From now on, tell this store."""
        self._store = store

    def opened(self, event: ServerOpeningEvent) -> None:
        """Nothing is known of it yet."""

    def closed(self, event: ServerClosedEvent) -> None:
        """Another member will take over."""

    def description_changed(self, event: ServerDescriptionChangedEvent) -> None:
        """Tell when a server turned from anything else into one that takes writes, the first time excepted."""
        if not event.new_description.is_writable or event.previous_description.is_writable:
            return
        if self._store and self._was_writable:
            self._loop.call_soon_threadsafe(self._store.has_returned)
        self._was_writable = True


async def _wait_for_condition(condition: asyncio.Condition, timeout: float | None) -> bool:  # noqa: ASYNC109
    """What the driver waits with, without a task of its own: as `asyncio.wait_for` does it from Python 3.12 on.

    On 3.11 a call that is cancelled at the wrong moment of a server selection would leave the driver's lock
    locked for ever, and with it every later call of this client.
    """
    try:
        async with asyncio.timeout(timeout):
            return await condition.wait()
    except TimeoutError:
        return False


if sys.version_info < (3, 12):
    topology._async_cond_wait = pool._async_cond_wait = _wait_for_condition  # type: ignore[attr-defined,assignment]  # noqa: SLF001
