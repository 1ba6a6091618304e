"""Preflight: one line for each thing that eventwatch needs, and the cure where it is missing.

Changes nothing: permissions are tried on a container and a document that do not exist.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from http import HTTPStatus
from typing import Final

from eventwatch.core.details import LONGEST_NAME
from eventwatch.core.errors import EngineError, EventwatchError
from eventwatch.core.text import printable
from eventwatch.engine.docker import DEFAULT_HOST, DENIED, NOBODY, DockerEngine, is_mounted_by_itself
from eventwatch.engine.protocol import Engine, id_fix
from eventwatch.pipeline.fleet import MOST, SILENCE, note_of
from eventwatch.pipeline.twins import TwinWatch
from eventwatch.pipeline.undocumented import doubt, running_undocumented
from eventwatch.settings.model import EMBEDDED, Settings
from eventwatch.store.connection import Store, open_store
from eventwatch.store.embedded import server_version
from eventwatch.store.rows import Peer

#: Seconds between two clocks from which on idle times are visibly wrong.
SKEW: Final = 5.0

#: Containers that are named.
NAMED: Final = 10

#: Seconds that a watcher is given to publish its next look: a sweep, and a renewal of its lease.
NEXT_LOOK: Final = 40.0

#: The newest major version of MongoDB that gets no security fixes any more (6.0: since July 2025).
ENDED: Final = 6


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at, and the cure unless `text` tells it or all is well.

    What neither fails nor is well is a note: it has a cure for some, or it could not be looked at (`unsure`).
    """

    subject: str
    text: str
    failed: bool = False
    cure: str = ""
    denied: bool = False
    unsure: bool = False

    def __str__(self) -> str:
        mark = "FAIL" if self.failed else "note" if self.cure or self.unsure else "ok"
        return f"{mark:<4} {self.subject}: {self.text}" + (f". Cure: {self.cure}" if self.cure else "")


async def examine(settings: Settings, engine: Engine, url: str) -> AsyncIterator[Finding]:
    """Everything in turn; a failed part does not keep the rest from being looked at."""
    async for finding in _examine_engine(engine, settings):
        yield finding
    if isinstance(engine, DockerEngine):
        yield await _examine_network(engine, settings.node_network)
    if settings.register_label:
        yield await _examine_label(settings.register_label, engine)
    if mount := _examine_socket(settings.docker_host or DEFAULT_HOST):
        yield mount
    async for finding in _examine_database(settings, url, engine):
        yield finding


async def _examine_engine(engine: Engine, settings: Settings) -> AsyncIterator[Finding]:
    try:
        info = await engine.identify()
    except EventwatchError as error:
        yield Finding("engine", str(error), failed=True)
        return
    yield Finding("engine", f"{info.name}, version {info.version}, API {info.api_version} (1.40 or later needed)")
    if info.warning:
        yield Finding("engine's id", info.warning, unsure=True)
    if info.system_time:
        yield _skew("engine's clock", info.system_time)
    yield await _permission("GET /events", _open_stream(engine))
    yield await _permission("GET /containers/json", engine.list_running("eventwatch"))
    yield await _permission("GET /containers/{id}/json", engine.inspect(NOBODY))
    if settings.idle_activity:
        instead = ", or set EVENTWATCH_IDLE_ACTIVITY to nothing"
        yield await _permission("GET /containers/{id}/stats", engine.usage(NOBODY), instead)
    yield await _examine_addresses(engine)
    call = "POST /containers/{id}/stop"
    stops = await _permission(call, engine.stop(NOBODY, grace=0), ", or set EVENTWATCH_IDLE_TIMEOUT=0")
    if stops.denied and not settings.idle_timeout and not settings.stop_nodes_on_exit:
        stops = Finding(call, "denied, and not needed: no node is ever stopped with these settings")
    yield stops


async def _examine_addresses(engine: Engine) -> Finding:
    call = "GET /networks/{id}"
    try:
        await engine.addresses(NOBODY)
    except EngineError as error:
        if error.status == DENIED:
            return Finding(call, "denied, which can be done without: starts are written a millisecond later")
        if error.status != HTTPStatus.NOT_FOUND:  # the engine's own answer: there is no such network
            return Finding(call, str(error), unsure=True)
    return Finding(call, "allowed")


async def _examine_network(engine: DockerEngine, network: str) -> Finding:
    """Whether the node network exists; a proxy need not allow this look, as eventwatch itself takes none."""
    try:
        names = await engine.list_networks()
    except EventwatchError as error:
        if isinstance(error, EngineError) and error.status == DENIED:
            return Finding(
                "node network", f"{network}; whether it exists is not known, GET /networks is denied", unsure=True
            )
        return Finding("node network", str(error), failed=True)
    if network in names:
        return Finding("node network", f"{network} exists")
    close = get_close_matches(network, names, n=1, cutoff=0.0)
    nearest = f", the nearest name is {close[0]}" if close else ""
    cure = "set EVENTWATCH_NODE_NETWORK, or create it"
    return Finding("node network", f"no network is called {network}{nearest}", failed=True, cure=cure)


async def _open_stream(engine: Engine) -> None:
    async with engine.events(None, lambda _: None):
        pass


async def _permission(call: str, attempt: Awaitable[object], instead: str = "") -> Finding:
    try:
        await attempt
    except EngineError as error:
        denied = error.status == DENIED
        cure = f"allow it in the socket proxy{instead}" if denied else ""
        return Finding(call, str(error), failed=True, cure=cure, denied=denied)
    return Finding(call, "allowed")


def _examine_socket(host: str) -> Finding | None:
    path = host.removeprefix("unix://")
    if path == host:
        return None
    if is_mounted_by_itself(path):
        return Finding(
            "socket mount",
            f"{path} is mounted as a file, and stays the dead one when the engine is restarted",
            failed=True,
            cure="mount its folder, or go through a socket proxy",
        )
    return Finding("socket mount", f"{path} is not mounted as a file")


async def _examine_database(settings: Settings, url: str, engine: Engine) -> AsyncIterator[Finding]:
    try:
        async with open_store(url, settings.mongo_database) as store:
            yield Finding("database", f"reachable, database {settings.mongo_database}")
            if settings.mongo_url.get_secret_value() == EMBEDDED:
                yield await _examine_embedded(url)
            yield _skew("database's clock", await store.system_time())
            await store.check_writable()
            yield Finding("database rights", "nodes and checkers can be written")
            yield await _examine_indexes(store)
            yield await _examine_fleet(store)
            yield await _examine_peers(store, engine)
            if isinstance(engine, DockerEngine):
                yield await _examine_documents(settings, store, engine)
    except EventwatchError as error:
        yield Finding("database", str(error), failed=True, cure="check EVENTWATCH_MONGO_URL and the server")


async def _examine_indexes(store: Store) -> Finding:
    """Whether the indexes are there, or will be: without them each watcher reads the documents of all engines."""
    missing = await store.missing_indexes()
    if not missing:
        return Finding("indexes", "all are there")
    if await store.may_create_indexes():
        return Finding("indexes", f"{len(missing)} of them are created when eventwatch starts")
    names = "; ".join(missing)
    cure = "give the user the role readWrite, or create them as another: " + names
    return Finding("indexes", "this login may not create those that are missing", failed=True, cure=cure)


async def _examine_fleet(store: Store) -> Finding:
    """Whether engines are gone whose documents are still there."""
    dead = await store.read_dead(after=SILENCE, most=MOST)
    if dead:
        return Finding("fleet", note_of(dead).removeprefix("fleet: "), failed=True)
    return Finding("fleet", "no engine is gone and has left documents")


async def _examine_documents(settings: Settings, store: Store, engine: DockerEngine) -> Finding:
    """Whether the nodes that run have documents here: they have none in another database than the manager's."""
    try:
        running = await running_undocumented(engine, settings)
    except EngineError as error:
        return Finding("documents", f"not compared with the nodes: {error}", unsure=True)
    known = await store.read(running) if running else {}
    if running and not known:
        cure = (
            "set EVENTWATCH_MONGO_URL and EVENTWATCH_MONGO_DATABASE, or DB_HOST and DB_COLLECTION, as it has them"
        )
        # With a label, eventwatch makes the documents itself, of some containers only.
        failed = not settings.register_label
        return Finding("documents", doubt(len(running), settings), failed=failed, cure=cure if failed else "")
    told = f"{len(known)} of the {len(running)} nodes that run have one"
    without = [node_id for node_id in running if node_id not in known]
    if not without:
        return Finding("documents", told)
    names = ", ".join([await _name_of(node_id, engine) for node_id in without[:NAMED]])
    more = f" and {len(without) - NAMED} more" if len(without) > NAMED else ""
    cure = "the manager makes them, or EVENTWATCH_REGISTER_LABEL; those that are no nodes belong elsewhere"
    return Finding("documents", f"{told}; without: {names}{more}", cure=cure)


async def _name_of(node_id: str, engine: Engine) -> str:
    try:
        name = (await engine.inspect(node_id)).name
    except EngineError:
        name = ""
    return printable(name or node_id[:12], LONGEST_NAME)


async def _examine_label(label: str, engine: Engine) -> Finding:
    """Whether the register label is that of any container: a misspelt one registers nothing, and says nothing."""
    try:
        found = await engine.list_running(label)
    except EngineError as error:
        return Finding("register label", f"{label}; whether a container has it is not known: {error}", unsure=True)
    if found:
        return Finding("register label", f"{label}: {len(found)} running containers have it")
    cure = "check EVENTWATCH_REGISTER_LABEL if there should be nodes now"
    return Finding("register label", f"no running container has {label}", cure=cure)


async def _examine_peers(store: Store, engine: Engine) -> Finding:
    """Whether who else watches an engine with our engine's id watches the same engine.

    A watcher may have published a container that is gone by now: a doubt is looked into again with its next look.
    """
    twins = TwinWatch(engine, store)
    try:
        engine_id = (await engine.identify()).id
    except EngineError as error:
        return Finding("engine's id", f"not compared with other watchers': {error}", unsure=True)
    peers = await store.peers(engine_id)
    await twins.meet(peers, engine_id=engine_id)
    if twins.doubtful:
        peers = await _next_looks(store, engine_id, peers)
        twins = TwinWatch(engine, store)
        await twins.meet(peers, engine_id=engine_id)
    if not await twins.may_delete(engine_id):
        hosts = ", ".join(sorted({peer.host for peer in peers})) or "another host"
        cure = id_fix(engine_id)
        return Finding("engine's id", f"that of another engine too, which {hosts} watches", failed=True, cure=cure)
    return Finding("engine's id", f"no other engine has it ({len(peers)} running watchers asked)")


async def _next_looks(store: Store, engine_id: str, peers: list[Peer]) -> list[Peer]:
    """The peers once each has looked again, or after `NEXT_LOOK`."""
    before = {(peer.manager_id, peer.witness.look) for peer in peers}
    try:
        async with asyncio.timeout(NEXT_LOOK):
            while not before.isdisjoint((peer.manager_id, peer.witness.look) for peer in peers):
                await asyncio.sleep(0.5)
                peers = await store.peers(engine_id)
    except TimeoutError:
        pass
    return peers


async def _examine_embedded(url: str) -> Finding:
    version = await server_version(url)
    age = ", past its end of life" if int(version.partition(".")[0]) <= ENDED else ""
    use = "for trials and tests; set EVENTWATCH_MONGO_URL for anything else"
    return Finding("embedded database", f"mongod {version}{age}: {use}")


def _skew(whose: str, clock: datetime) -> Finding:
    seconds = (clock - datetime.now(UTC)).total_seconds()
    skewed = abs(seconds) > SKEW
    cure = "synchronise the clocks (NTP)" if skewed else ""
    return Finding(whose, f"{seconds:+.1f} s from ours", failed=skewed, cure=cure)
