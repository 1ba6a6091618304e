"""`python -m tests.leftovers`: remove what a test run that was killed has left on this machine.

For a machine that is CI's alone: containers that restart always, a swarm, networks and half-dead private engines
would otherwise disturb the next run. It goes by the names that the tests give, so it also ends a run that is under
way. `.ci/run` calls it; nobody else has to.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Final

from tests.kit.nodes import RUN_LABEL
from tests.kit.processes import BrokenMachineError, mounts_under, remove_cgroups, run

#: How the tests name containers, networks, projects and folders of theirs.
PREFIX: Final = "ew-"
FILTERS: Final = (f"name=^/?{PREFIX}", f"label={RUN_LABEL}")
WITHIN: Final = 120.0


def main() -> None:
    end_processes()
    if run("docker", "info", "--format", "{{.Swarm.LocalNodeState}}", check=False).stdout.strip() == "active":
        say("leaving a swarm")
        run("docker", "swarm", "leave", "--force", check=False, within=WITHIN)
    for kind, listing, removal in (
        ("container", ("ps", "-aq", "--no-trunc"), ("rm", "-f", "-v")),
        ("network", ("network", "ls", "-q", "--no-trunc"), ("network", "rm")),
        ("volume", ("volume", "ls", "-q"), ("volume", "rm", "-f")),
    ):
        for found in sorted({id_ for asked in FILTERS for id_ in listed(*listing, "--filter", asked)}):
            say(f"removing {kind} {found[:12]}")
            run("docker", *removal, found, check=False, within=WITHIN)
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        remove_folder(folder)
    for namespace in Path("/run/netns").glob("ew[0-9]*"):
        say(f"removing network namespace {namespace.name}")
        with contextlib.suppress(BrokenMachineError):
            run("ip", "netns", "delete", namespace.name)
        remove_cgroups(namespace.name)


def listed(*command: str) -> list[str]:
    ended = run("docker", *command, check=False, within=WITHIN)
    return [] if ended.code else ended.stdout.split()


def end_processes() -> None:
    """End what works in folders of the tests' own: private engines, databases, sidecars."""
    ours = f"{tempfile.gettempdir()}/{PREFIX}"
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (process / "cmdline").read_bytes().split(b"\0")
            if any(ours.encode() in argument for argument in arguments) and int(process.name) != os.getpid():
                say(f"ending process {process.name}")
                os.kill(int(process.name), signal.SIGKILL)


def remove_folder(folder: Path) -> None:
    say(f"removing {folder.name}")
    for mount in reversed(mounts_under(folder)):
        with contextlib.suppress(BrokenMachineError):
            run("umount", "--lazy", mount)
    shutil.rmtree(folder, ignore_errors=True)


def say(text: str) -> None:
    print(f"==> left by a killed test run: {text}", flush=True)  # noqa: T201 - a command


if __name__ == "__main__":
    main()
