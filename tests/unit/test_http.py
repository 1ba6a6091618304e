"""The HTTP server by itself, over real sockets: what it costs, whom it answers, and how it ends connections."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import resource
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
from aiohttp import web

from eventwatch.core.errors import (
    ConfigError,
    EngineError,
    NodeDiedError,
    NodeGoneError,
    StoreError,
    WaitTimeoutError,
)
from eventwatch.core.facts import Cause, Change, Recorded
from eventwatch.core.metrics import Metrics
from eventwatch.http import answers, connections, feed
from eventwatch.http import server as pages_module
from eventwatch.http.access import Access, is_foreign, is_loopback, load_tls, page_url, read_token, without_ids
from eventwatch.http.answers import Answer, Answers, NodePages, Turns, accepts_gzip
from eventwatch.http.feed import ChangeFeed
from eventwatch.http.rows import Facts, Rows
from eventwatch.http.server import Pages, serve
from eventwatch.pipeline.fleet import note_of
from eventwatch.store.rows import EngineRecord
from tests.kit.certificates import make_certificates, trusting
from tests.kit.mongod import free_port
from tests.kit.seen import logged, texts
from tests.kit.waiting import SLOW, eventually

ID = "0123456789ab" * 5 + "cdef"
CHANGE = Change(ID, ID[:12], {"status": "running"}, {"status": "exited"}, False, Cause.EVENT, 1, 0.001)


@dataclass
class Served:
    """A server of made-up nodes, and how often each was asked for."""

    nodes: dict[str, str] = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    built: int = 0
    port: int = field(default_factory=free_port)
    feed: ChangeFeed = field(default_factory=ChangeFeed)
    waiting: int = 0
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    waited: list[tuple[str, str, float]] = field(default_factory=list)

    def node(self, node_id: str) -> dict[str, Any]:
        self.built += 1
        return {"node_id": node_id, "status": self.nodes[node_id], "padding": "x" * 200}

    async def find(self, beginning: str) -> list[str]:
        return [node_id for node_id in self.nodes if node_id.startswith(beginning)][:2]

    async def read(self, node_id: str) -> dict[str, Any] | None:
        return self.node(node_id) if node_id in self.nodes else None

    def facts(self, node_id: str) -> Facts:
        return Facts(recorded=Recorded(node_id, node_id[:12], status=self.nodes[node_id]))

    async def wait(self, node_id: str, condition: str, seconds: float) -> dict[str, Any] | None:
        self.waiting += 1
        try:
            await asyncio.wait_for(self.arrived.wait(), seconds)
        except TimeoutError:
            raise WaitTimeoutError("late") from None
        finally:
            self.waited.append((node_id, condition, seconds))
        return self.node(node_id)

    async def read_engines(self) -> list[dict[str, Any]]:
        self.built += 1
        return [{"engine_id": name} for name in ("own", "other")]

    async def read_page(self, engine_id: str, after: str, limit: int) -> tuple[list[dict[str, Any]], str | None]:
        """What the database has of another engine: the nodes that are here, under another id."""
        self.built += 1
        if engine_id == "away":
            raise StoreError("the database is away")
        rows = [{"node_id": node_id, "engine_id": engine_id} for node_id in sorted(self.nodes) if node_id > after]
        return rows[:limit], rows[limit - 1]["node_id"] if len(rows) > limit else None

    async def changes(self, node_id: str) -> list[dict[str, Any]]:
        return [{"node_id": node_id, "new": {"status": "exited"}}] if node_id == ID else []

    def client(self, **options: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", **options)

    @asynccontextmanager
    async def running(self, access: Access | None = None, host: str = "127.0.0.1") -> AsyncIterator[Served]:
        pages = Pages(
            metrics=Metrics(),
            feed=self.feed,
            node_ids=lambda: self.nodes,
            node=self.node,
            states=lambda: ((status, None) for status in self.nodes.values()),
            doubts=lambda: self.doubts,
            notes=lambda: self.notes,
            identity="1 0",
            find=self.find,
            engines=self.read_engines,
            engine_id=lambda: "own",
            read_page=self.read_page,
            read=self.read,
            wait=self.wait,
            changes=self.changes,
            access=access or Access(),
            rows=Rows(node_ids=lambda: self.nodes, facts=self.facts, more=lambda *_: {}),
            overview=dict,
            series=dict,
        )
        async with serve(host, self.port, pages):
            yield self


def many(count: int) -> dict[str, str]:
    return {f"{number:012x}{0:052x}": "running" for number in range(count)}


# -- what an answer costs -----------------------------------------------------------------------------------


async def test_an_answer_is_made_once_however_many_ask_for_it_within_a_moment() -> None:
    async with Served(many(50)).running() as served, served.client() as client:
        replies = await asyncio.gather(*(client.get("/api/nodes") for _ in range(15)))
        assert {reply.content for reply in replies} == {replies[0].content}
        assert len(replies[0].json()) == 50
        assert served.built == 50
        await asyncio.sleep(answers.MOMENT + 0.1)
        assert len((await client.get("/api/nodes")).json()) == 50
        assert served.built == 100


async def test_an_answer_is_compressed_for_those_who_ask_for_that() -> None:
    async with Served(many(200)).running() as served, served.client() as client:
        packed = await client.get("/api/nodes", headers={"Accept-Encoding": "gzip"})
        plain = await client.get("/api/nodes", headers={"Accept-Encoding": "identity"})
        assert packed.headers["Content-Encoding"] == "gzip"
        assert "Content-Encoding" not in plain.headers
        assert packed.json() == plain.json()
        assert int(packed.headers["Content-Length"]) < int(plain.headers["Content-Length"]) / 5


@pytest.mark.parametrize(
    ("header", "accepted"),
    [("gzip", True), ("br, GZIP;q=0.5", True), ("*", True), ("", False), ("br", False), ("gzip; q=0", False)],
)
def test_accept_encoding_is_read(header: str, accepted: bool) -> None:
    assert accepts_gzip(header) is accepted


async def test_the_list_of_nodes_comes_in_pages_that_link_to_the_next() -> None:
    nodes = many(25)
    async with Served(nodes).running() as served, served.client() as client:
        seen: list[str] = []
        path, asked = "/api/nodes?limit=10", 0
        while path:
            reply = await client.get(path)
            seen += [node["node_id"] for node in reply.json()]
            asked += 1
            found = re.fullmatch(r'<([^>]*)>; rel="next"', reply.headers.get("Link", ""))
            path = found[1] if found else ""
        assert seen == [node_id[:12] for node_id in sorted(nodes)]
        assert asked == 3
        assert (await client.get("/api/nodes", params={"after": seen[-1]})).json() == []


async def test_another_engines_nodes_come_in_pages_too_and_each_page_is_read_once_for_all() -> None:
    nodes = many(25)
    async with Served(nodes).running() as served, served.client() as client:
        seen: list[str] = []
        path = "/api/nodes?engine=other&limit=10"
        while path:
            replies = await asyncio.gather(*(client.get(path) for _ in range(3)))
            assert len({reply.content for reply in replies}) == 1
            seen += [node["node_id"] for node in replies[0].json()]
            found = re.fullmatch(r'<([^>]*)>; rel="next"', replies[0].headers.get("Link", ""))
            path = found[1] if found else ""
        assert seen == [node_id[:12] for node_id in sorted(nodes)]
        assert served.built == 3
        assert len((await client.get("/api/nodes?engine=own")).json()) == 25
        assert served.built == 3 + 25, "our own nodes are not read from the database"
        away = await client.get("/api/nodes?engine=away")
        assert (away.status_code, away.json()) == (503, {"error": "the database is away"})


async def test_the_engines_are_read_once_for_all_and_ours_is_marked() -> None:
    async with Served().running() as served, served.client() as client:
        replies = await asyncio.gather(*(client.get("/api/engines") for _ in range(10)))
        assert replies[0].json() == [
            {"engine_id": "own", "own": True},
            {"engine_id": "other", "own": False},
        ]
        assert served.built == 1


async def test_whole_ids_are_for_those_who_have_shown_a_token() -> None:
    """A container's id is its user's session with the manager."""
    served = Served({ID: "running"}, doubts=[f"nodes: {ID} is odd"])
    served.feed.publish(CHANGE)
    bearer = {"Authorization": "Bearer t0ken"}
    for access, headers, whole in ((Access(), {}, False), (Access(token=b"t0ken"), bearer, True)):
        async with served.running(access), served.client(headers=headers) as client:
            said = [(await client.get(path)).text for path in ("/api/nodes", f"/api/nodes/{ID[:12]}", "/readyz")]
            async with client.stream("GET", "/api/changes") as reply:
                said.append(await anext(line async for line in reply.aiter_lines() if line.startswith("data: ")))
            assert [ID[:12] in text for text in said] == [True] * 4
            assert [ID in text for text in said] == [whole] * 4
            assert (await client.get(f"/api/nodes/{ID}")).json()["node_id"] == ID
        served.port = free_port()


async def test_without_a_token_no_answer_depends_on_a_digit_that_is_not_shown() -> None:
    """Else whoever may ask finds out a session digit by digit, with at most 16 questions for each."""
    bearer = {"Authorization": "Bearer t0ken"}
    other = ID[:-1] + "0"
    assert other < ID
    for access, headers, told in ((Access(), {}, False), (Access(token=b"t0ken"), bearer, True)):
        answers = []
        for node_id in (ID, other):
            served = Served({node_id: "running"})
            async with served.running(access), served.client(headers=headers) as client:
                asked = [f"/api/nodes/{ID[:length]}" for length in (*range(4, 13), 13, 40, 63)]
                asked += [f"/api/nodes?after={ID[:length]}" for length in (12, 13, 40, 63)]
                asked += [f"/api/nodes/{ID[:13]}/changes"]
                asked += [f"/api/nodes/{ID[:60]}?until=healthy&timeout=0", f"/api/nodes?after={ID[:-1]}7"]
                replies = [await client.get(path) for path in asked]
                answers.append([(reply.status_code, reply.text) for reply in replies])
        assert (answers[0] != answers[1]) is told
        assert [code for code, _ in answers[0]][:12] == [200] * 9 + [200 if told else 400] * 3


@pytest.mark.parametrize("limit", ["0", "-1", "1001", "many", "1e3", "10 ", "99999999999999999999"])
async def test_a_wrong_limit_is_refused_in_one_line(limit: str) -> None:
    async with Served().running() as served, served.client() as client:
        reply = await client.get("/api/nodes", params={"limit": limit})
        assert (reply.status_code, reply.text) == (400, "limit must be a number from 1 to 1000\n")


async def test_a_page_holds_a_thousand_nodes_unless_told_otherwise() -> None:
    async with Served(many(1001)).running() as served, served.client() as client:
        assert len((await client.get("/api/nodes")).json()) == 1000


async def test_making_a_long_list_lets_others_run_in_between() -> None:
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    def node(node_id: str) -> dict[str, Any]:
        return {"node_id": node_id, "work": sum(range(20_000))}

    running = asyncio.create_task(others())
    await NodePages(lambda: many(200), node).page(after="", limit=200)
    running.cancel()
    assert turns > 20


async def test_who_gives_up_waiting_does_not_take_the_answer_from_the_others() -> None:
    made, made_up = Answers(), asyncio.Event()

    async def make() -> Answer:
        await made_up.wait()
        return Answer(b"body", {})

    first, second = (asyncio.create_task(made.get("key", make)) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    made_up.set()
    assert (await second).body == b"body"


async def test_an_answer_that_could_not_be_made_is_tried_again() -> None:
    made = Answers()

    async def fail() -> Answer:
        raise ValueError("not now")

    async def succeed() -> Answer:
        return Answer(b"body", {})

    with pytest.raises(ValueError, match="not now"):
        await made.get("key", fail)
    assert (await made.get("key", succeed)).body == b"body"


async def test_few_different_answers_are_kept() -> None:
    made = Answers()

    async def make() -> Answer:
        return Answer(b"body", {})

    for number in range(200):
        await made.get(number, make)
    assert len(made._made) <= answers.KEPT_ANSWERS


async def test_more_requests_than_the_rate_wait_and_too_many_are_told_so() -> None:
    turns = Turns(rate=100.0, burst=5, longest=0.2)
    began = asyncio.get_running_loop().time()
    taken = await asyncio.gather(*(turns.take() for _ in range(60)))
    assert 20 <= sum(taken) <= 30
    assert 0.1 < asyncio.get_running_loop().time() - began < 1.0


async def test_a_flood_of_pages_holds_up_no_probe_and_little_of_the_loop() -> None:
    served = Served(many(1000))
    async with served.running(), aiohttp.ClientSession() as flooding, served.client() as client:
        answered = 0

        async def flood() -> None:
            nonlocal answered
            while True:
                async with flooding.get(f"http://127.0.0.1:{served.port}/api/nodes") as reply:
                    await reply.read()
                    answered += 1

        clients = [asyncio.create_task(flood()) for _ in range(8)]
        await asyncio.sleep(0.5)
        before, began = answered, asyncio.get_running_loop().time()
        for _ in range(10):
            assert (await client.get("/livez")).text == "ok\n"
            await asyncio.sleep(0.1)
        took = asyncio.get_running_loop().time() - began
        assert answered - before < 2 * pages_module.RATE * took
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


async def test_metrics_count_the_nodes_without_building_them() -> None:
    async with Served(many(30)).running() as served, served.client() as client:
        said = (await client.get("/metrics")).text
        assert 'eventwatch_nodes{status="running"} 30.0' in said
        # What is nobody's word counts as well.
        assert 'eventwatch_nodes_health{health="other"} 30.0' in said
        assert served.built == 0


async def test_metrics_count_what_failed_by_the_part_that_did() -> None:
    async def failures(client: httpx.AsyncClient) -> list[float]:
        said = (await client.get("/metrics")).text
        parts = ("engine", "database", "internal")
        return [float(re.findall(rf'eventwatch_errors_total{{part="{part}"}} (\S+)', said)[0]) for part in parts]

    async with Served().running() as served, served.client() as client:
        before = await failures(client)
        EngineError("away")
        StoreError("away")
        await asyncio.sleep(answers.MOMENT + 0.1)
        after = await failures(client)
    assert [now - then for now, then in zip(after, before, strict=True)] == [1, 1, 0]


async def test_who_does_not_read_what_it_asked_for_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_module, "READING", 0.3)

    def long(node_id: str) -> dict[str, Any]:
        return {"node_id": node_id, "padding": "x" * 20_000}

    cut, abort = asyncio.Event(), pages_module._abort

    def aborted(request: web.Request) -> None:
        abort(request)
        cut.set()

    monkeypatch.setattr(pages_module, "_abort", aborted)
    served = Served(many(1000))
    monkeypatch.setattr(served, "node", long)
    async with served.running():
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port, limit=1024)
        writer.write(b"GET /api/nodes HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        await asyncio.wait_for(cut.wait(), 60)
        with contextlib.suppress(ConnectionError):
            assert len(await reader.read(-1)) < 20_000_000
        await left(writer)


async def test_only_so_many_follow_the_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "MOST_READERS", 2)
    async with Served().running() as served, contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(served.client())
        for _ in range(2):
            reply = await stack.enter_async_context(client.stream("GET", "/api/changes"))
            assert reply.status_code == 200
        await eventually(lambda: served.feed.is_full)
        assert (await client.get("/api/changes")).status_code == 503


async def test_changes_are_followed_and_silence_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "SILENCE", 0.1)
    served = Served()
    served.feed.publish(CHANGE)
    async with served.running(), served.client() as client, client.stream("GET", "/api/changes") as reply:
        lines = reply.aiter_lines()
        seen: list[str] = []
        while ":" not in seen:
            seen.append(await anext(lines))
        [data] = [line for line in seen if line.startswith("data: ")]
        assert json.loads(data.removeprefix("data: "))["new"] == {"status": "exited"}


def at(number: int) -> Change:
    return replace(CHANGE, at_ns=number)


async def read_changes(
    served: Served, count: int, *, after: int | str | None = None, query: str = ""
) -> list[tuple[str, str, Any]]:
    """The first so many events of a reader: kind, id and data."""
    headers = {} if after is None else {"Last-Event-ID": str(after)}
    events: list[tuple[str, str, Any]] = []
    fields: dict[str, str] = {}
    async with (
        asyncio.timeout(5 * SLOW),
        served.client(headers=headers) as client,
        client.stream("GET", f"/api/changes{query}") as reply,
    ):
        async for line in reply.aiter_lines():
            name, _, value = line.partition(": ")
            if name in {"id", "data", "event"}:
                fields[name] = value
            elif not line and fields.get("data"):
                events.append((fields.get("event", "message"), fields.get("id", ""), json.loads(fields["data"])))
                fields = {}
                if len(events) == count:
                    break
    return events


async def test_a_reader_resumes_after_the_last_change_it_has_seen() -> None:
    async with Served().running() as served:
        for number in (10, 20, 20, 15):
            served.feed.publish(at(number))
        assert [number for _, number, _ in await read_changes(served, 4)] == ["10", "20", "21", "22"]
        assert [number for _, number, _ in await read_changes(served, 2, after=20)] == ["21", "22"]
        later = asyncio.create_task(read_changes(served, 1, after=22))
        await eventually(lambda: served.feed._readers)
        served.feed.publish(at(30))
        assert [number for _, number, _ in await later] == ["30"]


async def test_a_reader_that_may_have_missed_changes_is_told_and_gets_all_that_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feed, "KEPT_CHANGES", 2)
    async with Served().running() as served:
        for number in (10, 20, 30):
            served.feed.publish(at(number))
        # Among them what this feed never gave: numbers of one before it, whose clock was ahead, and what is none.
        for seen in (0, 9, 31, 10**19, 10**30, "x"):
            assert [(kind, number) for kind, number, _ in await read_changes(served, 3, after=seen)] == [
                ("missed", ""),
                ("message", "20"),
                ("message", "30"),
            ]
        assert [number for _, number, _ in await read_changes(served, 2, after=10)] == ["20", "30"]


async def test_a_reader_that_knows_more_than_a_feed_that_began_anew_hears_of_what_comes() -> None:
    async with Served().running() as served:
        reading = asyncio.create_task(read_changes(served, 2, after=30))
        await eventually(lambda: served.feed._readers)
        served.feed.publish(at(20))
        assert [(kind, number) for kind, number, _ in await reading] == [("missed", ""), ("message", "20")]


async def test_after_a_restart_the_history_is_resumed_from_with_a_warning() -> None:
    async with Served().running() as served:
        served.feed.publish(at(100))
        old = [{"at_ns": 20, "node_id": "b"}, {"at_ns": 20, "node_id": "a"}]
        served.feed.recall(old)
        assert [number for _, number, _ in await read_changes(served, 3)] == ["19", "20", "100"]
        assert (await read_changes(served, 1, after=20))[0][0] == "missed"


async def test_a_reader_may_begin_with_now() -> None:
    async with Served().running() as served:
        served.feed.publish(at(10))
        reading = asyncio.create_task(read_changes(served, 1, query="?from=now"))
        await eventually(lambda: served.feed._readers)
        served.feed.publish(at(20))
        assert [number for _, number, _ in await reading] == ["20"]
        async with served.client() as client:
            assert (await client.get("/api/changes?from=yesterday")).status_code == 400


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /api/nodes HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: http://[", 403),
        (b"GET /static/" + b"a" * 3000 + b" HTTP/1.1\r\nHost: 127.0.0.1", 404),
        (b"GET /api/nodes HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer \xff", 401),
        (b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Encoding: gzip\r\nContent-Length: 4", 200),
    ],
)
async def test_an_odd_request_is_refused_without_a_line_in_the_log(
    tmp_path: Path, head: bytes, status: int
) -> None:
    (tmp_path / "token").write_text("secret")
    access = Access.load(token_file=str(tmp_path / "token")) if status == 401 else Access()
    with logged("INFO") as lines:
        async with Served(many(1)).running(access) as served:
            before = len(texts(lines))
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(head + b"\r\nConnection: close\r\n\r\n" + (b"abcd" if b"Length" in head else b""))
            answer = await asyncio.wait_for(reader.read(), 5)
            writer.close()
            assert answer.startswith(b"HTTP/1.1 %d" % status)
            assert texts(lines)[before:] == []


# -- one node -----------------------------------------------------------------------------------------------


async def test_one_node_is_shown_by_its_id_or_the_beginning_of_it() -> None:
    nodes = {ID: "running", "0123" + "f" * 60: "exited"}
    async with Served(nodes).running() as served, served.client() as client:
        for asked in (ID, ID[:12]):
            assert (await client.get(f"/api/nodes/{asked}")).json()["status"] == "running"
        for asked, status in {
            "e" * 64: 404,
            "eeee": 404,
            "0123": 400,
            "abc": 400,
            "..%2f": 400,
            "A" * 64: 400,
        }.items():
            reply = await client.get(f"/api/nodes/{asked}")
            assert reply.status_code == status
            assert list(reply.json()) == ["error"]


async def test_a_node_is_waited_for() -> None:
    async with Served({ID: "running"}).running() as served, served.client() as client:
        waiting = asyncio.create_task(client.get(f"/api/nodes/{ID}?until=healthy&timeout=5s"))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        served.arrived.set()
        assert (await waiting).json()["node_id"] == ID
        assert served.waited == [(ID, "healthy", 5.0)]
        for query in ("until=good", "until=healthy&timeout=x", "until=healthy&timeout=601s"):
            assert (await client.get(f"/api/nodes/{ID}?{query}")).status_code == 400


@pytest.mark.parametrize(
    ("error", "status"), [(WaitTimeoutError, 408), (NodeGoneError, 404), (NodeDiedError, 410), (StoreError, 503)]
)
async def test_a_wait_that_cannot_succeed_says_why(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception], status: int
) -> None:
    async def fail(*_: object) -> None:
        raise error("because")

    monkeypatch.setattr(Served, "wait", fail)
    async with Served({ID: "running"}).running() as served, served.client() as client:
        reply = await client.get(f"/api/nodes/{ID}?until=healthy")
        assert (reply.status_code, reply.json()) == (status, {"error": "because"})


async def test_those_who_wait_take_no_place_of_others_and_end_with_their_clients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 16)
    monkeypatch.setattr(connections, "MOST_PARKED", 100)
    async with Served({ID: "running"}).running() as served:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with served.client(limits=limits, timeout=30) as client, served.client() as other:
            path = f"/api/nodes/{ID}?until=healthy&timeout=60s"
            waiting: list[asyncio.Task[httpx.Response]] = []

            def are_all_seen_to() -> bool:
                return served.waiting + sum(task.done() for task in waiting) == len(waiting)

            for _ in range(11):  # no more at once than there are places for those who begin to wait
                waiting += [asyncio.create_task(client.get(path)) for _ in range(10)]
                await eventually(are_all_seen_to, 20)
            assert [task.result().status_code for task in waiting if task.done()] == [503] * 10
            assert (await other.get("/api/nodes")).status_code == 200
            assert (await other.get("/livez")).status_code == 200
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await eventually(lambda: len(served.waited) == 100)


# -- whom it answers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "served"),
    [
        ("127.0.0.1", True),
        ("127.0.0.1:9471", True),
        ("[::1]:9471", True),
        ("[fe80::1%25eth0]", True),
        ("localhost", True),
        ("LOCALHOST.:9471", True),
        ("10.1.2.3:80", True),
        ("", True),
        ("sidecar:9471", True),
        ("Sidecar.", True),
        ("attacker.example", False),
        ("attacker.example:9471", False),
        ("localhost.attacker.example", False),
        ("127.0.0.1.attacker.example", False),
        ("sidecar.attacker.example", False),
        ("a:b:c", False),
        ("127.0.0.1@attacker.example", False),
    ],
)
def test_only_addresses_localhost_and_allowed_names_are_served(host: str, served: bool) -> None:
    assert Access.load(hosts=["sidecar"]).serves_host(host) is served


async def test_a_name_that_only_points_here_reads_nothing() -> None:
    async with Served(many(1)).running() as served, served.client() as client:
        for path in ("/", "/api/nodes", "/metrics", "/readyz", "/nothing"):
            reply = await client.get(path, headers={"Host": "attacker.example"})
            assert reply.status_code == 421
            assert "EVENTWATCH_HTTP_ALLOWED_HOSTS" in reply.text
            assert reply.text.count("\n") == 1


@pytest.mark.parametrize(
    ("path", "headers", "foreign"),
    [
        ("/api/nodes", {}, False),
        ("/api/nodes", {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors"}, False),
        ("/api/nodes", {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"}, False),
        ("/", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, False),
        ("/", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, True),
        ("/api/nodes", {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, True),
        ("/api/nodes", {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"}, True),
        ("/api/nodes", {"Origin": "http://here:1", "Host": "here:1"}, False),
        ("/api/nodes", {"Origin": "http://here:2", "Host": "here:1"}, True),
        ("/api/nodes", {"Origin": "null", "Host": "here:1"}, True),
    ],
)
def test_what_a_browser_asks_on_behalf_of_another_site_is_refused(
    path: str, headers: dict[str, str], foreign: bool
) -> None:
    assert is_foreign(headers, path) is foreign


async def test_no_answer_is_kept_or_tells_what_serves_it() -> None:
    async with Served(many(1)).running() as served, served.client() as client:
        for path in ("/", "/livez", "/readyz", "/metrics", "/api/nodes", "/nothing"):
            reply = await client.get(path)
            assert reply.headers["Cache-Control"] == "no-store", path
            assert "Server" not in reply.headers
        script = await client.get("/static/main.js")
        assert script.headers["Cache-Control"] == "no-cache"
        again = await client.get("/static/main.js", headers={"If-None-Match": script.headers["ETag"]})
        assert again.status_code == 304


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


async def test_who_has_no_token_is_told_how_many_engines_are_dead_and_not_which() -> None:
    note = note_of([EngineRecord("UPSA:GB37", host="db-host-7"), EngineRecord("engine-b", host="host-b")])
    served = Served(many(1), notes=[note])
    async with served.running(Access(token=b"s3cret:1")), served.client() as client:
        [told] = (await client.get("/readyz")).json()
        assert told == "fleet: nobody keeps the documents of 2 engines true"
        [told] = (await client.get("/readyz", headers={"Authorization": "Bearer s3cret:1"})).json()
        assert "db-host-7" in told


async def test_a_token_is_asked_for_except_by_the_probes() -> None:
    served = Served(many(1), doubts=[f"lease: standing by, checker {ID[:32]} watches this engine"])
    async with served.running(Access(token=b"s3cret:1")), served.client() as client:
        for path in ("/", "/api/nodes", "/api/changes", "/metrics", "/static/main.js", "/nothing"):
            refused = await client.get(path)
            assert refused.status_code == 401, path
            assert refused.headers["WWW-Authenticate"].startswith("Basic ")
        assert (await client.get("/livez")).status_code == 200
        assert (await client.get("/readyz")).json() == ["lease: standing by, checker ... watches this engine"]
        right = {"Authorization": "Bearer s3cret:1"}
        assert ID[:32] in (await client.get("/readyz", headers=right)).text
        lower = {"Authorization": "bearer  s3cret:1"}
        for headers in (right, lower, basic("any", "s3cret:1"), basic("", "s3cret:1")):
            assert (await client.get("/api/nodes", headers=headers)).status_code == 200
        for headers in (
            {"Authorization": "Bearer s3cret"},
            {"Authorization": "s3cret:1"},
            {"Authorization": "Bearer"},
            {"Authorization": "Basic s3cret:1"},
            {"Authorization": "Digest s3cret:1"},
            basic("s3cret:1", ""),
        ):
            assert (await client.get("/api/nodes", headers=headers)).status_code == 401


def test_ids_are_left_out_of_reasons_and_nothing_else() -> None:
    engine = ":".join(["ABCD"] * 12)
    said = f"nodes: 1, {ID[:12]}, {ID}, {engine}, 123e4567-e89b-12d3-a456-426614174000; sweep: 12 s old"
    assert without_ids(said) == "nodes: 1, ..., ..., ..., ...; sweep: 12 s old"


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "cannot be read, No such file"),
        (b" \n", "is empty"),
        (b"two words", "must hold one line of visible"),
        (b"\xff\xfe", "must hold one line of visible"),
        (b"x" * 5000, "must hold one line of visible"),
    ],
)
def test_a_token_file_that_cannot_be_used_is_one_line(content: bytes | None, fault: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_token(str(file))
    assert str(caught.value).startswith(f"EVENTWATCH_HTTP_TOKEN_FILE: {file} {fault}")
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_token(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no file"):
        read_token(str(tmp_path))


def test_a_token_is_read_without_its_line_end(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    assert read_token(str(tmp_path / "token")) == b"s3cret"


def test_tls_files_that_cannot_be_used_are_one_line(tmp_path: Path) -> None:
    make_certificates(tmp_path, "127.0.0.1")
    (tmp_path / "empty").touch()
    cert, key, other, empty, none = (
        str(tmp_path / name) for name in ("server.crt", "server.key", "key.pem", "empty", "none")
    )
    for files, start in (
        ((none, key), f"EVENTWATCH_HTTP_TLS_CERT_FILE: {none} cannot be read"),
        ((cert, none), f"EVENTWATCH_HTTP_TLS_KEY_FILE: {none} cannot be read"),
        ((empty, key), f"EVENTWATCH_HTTP_TLS_CERT_FILE: {empty} is empty"),
        ((cert, other), "EVENTWATCH_HTTP_TLS_CERT_FILE and EVENTWATCH_HTTP_TLS_KEY_FILE: "),
        ((key, cert), "EVENTWATCH_HTTP_TLS_CERT_FILE and EVENTWATCH_HTTP_TLS_KEY_FILE: "),
    ):
        with pytest.raises(ConfigError) as caught:
            load_tls(*files)
        assert str(caught.value).startswith(start)
        assert "\n" not in str(caught.value)


async def test_over_tls_the_pages_are_served_and_plain_http_is_not(tmp_path: Path) -> None:
    make_certificates(tmp_path, "127.0.0.1")
    access = Access.load(cert_file=str(tmp_path / "server.crt"), key_file=str(tmp_path / "server.key"))
    trusted = trusting(tmp_path)
    async with Served(many(3)).running(access) as served:
        async with httpx.AsyncClient(verify=trusted) as client:
            reply = await client.get(f"https://127.0.0.1:{served.port}/api/nodes")
            assert len(reply.json()) == 3
        async with served.client() as plain:
            with pytest.raises(httpx.TransportError):
                await plain.get("/livez")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("sidecar", False),
    ],
)
def test_what_is_loopback_is_known(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("host", "names", "tls", "url"),
    [
        ("127.0.0.1", {"127.0.0.1"}, False, ""),
        ("localhost", {"localhost"}, False, ""),
        ("10.1.2.3", {"10.1.2.3"}, False, "http://10.1.2.3:9471/"),
        ("fd00::7", {"fd00::7"}, True, "https://[fd00::7]:9471/"),
        ("0.0.0.0", {"0.0.0.0", "localhost", "watch.example"}, False, "http://watch.example:9471/"),
    ],
)
def test_others_are_told_where_the_page_is_if_they_can_reach_it(
    host: str, names: set[str], tls: bool, url: str
) -> None:
    assert page_url(host, 9471, names=names, tls=tls) == url
    assert page_url(host, 0, names=names, tls=tls) == ""


def test_what_listens_everywhere_and_has_no_name_is_told_by_its_address() -> None:
    url = page_url("::", 9471, names={"::"}, tls=False)
    assert url == "" or Access().serves_host(url.removeprefix("http://").removesuffix("/"))


async def test_off_loopback_without_a_token_there_is_one_warning() -> None:
    with logged("WARNING") as lines:
        async with Served().running(host="0.0.0.0"), Served().running(), Served().running(Access(token=b"x")):
            pass
        async with Served().running(Access(token=b"x"), host="0.0.0.0"):
            pass
    assert len(lines) == 1
    assert "EVENTWATCH_HTTP_TOKEN_FILE" in lines[0].text


# -- connections --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def idle_connections(port: int, count: int) -> Iterator[list[socket.socket]]:
    held: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            held.append(stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5)))  # noqa: PERF401
        yield held


async def left(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def is_closed(held: socket.socket) -> bool:
    held.setblocking(False)
    try:
        while held.recv(1024):
            """What it was told before."""
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def set_all(**values: float) -> None:
        for name, value in values.items():
            monkeypatch.setattr(connections, name, value)

    monkeypatch.setattr(connections, "default_cap", lambda: 16)
    monkeypatch.setattr(connections, "LOOK", 0.1)
    return set_all


async def test_idle_connections_take_no_probes_place(small: Callable[..., None]) -> None:
    small(GRACE=0.0, FIRST_GRACE=0.0)
    async with Served().running() as served, served.client() as client:
        with logged("WARNING") as lines, idle_connections(served.port, 100) as held:
            await asyncio.sleep(0.3)
            for _ in range(20):
                assert (await client.get("/readyz", headers={"Connection": "close"})).status_code == 200
            assert sum(not is_closed(each) for each in held) <= 16
        assert len(texts(lines)) == 1


def is_told_to_come_again(held: socket.socket) -> bool:
    """Whether it was answered so, and nothing comes after that."""
    held.settimeout(5)
    answer = b""
    try:
        while chunk := held.recv(4096):
            answer += chunk
    except OSError:
        return False
    head, _, body = answer.partition(b"\r\n\r\n")
    return (
        head.startswith(b"HTTP/1.1 503 ")
        and b"\r\nRetry-After: 1\r\n" in head
        and b"\r\nContent-Length: %d\r\n" % len(body) in head + b"\r\n"
    )


async def test_who_asked_for_nothing_makes_room_after_who_was_answered_and_is_told_so(
    small: Callable[..., None],
) -> None:
    small(GRACE=0.0, FIRST_GRACE=0.2)
    async with Served().running() as served:
        with idle_connections(served.port, 8) as silent, idle_connections(served.port, 8) as answered:
            for each in answered:
                each.sendall(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
                assert (await asyncio.to_thread(each.recv, 4096)).startswith(b"HTTP/1.1 200 ")
            await asyncio.sleep(0.5)
            with idle_connections(served.port, 8):
                await eventually(lambda: all(map(is_closed, answered)))
                assert not any(map(is_closed, silent))
                with idle_connections(served.port, 3):
                    assert await asyncio.to_thread(lambda: all(map(is_told_to_come_again, silent[:3])))


async def test_many_places_are_taken_from_the_descriptors_and_the_host_keeps_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for limit, cap in ((64, 16), (1024, 256), (16_384, 4096), (10**6, 4096)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert connections.default_cap() == cap
        held = connections.Connections()
        assert (
            held.cap + held.cap // 8 + held._most_parked + connections.LEAVING <= limit * 0.9 + connections.LEAVING
        )


async def test_what_comes_above_the_cap_is_told_to_come_again_when_none_is_idle(
    small: Callable[..., None],
) -> None:
    async with Served().running() as served, contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(served.client())
        chunks: list[AsyncIterator[bytes]] = []
        for _ in range(16):
            reply = await stack.enter_async_context(client.stream("GET", "/api/changes"))
            chunks.append(reply.aiter_raw())
            await anext(chunks[-1])
        await asyncio.sleep(connections.GRACE)
        with idle_connections(served.port, 4) as held:
            for each in held:  # also those whose request comes when nobody reads it any more
                with contextlib.suppress(OSError):
                    each.sendall(b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert await asyncio.to_thread(lambda: sum(map(is_told_to_come_again, held))) >= 2
            await eventually(lambda: all(map(is_closed, held)))
        served.feed.publish(CHANGE)  # those that are busy stay
        assert len(served.feed._readers) == 16


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Half: ",
        b"GET /livez HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    ],
    ids=["nothing", "half a header", "an answered request"],
)
async def test_idle_and_half_sent_requests_end(small: Callable[..., None], sent: bytes) -> None:
    small(FIRST_REQUEST=0.3, NEXT_REQUEST=0.3)
    async with Served().running() as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        writer.write(sent)
        async with asyncio.timeout(3 * SLOW):
            with contextlib.suppress(ConnectionError):
                await reader.read(-1)
        await left(writer)


async def test_a_tls_handshake_that_is_never_made_ends(small: Callable[..., None], tmp_path: Path) -> None:
    small(FIRST_REQUEST=0.3)
    make_certificates(tmp_path, "127.0.0.1")
    access = Access.load(cert_file=str(tmp_path / "server.crt"), key_file=str(tmp_path / "server.key"))
    async with Served().running(access) as served:
        with idle_connections(served.port, 4) as held:
            await eventually(lambda: all(map(is_closed, held)), 5)


async def test_a_request_that_is_no_http_is_answered_without_a_traceback_or_a_banner(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    async with Served().running() as served:
        for sent in (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET / HTTP/1.1\r\nBad Header\r\n\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(sent)
            async with asyncio.timeout(3 * SLOW):
                answer = await reader.read(-1)
            assert answer.startswith(b"HTTP/1.0 400 ")
            assert b"aiohttp" not in answer.lower()
            await left(writer)
    assert caplog.records == []
    assert "Traceback" not in capsys.readouterr().err


async def test_an_address_in_use_is_a_warning_and_one_that_is_not_ours_an_error() -> None:
    async with Served().running() as served:
        with logged("WARNING") as lines:
            async with Served(port=served.port).running():
                pass
        assert [line.text for line in lines] == [
            f"EVENTWATCH_HTTP_LISTEN: 127.0.0.1:{served.port} is in use, going on without HTTP until it is free"
        ]
    with pytest.raises(ConfigError, match="cannot listen on 192"):
        async with Served().running(host="192.0.2.1"):
            pass


async def test_a_successor_has_the_address_as_soon_as_its_predecessor_is_gone() -> None:
    before = Served(many(1))
    async with AsyncExitStack() as stack:
        async with before.running():
            after = await stack.enter_async_context(Served(many(2), port=before.port).running())
            async with before.client() as client:
                assert len((await client.get("/api/nodes")).json()) == 1

        async def answers() -> bool:
            with suppress(httpx.TransportError):
                async with after.client() as client:
                    return len((await client.get("/api/nodes")).json()) == 2
            return False

        await eventually(answers, 5)
    with pytest.raises(httpx.TransportError):
        async with after.client() as client:
            await client.get("/livez")
