"""What a command prints; what is logged goes to standard error."""

from __future__ import annotations


def say(line: str) -> None:
    """Print one line of a command's output."""
    print(line, flush=True)  # noqa: T201
