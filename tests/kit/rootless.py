"""A rootless Docker engine that a test owns: the installed dockerd under rootlesskit, as a user of its own.

Everything of it lies under one temporary folder; the user is known only in a mount namespace of its own, so that
nothing of the machine's `/etc` changes. rootlesskit, slirp4netns and newuidmap come from Debian's packages,
unpacked into `.cache/engines`. They have no cgroups where the machine has version 1 of them, and so no limits.

Needs root and Debian 12, and a kernel that allows user namespaces.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.kit.debian import unpack_packages
from tests.kit.engines import CACHE, START_TIMEOUT, answers, end_processes
from tests.kit.processes import SYSTEM_PATH, Process, system_environment
from tests.kit.waiting import eventually

PACKAGES: Final = ("rootlesskit", "slirp4netns", "uidmap", "libslirp0", "libsubid4")
#: That of Debian's docker.io.
SCRIPT: Final = "/usr/share/docker.io/contrib/dockerd-rootless.sh"
USER: Final = 4242
#: Runs a command as the user; the folder comes first. The network's device is only root's on some machines.
_NAMESPACE: Final = f"""
folder=$1 && shift
for name in passwd group subuid subgid; do mount --bind "$folder/etc/$name" "/etc/$name" || exit; done
umount /sys/fs/cgroup/unified 2>/dev/null
mknod -m 666 "$folder/tun" c 10 200 && mount --bind "$folder/tun" /dev/net/tun || exit
mount --make-rshared /
cd "$folder/home" && exec setpriv --pdeathsig TERM --reuid {USER} --regid {USER} --clear-groups env -i \
    HOME="$folder/home" XDG_RUNTIME_DIR="$folder/run" LD_LIBRARY_PATH="$folder/lib" \
    PATH="$folder/bin:{SYSTEM_PATH}" "$@"
"""


class RootlessEngine:
    """Entered when it answers."""

    def __init__(self) -> None:
        self.folder = Path()
        self._daemon = Process("rootless engine")

    @property
    def socket(self) -> Path:
        """Where the `docker` command finds it by the context `rootless`: in its user's `XDG_RUNTIME_DIR`."""
        return self.folder / "run" / "docker.sock"

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    async def __aenter__(self) -> Self:
        unpack_packages(CACHE / "rootless", "bookworm", *PACKAGES)
        self.folder = Path(tempfile.mkdtemp(prefix="ew-rootless-"))
        self._lay_out(self.folder, CACHE / "rootless" / "usr")
        self._daemon.spawn(
            [
                *("unshare", "--mount", "--propagation", "private", "sh", "-c", _NAMESPACE, "sh", self.folder),
                *self._command(),
            ],
            env=system_environment(),
            orphaned="TERM",
        )
        try:
            await eventually(
                lambda: answers(self.socket),
                START_TIMEOUT,
                what=lambda: f"the rootless engine answers\n{self._daemon.tail()}",
            )
        except BaseException:
            await self._clean_up()
            raise
        return self

    def _command(self) -> list[str]:
        without = ("SANDBOX", "SECCOMP")
        return [
            *("env", *(f"DOCKERD_ROOTLESS_ROOTLESSKIT_SLIRP4NETNS_{name}=false" for name in without)),
            *("sh", SCRIPT, "--iptables=false", "--storage-driver=vfs"),
        ]

    @staticmethod
    def _lay_out(folder: Path, programs: Path) -> None:
        folder.chmod(0o711)
        for name in ("home", "run"):
            (folder / name).mkdir(mode=0o700)
            shutil.chown(folder / name, USER, USER)
        (folder / "etc").mkdir()
        user = f"ewless:x:{USER}:{USER}::{folder}/home:/bin/sh\n"
        (folder / "etc/passwd").write_text(Path("/etc/passwd").read_text() + user)
        (folder / "etc/group").write_text(Path("/etc/group").read_text() + f"ewless:x:{USER}:\n")
        for name in ("subuid", "subgid"):
            (folder / "etc" / name).write_text("ewless:300000:65536\n")
        shutil.copytree(programs / "bin", folder / "bin")
        shutil.copytree(programs / "lib/x86_64-linux-gnu", folder / "lib")
        for name in ("newuidmap", "newgidmap"):
            (folder / "bin" / name).chmod(0o4755)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._clean_up()

    async def _clean_up(self) -> None:
        await self._daemon.end()
        self._daemon.close()
        await end_processes(self.folder, with_children=True)
        await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)
