"""What a document has to say, from the engine's own inspection of its container.

It knows the rules by heart and shares no code with eventwatch, so that one mistake cannot be made twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from aiodocker import Docker, DockerError
from pymongo.asynchronous.database import AsyncDatabase

from tests.kit.nodes import DOCKERS_WORDS, NODE_PORT
from tests.kit.waiting import PATIENCE, SLOW, eventually

Document = dict[str, Any]


def true_fields(container: Mapping[str, Any], *, network: str, port: int = NODE_PORT) -> Document:
    """What a node's document must say of this inspection; `port` is missing where it is left as it is."""
    state = container["State"]
    status = DOCKERS_WORDS.get(state["Status"], state["Status"])
    health = (state.get("Health") or {}).get("Status") or "none"
    if status != "running" and health == "healthy":
        health = "unhealthy"
    ip = ""
    if status in ("running", "paused"):
        networks = container["NetworkSettings"]["Networks"] or {}
        ip = (networks.get(network) or {}).get("IPAddress", "")
    fields: Document = {"status": status, "health": health, "ip": ip}
    exposed = [
        int(spec.split("/")[0]) for spec in container["Config"].get("ExposedPorts") or () if "/udp" not in spec
    ]
    if not exposed or port in exposed:
        fields["port"] = port
    elif len(exposed) == 1:
        fields["port"] = exposed[0]
    return fields


def differences(document: Document, container: Mapping[str, Any], network: str) -> Iterator[str]:
    """Where a document departs from the contract, in words."""
    for name, value in true_fields(container, network=network).items():
        if document.get(name) != value:
            yield f"{name} is {document.get(name)!r}, should be {value!r}"


async def wrong_documents(docker: Docker, database: AsyncDatabase[Document], network: str) -> dict[str, str]:
    """For each document that is not true, what is wrong with it."""
    wrong: dict[str, str] = {}
    for document in await database["ToolServerNode"].find().to_list():
        short_id = document["_id"][:12]
        try:
            async with asyncio.timeout(PATIENCE * SLOW):
                container = await docker.containers.container(document["_id"]).show()
        except DockerError as error:
            if error.status != 404:
                raise
            wrong[short_id] = "its container is gone"
            continue
        if texts := [*differences(document, container, network)]:
            wrong[short_id] = ", ".join(texts)
    return wrong


async def assert_documents_true(
    docker: Docker, database: AsyncDatabase[Document], network: str, *, within: float = PATIENCE
) -> None:
    """Wait until every document says what an inspection says."""
    wrong: dict[str, str] = {}

    async def right() -> bool:
        wrong.clear()
        wrong.update(await wrong_documents(docker, database, network))
        return not wrong

    await eventually(right, within, what=lambda: f"documents are true: {wrong or 'nothing was compared'}")


def manager_document(node_id: str, **fields: Any) -> Document:
    return {
        "_id": node_id,
        "short_id": node_id[:12],
        "status": "created",
        "health": "starting",
        "ip": "",
        "port": NODE_PORT,
        "last_req_time": ago(0),
        **fields,
    }


def ago(seconds: float) -> datetime:
    """A moment as the manager stores it: UTC that does not say so, in whole milliseconds."""
    moment = datetime.now(UTC).replace(tzinfo=None) - timedelta(seconds=seconds)
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)
