"""Rows of the list of containers, made of what an inspection of the same container says."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from eventwatch.core.facts import parse_time
from eventwatch.core.listing import age_in_words


def row_of(container: Mapping[str, Any], now: datetime) -> dict[str, Any]:
    """As Docker's `GET /containers/json` tells of it at that time."""
    state = container["State"]
    status, health = state["Status"], (state.get("Health") or {}).get("Status")
    up = age_in_words((now - (parse_time(state["StartedAt"]) or now)).total_seconds())
    ended = age_in_words((now - (parse_time(state.get("FinishedAt")) or now)).total_seconds())
    shown = {"starting": " (health: starting)", None: ""}.get(health, f" ({health})")
    text = {
        "created": "Created",
        "running": f"Up {up}{shown}",
        "paused": f"Up {up} (Paused)",
        "restarting": f"Restarting ({state.get('ExitCode', 0)}) {ended} ago",
        "removing": "Removal In Progress",
        "dead": "Dead",
    }.get(status, f"Exited ({state.get('ExitCode', 0)}) {ended} ago")
    networks = container["NetworkSettings"]["Networks"]
    return {"Id": container["Id"], "State": status, "Status": text, "NetworkSettings": {"Networks": networks}}
