"""The watcher of this process, for calls that are made beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from eventwatch.calls.changes import Changes
from eventwatch.engine.protocol import Engine
from eventwatch.pipeline.sweeper import Sweeper
from eventwatch.settings.model import Settings


@dataclass(frozen=True, slots=True)
class Here:
    """What a running watcher lends: its settings, its engine, its changes, and which nodes it keeps true now.

    `sweeper` gives the one that runs: there is none on a standby and between two terms. `idle_timeout` tells after
    how many seconds a node is idle, as far as it knows; 0 or infinite: never.
    """

    settings: Settings
    engine: Engine
    changes: Changes
    sweeper: Callable[[], Sweeper | None]
    keeps: Callable[[str], bool]
    idle_timeout: Callable[[str], float]


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
