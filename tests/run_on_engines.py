"""The end-to-end suite on other versions of the engine: `python -m tests.run_on_engines`, `make test-engines`.

Each version is an engine of the run's own (`tests.engines.PrivateEngine`), and pytest runs on it as a process of
its own, told by `DOCKER_HOST`. The installed version is not among them unless it is asked for: it is what
`make test` runs on. Needs root, as private engines do. What follows `--` goes to pytest, instead of `tests/e2e`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from typing import Final

from tests.kit.engines import INSTALLED, VERSIONS, PrivateEngine, Version

ROOT: Final = Path(__file__).resolve().parent.parent
OTHERS: Final = tuple(version for version in VERSIONS if version != INSTALLED)
#: Variables that would lead the tests, or what they start, to another engine.
FOREIGN: Final = ("DOCKER_", "EVENTWATCH_", "DB_")


async def run_on(version: Version, arguments: list[str]) -> int:
    """Run pytest on an engine of this version; its exit code."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    async with PrivateEngine(version) as engine:
        process = await asyncio.create_subprocess_exec(
            *("setpriv", "--pdeathsig", "TERM", sys.executable, "-m", "pytest", "-p", "no:cacheprovider"),
            *arguments,
            cwd=ROOT,
            env={**environment, "DOCKER_HOST": engine.url},
        )
        try:
            return await process.wait()
        finally:
            if process.returncode is None:
                process.terminate()
                await process.wait()


async def run_on_all(versions: list[Version], arguments: list[str]) -> dict[Version, int]:
    codes: dict[Version, int] = {}
    for version in versions:
        print(f"==> Docker engine {version}", flush=True)  # noqa: T201
        began = time.monotonic()
        codes[version] = await run_on(version, arguments)
        print(f"==> Docker engine {version}: {time.monotonic() - began:.0f} s", flush=True)  # noqa: T201
    return codes


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the end-to-end suite on other versions of the engine.")
    parser.add_argument("--engine", action="append", choices=VERSIONS, help=f"default: {', '.join(OTHERS)}")
    parser.add_argument("arguments", nargs="*", default=["tests/e2e"], help="for pytest, after --")
    options = parser.parse_args()
    # Told to end, it ends as with Ctrl-C, so that it leaves nothing behind.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    codes = asyncio.run(run_on_all(options.engine or list(OTHERS), options.arguments))
    for version, code in codes.items():
        print(f"Docker engine {version}: {'passed' if code == 0 else f'failed ({code})'}")  # noqa: T201
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main())
