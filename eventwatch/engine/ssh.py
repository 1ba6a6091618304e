"""The way to an engine on `ssh://[USER@]HOST[:PORT][/SOCKET]`, as the `docker` command takes it.

Why: `ssh` knows this user's keys, agent, `known_hosts` and jump hosts, so it is asked, and nothing more is needed
than `docker` would need. On the far side it runs `docker system dial-stdio`, which connects itself to the engine
there.

How: a Unix socket in a folder that only this user can enter; each connection to it is one `ssh`, which lives no
longer than the connection. So an engine behind ssh is spoken to as a local one is.

Contract: `ssh` never asks anybody (`BatchMode`); what it is given is checked, so that no part of the URL is taken
for an option or reaches a shell; at most `MOST_PROCESSES` run at once, of which `MOST_STARTING` log in; none
outlives `close`. Our settings are not in its environment.

Not promised: speed. A connection costs a login (0.1 to 1 s), unless the user's ssh shares connections
(`ControlMaster` with `ControlPersist`, made by another ssh).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from eventwatch.core.errors import ConfigError
from eventwatch.core.text import printable

MOST_PROCESSES: Final = 64
#: sshd turns some away where ten have not logged in yet (its `MaxStartups`).
MOST_STARTING: Final = 4
#: Seconds that a connection counts as starting unless something is heard before.
STARTING: Final = 2.0
#: Seconds that an `ssh` gets to end by itself.
ENDING: Final = 2.0
#: Seconds to reach the host: less than a call has, so that ssh tells why it cannot.
CONNECT_TIMEOUT: Final = 8

_CHUNK: Final = 64 * 1024
_LONGEST_COMPLAINT: Final = 4096
_LONGEST_LINE: Final = 300
#: What begins so is ours, and may be secret.
_OURS: Final = ("EVENTWATCH_", "DB_", "DOCKER_")

_URL: Final = re.compile(
    r"ssh://(?:([A-Za-z0-9_][A-Za-z0-9_.+-]*)@)?"
    r"(?:([A-Za-z0-9_][A-Za-z0-9_.-]*)|\[([0-9A-Fa-f:.]+(?:%[A-Za-z0-9_.-]+)?)\])"
    r"(?::([0-9]{1,5}))?(/[A-Za-z0-9_./+-]*)?"
)
_OPTIONS: Final = (
    "-T",
    *("-o", "BatchMode=yes"),
    *("-o", f"ConnectTimeout={CONNECT_TIMEOUT}"),
    *("-o", "ServerAliveInterval=10"),
    *("-o", "ClearAllForwardings=yes"),
    *("-o", "ControlMaster=no"),  # the end of the one that others share would end them all
)
#: What ssh, or docker on the far side, complains of, and what mends that.
_FIXES: Final = {
    "Host key verification failed": "none is known, or another: connect once by hand with ssh, as this user",
    "Permission denied (": "ssh needs a key for it that it can use without asking for a password",
    "permission denied while trying to connect": "add the user there to the group docker",
    "is not a docker command": "upgrade docker there, 18.09 is needed",
}
#: What a shell ends with when it does not know a command.
_NO_COMMAND: Final = 127


@dataclass(frozen=True, slots=True)
class SshHost:
    """What an ssh:// URL names. `socket` is that of the engine over there; empty for what docker takes there."""

    host: str
    user: str = ""
    port: str = ""
    socket: str = ""

    def command(self) -> list[str]:
        """The program that connects its input and output with the engine."""
        options = [*_OPTIONS, *(("-l", self.user) if self.user else ()), *(("-p", self.port) if self.port else ())]
        engine = ("--host", f"unix://{self.socket}") if self.socket else ()
        return ["ssh", *options, "--", self.host, "docker", *engine, "system", "dial-stdio"]


def parse_ssh_url(url: str) -> SshHost:
    """Read an ssh:// URL. Raises ValueError, which does not repeat it: it may hold a password."""
    if (found := _URL.fullmatch(url)) is None:
        raise ValueError("it must be ssh://[USER@]HOST[:PORT][/SOCKET], without a password or odd characters")
    user, host, ipv6, port, path = found.groups(default="")
    return SshHost(host or ipv6, user, port, path.rstrip("/"))


class SshForwarder:
    """A local socket behind which the engine of a host is; made when it is first asked for."""

    def __init__(self, host: SshHost) -> None:
        self._command = host.command()
        #: Why the last connection came to nothing, with the fix; empty once one has been heard from since.
        self.trouble = ""
        self._folder = ""
        self._server: asyncio.Server | None = None
        self._opening = asyncio.Lock()
        self._starting = asyncio.Semaphore(MOST_STARTING)
        self._bridges: set[asyncio.Task[None]] = set()
        #: Of those that are over, what still ends their processes.
        self._endings: set[asyncio.Task[None]] = set()

    async def socket(self) -> Path:
        """The path of the local socket. Raises ConfigError where there is no ssh, or no place for the socket."""
        async with self._opening:
            if self._server is not None and not await asyncio.to_thread(self._is_there):  # somebody tidied up
                self._server.close()
                self._server = None
            if self._server is None:
                if shutil.which("ssh") is None:
                    raise ConfigError(
                        "EVENTWATCH_DOCKER_HOST: ssh:// needs the ssh command, which is not on PATH "
                        "(Debian: openssh-client)"
                    )
                try:
                    await asyncio.to_thread(self._make_folder)
                    self._server = await asyncio.start_unix_server(self._accept, f"{self._folder}/engine.sock")
                except OSError as error:
                    await self._remove_folder()
                    raise ConfigError(
                        f"EVENTWATCH_DOCKER_HOST: ssh:// needs a socket in the temporary folder: {error}"
                    ) from None
        return Path(self._folder, "engine.sock")

    async def close(self) -> None:
        """End all connections and their processes. Who asks for the socket later opens another."""
        async with self._opening:
            server, self._server = self._server, None
            if server is not None:
                server.close()
                for bridge in self._bridges:
                    bridge.cancel()
                await asyncio.gather(*self._bridges, return_exceptions=True)
                await asyncio.gather(*self._endings, return_exceptions=True)
                await self._remove_folder()

    def _is_there(self) -> bool:
        return self._is_ours() and Path(self._folder, "engine.sock").exists()

    def _is_ours(self) -> bool:
        """Whether nobody else has put a folder, or a link, in the place of ours."""
        try:
            return Path(self._folder).lstat().st_uid == os.geteuid()
        except OSError:
            return False

    def _make_folder(self) -> None:
        if self._folder:  # the same again, for those who know it
            with contextlib.suppress(FileExistsError):
                Path(self._folder).mkdir(mode=0o700)
        if not self._folder or not self._is_ours():
            self._folder = tempfile.mkdtemp(prefix="eventwatch-ssh-")

    async def _remove_folder(self) -> None:
        folder, self._folder = self._folder, ""
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None:  # it had come before the end
            writer.close()
            return
        if len(self._bridges) + len(self._endings) >= MOST_PROCESSES:
            self.trouble = f"{MOST_PROCESSES} connections over ssh are open, and none ends"
            writer.close()
            return
        bridge = asyncio.create_task(self._bridge(reader, writer), name="ssh-bridge")
        self._bridges.add(bridge)
        bridge.add_done_callback(self._bridges.discard)

    async def _bridge(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, over as soon as either side ends it."""
        link: _Link | None = None
        try:
            async with self._starting:
                if reader.at_eof():  # its client gave up while it waited for its turn
                    return
                process = await asyncio.create_subprocess_exec(
                    *self._command,
                    stdin=PIPE,
                    stdout=PIPE,
                    stderr=PIPE,
                    env=_environment(),
                    start_new_session=True,
                )
                link = _Link(process, reader, writer, on_answer=self._on_answer)
                await link.begun(within=STARTING)
            if await link.is_refused():
                self.trouble = await link.why_refused()
        except OSError as error:
            self.trouble = f"ssh cannot be run: {error.strerror or error}"
        finally:
            writer.close()
            if link is not None:
                ending = asyncio.create_task(link.end(), name="ssh-ending")
                self._endings.add(ending)
                ending.add_done_callback(self._endings.discard)

    def _on_answer(self) -> None:
        self.trouble = ""


class _Link:
    """A connection and its ssh, with what passes between them."""

    def __init__(
        self,
        process: Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        on_answer: Callable[[], object],
    ) -> None:
        if process.stdin is None or process.stdout is None or process.stderr is None:
            raise OSError("it has no pipes")
        self._process = process
        self._on_answer = on_answer
        self._begun = asyncio.Event()
        self._answered = False
        self._there = asyncio.create_task(_pass_on(reader, process.stdin), name="ssh-there")
        self._back = asyncio.create_task(
            _pass_on(process.stdout, writer, on_first=self._note_answer), name="ssh-back"
        )
        self._back.add_done_callback(lambda _: self._begun.set())
        self._complaint = asyncio.create_task(_last_words(process.stderr), name="ssh-complaint")

    def _note_answer(self) -> None:
        self._answered = True
        self._begun.set()
        self._on_answer()

    async def begun(self, *, within: float) -> None:
        """Wait until anything came back, either side has ended it, or so many seconds have passed."""
        begun = asyncio.create_task(self._begun.wait(), name="ssh-begun")
        try:
            await asyncio.wait({begun, self._there}, timeout=within, return_when=asyncio.FIRST_COMPLETED)
        finally:
            begun.cancel()

    async def is_refused(self) -> bool:
        """Wait until either side has ended it; whether it was ssh, before anything came back."""
        await asyncio.wait({self._there, self._back}, return_when=asyncio.FIRST_COMPLETED)
        return self._back.done() and not self._answered

    async def why_refused(self) -> str:
        """What ssh or the far side complained of, in one line with the fix if that is known."""
        await asyncio.wait({self._complaint}, timeout=ENDING)  # who inherits the pipe may keep it open
        code = await self._ended()
        said = self._complaint.result() if self._complaint.done() else ""
        lines = [printable(line.strip(), _LONGEST_LINE) for line in said.splitlines() if line.strip()]
        line = lines[-1] if lines else f"ssh ended with {code} and said nothing"
        if code == _NO_COMMAND:
            return f"{line}: install docker on that host, or forward the socket of its engine with ssh -L"
        return line + next((f": {fix}" for part, fix in _FIXES.items() if part in said), "")

    async def end(self) -> None:
        """End ssh and what it has started, whatever it does."""
        tasks = self._there, self._back, self._complaint
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)
            if await self._ended() is not None:
                break
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _ended(self) -> int | None:
        """Its exit code, once it has ended; None where that takes too long."""
        waiting = asyncio.ensure_future(self._process.wait())
        await asyncio.wait({waiting}, timeout=ENDING)
        waiting.cancel()
        return self._process.returncode


async def _pass_on(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, on_first: Callable[[], object] | None = None
) -> None:
    """Write what is read, until either of the two ends."""
    with contextlib.suppress(OSError):
        while data := await reader.read(_CHUNK):
            if on_first is not None:
                on_first()
                on_first = None
            writer.write(data)
            await writer.drain()


async def _last_words(stderr: asyncio.StreamReader) -> str:
    said = b""
    while data := await stderr.read(_LONGEST_COMPLAINT):
        said = (said + data)[-_LONGEST_COMPLAINT:]
    return said.decode(errors="replace")


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
