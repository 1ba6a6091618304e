"""An ssh server of a test's own on loopback, and an `ssh` that knows it; OpenSSH's, of Debian where it is missing.

Who logs in is root, with a key of the test's; nothing of the machine's own ssh is read or changed, save that the
folder `/run/sshd` is made, as the server insists. Needs root.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.conftest import why_unreachable
from tests.kit.debian import unpack_packages
from tests.kit.engines import CACHE
from tests.kit.mongod import free_port
from tests.kit.processes import SYSTEM_PATH, Process, children_of, run, send, system_environment
from tests.kit.waiting import eventually

PACKAGES: Final = ("openssh-server", "libwrap0")


class PrivateSshd:
    """Entered when it listens. `variables` are set in each session, as a far user's environment would be."""

    def __init__(self, **variables: str) -> None:
        self.folder = Path()
        self.port = free_port()
        self._variables = variables
        self._server = Process("sshd")

    @property
    def url(self) -> str:
        return f"ssh://root@127.0.0.1:{self.port}"

    @property
    def path(self) -> str:
        """A PATH with an `ssh` that has the key, and knows this server."""
        return f"{self.folder}/bin:{os.environ['PATH']}:{SYSTEM_PATH}"

    @property
    def known_hosts(self) -> Path:
        return self.folder / "known_hosts"

    @property
    def authorized_keys(self) -> Path:
        return self.folder / "authorized_keys"

    async def __aenter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="ew-ssh-"))
        self._write_keys(self.folder)
        await self.start()
        return self

    def _write_keys(self, folder: Path) -> None:
        for name in ("host", "user"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name)
        shutil.copy(folder / "user.pub", self.authorized_keys)
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {(folder / 'host.pub').read_text()}")
        (folder / "config").write_text(
            f"Host *\nIdentityFile {folder}/user\nIdentitiesOnly yes\nIdentityAgent none\n"
            f"UserKnownHostsFile {self.known_hosts}\nGlobalKnownHostsFile none\nStrictHostKeyChecking yes\n"
        )
        wrapper = folder / "bin" / "ssh"
        wrapper.parent.mkdir()
        # OpenSSH looks for its user's settings in the home on record, wherever HOME points.
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/config "$@"\n')
        wrapper.chmod(0o755)
        (folder / "passwd").write_text(
            Path("/etc/passwd").read_text() + "sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin\n"
        )

    def _write_settings(self) -> None:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        variables = " ".join(f'"{name}={value}"' for name, value in self._variables.items())
        (self.folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.folder}/host\nPidFile none\nUsePAM no\n"
            f"AuthorizedKeysFile {self.authorized_keys}\nStrictModes no\nPasswordAuthentication no\n"
            f"PermitRootLogin yes\n{f'SetEnv {variables}' if variables else ''}\n"
        )

    async def start(self, **variables: str) -> None:
        """Listen, on the same port as before; `variables` are added to those of the sessions to come."""
        self._variables |= variables
        self._write_settings()
        installed, unpacked = shutil.which("sshd", path=SYSTEM_PATH), CACHE / "sshd"
        if installed is None:
            unpack_packages(unpacked, "bookworm", *PACKAGES)
        script = 'mount --bind "$1" /etc/passwd && shift && exec "$@"'
        daemon = [installed or unpacked / "usr/sbin/sshd", "-D", "-e", "-f", self.folder / "sshd_config"]
        self._server.spawn(
            ["unshare", "--mount", "sh", "-c", script, "sh", self.folder / "passwd", *daemon],
            env=system_environment(LD_LIBRARY_PATH=f"{unpacked}/usr/lib/x86_64-linux-gnu"),
        )
        await eventually(
            lambda: not why_unreachable(f"tcp://127.0.0.1:{self.port}"),
            what=lambda: f"sshd listens\n{self._server.tail()}",
        )

    async def stop(self) -> None:
        """End the server and, as when a line is cut, all of its sessions."""
        sessions = children_of(self._server.pid)
        await self._server.kill()
        for session in sessions:
            send(session, signal.SIGKILL)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        shutil.rmtree(self.folder, ignore_errors=True)
