"""The end-to-end suite on other engines: `python -m tests.run_on_engines`, `make test-engines`.

Each is an engine of the run's own, and pytest runs on it as a process of its own, told by `DOCKER_HOST`. Without a
choice, these are the versions of Docker that are not installed; `make test` runs on the one that is. Rootless
Docker and Podman are for a look at what they can do: not all of the suite passes there (see the README). Needs
root, as private engines do. What follows `--` goes to pytest, instead of `tests/e2e`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from tests.kit.engines import INSTALLED, VERSIONS, PrivateEngine, Version
from tests.kit.lacks import ENGINE_VARIABLE, PODMAN_ROOTLESS, ROOTLESS
from tests.kit.podman import PODMANS, PodmanVersion, PrivatePodman, RootlessPodman, check_health
from tests.kit.rootless import RootlessEngine
from tests.kit.waiting import end

ROOT: Final = Path(__file__).resolve().parent.parent
OTHERS: Final = tuple(version for version in VERSIONS if version != INSTALLED)
DOCKERS: Final[dict[str, Version]] = {str(version): version for version in VERSIONS}
PODMANS_BY_NAME: Final[dict[str, PodmanVersion]] = {f"podman-{version}": version for version in PODMANS}
#: Variables that would lead the tests, or what they start, to another engine.
FOREIGN: Final = ("DOCKER_", "EVENTWATCH_", "DB_")
#: Except this, of the tests themselves.
KEPT: Final = "EVENTWATCH_TEST_SLOW"


@asynccontextmanager
async def opened(name: str) -> AsyncIterator[str]:
    """Start this engine; its URL."""
    if name == ROOTLESS:
        async with RootlessEngine() as rootless:
            yield rootless.url
    elif name in PODMANS_BY_NAME or name == PODMAN_ROOTLESS:
        podman = RootlessPodman() if name == PODMAN_ROOTLESS else PrivatePodman(PODMANS_BY_NAME[name])
        async with podman:
            checks = asyncio.create_task(check_health(podman.socket), name="health-checks")
            yield podman.url
            await end(checks)
    else:
        async with PrivateEngine(DOCKERS[name]) as engine:
            yield engine.url


async def run_on(name: str, arguments: list[str]) -> int:
    """Run pytest on this engine; its exit code."""
    environment = {
        variable: value
        for variable, value in os.environ.items()
        if variable == KEPT or not variable.startswith(FOREIGN)
    }
    async with opened(name) as url:
        process = await asyncio.create_subprocess_exec(
            *("setpriv", "--pdeathsig", "TERM", sys.executable, "-m", "pytest", "-p", "no:cacheprovider"),
            *arguments,
            cwd=ROOT,
            env={**environment, "DOCKER_HOST": url, ENGINE_VARIABLE: name},
        )
        try:
            return await process.wait()
        finally:
            if process.returncode is None:
                process.terminate()
                await process.wait()


async def run_on_all(names: list[str], arguments: list[str]) -> dict[str, int]:
    codes: dict[str, int] = {}
    for name in names:
        print(f"==> engine {name}", flush=True)  # noqa: T201
        began = time.monotonic()
        codes[name] = await run_on(name, arguments)
        print(f"==> engine {name}: {time.monotonic() - began:.0f} s", flush=True)  # noqa: T201
    return codes


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the end-to-end suite on other engines.")
    engines = [*DOCKERS, ROOTLESS, *PODMANS_BY_NAME, PODMAN_ROOTLESS]
    parser.add_argument("--engine", action="append", choices=engines, help=f"default: {', '.join(OTHERS)}")
    parser.add_argument("arguments", nargs="*", default=["tests/e2e"], help="for pytest, after --")
    options = parser.parse_args()
    # Told to end, it ends as with Ctrl-C, so that it leaves nothing behind.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    codes = asyncio.run(run_on_all(options.engine or list(OTHERS), options.arguments))
    for name, code in codes.items():
        print(f"engine {name}: {'passed' if code == 0 else f'failed ({code})'}")  # noqa: T201
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main())
