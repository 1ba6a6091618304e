"""Asking a running eventwatch whether it is ready, as a container's health check does twice a minute.

Needs nothing but the standard library, so that asking costs little: the rest of the program takes most of a
second to import.
"""

from __future__ import annotations

import http
import http.client
import json
from typing import Final

from eventwatch.errors import EventwatchError

#: Seconds for an answer.
DEADLINE: Final = 4.0
STANDBY: Final = "lease: standing by,"
#: What begins a line that is no doubt.
NOTES: Final = ("clock:", "nodes:")
_EVERYWHERE: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - everywhere includes here


def ask_readiness(host: str, port: int) -> tuple[bool, list[str]]:
    """Whether the eventwatch that listens there is ready, and what it says. EventwatchError when none answers."""
    host = _EVERYWHERE.get(host, host)
    connection = http.client.HTTPConnection(host, port, timeout=DEADLINE)
    try:
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        return answer.status == http.HTTPStatus.OK, [str(reason) for reason in json.load(answer)]
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise EventwatchError(f"no eventwatch answers at {host} port {port}: {error}") from None
    finally:
        connection.close()


def standing_by(manager_id: str) -> str:
    """The doubt of a standby."""
    return f"{STANDBY} checker {manager_id} watches this engine"


def is_standby(reasons: list[str]) -> bool:
    """Whether the only doubt is that another checker leads, which is as it should be."""
    doubts = [reason for reason in reasons if not reason.startswith(NOTES)]
    return len(doubts) == 1 and doubts[0].startswith(STANDBY)
