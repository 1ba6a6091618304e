"""What a command prints; what is logged goes to standard error."""

from __future__ import annotations

from eventwatch.core.text import printable


def say(line: str) -> None:
    """Print one line of a command's output; one it stays, and only shown, whatever names and errors are in it."""
    print(printable(line), flush=True)  # noqa: T201
