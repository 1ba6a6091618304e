"""What a row of an engine's list of containers proves, and it is little.

Why: to inspect ten thousand quiet containers at each pass costs their engine more than all else that we ask, and
nearly always tells what is known. A list is one request.

Contract: a row is never believed, as engines show old ones now and then. All that is asked of it is whether it
shows any sign that the container is otherwise than an inspection has found it: its state, its health, its address,
and since when it runs or has ended. Where it shows none, and no event came since, that inspection still stands.
What a row says in words that we do not know is a sign.

Not promised: that every change leaves a sign. A pass inspects some of those without one all the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from eventwatch.core.facts import NO_HEALTH_CHECK, NOT_RUNNING_IP, Observation

#: Seconds by which an age may be off: that of a row was worked out somewhat before or after ours.
TOLERANCE: Final = range(-2, 3)
_UP = re.compile(r"Up ([^()]+?)(?: \((?:health: )?(starting|healthy|unhealthy)\))?")
_ENDED = re.compile(r"Exited \((-?\d+)\) (.+) ago")

_MINUTE: Final = 60
_HOUR: Final = 3600


@dataclass(frozen=True, slots=True)
class Listed:
    """A row: `state` in a word, `text` in the engine's words for people; `addresses` by the network's name.

    Texts are as the engine has them; what is missing or odd is empty.
    """

    node_id: str
    state: str = ""
    text: str = ""
    addresses: Mapping[str, str] | None = None
    name: str = ""
    image: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


def shows_no_change(row: Listed, seen: Observation, *, network: str, now: datetime) -> bool:
    """Whether nothing in this row speaks against what an inspection found; `now` is the engine's time (aware).

    Only for containers that run, and those that have ended or not begun: all others are about to change, or their
    rows do not tell their health.
    """
    if not seen.found or row.state != seen.status:
        return False
    if seen.status == "running":
        return _runs_as_before(row, seen, network=network, now=now)
    if seen.status == "created":
        return row.text == "Created"
    found = _ENDED.fullmatch(row.text) if seen.status == "exited" else None
    if found is None or seen.ending is None or str(seen.ending.exit_code) != found[1]:
        return False
    return _is_age(found[2], seen.finished_at, now)


def _runs_as_before(row: Listed, seen: Observation, *, network: str, now: datetime) -> bool:
    found = _UP.fullmatch(row.text)
    if found is None or row.addresses is None or row.addresses.keys() != set(seen.networks):
        return False
    if (found[2] or NO_HEALTH_CHECK) != seen.health or row.addresses.get(network, NOT_RUNNING_IP) != seen.ip:
        return False
    return _is_age(found[1], seen.started_at, now)


def _is_age(text: str, since: datetime | None, now: datetime) -> bool:
    if since is None:
        return False
    seconds = (now - since).total_seconds()
    return any(age_in_words(seconds + off) == text for off in TOLERANCE)


def age_in_words(seconds: float) -> str:
    """As engines tell people how long ago something was; one of the future is no age, and so the empty text."""
    whole = int(seconds)
    minutes, hours = whole // _MINUTE, int(seconds / _HOUR + 0.5)
    if seconds < 0:
        return "" if whole < TOLERANCE[0] else "Less than a second"
    for below, text in (
        (1, "Less than a second"),
        (2, "1 second"),
        (60, f"{whole} seconds"),
        (120, "About a minute"),
        (3600, f"{minutes} minutes"),
    ):
        if whole < below:
            return text
    days = hours // 24
    for limit, words in (
        (2, "About an hour"),
        (48, f"{hours} hours"),
        (24 * 14, f"{days} days"),
        (24 * 60, f"{days // 7} weeks"),
        (24 * 365 * 2, f"{days // 30} months"),
    ):
        if hours < limit:
            return words
    return f"{whole // _HOUR // 24 // 365} years"
