"""Asking a running eventwatch whether it is ready, as a container's health check does twice a minute.

Needs nothing but the standard library, so that asking costs little: the rest of the program takes most of a
second to import.
"""

from __future__ import annotations

import http.client
import json
from typing import Final

from eventwatch.errors import EventwatchError

#: Seconds for an answer.
DEADLINE: Final = 4.0
STANDBY: Final = "lease: standing by,"
_EVERYWHERE: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - everywhere includes here


def ask_readiness(host: str, port: int) -> list[str]:
    """The doubts of the eventwatch that listens there. Raises EventwatchError when none answers."""
    host = _EVERYWHERE.get(host, host)
    connection = http.client.HTTPConnection(host, port, timeout=DEADLINE)
    try:
        connection.request("GET", "/readyz")
        return [str(reason) for reason in json.load(connection.getresponse())]
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise EventwatchError(f"no eventwatch answers at {host} port {port}: {error}") from None
    finally:
        connection.close()


def standing_by(manager_id: str) -> str:
    """The doubt of a standby."""
    return f"{STANDBY} checker {manager_id} watches this engine"


def is_standby(reasons: list[str]) -> bool:
    """Whether the only doubt is that another checker leads, which is as it should be."""
    return len(reasons) == 1 and reasons[0].startswith(STANDBY)
