"""What an engine cannot do, so that a test which needs it is skipped there, with the reason, and nowhere else.

Contract: a test says what it needs by `@pytest.mark.needs("cgroups")`, in the words of `REASONS`. Which engine it
runs on, `tests.run_on_engines` says by `EVENTWATCH_TEST_ENGINE`; without that it is a Docker of root, which lacks
nothing.
Here is only what the engine itself, or this machine with it, does not have: a fault of ours is no lack.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Final

from tests.kit.engines import VERSIONS

ENGINE_VARIABLE: Final = "EVENTWATCH_TEST_ENGINE"
ROOTLESS: Final = "rootless"
PODMAN: Final = "podman"
PODMAN_ROOTLESS: Final = "podman-rootless"

REASONS: Final[Mapping[str, str]] = {
    "cgroups": "without cgroups 2, a rootless engine has no pauses, no limits of memory and no usage",
    "told-connect": "Podman tells of no connection before a start",
    "used-addresses": "Podman gives a container the next address, not the lowest free one",
    "restarting": "Podman starts a container again at once: none is ever restarting",
    "reach": "the nodes of this engine are in a network namespace that is not the tests'",
    "update": "Podman 4.3 cannot update a container by Docker's API",
}
#: Needs that an engine does not meet, by the beginning of its name.
_UNMET: Final[Mapping[str, Collection[str]]] = {
    **{version: {"reach"} for version in VERSIONS},
    ROOTLESS: {"cgroups", "reach"},
    PODMAN: {"told-connect", "used-addresses", "restarting"},
    "podman-4.3": {"update"},
    PODMAN_ROOTLESS: {"cgroups", "reach", "update"},
}
#: Events that Podman does not tell of what happens to a container.
_UNTOLD: Final[Mapping[str, Collection[str]]] = {
    "stop": {"kill", "stop", "disconnect"},
    "own-exit": {"disconnect"},
    "kill": {"disconnect"},
    "restart": {"stop", "connect"},
    "oom": {"oom"},
}


def engine() -> str:
    """The engine's name as `tests.run_on_engines` has it; nothing for the installed Docker."""
    return os.environ.get(ENGINE_VARIABLE, "")


def why_not(needs: Collection[str]) -> str:
    """Why this engine cannot run a test that needs this; nothing when it can."""
    unmet = [need for name, lacking in _UNMET.items() if engine().startswith(name) for need in lacking]
    return "; ".join(REASONS[need] for need in needs if need in unmet)


def told(happening: str, actions: Collection[str]) -> set[str]:
    """Those of the events of a happening of which this engine tells."""
    return set(actions) - set(_UNTOLD.get(happening, ()) if engine().startswith(PODMAN) else ())
