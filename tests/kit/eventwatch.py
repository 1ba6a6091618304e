"""eventwatch, or another Python program of the tree, as a process of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.kit.processes import ROOT, Process, our_environment


class Eventwatch(Process):
    """`eventwatch run` with these settings (by the names of `Settings`), which may be killed and started again.

    `code` is the folder that holds the package: this tree, or another version.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, str], *, name: str = "eventwatch", code: Path = ROOT
    ) -> None:
        super().__init__(name, folder / f"{name}.log")
        self._code = str(code)
        self._folder = folder
        self._settings = settings

    def start(self, *, within: Sequence[str] = (), **settings: str) -> None:
        """Start it; `within` is a command that runs it, `settings` come on top of its own."""
        self.spawn(
            [*within, sys.executable, "-m", "eventwatch", "run"],
            env=our_environment(
                PYTHONWARNINGS="default", PYTHONPATH=self._code, **variables({**self._settings, **settings})
            ),
            cwd=self._folder,
        )


def variables(settings: Mapping[str, str]) -> dict[str, str]:
    """The settings as the environment has them."""
    return {f"EVENTWATCH_{name.upper()}": value for name, value in settings.items()}


def program(
    *arguments: str | Path, env: Mapping[str, str], cwd: Path, prefix: tuple[str | Path, ...] = ()
) -> Process:
    """Run Python with these arguments, this environment and no other; the tree can be imported from any folder."""
    base = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return started(*prefix, sys.executable, *arguments, env=base | dict(env), cwd=cwd)


def started(*command: str | Path, env: Mapping[str, str], cwd: Path) -> Process:
    """Run a command; to be used as a context, which ends it."""
    return Process(Path(command[0]).name).spawn(command, env=env, cwd=cwd)


async def run_program(
    *arguments: str | Path, env: Mapping[str, str], cwd: Path, prefix: tuple[str | Path, ...] = ()
) -> tuple[int, str]:
    """Run Python to its end; the exit code and all output."""
    async with program(*arguments, env=env, cwd=cwd, prefix=prefix) as running:
        code = await running.ends()
        return code, running.output
