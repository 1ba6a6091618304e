"""The watcher of this process, for calls that are made beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from eventwatch.calls.changes import Changes
from eventwatch.engine import Engine
from eventwatch.settings import Settings


@dataclass(frozen=True, slots=True)
class Here:
    """What a running watcher lends: its settings, its engine, its changes, and which nodes it keeps true now."""

    settings: Settings
    engine: Engine
    changes: Changes
    keeps: Callable[[str], bool]


_here: Here | None = None


def enter(here: Here) -> None:
    """Name the watcher of this process."""
    global _here  # noqa: PLW0603 - one watcher per process, as Beanie's documents are bound once per process
    _here = here


def leave(here: Here) -> None:
    """Say that it ended."""
    global _here  # noqa: PLW0603
    if _here is here:
        _here = None


def get_here() -> Here | None:
    """The watcher of this process, if one runs."""
    return _here
