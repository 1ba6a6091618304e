"""Somebody's own code: which nodes may be sent a request."""

from __future__ import annotations

from eventwatch import ToolServerNode


async def routable() -> set[str]:
    nodes = ToolServerNode.find(ToolServerNode.status == "running", ToolServerNode.health == "healthy")
    return {node.ip async for node in nodes}
