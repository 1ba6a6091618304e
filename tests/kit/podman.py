"""A Podman that a test owns, behind its Docker-compatible socket.

Needs root and Debian 12: 4.3 is that one's package, installed when it is missing; 5.4 is Debian 13's, in a whole
Debian 13 under `.cache/engines`, since it needs its libraries. What they cannot do here is said once, in
`tests/faults/test_podman.py`.

Health checks of Podman are run by systemd, and by nobody without it: `check_health` does in its place, by the call
that systemd's timer makes.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

import aiohttp

from tests.kit.engines import CACHE
from tests.kit.images import mirror
from tests.kit.processes import SYSTEM_PATH, Process, run, system_environment
from tests.kit.rootless import RootlessEngine
from tests.kit.waiting import eventually

PodmanVersion = Literal["4.3", "5.4"]
PODMANS: Final[tuple[PodmanVersion, ...]] = ("4.3", "5.4")

PACKAGES: Final = ("podman", "containernetworking-plugins", "netavark")
#: What 5.4 needs in its Debian.
LATER: Final = "podman,netavark,aardvark-dns,crun,iptables,nftables,ca-certificates"
#: Seconds between two health checks of each container.
CHECK_INTERVAL: Final = 1.0

#: Makes a Debian the root of a program that sees the same processes, devices and temporary files. crun takes the
#: mixed cgroups of some machines for broken.
_WITHIN: Final = """
root=$1 && shift && mount --bind "$root" "$root" && mkdir -p "$root/before" || exit
for name in proc sys dev tmp; do mount --rbind "/$name" "$root/$name" || exit; done
umount "$root/sys/fs/cgroup/unified" 2>/dev/null
mount -t tmpfs run "$root/run" && cd "$root" && pivot_root . before && umount --lazy /before && exec "$@"
"""


class PrivatePodman:
    """`podman system service` with everything under one temporary folder. Entered when it answers."""

    def __init__(self, version: PodmanVersion = "4.3", *, log_size: int = 0) -> None:
        """`log_size`: bytes at which it cuts its log of events in half, instead of a million."""
        self.version = version
        self._log_size = log_size
        self.folder = Path()
        self._runtime = "runc" if version == "4.3" else "crun"
        self._service: Process | None = None

    @property
    def socket(self) -> Path:
        return self.folder / "podman.sock"

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    async def __aenter__(self) -> Self:
        within = await asyncio.to_thread(self._install)
        self.folder = Path(tempfile.mkdtemp(prefix="ew-podman-"))
        # Its defaults want more than a container like ours may have: a higher limit, systemd, cgroups version 2.
        _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
        (self.folder / "containers.conf").write_text(
            f'[containers]\ndefault_ulimits = ["nofile={files}:{files}", "nproc=4096:4096"]\n'
            + _engine_settings(self._runtime, self.folder / "events.log")
            + (f"events_logfile_max_size = {self._log_size}\n" if self._log_size else "")
        )
        self._service = Process("podman", self.folder / "log")
        self._service.spawn(
            [*within, *self._podman(), "system", "service", "--time=0", self.url],
            env=system_environment(HOME="/root"),
            orphaned="TERM",
        )
        await eventually(self.socket.exists, 20, what="podman's socket is there")
        return self

    def _install(self) -> list[str | Path]:
        """Make it available; the command that runs it where it is."""
        if self.version == "4.3":
            if shutil.which("podman", path=SYSTEM_PATH) is None:
                run("apt-get", "-qq", "update", within=300)
                run("apt-get", "-qq", "-y", "--no-install-recommends", "install", *PACKAGES, within=600)
            return []
        root = CACHE / f"podman-{self.version}"
        if not root.exists():
            if shutil.which("debootstrap", path=SYSTEM_PATH) is None:
                run("apt-get", "-qq", "update", within=300)
                run("apt-get", "-qq", "-y", "--no-install-recommends", "install", "debootstrap", within=300)
            CACHE.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="podman-", dir=CACHE) as made:
                # In a namespace of its own: it mounts a /proc, and leaves it there.
                bootstrap = ("debootstrap", "--variant=minbase", f"--include={LATER}", "trixie", f"{made}/root")
                run("unshare", "--mount", *bootstrap, mirror(), within=600)
                with contextlib.suppress(OSError):  # another test run may have been as quick
                    Path(made, "root").rename(root)
        return ["unshare", "--mount", "--propagation", "private", "sh", "-c", _WITHIN, "sh", root]

    def _podman(self) -> list[str]:
        # The runtime again: what the configuration names is not believed by every command of 4.3. It leaves files
        # where it works.
        return [
            *("env", f"--chdir={self.folder}", f"CONTAINERS_CONF={self.folder}/containers.conf"),
            *("podman", "--runtime", self._runtime),
            *("--root", f"{self.folder}/root", "--runroot", f"{self.folder}/run"),
        ]

    def run(self, *command: str) -> str:
        """Run one of podman's own commands."""
        assert self._service is not None
        there = ("nsenter", f"--target={self._service.pid}", "--mount", "--root") if self.version != "4.3" else ()
        return run(*there, *self._podman(), *command).stdout

    async def probe(self, container: str) -> None:
        """Run a container's health check once."""
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(self.socket))) as session:
            await _check(session, container)

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


class RootlessPodman(RootlessEngine):
    """Podman 4.3 of an ordinary user. Entered when it answers."""

    @property
    def socket(self) -> Path:
        return self.folder / "run" / "podman.sock"

    def _command(self) -> list[str]:
        settings = self.folder / "home" / "containers.conf"
        settings.write_text(_engine_settings("runc", self.folder / "home" / "events.log"))
        return [
            *("env", f"CONTAINERS_CONF={settings}", "podman", "--storage-driver", "vfs"),
            *("system", "service", "--time=0", self.url),
        ]


async def check_health(path: Path) -> None:
    """Run the health checks of all containers that run, again and again, until it is cancelled."""
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session:
        while True:
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get("http://podman/v1.41/containers/json") as answer:
                    rows: list[dict[str, Any]] = await answer.json()
                await asyncio.gather(*(_check(session, row["Id"]) for row in rows))
            await asyncio.sleep(CHECK_INTERVAL)


async def _check(session: aiohttp.ClientSession, container: str) -> None:
    with contextlib.suppress(aiohttp.ClientError):
        # What has no health check, or is gone, is an answer as well.
        await session.get(f"http://podman/v4.0.0/libpod/containers/{container}/healthcheck")


def _engine_settings(runtime: str, log: Path) -> str:
    # Its log of events is one for all of a user, by default.
    return (
        f'[engine]\nruntime = "{runtime}"\ncgroup_manager = "cgroupfs"\n'
        f'events_logger = "file"\nevents_logfile_path = "{log}"\n'
    )
