import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import httpx
from aiodocker import Docker
from fastapi import FastAPI, HTTPException, Request, Response

from eventwatch import EventwatchError, ToolServerNode, in_use, touch, wait_for, watch

CONTAINER = {
    "Image": os.environ.get("NODE_IMAGE", "my-tool-server"),
    "HostConfig": {"NetworkMode": os.environ.get("EVENTWATCH_NODE_NETWORK", "tool-server-network")},
    "Healthcheck": {
        "Test": ["CMD", "wget", "-q", "-O", "/dev/null", "http://127.0.0.1:31942/"],
        "Interval": 1_000_000_000,
    },
}


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with watch(), Docker() as app.state.docker, httpx.AsyncClient() as app.state.nodes:
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/sessions")
async def create() -> dict[str, str]:
    container = await app.state.docker.containers.create(CONTAINER)
    # The document comes before the start, so that nobody meets a node that nobody knows.
    asked = datetime.now(UTC).replace(tzinfo=None)
    await ToolServerNode(id=container.id, short_id=container.id[:12], last_req_time=asked).insert()
    try:
        await container.start()
        await wait_for(container.id, "healthy", timeout=30)
    except EventwatchError as error:  # not in time, or it died, and why
        await release(container.id)
        raise HTTPException(503, str(error)) from None
    return {"session": container.id}


@app.post("/sessions/{session}/close")
async def close(session: str) -> None:
    await app.state.docker.containers.container((await known(session)).id).stop()


@app.post("/sessions/{session}/reopen")
async def reopen(session: str) -> None:
    await app.state.docker.containers.container((await known(session)).id).start()
    await touch(session)
    await wait_for(session, "healthy", timeout=30)


@app.delete("/sessions/{session}")
async def release(session: str) -> None:
    await app.state.docker.containers.container((await known(session)).id).delete(force=True, v=True)


@app.api_route("/sessions/{session}/{path:path}", methods=["GET", "POST", "PUT"])
async def pass_on(session: str, path: str, request: Request) -> Response:
    node = await known(session)
    if node.status != "running":
        raise HTTPException(409, f"the session is {node.status}")
    async with in_use(session):  # for as long as the request takes, the node is not idle
        url = f"http://{node.ip}:{node.port}/{path}"
        answer = await app.state.nodes.request(request.method, url, content=await request.body(), timeout=None)
    return Response(answer.content, answer.status_code)


async def known(session: str) -> ToolServerNode:
    node = await ToolServerNode.get(session)
    if node is None:
        raise HTTPException(404, "no such session")
    return node
