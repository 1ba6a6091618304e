"""eventwatch: keeps ToolServer node documents in MongoDB true to their Docker containers.

What is imported from here is the public API; everything else may change.
"""

from eventwatch.app import watch
from eventwatch.documents import NodeChecker, ToolServerNode
from eventwatch.settings import Settings
from eventwatch.sweeper import check_nodes_status, check_nodes_status_loop, update_node_status

__all__ = [
    "NodeChecker",
    "Settings",
    "ToolServerNode",
    "check_nodes_status",
    "check_nodes_status_loop",
    "update_node_status",
    "watch",
]
