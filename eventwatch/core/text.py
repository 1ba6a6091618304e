"""Text from outside (names, health texts, documents, errors), made harmless for a line of a terminal or a log."""

from __future__ import annotations

import unicodedata
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
