"""What `eventwatch doctor` makes of other watchers that have our engine's id."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast
from unittest.mock import AsyncMock

from eventwatch.cli.doctor import _examine_peers
from eventwatch.engine.protocol import Engine
from eventwatch.store.nodes import Peer, Store, Witness

GONE = ("a" * 64,)


async def examined(*looks: Witness) -> str:
    """What is said of our engine, which has no container, when another watcher publishes these looks in turn."""
    peers = [[Peer(manager_id="m", host="other", pid=1, holds=True, witness=look)] for look in looks]
    store = SimpleNamespace(peers=AsyncMock(side_effect=peers), twin_seen=AsyncMock(return_value=None))
    engine = SimpleNamespace(
        identify=AsyncMock(return_value=SimpleNamespace(id="E1")),
        inspect=AsyncMock(return_value=SimpleNamespace(found=False)),
    )
    return str(await _examine_peers(cast("Store", store), cast("Engine", engine)))


async def test_a_container_that_has_just_gone_makes_no_twin() -> None:
    assert "ok   engine's id: no other engine has it" in await examined(Witness(GONE, 1), Witness((), 2))


async def test_two_looks_without_a_container_of_ours_make_one() -> None:
    said = await examined(Witness(GONE, 1), Witness(GONE, 2))
    assert said.startswith("FAIL engine's id: that of another engine too, which other watches")
