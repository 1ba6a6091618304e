"""Docker engines that a test owns and may break.

`PrivateEngine` is a dockerd of a chosen version beside whatever else runs on the machine: everything of it lies
under one temporary folder; network namespace, addresses, cgroups and identity are its own. It survives any order
of `kill`, `freeze`, `thaw` and `start`, and leaves nothing behind.

Needs root and Debian: other engine versions than the installed one come from Debian's later suites, over the
package sources that the machine already uses, into `.cache/engines`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import tempfile
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

from tests.kit.certificates import make_certificates
from tests.kit.debian import unpack_packages
from tests.kit.processes import (
    ROOT,
    SYSTEM_PATH,
    BrokenMachineError,
    Process,
    children_of,
    mounts_under,
    parent_of,
    processes_under,
    remove_cgroups,
    run,
    send,
    system_environment,
)
from tests.kit.waiting import eventually

Version = Literal["20.10", "26.1", "28.5"]

CACHE: Final = ROOT / ".cache" / "engines"
INSTALLED: Final = "20.10"
#: Debian's suite that has each engine.
SUITES: Final = {"26.1": "trixie", "28.5": "forky"}
VERSIONS: Final[tuple[Version, ...]] = ("20.10", "26.1", "28.5")
START_TIMEOUT: Final = 60.0
STOP_TIMEOUT: Final = 20.0


# -- engine versions --------------------------------------------------------------------------------------


def engine_path(version: Version) -> str:
    """The PATH on which this version's dockerd comes first; fetches it when it is not in the cache."""
    if version == INSTALLED:
        return SYSTEM_PATH
    folder = CACHE / version
    # Without their runc, which needs a newer libc: the installed one serves all versions.
    unpack_packages(folder, SUITES[version], "docker.io", "docker-cli", "containerd")
    return f"{folder}/usr/sbin:{folder}/usr/bin:{SYSTEM_PATH}"


# -- the engine -------------------------------------------------------------------------------------------


class PrivateEngine:
    """A dockerd of the test's own. Entered when it answers; `url` stays the same over restarts.

    `remote`: it listens on `remote_url` too, over TLS for clients that have the certificates of `certificates`.
    """

    def __init__(self, version: Version = INSTALLED, *, remote: bool = False) -> None:
        self.version = version
        self.folder = Path()
        self._remote = remote
        self._octet = 0
        self._daemon: Process | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    @property
    def socket(self) -> Path:
        return self.folder / "run" / "docker.sock"

    @property
    def remote_address(self) -> str:
        return f"10.{self._octet}.254.2"

    @property
    def remote_url(self) -> str:
        return f"tcp://{self.remote_address}:2376"

    @property
    def certificates(self) -> Path:
        return self.folder / "certificates"

    @property
    def pid(self) -> int:
        """The dockerd's."""
        return self.daemon.pid

    @property
    def running(self) -> bool:
        return self.daemon.running

    @property
    def daemon(self) -> Process:
        if self._daemon is None:
            raise BrokenMachineError("the engine is not entered")
        return self._daemon

    async def __aenter__(self) -> Self:
        if os.geteuid() != 0:
            raise BrokenMachineError("a private engine needs root")
        path = engine_path(self.version)
        if shutil.which("dockerd", path=path) is None:
            raise BrokenMachineError("no dockerd on this machine: run .ci/engine")
        self.folder = Path(tempfile.mkdtemp(prefix="ew-engine-"))
        try:
            self._claim_network()
            (self.folder / "run").mkdir()
            self._daemon = Process(f"dockerd {self.version}", self.folder / "dockerd.log")
            self._write_identity(uuid.uuid4())
            if self._remote:
                self._connect_network()
                self.certificates.mkdir()
                make_certificates(self.certificates, self.remote_address)
            await self.start()
        except BaseException:
            await self._clean_up()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._clean_up()

    def _claim_network(self) -> None:
        # A network namespace of its own: a dockerd that starts again removes the docker0 of whoever else has one.
        # Creating it is the claim: two test runs at once get different names, and so different addresses.
        for octet in random.sample(range(101, 255), 40):
            with contextlib.suppress(BrokenMachineError):
                run("ip", "netns", "add", f"ew{octet}")
                self._octet = octet
                run("ip", "-netns", self._name, "link", "set", "lo", "up")
                return
        raise BrokenMachineError("cannot create a network namespace")

    def _connect_network(self) -> None:
        # The cable goes with the namespace when that is deleted.
        ends = (f"{self._name}-h", f"{self._name}-n")
        run("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1], "netns", self._name)
        run("ip", "address", "add", f"10.{self._octet}.254.1/24", "dev", ends[0])
        run("ip", "link", "set", ends[0], "up")
        run("ip", "-netns", self._name, "address", "add", f"{self.remote_address}/24", "dev", ends[1])
        run("ip", "-netns", self._name, "link", "set", ends[1], "up")

    def _write_identity(self, identity: uuid.UUID) -> None:
        # By default an engine of 20.10 takes its id from a file that all engines of a machine share.
        config: dict[str, Any] = {}
        if self.version == INSTALLED:
            config["deprecated-key-path"] = str(self.folder / f"key-{identity}.json")
        else:
            (self.folder / "data").mkdir(exist_ok=True)
            (self.folder / "data" / "engine-id").write_text(str(identity))
        (self.folder / "daemon.json").write_text(json.dumps(config))

    @property
    def _name(self) -> str:
        return f"ew{self._octet}"

    def _command(self) -> list[str]:
        folder, name = self.folder, self._name
        remote = (
            f"--host={self.remote_url}",
            "--tlsverify",
            f"--tlscacert={self.certificates}/ca.pem",
            f"--tlscert={self.certificates}/server.crt",
            f"--tlskey={self.certificates}/server.key",
        )
        return [
            *("nsenter", f"--net=/run/netns/{name}", "dockerd"),
            f"--config-file={folder}/daemon.json",
            f"--data-root={folder}/data",
            f"--exec-root={folder}/exec",
            f"--pidfile={folder}/run/docker.pid",
            f"--host={self.url}",
            f"--bip=10.{self._octet}.255.1/24",
            f"--default-address-pool=base=10.{self._octet}.0.0/16,size=24",
            f"--cgroup-parent=/{name}",
            f"--containerd-namespace={name}",
            f"--containerd-plugins-namespace={name}-plugins",
            "--iptables=false",
            "--ip6tables=false",
            "--ip-forward=false",
            "--ip-masq=false",
            "--userland-proxy=false",
            "--shutdown-timeout=5",
            *(remote if self._remote else ()),
        ]

    # -- what may be done to it ------------------------------------------------------------------------

    async def start(self) -> None:
        """Start it, on whatever data there is, and wait until it answers."""
        await self.spawn()
        await self.wait_ready()

    async def spawn(self) -> None:
        """Start it without waiting for an answer."""
        self.socket.unlink(missing_ok=True)
        (self.folder / "run" / "docker.pid").unlink(missing_ok=True)
        # A containerd that outlived a killed dockerd holds the data's lock; the containers live on without it.
        await end_processes(self.folder, "containerd --config")
        # Where nobody reaps orphans, dockerd would take the zombie for a living containerd and wait for it.
        (self.folder / "exec" / "containerd" / "containerd.pid").unlink(missing_ok=True)
        self.daemon.spawn(self._command(), env=system_environment(PATH=engine_path(self.version)), orphaned="TERM")

    async def wait_ready(self) -> None:
        await eventually(
            lambda: answers(self.socket),
            START_TIMEOUT,
            what=lambda: f"{self.daemon.name} answers\n{self.daemon.tail()}",
            instead=lambda: "" if self.running else f"{self.daemon.name} did not start:\n{self.daemon.tail()}",
        )

    async def stop(self) -> None:
        """SIGTERM: it stops its containers and ends."""
        await self.daemon.end(within=STOP_TIMEOUT)

    async def kill(self) -> None:
        """SIGKILL: the containers stay."""
        await self.daemon.kill()

    def freeze(self) -> None:
        """SIGSTOP: connections stay open, nothing answers."""
        self.daemon.freeze()

    def thaw(self) -> None:
        self.daemon.thaw()

    def kill_container_process(self, pid: int) -> None:
        """SIGKILL a container's first process from outside, behind the engine's back."""
        if str(self.folder) not in Path(f"/proc/{parent_of(pid)}/cmdline").read_text():
            raise BrokenMachineError(f"process {pid} is no container of this engine")
        send(pid, signal.SIGKILL)

    async def wipe(self, *, new_identity: bool = False) -> None:
        """End it and remove all that it knows, as a lost disk would; with `new_identity` it is another engine."""
        identity = self.folder / "data" / "engine-id"
        kept = None if new_identity or not identity.exists() else uuid.UUID(identity.read_text())
        await self._remove_remains()
        await asyncio.to_thread(shutil.rmtree, self.folder / "data", ignore_errors=True)
        if new_identity:
            self._write_identity(uuid.uuid4())
        elif kept:
            self._write_identity(kept)

    def forget_identity(self) -> None:
        """Give it another id at its next start; what it knows of containers stays."""
        self._write_identity(uuid.uuid4())

    async def become_twin_of(self, other: PrivateEngine) -> None:
        """Start again with the other's id, as an engine on a cloned machine does."""
        await self.stop()
        (self.folder / "data" / "engine-id").write_text((other.folder / "data" / "engine-id").read_text())
        await self.start()

    # -- cleaning up -----------------------------------------------------------------------------------

    async def _clean_up(self) -> None:
        if self._daemon is not None:
            self.thaw()
        await self._remove_remains()
        if self._octet:
            with contextlib.suppress(BrokenMachineError):
                run("ip", "netns", "delete", self._name)
        await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)

    async def _remove_remains(self) -> None:
        if self._daemon is not None:
            await self._daemon.end()
        await end_processes(self.folder, "containerd-shim", with_children=True)
        await end_processes(self.folder)
        for mount in reversed(mounts_under(self.folder)):
            with contextlib.suppress(BrokenMachineError):
                run("umount", "--lazy", mount)
        remove_cgroups(self._name)


async def end_processes(folder: Path, kind: str = "", *, with_children: bool = False) -> None:
    """End what an engine has left, with paths in its own folder; `kind` is a part of the command."""
    ours = [pid for pid, command in processes_under(folder).items() if kind in command]
    if with_children:
        # The shim's children are the containers' first processes; with them all of a container ends.
        for pid in ours:
            for child in children_of(pid):
                send(child, signal.SIGKILL)
    for pid in ours:
        send(pid, signal.SIGKILL)
    await eventually(lambda: not processes_under(folder).keys() & set(ours), STOP_TIMEOUT, what="processes end")


def answers(path: Path) -> bool:
    """Whether an engine answers at this socket."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(0.5)
        client.connect(str(path))
        client.sendall(b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n")
        return b"200" in client.recv(15)
    return False
