"""Docker engines and MongoDB servers that a test owns and may break.

`PrivateEngine` is a dockerd of a chosen version beside whatever else runs on the machine: everything of it lies
under one temporary folder; network namespace, addresses, cgroups and identity are its own. `PrivateMongo` is a
mongod, or a replica set of three. Both survive any order of `kill`, `freeze`, `thaw` and `start`, and leave
nothing behind.

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
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

from pymongo import AsyncMongoClient
from pymongo.errors import AutoReconnect, PyMongoError

from tests.certificates import make_certificates
from tests.conftest import find_mongod, free_port
from tests.nodes import SLOW

Version = Literal["20.10", "26.1", "28.5"]

CACHE: Final = Path(__file__).resolve().parent.parent / ".cache" / "engines"
INSTALLED: Final = "20.10"
#: Debian's suite that has each engine.
SUITES: Final = {"26.1": "trixie", "28.5": "forky"}
VERSIONS: Final[tuple[Version, ...]] = ("20.10", "26.1", "28.5")
START_TIMEOUT: Final = 60.0
STOP_TIMEOUT: Final = 20.0
SYSTEM_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class BrokenMachineError(RuntimeError):
    """The machine cannot run what the test needs; a test never skips for it."""


def run(*command: str, cwd: Path | None = None) -> str:
    """Run a system command to its end and return what it printed; raises with its last line."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PATH": SYSTEM_PATH, "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise BrokenMachineError(f"{' '.join(command)}: {last[0]}")
    return done.stdout


# -- engine versions --------------------------------------------------------------------------------------


def engine_path(version: Version) -> str:
    """The PATH on which this version's dockerd comes first; fetches it when it is not in the cache."""
    if version == INSTALLED:
        return SYSTEM_PATH
    folder = CACHE / version
    # Without their runc, which needs a newer libc: the installed one serves all versions.
    unpack_packages(folder, SUITES[version], "docker.io", "docker-cli", "containerd")
    return f"{folder}/usr/sbin:{folder}/usr/bin:{SYSTEM_PATH}"


def unpack_packages(folder: Path, suite: str, *packages: str) -> None:
    """Download packages of a Debian suite, beside the system's package lists, not into them; unless it is done."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent) as temporary:
        work = Path(temporary)
        (work / "debian.sources").write_text(sources_of_suite(suite))
        for name in ("lists/partial", "archives/partial"):
            (work / name).mkdir(parents=True)
        options = {
            "Dir::Etc::sourcelist": work / "debian.sources",
            "Dir::Etc::sourceparts": "-",
            "Dir::State::Lists": work / "lists",
            "Dir::Cache": work,
            "APT::Sandbox::User": "root",
            "Acquire::Retries": "3",
        }
        apt = ["apt-get", "-qq", *(part for name, value in options.items() for part in ("-o", f"{name}={value}"))]
        run(*apt, "update")
        run(*apt, "download", *packages, cwd=work)
        for package in work.glob("*.deb"):
            run("dpkg", "-x", str(package), str(work / "root"))
        # Another test run may have been as quick.
        with contextlib.suppress(OSError):
            (work / "root").rename(folder)


def sources_of_suite(suite: str) -> str:
    """The machine's own package source of its release, with only the suite changed."""
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)[
        "VERSION_CODENAME"
    ].strip('"')
    for path in sorted(Path("/etc/apt").glob("sources.list.d/*.sources")):
        for stanza in path.read_text().split("\n\n"):
            lines = [line for line in stanza.splitlines() if line.strip() and not line.startswith("#")]
            suites = next((line for line in lines if line.lower().startswith("suites:")), "")
            if release in suites.split():
                return "\n".join(f"Suites: {suite}" if line == suites else line for line in lines) + "\n"
    raise BrokenMachineError(f"no deb822 source of {release} in /etc/apt/sources.list.d: this is no Debian 12")


# -- processes --------------------------------------------------------------------------------------------


def processes_under(folder: Path) -> dict[int, str]:
    """Pid and command line of every process that was started with a path in `folder`."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if f"{folder}/" in command:
                    found[int(entry.name)] = command
    return found


def children_of(pid: int) -> list[int]:
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            children += [int(child) for child in task.read_text().split()]
    return children


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


async def until(done: Callable[[], bool], within: float, what: str) -> None:
    """Poll until `done`; raises BrokenMachineError naming `what` when it takes too long."""
    deadline = time.monotonic() + within * SLOW
    while not done():
        if time.monotonic() > deadline:
            raise BrokenMachineError(f"{what}: not within {within:.0f} s")
        await asyncio.sleep(0.02)


class Daemon:
    """One process with a log, that may be killed, frozen and started again."""

    def __init__(self, name: str, log: Path) -> None:
        self.name = name
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        if self._process is None:
            raise BrokenMachineError(f"{self.name} was never started")
        return self._process.pid

    def spawn(self, command: Sequence[str | Path], path: str = SYSTEM_PATH) -> None:
        if self.running:
            raise BrokenMachineError(f"{self.name} runs already")
        with self.log.open("ab") as output:
            # It must not outlive a test run that was killed: the kernel ends it when its parent has ended.
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "PATH": path},
                start_new_session=True,
            )

    def send(self, number: signal.Signals) -> None:
        if self._process is not None and self.running:
            self._process.send_signal(number)

    async def end(self, number: signal.Signals, within: float = STOP_TIMEOUT) -> None:
        """Send the signal and wait for the end; SIGKILL follows when it takes too long."""
        self.send(number)
        deadline = time.monotonic() + within
        while self.running:
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                deadline += within
            await asyncio.sleep(0.02)

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-5:])


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
        self._daemon: Daemon | None = None

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
    def daemon(self) -> Daemon:
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
            self._daemon = Daemon(f"dockerd {self.version}", self.folder / "dockerd.log")
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
        await self._end_all("containerd --config")
        # Where nobody reaps orphans, dockerd would take the zombie for a living containerd and wait for it.
        (self.folder / "exec" / "containerd" / "containerd.pid").unlink(missing_ok=True)
        self.daemon.spawn(self._command(), engine_path(self.version))

    async def wait_ready(self) -> None:
        def ready() -> bool:
            if not self.running:
                raise BrokenMachineError(f"dockerd {self.version} did not start:\n{self.daemon.tail()}")
            return self._answers()

        try:
            await until(ready, START_TIMEOUT, f"dockerd {self.version} answers")
        except BrokenMachineError as error:
            raise BrokenMachineError(f"{error}\n{self.daemon.tail()}") from None

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
            client.settimeout(0.5)
            client.connect(str(self.socket))
            client.sendall(b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n")
            return b"200" in client.recv(15)
        return False

    async def terminate(self) -> None:
        """SIGTERM: it stops its containers and ends."""
        await self.daemon.end(signal.SIGTERM)

    async def kill(self) -> None:
        """SIGKILL: the containers stay."""
        await self.daemon.end(signal.SIGKILL)

    def freeze(self) -> None:
        """SIGSTOP: connections stay open, nothing answers."""
        self.daemon.send(signal.SIGSTOP)

    def thaw(self) -> None:
        self.daemon.send(signal.SIGCONT)

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
        await self.terminate()
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
            await self._daemon.end(signal.SIGTERM)
        await self._end_all("containerd-shim", with_children=True)
        await self._end_all("")
        for mount in reversed(mounts_under(self.folder)):
            with contextlib.suppress(BrokenMachineError):
                run("umount", "--lazy", mount)
        remove_cgroups(self._name)

    async def _end_all(self, kind: str, *, with_children: bool = False) -> None:
        """End what dockerd has left: it is all started with paths in our own folder."""
        ours = [pid for pid, command in processes_under(self.folder).items() if kind in command]
        if with_children:
            # The shim's children are the containers' first processes; with them all of a container ends.
            for pid in ours:
                for child in children_of(pid):
                    send(child, signal.SIGKILL)
        for pid in ours:
            send(pid, signal.SIGKILL)
        await until(lambda: not processes_under(self.folder).keys() & set(ours), STOP_TIMEOUT, "processes end")


def mounts_under(folder: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [point for line in lines if (point := line.split()[4]).startswith(f"{folder}/")]


def remove_cgroups(name: str) -> None:
    # Not by glob(), which fails where another engine's container ends meanwhile.
    groups = [Path(parent, name) for parent, folders, _ in os.walk("/sys/fs/cgroup") if name in folders]
    for group in groups:
        for folder, _, _ in os.walk(group, topdown=False):
            with contextlib.suppress(OSError):
                Path(folder).rmdir()


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.5):
        return True
    return False


# -- the database -----------------------------------------------------------------------------------------


class PrivateMongo:
    """A replica set of the test's own, of one member or of three; `standalone` is a mongod without one.

    `disk_mb` puts the data of a single member on a file system of that size, to be filled up.
    """

    def __init__(self, members: int = 1, *, standalone: bool = False, disk_mb: int | None = None) -> None:
        self._count = members
        self._standalone = standalone
        self._disk_mb = disk_mb
        self._mounted = False
        self.folder = Path()
        self.ports: list[int] = []
        self.members: list[Daemon] = []

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{port}" for port in self.ports)
        return f"mongodb://{hosts}/" + ("" if self._standalone else "?replicaSet=ew")

    async def __aenter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="ew-mongo-"))
        try:
            if self._disk_mb:
                run("mount", "-t", "tmpfs", "-o", f"size={self._disk_mb}m", "tmpfs", str(self.folder))
                self._mounted = True
            for number in range(self._count):
                (self.folder / f"db{number}").mkdir()
                self.ports.append(free_port())
                self.members.append(Daemon(f"mongod {number}", self.folder / f"mongod{number}.log"))
                self.spawn(number)
            for number in range(self._count):
                await self._wait_answer(number)
            if not self._standalone:
                await self._initiate()
            await self.wait_primary()
            if self._count > 1:
                await self.wait_replicated()
        except BaseException:
            await self._clean_up()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._clean_up()

    async def _clean_up(self) -> None:
        for member in self.members:
            member.send(signal.SIGCONT)
            await member.end(signal.SIGKILL)
        if self._mounted:
            run("umount", "--lazy", str(self.folder))
        await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)

    def client(self, number: int | None = None, *, patience_ms: int = 2000) -> AsyncMongoClient[dict[str, Any]]:
        """A client of the whole set, or of one member directly."""
        url = self.url if number is None else f"mongodb://127.0.0.1:{self.ports[number]}/?directConnection=true"
        return AsyncMongoClient(
            url, serverSelectionTimeoutMS=patience_ms, connectTimeoutMS=patience_ms, socketTimeoutMS=5000
        )

    def spawn(self, number: int = 0) -> None:
        """Start one member without waiting for it."""
        mode = () if self._standalone else ("--replSet", "ew", "--oplogSize", "16")
        self.members[number].spawn(
            [
                *(find_mongod(), "--dbpath", self.folder / f"db{number}", "--port", str(self.ports[number])),
                *("--bind_ip", "127.0.0.1", "--nounixsocket", "--wiredTigerCacheSizeGB", "0.25", "--quiet"),
                *("--setParameter", "diagnosticDataCollectionEnabled=false", *mode),
            ]
        )

    async def start(self, number: int = 0) -> None:
        """Start a member that was killed, and wait until there is a primary."""
        self.spawn(number)
        await self._wait_answer(number)
        await self.wait_primary()

    async def kill(self, number: int = 0) -> None:
        await self.members[number].end(signal.SIGKILL)

    def save_data(self) -> None:
        """Keep a copy of the first member's data, which must have ended."""
        shutil.copytree(self.folder / "db0", self.folder / "saved")

    def roll_back(self) -> None:
        """Put the kept copy back: what was acknowledged since is lost, as in a crash before the journal was."""
        shutil.rmtree(self.folder / "db0")
        (self.folder / "saved").rename(self.folder / "db0")

    def freeze(self, number: int = 0) -> None:
        self.members[number].send(signal.SIGSTOP)

    def thaw(self, number: int = 0) -> None:
        self.members[number].send(signal.SIGCONT)

    async def primary(self) -> int | None:
        """The number of the member that says that it is primary."""
        for number in range(self._count):
            with contextlib.suppress(PyMongoError):
                if self.members[number].running and listens(self.ports[number]):
                    async with self.client(number, patience_ms=500) as client:
                        if (await client.admin.command("hello"))["isWritablePrimary"]:
                            return number
        return None

    async def wait_primary(self, *, other_than: int | None = None) -> int:
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            number = await self.primary()
            if number is not None and number != other_than:
                return number
            await asyncio.sleep(0.05)
        raise BrokenMachineError("the replica set has no primary")

    async def wait_replicated(self) -> None:
        """Wait until every member is primary or secondary, so that any of them may be lost."""
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            with contextlib.suppress(PyMongoError):
                async with self.client() as client:
                    status = await client.admin.command("replSetGetStatus")
                if all(member["stateStr"] in {"PRIMARY", "SECONDARY"} for member in status["members"]):
                    return
            await asyncio.sleep(0.05)
        raise BrokenMachineError("the replica set does not come together")

    async def step_down(self, *, for_s: int = 10) -> None:
        """Let the primary resign; another member, if there is one, takes over."""
        number = await self.wait_primary()
        async with self.client(number) as client:
            # An answer is not promised: the server may close all connections first.
            with contextlib.suppress(AutoReconnect):
                await client.admin.command({"replSetStepDown": for_s, "secondaryCatchUpPeriodSecs": 2})

    async def fail_over(self) -> int:
        """SIGKILL the primary and wait for another; the number of the killed one, to be started again."""
        number = await self.wait_primary()
        await self.kill(number)
        await self.wait_primary(other_than=number)
        return number

    @contextlib.contextmanager
    def full_disk(self) -> Iterator[None]:
        """Fill the data's file system to the last byte; give the space back afterwards."""
        if not self._mounted:
            raise BrokenMachineError("the database has no disk of its own")
        filler = self.folder / "filler"
        try:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(64 * 1024))
            with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
                while True:
                    file.write(b"x")
            yield
        finally:
            filler.unlink(missing_ok=True)

    async def _wait_answer(self, number: int) -> None:
        member = self.members[number]
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            with contextlib.suppress(PyMongoError):
                if listens(self.ports[number]):
                    async with self.client(number, patience_ms=500) as client:
                        await client.admin.command("ping")
                        return
            if not member.running or time.monotonic() > deadline:
                raise BrokenMachineError(f"{member.name} did not start:\n{member.tail()}")
            await asyncio.sleep(0.02)

    async def _initiate(self) -> None:
        members = [{"_id": number, "host": f"127.0.0.1:{port}"} for number, port in enumerate(self.ports)]
        # Elections within a second, so that a failover is a fault of seconds, as on a well-kept set.
        settings = {"electionTimeoutMillis": 1000, "heartbeatIntervalMillis": 200}
        async with self.client(0) as client:
            await client.admin.command("replSetInitiate", {"_id": "ew", "members": members, "settings": settings})
