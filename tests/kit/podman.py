"""A Podman that a test owns, behind its Docker-compatible socket.

Needs root and Debian; installs Debian's package when it is missing. What it cannot do here is said once, in
`tests/faults/test_podman.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.kit.processes import SYSTEM_PATH, Process, run, system_environment
from tests.kit.waiting import eventually

PACKAGES: Final = ("podman", "containernetworking-plugins", "netavark")


class PrivatePodman:
    """`podman system service` with everything under one temporary folder. Entered when it answers."""

    def __init__(self) -> None:
        self.folder = Path()
        self._service: Process | None = None

    @property
    def socket(self) -> Path:
        return self.folder / "podman.sock"

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    async def __aenter__(self) -> Self:
        if shutil.which("podman", path=SYSTEM_PATH) is None:
            run("apt-get", "-qq", "update", within=300)
            run("apt-get", "-qq", "-y", "--no-install-recommends", "install", *PACKAGES, within=600)
        self.folder = Path(tempfile.mkdtemp(prefix="ew-podman-"))
        # Its defaults want more than a container like ours may have: a higher limit, systemd, cgroups version 2.
        _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
        (self.folder / "containers.conf").write_text(
            f'[containers]\ndefault_ulimits = ["nofile={files}:{files}", "nproc=4096:4096"]\n'
            '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
        )
        self._service = Process("podman", self.folder / "log")
        self._service.spawn(
            [*self._podman(), "system", "service", "--time=0", self.url], env=system_environment(), orphaned="TERM"
        )
        await eventually(self.socket.exists, 20, what="podman's socket is there")
        return self

    def _podman(self) -> list[str]:
        # The runtime again: what the configuration names is not believed by every command of 4.3.
        return [
            *("env", f"CONTAINERS_CONF={self.folder}/containers.conf", "podman", "--runtime", "runc"),
            *("--root", f"{self.folder}/root", "--runroot", f"{self.folder}/run"),
        ]

    def run(self, *command: str) -> str:
        """Run one of podman's own commands."""
        return run(*self._podman(), *command).stdout

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(RuntimeError):
            await asyncio.to_thread(self.run, "rm", "--all", "--force", "--time", "0")
            await asyncio.to_thread(self.run, "network", "prune", "--force")
        assert self._service is not None
        await self._service.end()
        with contextlib.suppress(RuntimeError):
            run("umount", "--lazy", f"{self.folder}/root/overlay")
        await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)
