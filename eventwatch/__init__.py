"""eventwatch: keeps ToolServer node documents in MongoDB true to their Docker containers.

What is imported from here is the public API; everything else may change. The names are resolved when they are
first used (PEP 562), so that the health check of a container, which needs none of them, stays cheap.
"""

TYPE_CHECKING = False  # what type checkers know by this name, without the cost of importing typing

if TYPE_CHECKING:
    from eventwatch.app import Application, watch
    from eventwatch.calls.use import in_use, touch
    from eventwatch.calls.waiting import wait_for
    from eventwatch.checks import check_nodes_status, check_nodes_status_loop, update_node_status
    from eventwatch.core.errors import (
        ChangesLostError,
        ConfigError,
        EventwatchError,
        NodeDiedError,
        NodeGoneError,
        StoreError,
        WaitTimeoutError,
    )
    from eventwatch.core.facts import Cause, Change
    from eventwatch.core.logs import use_standard_logging
    from eventwatch.pipeline.sweeper import SweepReport
    from eventwatch.settings.model import Settings
    from eventwatch.store.documents import NodeChecker, ToolServerNode

__all__ = [
    "Application",
    "Cause",
    "Change",
    "ChangesLostError",
    "ConfigError",
    "EventwatchError",
    "NodeChecker",
    "NodeDiedError",
    "NodeGoneError",
    "Settings",
    "StoreError",
    "SweepReport",
    "ToolServerNode",
    "WaitTimeoutError",
    "check_nodes_status",
    "check_nodes_status_loop",
    "in_use",
    "touch",
    "update_node_status",
    "use_standard_logging",
    "wait_for",
    "watch",
]

_HOMES = {
    "Application": "app",
    "Cause": "core.facts",
    "Change": "core.facts",
    "ChangesLostError": "core.errors",
    "ConfigError": "core.errors",
    "EventwatchError": "core.errors",
    "NodeChecker": "store.documents",
    "NodeDiedError": "core.errors",
    "NodeGoneError": "core.errors",
    "Settings": "settings.model",
    "StoreError": "core.errors",
    "SweepReport": "pipeline.sweeper",
    "ToolServerNode": "store.documents",
    "WaitTimeoutError": "core.errors",
    "check_nodes_status": "checks",
    "check_nodes_status_loop": "checks",
    "in_use": "calls.use",
    "touch": "calls.use",
    "update_node_status": "checks",
    "use_standard_logging": "core.logs",
    "wait_for": "calls.waiting",
    "watch": "app",
}


def __getattr__(name: str) -> object:
    from importlib import import_module  # noqa: PLC0415 - as above

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
