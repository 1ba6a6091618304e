"""How to run a program: to its end by `run`, or for as long as a test needs it as a `Process`.

A `Process` writes all its output to a file, so that nobody has to read it for it to go on, and so that a failure
can show its last lines. It never outlives the test run, even one that was killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, NamedTuple, Self

from tests.kit.waiting import PATIENCE, SLOW, eventually

ROOT: Final = Path(__file__).resolve().parents[2]
SYSTEM_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SETPRIV: Final = shutil.which("setpriv", path=SYSTEM_PATH) or "setpriv"
#: What must not leak from the caller's environment into a program under test.
OUR_VARIABLES: Final = ("EVENTWATCH_", "DB_", "DOCKER_")
Command = Sequence[str | Path]


class BrokenMachineError(RuntimeError):
    """The machine cannot run what the test needs; a test never skips for it."""


class Ended(NamedTuple):
    """What a program has left."""

    code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def run(
    *command: str | Path,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    within: float = 60.0,
    check: bool = True,
) -> Ended:
    """Run a program to its end, with this environment and no other (default: ours, with the system's programs).

    With `check`, an exit code other than 0 raises `BrokenMachineError` with its last lines.
    """
    ended = subprocess.run(
        command,
        cwd=cwd,
        env=system_environment() if env is None else env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=within * SLOW,
        check=False,
    )
    if check and ended.returncode:
        tail = last_lines(ended.stdout + ended.stderr, 15) or "no message"
        raise BrokenMachineError(f"{' '.join(map(str, command))} ended with {ended.returncode}:\n{tail}")
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def output(*command: str | Path, cwd: Path = ROOT, within: float = 60.0, **env: str) -> str:
    """What a program of the system prints to its standard output, which has to end well."""
    return run(*command, cwd=cwd, within=within, env=system_environment(**env)).stdout.strip()


def system_environment(**more: str) -> dict[str, str]:
    """Our own, with the places of the system's programs, in English."""
    return {**os.environ, "PATH": f"{os.environ['PATH']}:{SYSTEM_PATH}", "LC_ALL": "C", **more}


def our_environment(**more: str) -> dict[str, str]:
    """For a Python program of the tree: our own environment without anybody's settings of eventwatch."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(OUR_VARIABLES)}
    return {**others, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **more}


def last_lines(text: str, count: int) -> str:
    return "\n".join(text.strip().splitlines()[-count:])


class Process:
    """A program that may be told, frozen, killed and started again.

    `log` collects its output, by default in a folder of its own, which goes with `close`. Use it as a context to
    have it closed.
    """

    def __init__(self, name: str, log: Path | None = None) -> None:
        self.name = name
        self._own_folder = None if log else Path(tempfile.mkdtemp(prefix="ew-process-"))
        self.log = log or self._own_folder / "log"  # type: ignore[operator]  # one of them is there
        self._process: subprocess.Popen[bytes] | None = None
        self._kept = ""
        self._began_at = 0
        self._told_to = 0

    def spawn(
        self,
        command: Command,
        *,
        env: Mapping[str, str],
        cwd: Path | None = None,
        orphaned: Literal["KILL", "TERM"] = "KILL",
    ) -> Self:
        """Start it with this environment and no other; `orphaned` is its signal when the test run has ended."""
        if self.running:
            raise BrokenMachineError(f"{self.name} runs already")
        with self.log.open("ab") as output:
            self._began_at = output.tell()
            self._process = subprocess.Popen(
                # The kernel sees to it, even when both are frozen.
                [SETPRIV, "--pdeathsig", orphaned, *command],
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return self

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        if self._process is None:
            raise BrokenMachineError(f"{self.name} was never started")
        return self._process.pid

    # -- what it is told -------------------------------------------------------------------------------

    def send(self, number: signal.Signals) -> None:
        if self._process is not None and self.running:
            self._process.send_signal(number)

    def freeze(self) -> None:
        """SIGSTOP: connections stay open, nothing answers."""
        self.send(signal.SIGSTOP)

    def thaw(self) -> None:
        self.send(signal.SIGCONT)

    async def kill(self) -> None:
        if self._process is not None:
            await self.stop(signal.SIGKILL)

    async def stop(self, number: signal.Signals = signal.SIGTERM, within: float = 2 * PATIENCE) -> int:
        """Send the signal and wait for its end; its exit code."""
        self.send(number)
        return await self.ends(within)

    async def ends(self, within: float = 2 * PATIENCE) -> int:
        """Wait for its end; its exit code."""
        await eventually(lambda: not self.running, within, what=lambda: f"{self.name} ends\n{self.tail()}")
        assert self._process is not None
        return self._process.wait()

    async def end(self, number: signal.Signals = signal.SIGTERM, within: float = 2 * PATIENCE) -> None:
        """Send the signal; SIGKILL follows where that has not ended it."""
        with contextlib.suppress(AssertionError):
            await self.stop(number, within)
        await self.kill()

    def close(self) -> None:
        """End it and what it has started, if it has not ended; its output stays known."""
        if self._process is not None and self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._own_folder:
            self._kept = self.output
            shutil.rmtree(self._own_folder, ignore_errors=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- what it says ----------------------------------------------------------------------------------

    @property
    def output(self) -> str:
        """All that it has said, also before it was started again."""
        return self.log.read_text(errors="replace") if self.log.exists() else self._kept

    def news(self) -> str:
        """What it has said since the last call."""
        with self.log.open("rb") as log:
            log.seek(self._told_to)
            text = log.read()
        self._told_to += len(text)
        return text.decode(errors="replace")

    def tail(self, lines: int = 40) -> str:
        return last_lines(self.output, lines)

    async def speaks(self, within: float = 2 * PATIENCE) -> None:
        """Wait until it has said anything; until then it may not even handle signals."""
        await eventually(lambda: self.log.stat().st_size > self._began_at, within, what=f"{self.name} speaks")

    async def says(self, text: str, *, times: int = 1, within: float = 2 * PATIENCE) -> None:
        """Wait until it has said so, that many times."""
        await eventually(
            lambda: self.output.count(text) >= times,
            within,
            what=lambda: f"{self.name} says {text!r}\n{self.tail()}",
            instead=lambda: "" if self.running else f"{self.name} ended and never said {text!r}:\n{self.tail()}",
        )


# -- processes of others ----------------------------------------------------------------------------------


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
