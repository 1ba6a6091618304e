"""Durations as people write them: `90s`, `250ms`, `30m`, `1h30m`, or a number of seconds.

Contract: what `format_duration` writes, `parse_duration` reads as the same number. `about` is for people only.
"""

from __future__ import annotations

import math
import re
from datetime import timedelta
from decimal import Decimal

_UNITS = {"d": Decimal(86400), "h": Decimal(3600), "m": Decimal(60), "s": Decimal(1), "ms": Decimal("0.001")}
_DURATION = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*(ms|s|m|h|d)?\s*", re.ASCII)
#: Several units, the largest first, each once.
_COMPOUND = re.compile(
    r"\s*(?:(\d+)d\s*)?(?:(\d+)h\s*)?(?:(\d+)m(?!s)\s*)?(?:(\d+)s\s*)?(?:(\d+)ms\s*)?", re.ASCII
)
_DURATION_FORMS = "must be seconds or a duration such as 90, 90s, 250ms, 30m, 1h30m or 1d"
_LONGEST = 3650 * 86400.0  # dates and timers overflow not far beyond


class TooLongError(ValueError):
    """A duration, but longer than any that is accepted."""


def parse_duration(value: object) -> float:
    """Seconds from a number, a timedelta or a text such as `90s`; ValueError says which forms are accepted."""
    seconds = _seconds(value)
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        raise ValueError(_DURATION_FORMS)
    if seconds > _LONGEST:
        raise TooLongError(f"must be at most {format_duration(_LONGEST)}")
    return seconds


def format_duration(seconds: float) -> str:
    """Write a duration in the largest unit that divides it; `parse_duration` gives back the same number."""
    exact = Decimal(repr(float(seconds)))
    if not exact:
        return "0s"
    for unit, size in _UNITS.items():
        if exact % size == 0:
            return f"{int(exact / size)}{unit}"
    return f"{(exact / _UNITS['ms']).normalize():f}ms"


def about(seconds: float) -> str:
    """A duration for people, in its two largest units: `2d 3h`, `31m 2s`, `4s`, `250ms`; `never` if infinite."""
    if math.isinf(seconds):
        return "never"
    if seconds < 1:
        return f"{max(0.0, seconds) * 1000:.0f}ms"
    left = round(seconds)
    told: list[str] = []
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or told:
            told.append(f"{count}{unit}")
    return " ".join(part for part in told[:2] if not part.startswith("0"))


def _seconds(value: object) -> float | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, str) and value.strip() and (compound := _COMPOUND.fullmatch(value)):
        return float(sum(int(n) * size for n, size in zip(compound.groups(), _UNITS.values(), strict=True) if n))
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return None
    return float(Decimal(match[1]) * _UNITS[match[2] or "s"])
