"""A Docker engine made of memory: `python -m tests.bench.fake_engine SOCKET --nodes N`.

What for: nodes in numbers that no machine runs as containers, changes at an exact moment, and a count of what
was asked. It answers what eventwatch, the floor and the poller ask (`/version`, `/info`, `/containers/json`,
`/containers/{id}/json`, `/containers/{id}/stop`, `/events` with live push and `since`), with bodies as long as
the real engine's, because the cost of parsing them is part of every figure.

What it is not: correct. Filters are ignored, an inspection never blocks on a lock, network events are
never sent, and a reader that stalls slows the sender down instead of losing events. So it says what a client costs,
never how long an engine takes.

The benchmark drives it through `/bench/...` on the same socket: `emit` one event, `flood` with many, change
nodes `silently`, tell the `truth` and the `stats`.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from aiohttp import web

NETWORK: Final = "bench-network"
#: As many events as a real engine keeps.
KEPT: Final = 256
#: Events written at once in a flood: about the size of a socket buffer.
FLOOD_CHUNK: Final = 256

#: What happens to a node in a flood, over and over; it ends where it began.
FLOOD_CYCLE: Final = ("kill", "die", "stop", "start", "pause", "unpause")
STATUS_AFTER: Final = {"die": "exited", "start": "running", "pause": "paused", "unpause": "running"}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_HOST_CONFIG: Final = {
    "LogConfig": {"Type": "json-file", "Config": {}},
    "NetworkMode": NETWORK,
    "RestartPolicy": {"Name": "no", "MaximumRetryCount": 0},
    **dict.fromkeys(
        (
            "Binds", "PortBindings", "VolumesFrom", "CapAdd", "CapDrop", "Dns", "DnsOptions", "DnsSearch", "ExtraHosts",
            "GroupAdd", "Links", "SecurityOpt", "BlkioWeightDevice", "BlkioDeviceReadBps", "BlkioDeviceWriteBps",
            "BlkioDeviceReadIOps", "BlkioDeviceWriteIOps", "Devices", "DeviceCgroupRules", "DeviceRequests",
            "MemorySwappiness", "PidsLimit", "Ulimits",
        )
    ),
    **dict.fromkeys(
        (
            "OomScoreAdj", "CpuShares", "Memory", "NanoCpus", "BlkioWeight", "CpuPeriod", "CpuQuota",
            "CpuRealtimePeriod", "CpuRealtimeRuntime", "KernelMemory", "KernelMemoryTCP", "MemoryReservation",
            "MemorySwap", "CpuCount", "CpuPercent", "IOMaximumIOps", "IOMaximumBandwidth", "ShmSize",
        ),
        0,
    ),
    **dict.fromkeys(("AutoRemove", "Privileged", "PublishAllPorts", "ReadonlyRootfs", "OomKillDisable"), False),
    **dict.fromkeys(("VolumeDriver", "Cgroup", "PidMode", "UTSMode", "UsernsMode", "Isolation", "CpusetCpus"), ""),
    "MaskedPaths": [f"/proc/{name}" for name in ("asound", "acpi", "kcore", "keys", "timer_list", "sched_debug")],
    "ReadonlyPaths": [f"/proc/{name}" for name in ("bus", "fs", "irq", "sys", "sysrq-trigger")],
}  # fmt: skip


@dataclass
class FakeNode:
    """One container."""

    number: int
    node_id: str
    status: str = "running"
    health: str = "healthy"
    started_at: str = "2026-01-01T00:00:00.000000001Z"

    @property
    def ip(self) -> str:
        high, low = divmod(self.number, 250)
        return f"10.77.{high}.{low + 2}"

    @property
    def truth(self) -> dict[str, str]:
        """What the document must say."""
        up = self.status in {"running", "paused"}
        health = self.health if self.status == "running" else "unhealthy"
        return {"status": self.status, "health": health, "ip": self.ip if up else ""}

    def happen(self, action: str) -> None:
        self.status = STATUS_AFTER.get(action, self.status)
        if action.startswith("health_status: "):
            self.health = action.removeprefix("health_status: ")

    def inspection(self) -> dict[str, Any]:
        folder = f"/var/lib/docker/containers/{self.node_id}"
        layers = ":".join(f"/var/lib/docker/overlay2/{hashlib.sha256(bytes(n)).hexdigest()}/diff" for n in range(6))
        truth = self.truth
        return {
            "Id": self.node_id,
            "Created": self.started_at,
            "Path": "sh",
            "Args": ["-c", "trap 'exit 0' TERM; httpd -f -p 31942 & wait"],
            "State": {
                "Status": self.status,
                "Running": self.status in {"running", "paused"},
                "Paused": self.status == "paused",
                "Restarting": False,
                "OOMKilled": False,
                "Dead": False,
                "Pid": 1000 + self.number,
                "ExitCode": 0,
                "Error": "",
                "StartedAt": self.started_at,
                "FinishedAt": "0001-01-01T00:00:00Z",
                "Health": {
                    "Status": truth["health"],
                    "FailingStreak": 0,
                    "Log": [{"Start": self.started_at, "End": self.started_at, "ExitCode": 0, "Output": ""}] * 5,
                },
            },
            "Image": f"sha256:{self.node_id}",
            "ResolvConfPath": f"{folder}/resolv.conf",
            "HostnamePath": f"{folder}/hostname",
            "HostsPath": f"{folder}/hosts",
            "LogPath": f"{folder}/{self.node_id}-json.log",
            "Name": f"/node-{self.number}",
            "RestartCount": 0,
            "Driver": "overlay2",
            "Platform": "linux",
            "HostConfig": _HOST_CONFIG,
            "GraphDriver": {"Data": {"LowerDir": layers, "MergedDir": layers[:90]}, "Name": "overlay2"},
            "Mounts": [],
            "Config": {
                "Hostname": self.node_id[:12],
                "ExposedPorts": {"31942/tcp": {}},
                "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
                "Cmd": ["sh", "-c", "trap 'exit 0' TERM; httpd -f -p 31942 & wait"],
                "Image": "eventwatch-node:1",
                "Labels": {"eventwatch.run": "181dd5f09d8f2afa", "tool-server.node": f"node-{self.number}"},
            },
            "NetworkSettings": {
                "Ports": {"31942/tcp": None},
                "Networks": {
                    NETWORK: {
                        "NetworkID": self.node_id,
                        "EndpointID": self.node_id,
                        "Gateway": "10.77.0.1",
                        "IPAddress": truth["ip"],
                        "IPPrefixLen": 16,
                        "MacAddress": "02:42:0a:4d:00:02",
                    }
                },
            },
        }

    def event(self, action: str, time_nano: int) -> bytes:
        """One line of the event stream."""
        line = {
            "status": action,
            "id": self.node_id,
            "from": "eventwatch-node:1",
            "Type": "container",
            "Action": action,
            "Actor": {
                "ID": self.node_id,
                "Attributes": {
                    "eventwatch.run": "181dd5f09d8f2afa",
                    "image": "eventwatch-node:1",
                    "name": f"node-{self.number}",
                    "tool-server.node": f"node-{self.number}",
                },
            },
            "scope": "local",
            "time": time_nano // 1_000_000_000,
            "timeNano": time_nano,
        }
        return json.dumps(line, separators=(",", ":")).encode() + b"\n"


def fake_id(number: int) -> str:
    return hashlib.sha256(f"node {number}".encode()).hexdigest()


class FakeEngine:
    """The nodes, whoever listens to their events, and the count of requests."""

    def __init__(self, nodes: int, exited: int = 0) -> None:
        self.nodes = [FakeNode(number, fake_id(number)) for number in range(nodes)]
        for node in self.nodes[:exited]:
            node.status = "exited"
        self._by_id = {node.node_id: node for node in self.nodes}
        self._bodies: dict[str, tuple[tuple[str, str], bytes]] = {}
        self._listeners: list[web.StreamResponse] = []
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=KEPT)
        self._last_time = 0
        self._requests: Counter[str] = Counter()
        self._greeting: str | None = None

    def application(self) -> web.Application:
        app = web.Application()
        for method, path, handler in (
            ("GET", "/version", self._version),
            ("GET", "/info", self._info),
            ("GET", "/containers/json", self._list),
            ("GET", "/containers/{id}/json", self._inspect),
            ("POST", "/containers/{id}/stop", self._stop),
            ("GET", "/events", self._events),
        ):
            counted = self._counted(path, handler)
            app.router.add_route(method, path, counted)
            app.router.add_route(method, "/v{api}" + path, counted)
        app.router.add_post("/bench/emit", self._emit)
        app.router.add_post("/bench/greet", self._greet)
        app.router.add_post("/bench/flood", self._flood)
        app.router.add_post("/bench/silent", self._silent)
        app.router.add_get("/bench/truth", self._truth)
        app.router.add_get("/bench/stats", self._stats)
        return app

    def _counted(self, name: str, handler: Handler) -> Handler:
        async def counted(request: web.Request) -> web.StreamResponse:
            self._requests[name] += 1
            return await handler(request)

        return counted

    # -- the engine's own interface ------------------------------------------------------------------

    async def _version(self, _: web.Request) -> web.Response:
        return web.json_response({"Version": "20.10.24", "ApiVersion": "1.41", "MinAPIVersion": "1.12"})

    async def _info(self, _: web.Request) -> web.Response:
        return web.json_response({"ID": "fake-engine", "Name": "fake", "Containers": len(self.nodes)})

    async def _list(self, _: web.Request) -> web.Response:
        rows = [
            {"Id": node.node_id, "Names": [f"/node-{node.number}"], "State": node.status, "Labels": {}}
            for node in self.nodes
        ]
        return web.json_response(rows)

    async def _inspect(self, request: web.Request) -> web.Response:
        node = self._by_id.get(request.match_info["id"])
        if node is None:
            return web.json_response({"message": "No such container"}, status=404)
        state = (node.status, node.health)
        cached = self._bodies.get(node.node_id)
        if cached is None or cached[0] != state:
            cached = state, json.dumps(node.inspection(), separators=(",", ":")).encode()
            self._bodies[node.node_id] = cached
        return web.Response(body=cached[1], content_type="application/json")

    async def _stop(self, request: web.Request) -> web.Response:
        node = self._by_id.get(request.match_info["id"])
        if node is None:
            return web.json_response({"message": "No such container"}, status=404)
        await self._send(node, "die")
        return web.Response(status=204)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        if since := request.query.get("since"):
            seconds, _, nanos = since.partition(".")
            start = int(seconds) * 1_000_000_000 + int(nanos.ljust(9, "0") or 0)
            for time_nano, line in list(self._kept):
                if time_nano >= start:
                    await response.write(line)
        self._listeners.append(response)
        try:
            if self._greeting:
                action, self._greeting = self._greeting, None
                await self._send(self.nodes[0], action)
            await asyncio.Event().wait()
        finally:
            self._listeners.remove(response)
        return response

    # -- the benchmark's -----------------------------------------------------------------------------

    def _now(self) -> int:
        self._last_time = max(time.time_ns(), self._last_time + 1)
        return self._last_time

    async def _send(self, node: FakeNode, action: str) -> int:
        time_nano = self._now()
        node.happen(action)
        line = node.event(action, time_nano)
        self._kept.append((time_nano, line))
        await self._broadcast(line)
        return time_nano

    async def _broadcast(self, data: bytes) -> None:
        for listener in list(self._listeners):
            try:
                await listener.write(data)
            except ConnectionError:
                continue  # its handler is about to be cancelled

    async def _emit(self, request: web.Request) -> web.Response:
        """`node`, `action`: one event; answers its `timeNano` and the node's id."""
        node = self.nodes[int(request.query["node"])]
        time_nano = await self._send(node, request.query["action"])
        return web.json_response({"id": node.node_id, "timeNano": time_nano})

    async def _greet(self, request: web.Request) -> web.Response:
        """Let `action` happen to the first node as soon as somebody opens the event stream."""
        self._greeting = request.query["action"]
        return web.Response()

    async def _flood(self, request: web.Request) -> web.Response:
        """`events` about the nodes but the last in turn, as fast as they are read; then one `pause` of the last."""
        *crowd, last = self.nodes
        total, began = int(request.query["events"]), time.time_ns()
        # The engine's share in the cost is kept small: lines are split around their time once.
        parts = {
            (node.number, action): tuple(node.event(action, 10**18 + 7).replace(b"1000000000000000007", b"%d"))
            for node in crowd
            for action in FLOOD_CYCLE
        }
        lines = {key: bytes(value) for key, value in parts.items()}
        sent = 0
        while sent < total:
            chunk = []
            for number in range(sent, min(sent + FLOOD_CHUNK, total)):
                step, position = divmod(number, len(crowd))
                action = FLOOD_CYCLE[step % len(FLOOD_CYCLE)]
                chunk.append(lines[position, action] % self._now())
                crowd[position].status = STATUS_AFTER.get(action, crowd[position].status)
            await self._broadcast(b"".join(chunk))
            sent += len(chunk)
        read_at = time.time_ns()
        await self._send(last, "pause" if last.status == "running" else "unpause")
        return web.json_response({"began": began, "read": read_at, "id": last.node_id, "status": last.status})

    async def _silent(self, request: web.Request) -> web.Response:
        """Turn the first `count` nodes from running to exited or back without an event; answers their ids."""
        chosen = self.nodes[: int(request.query["count"])]
        status = "exited" if chosen[0].status == "running" else "running"
        for node in chosen:
            node.status = status
        return web.json_response({"status": status, "ids": [node.node_id for node in chosen]})

    async def _truth(self, _: web.Request) -> web.Response:
        return web.json_response({node.node_id: node.truth for node in self.nodes})

    async def _stats(self, _: web.Request) -> web.Response:
        return web.json_response({"requests": self._requests, "listeners": len(self._listeners)})


async def serve(socket: Path, engine: FakeEngine) -> None:
    # Without cancellation a listener that went away would be written to for ever.
    runner = web.AppRunner(engine.application(), access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    socket.unlink(missing_ok=True)
    await web.UnixSite(runner, str(socket)).start()
    print("ready", flush=True)  # noqa: T201 - who started us waits for it
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="A Docker engine made of memory.")
    parser.add_argument("socket", type=Path)
    parser.add_argument("--nodes", type=int, default=10)
    parser.add_argument("--exited", type=int, default=0, help="how many of them are not running")
    options = parser.parse_args()
    asyncio.run(serve(options.socket, FakeEngine(options.nodes, options.exited)))


if __name__ == "__main__":
    main()
