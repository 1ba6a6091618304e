"""docs/openapi.json says what the HTTP API answers: checked against the real answers, and against the routes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from eventwatch.app import Application
from eventwatch.http.server import PROBES
from tests.kit.mongod import free_address
from tests.kit.processes import ROOT
from tests.kit.waiting import SLOW
from tests.kit.world import World

DOCUMENT: dict[str, Any] = json.loads((ROOT / "docs" / "openapi.json").read_text())
#: For people and browsers.
NOT_AN_API = {"/", "/static"}


def check(path: str, reply: httpx.Response) -> None:
    """Whether the file has this answer."""
    answer = DOCUMENT["paths"][path]["get"]["responses"][str(reply.status_code)]
    if "$ref" in answer:
        answer = DOCUMENT["components"]["responses"][answer["$ref"].rpartition("/")[2]]
    said = answer["content"]
    kind = reply.headers["Content-Type"].partition(";")[0]
    assert kind in said
    value = reply.json() if kind == "application/json" else reply.text
    schema = {**said[kind]["schema"], "components": DOCUMENT["components"]}
    Draft202012Validator(schema).validate(value)


def test_the_file_is_sound() -> None:
    for name, schema in DOCUMENT["components"]["schemas"].items():
        Draft202012Validator.check_schema(schema)
        assert set(schema["required"]) <= set(schema["properties"]), name


async def test_every_answer_is_as_the_file_says(world: World) -> None:
    node, address = await world.start("one", healthcheck="flag", interval_s=0.2), free_address()
    absent = "e" * 64
    async with (
        world.watching(http_listen=address) as watched,
        httpx.AsyncClient(base_url=f"http://{address}", timeout=10) as client,
    ):
        await world.becomes_true()
        one = f"/api/nodes/{node.id}"
        asked = {
            "/livez": ["/livez"],
            "/readyz": ["/readyz"],
            "/metrics": ["/metrics"],
            "/api/engines": ["/api/engines"],
            "/api/nodes": ["/api/nodes", "/api/nodes?limit=0", "/api/nodes?engine=another"],
            "/api/nodes/{id}": [
                *(one, one[:-52], f"{one}?until=running", f"{one}?until=healthy&timeout=100ms", f"{one}?until=x"),
                *(f"/api/nodes/{absent}", f"/api/nodes/{absent}?until=deleted"),
            ],
            "/api/nodes/{id}/changes": [f"{one}/changes", f"{one[:-50]}/changes", "/api/nodes/x/changes"],
            "/api/changes": ["/api/changes?from=then"],
            "/api/rows": ["/api/rows", "/api/rows?since=x"],
            "/api/overview": ["/api/overview"],
            "/api/series": ["/api/series"],
        }
        met = {path: {check_one(path, await client.get(url)) for url in urls} for path, urls in asked.items()}
        assert met["/api/nodes/{id}"] == {200, 400, 404, 408}
        await node.kill()
        assert check_one("/api/nodes/{id}", await client.get(f"{one}?until=healthy")) == 410
        async with asyncio.timeout(5 * SLOW), client.stream("GET", "/api/changes") as reply:
            assert reply.headers["Content-Type"].startswith("text/event-stream")
            async for line in reply.aiter_lines():
                if line.startswith("data: "):
                    schema = {"$ref": "#/components/schemas/Change", "components": DOCUMENT["components"]}
                    Draft202012Validator(schema).validate(json.loads(line.removeprefix("data: ")))
                    break
        assert routes(watched.app) - NOT_AN_API == set(DOCUMENT["paths"])


async def test_every_refusal_is_as_the_file_says(world: World, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("t0ken")
    address = free_address()
    refusals: dict[int, dict[str, str]] = {
        401: {},
        403: {"Sec-Fetch-Site": "cross-site"},
        421: {"Host": "another.example"},
    }
    async with (
        world.watching(http_listen=address, http_token_file=str(tmp_path / "token")),
        httpx.AsyncClient(base_url=f"http://{address}", timeout=10) as client,
    ):
        for path, methods in DOCUMENT["paths"].items():
            said = {int(code) for code in methods["get"]["responses"]} & refusals.keys()
            assert said == refusals.keys() - ({401} if path in PROBES else set()), path
            for code in said:
                reply = await client.get(path.replace("{id}", "e" * 64), headers=refusals[code])
                assert check_one(path, reply) == code


def check_one(path: str, reply: httpx.Response) -> int:
    check(path, reply)
    return reply.status_code


def routes(app: Application) -> set[str]:
    pages = app.pages
    assert pages is not None
    found = set()
    for resource in pages.application().router.resources():
        found.add(resource.canonical)
    return found


def test_an_answer_that_the_file_does_not_have_is_found() -> None:
    with pytest.raises(Exception, match="'error' is a required property"):
        check("/api/nodes/{id}", httpx.Response(404, json={"wrong": 1}))
