"""Text from outside (names, health texts, documents, errors), made harmless for a line of a terminal or a log."""

from __future__ import annotations

import unicodedata
from datetime import UTC, datetime
from pathlib import Path

#: Control, format and surrogate characters, and what separates lines and paragraphs.
_ESCAPED = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def printable(text: object, limit: int | None = None) -> str:
    r"""Write a text so that a terminal only shows it: `\x1b` and the like in place of what a terminal obeys.

    Of a text longer than `limit` characters the beginning is left, and an ellipsis.
    """
    line = text if isinstance(text, str) else str(text)
    if limit is not None and len(line) > limit:
        line = line[:limit] + "…"
    if line.isprintable():
        return line
    return "".join(_escaped(char) if unicodedata.category(char) in _ESCAPED else char for char in line)


def middle_cut(text: str, limit: int) -> str:
    """The text, or its beginning and its end with an ellipsis between: fleets' names differ at the end."""
    if len(text) <= limit:
        return text
    end = max(0, limit - 1) // 2
    return text[: max(0, limit - 1 - end)] + "…" + (text[-end:] if end else "")


def json_text(value: object) -> str:
    """What JSON has no form for, as a text: times in ISO 8601 with their offset, naive ones being UTC."""
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).isoformat()
    return str(value)


def path_of(text: str | Path) -> Path:
    """The path that a setting names, `~` and `~USER` as a shell reads them; that of an unknown user stays."""
    path = Path(text)
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def why_unreadable(error: OSError | ValueError) -> str:
    """Why a file cannot be read, without its name; ValueError is for a name that no file can have."""
    return str(getattr(error, "strerror", None) or error)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
