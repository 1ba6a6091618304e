"""Recognises the containers that eventwatch itself lives on: its own, its database's, and its engine proxy's.

Whoever can write the database can name any container in a document; these are never stopped, not even where they
are on the node network or carry the register label.

Not promised: that a database or proxy behind further hops (a load balancer, a tunnel) is recognised.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from eventwatch.core.facts import Observation

#: Seconds for the resolution of one host name.
RESOLVE_DEADLINE: Final = 2.0
#: The files that an engine mounts into each container, out of a folder named after its id.
_OWN_MOUNT: Final = re.compile(r"/([0-9a-f]{64})/\S+ /etc/(?:hostname|hosts|resolv\.conf) ")


@dataclass(frozen=True, slots=True)
class Essentials:
    """What identifies our own containers: their ids, or where we reach what runs in them."""

    ids: frozenset[str] = frozenset()
    hosts: frozenset[str] = frozenset()
    ports: frozenset[int] = frozenset()

    def why_not_to_stop(self, seen: Observation) -> str:
        """Why this container must never be stopped by us; empty when nothing speaks against it."""
        if seen.node_id in self.ids:
            return "its container is eventwatch's own"
        if self.hosts & (seen.names | seen.addresses) or self.ports & seen.published_ports:
            return "its container is eventwatch's database or proxy"
        return ""


async def find_essentials(docker_host: str | None, database: Iterable[tuple[str, int]]) -> Essentials:
    """Look up our own container, and the hosts and ports of the engine's proxy and of the database's members."""
    reached = {(host, port) for host, port in database if not host.startswith("/")}
    parts = urlsplit(docker_host or "")
    if parts.scheme in {"tcp", "http", "https"} and parts.hostname:
        reached.add((parts.hostname, parts.port or 0))
    hosts = {host for host, _ in reached}
    resolved = await asyncio.gather(*(_addresses(host) for host in hosts))
    ports = frozenset(port for _, port in reached if port)
    return Essentials(own_container_ids(), frozenset(hosts.union(*resolved)), ports)


def own_container_ids(mounts: Path = Path("/proc/self/mountinfo")) -> frozenset[str]:
    """The id of the container that this process runs in; empty outside of one."""
    try:
        return frozenset(_OWN_MOUNT.findall(mounts.read_text(encoding="utf-8", errors="replace")))
    except OSError:
        return frozenset()


async def _addresses(host: str) -> set[str]:
    try:
        async with asyncio.timeout(RESOLVE_DEADLINE):
            found = await asyncio.get_running_loop().getaddrinfo(host, None)
    except (OSError, TimeoutError, UnicodeError):
        return set()
    # A loopback address is this machine's, or this container's: the published port tells the container then.
    addresses = {str(entry[4][0]) for entry in found}
    return {address for address in addresses if not address.startswith("127.") and address != "::1"}
