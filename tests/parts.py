"""`python -m tests.parts [PYTEST OPTIONS]`: all tests, in parts that need not wait for each other.

Two parts run side by side for each processor, and the next as soon as one has ended. Most of what the tests do
is wait: for engines, timeouts and leases. What breaks engines has engines of its own, so it disturbs nobody. What
a part prints is shown when it ends, and a line a minute says how far each is; the exit code is that of the worst.

With `EVENTWATCH_TEST_AGAIN=N`, as in CI, a part of which at most N tests failed runs these again, up to twice and
when nothing else runs, and passes if they do: on a shared machine a deadline is missed now and then. Each is named
as unsteady, which is to be looked into, and what it printed the first time is shown all the same.

With `EVENTWATCH_TEST_RESUME=1`, what has passed in the run before is left out (tests/conftest.py keeps the list).
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.conftest import PASSED_TESTS

ROOT: Final = Path(__file__).resolve().parents[1]
LOGS: Final = ROOT / ".cache" / "tests"
PROPERTIES: Final = "tests/unit/test_properties.py"
#: The first half of the end-to-end tests by what they take.
FIRST: Final = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/e2e/test_[a-m]*.py"))
NOT_FIRST: Final = [f"--ignore={path}" for path in FIRST]
#: What pytest is given for each part, the longest first; together they are all tests.
PARTS: Final = {
    "faults": ("tests/faults",),
    "first": tuple(FIRST),
    "container": ("tests/container",),
    "others": (
        "tests",
        *(f"--ignore={path}" for path in ("tests/faults", "tests/container", "tests/unit", *FIRST)),
    ),
    # Thousands of random histories say nothing more of what is covered, and take four times as long when counted.
    "unit": ("tests/unit", "--cov", f"--ignore={PROPERTIES}"),
    "properties": (PROPERTIES,),
}
TOLD_EVERY: Final = 60.0
#: pytest's own codes: nothing went wrong, and no test was found (when the options choose some).
PASSED: Final = frozenset({0, 5})
#: How often what failed is tried again.
TRIES: Final = 2


@dataclass
class Part:
    """One run of pytest. Entered by `start`, over when `ended`."""

    name: str
    arguments: tuple[str, ...]
    log: Path = field(init=False)
    cache: Path = field(init=False)
    passed: Path = field(init=False)
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    took: float = 0.0

    def __post_init__(self) -> None:
        self.log = LOGS / f"{self.name}.log"
        self.cache = ROOT / ".pytest_cache" / self.name
        self.passed = LOGS / f"{self.name}.passed"

    def start(self, options: list[str], *, resume: bool = False) -> None:
        self.began = time.monotonic()
        if not resume:
            self.passed.unlink(missing_ok=True)
        # What only a part of the tests covers says nothing.
        uncounted = ["--no-cov"] if resume or options else []
        with self.log.open("wb") as output:
            self.process = self._pytest([*options, *uncounted], stdout=output, stderr=subprocess.STDOUT)

    def _pytest(self, options: list[str], **files: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "pytest", *self.arguments, "-o", f"cache_dir={self.cache}", *options]
        return subprocess.Popen(command, cwd=ROOT, env={**os.environ, PASSED_TESTS: str(self.passed)}, **files)

    def ended(self) -> bool:
        if self.process is None or self.process.poll() is None:
            return False
        self.took = self.took or time.monotonic() - self.began
        return True

    @property
    def code(self) -> int:
        assert self.process is not None
        return self.process.wait()

    def progress(self) -> str:
        """How far it is, as pytest last said."""
        if self.process is None:
            return "not begun"
        if self.ended():
            return "ended"
        told = re.findall(r"\[ *(\d+%)\]", self.log.read_text(errors="replace"))
        return told[-1] if told else "begun"

    def failed(self) -> list[str]:
        """The tests that failed, if nothing else is wrong with the part."""
        last = self.cache / "v" / "cache" / "lastfailed"
        return sorted(json.loads(last.read_text())) if self.code == 1 and last.is_file() else []

    def passes_again(self, options: list[str], *, most: int) -> bool:
        """Run the failed ones again, if they are few."""
        for _ in range(TRIES):
            failed = self.failed()
            if not 0 < len(failed) <= most:
                return False
            for test in failed:
                say(f"==> unsteady, tried again by itself: {test}")
            self.process = self._pytest(["--last-failed", "--no-cov", *options])
            if self.process.wait() == 0:
                return True
        return False

    def interrupt(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)


def run(parts: list[Part], options: list[str], *, at_once: int, again: int = 0, resume: bool = False) -> int:
    """Run them, tell of them, and return the exit code."""
    waiting, shown = list(parts), time.monotonic()
    running: list[Part] = []
    while waiting or running:
        while waiting and len(running) < at_once:
            running.append(waiting.pop(0))
            running[-1].start(options, resume=resume)
        time.sleep(0.2)
        for part in [part for part in running if part.ended()]:
            running.remove(part)
            say(f"==> pytest, part {part.name}: {part.took:.0f} s, exit code {part.code}")
            say(part.log.read_text(errors="replace"))
        if running and time.monotonic() - shown > TOLD_EVERY:
            shown = time.monotonic()
            say("==> " + ", ".join(f"{part.name}: {part.progress()}" for part in parts))
    say("==> pytest: " + ", ".join(f"{part.name} {part.took:.0f} s, exit code {part.code}" for part in parts))
    wrong = [part for part in parts if part.code not in PASSED]
    wrong = [part for part in wrong if not part.passes_again(options, most=again)]
    for part in wrong:
        say(f"==> failed: {', '.join(part.failed()) or f'part {part.name}, exit code {part.code}'}")
    return max((part.code for part in wrong), default=0)


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - a command


def main() -> None:
    LOGS.mkdir(parents=True, exist_ok=True)
    parts = [Part(name, arguments) for name, arguments in PARTS.items()]

    def interrupt(*_: object) -> None:
        for part in parts:
            part.interrupt()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    processors = os.cpu_count() or 1
    at_once = 2 * processors if processors > 1 else 1
    again, resume = (int(os.environ.get(f"EVENTWATCH_TEST_{name}", "0")) for name in ("AGAIN", "RESUME"))
    sys.exit(run(parts, sys.argv[1:], at_once=at_once, again=again, resume=bool(resume)))


if __name__ == "__main__":
    main()
