"""eventwatch: keeps ToolServer node documents in MongoDB true to their Docker containers.

What is imported from here is the public API; everything else may change. The names are resolved when they are
first used (PEP 562), so that the health check of a container, which needs none of them, stays cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eventwatch.app import watch
    from eventwatch.documents import NodeChecker, ToolServerNode
    from eventwatch.logs import use_standard_logging
    from eventwatch.settings import Settings
    from eventwatch.sweeper import check_nodes_status, check_nodes_status_loop, update_node_status

__all__ = [
    "NodeChecker",
    "Settings",
    "ToolServerNode",
    "check_nodes_status",
    "check_nodes_status_loop",
    "update_node_status",
    "use_standard_logging",
    "watch",
]

_HOMES = {
    "NodeChecker": "documents",
    "Settings": "settings",
    "ToolServerNode": "documents",
    "check_nodes_status": "sweeper",
    "check_nodes_status_loop": "sweeper",
    "update_node_status": "sweeper",
    "use_standard_logging": "logs",
    "watch": "app",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
