"""The installed version."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def eventwatch_version() -> str:
    """As installed; `unknown` when run from a tree that is not."""
    try:
        return version("eventwatch")
    except PackageNotFoundError:
        return "unknown"
