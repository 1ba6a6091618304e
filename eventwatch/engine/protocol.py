"""What the pipeline asks of an engine. `DockerEngine` is the real one, a replay is another."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol

from eventwatch.core.facts import Event, Observation, Usage
from eventwatch.core.listing import Listed

#: What engines of one id need, as a clause.
ID_FIX: Final = (
    "give one of them an id of its own: stop its Docker, remove /var/lib/docker/engine-id "
    "(before Engine 23: /etc/docker/key.json), start it"
)
#: The same where the id is made of the name of the host.
PODMAN_FIX: Final = "give its host a name of its own (`hostnamectl hostname NAME`), and restart its Podman service"

#: What hosts are called to which nobody gave a name.
_NOBODYS_NAMES: Final = {"", "localhost"}


def id_fix(engine_id: str) -> str:
    """What to do where another engine has this id too."""
    return PODMAN_FIX if engine_id.startswith("podman-") else ID_FIX


def is_named_by_nobody(host: str) -> bool:
    """Whether many hosts have this name."""
    return host.partition(".")[0].lower() in _NOBODYS_NAMES


def has_common_id(engine_id: str) -> bool:
    """Whether this is the id of a Podman whose host nobody gave a name (see `podman_id`): many have it."""
    host, _, _ = engine_id.removeprefix("podman-").rpartition("-")
    return engine_id.startswith("podman-") and is_named_by_nobody(host)


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """Who the engine is. `id` survives restarts of the engine and names the owner of a node.

    `system_time` is its wall clock when it answered, None if it did not tell. `warning`: why another engine may
    have the same id, with the fix; empty unless that is likely.
    """

    id: str
    name: str
    version: str
    api_version: str
    system_time: datetime | None = None
    warning: str = ""


class Engine(Protocol):
    """What the pipeline asks of an engine; `DockerEngine` is the real one, a replay is another."""

    async def identify(self) -> EngineInfo:
        """Ask who it is, negotiating the API version anew."""
        ...

    def events(
        self, since: int | None, on_malformed: Callable[[str], object]
    ) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
        """Open the event stream from `since` (ns, inclusive). Entered once the engine has accepted it."""
        ...

    async def inspect(self, node_id: str, *, as_of: int = 0) -> Observation:
        """What the engine says of a container now."""
        ...

    async def address(self, network_id: str, node_id: str) -> str:
        """The container's address by what a network says, which waits for no container; empty: it says none."""
        ...

    async def usage(self, node_id: str) -> Usage:
        """What a container has used so far; nothing is known of one that is gone."""
        ...

    async def resolve(self, name: str) -> str | None:
        """Id of the container that goes by this name, id or beginning of an id; None when there is none."""
        ...

    async def list_all(self) -> list[str]:
        """Ids of all containers, running or not."""
        ...

    async def list_rows(self) -> list[Listed]:
        """The rows of all containers, running or not; they may be old."""
        ...

    async def list_running(self, label: str | None = None) -> list[str]:
        """Ids of the running containers, or of those that carry `label` (`key` or `key=value`)."""
        ...

    async def list_newest(self, limit: int) -> list[str]:
        """Ids of the containers that were created last, running or not, at most `limit` of them."""
        ...

    async def stop(self, node_id: str, *, grace: float) -> None:
        """Stop a container: SIGTERM, and SIGKILL after `grace` seconds. Already stopped or gone is fine."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...
