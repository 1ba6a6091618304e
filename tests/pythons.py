"""`python3 -m tests.pythons 3.14`: where that Python is, unpacked from Debian's packages into `.cache/pythons`.

It is installed nowhere and runs beside the system's own: it is told, in its file, to take the libraries that it
was built with, so what it starts takes the system's. Needs root and Debian 12.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from tests.kit.debian import unpack_packages
from tests.kit.processes import ROOT, BrokenMachineError, run

CACHE: Final = ROOT / ".cache" / "pythons"
#: Debian's suite that has each.
SUITES: Final = {"3.13": "trixie", "3.14": "forky"}
PACKAGES: Final = (
    *("python{0}", "python{0}-minimal", "python{0}-venv", "libpython{0}-minimal", "libpython{0}-stdlib"),
    *("python3-pip-whl", "libc6", "libgcc-s1", "libbz2-1.0", "libexpat1", "libffi8", "liblzma5", "libncursesw6"),
    *("libreadline8t64", "libsqlite3-0", "libssl3t64", "libtinfo6", "libuuid1", "libzstd1", "zlib1g"),
)
#: Where ensurepip of Debian has its wheels.
WHEELS: Final = "/usr/share/python-wheels/"


def unpacked_python(version: str) -> Path:
    """Its program, which works; unpacked unless that is done."""
    if version not in SUITES:
        raise BrokenMachineError(f"no suite of Debian has Python {version}")
    folder = CACHE / f"debian-{version}"
    program = folder / "usr" / "bin" / f"python{version}"
    if not works(program):
        unpack_packages(folder, SUITES[version], *(name.format(version) for name in PACKAGES))
        unpack_packages(CACHE / "patchelf", "bookworm", "patchelf")
        (loader,) = folder.glob("usr/lib/*/ld-linux-*.so.*")
        set_up = ("--set-interpreter", str(loader), "--force-rpath", "--set-rpath", str(loader.parent))
        run(str(CACHE / "patchelf" / "usr" / "bin" / "patchelf"), *set_up, str(program))
        for file in (folder / "usr" / "lib" / f"python{version}").glob("_sysconfigdata_*.py"):
            file.write_text(file.read_text().replace(f"'{WHEELS}'", f"'{folder}{WHEELS}'"))
    return program


def works(program: Path) -> bool:
    """Whether it runs, which it does not where the folder was moved."""
    return program.exists() and run(program, "-c", "import ensurepip, ssl", check=False).code == 0


def main() -> None:
    try:
        print(unpacked_python(sys.argv[1]))  # noqa: T201 - a command
    except BrokenMachineError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
