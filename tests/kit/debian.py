"""Packages of Debian's other suites, over the package sources that the machine already uses, never installed."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

from tests.kit.processes import BrokenMachineError, run


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
        run(*apt, "update", within=300)
        run(*apt, "download", *packages, cwd=work, within=600)
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
