"""The health check of a container, at little more than what it costs to start Python.

Asked twice a minute, reading the settings, and importing what that needs, was half of an idle eventwatch's cost.
So this asks the eventwatch that runs here without them: the one process of the same user that is `eventwatch run`
with the variables, the folder and the files that we have, and so the settings that we would read. That it listens
where it is asked is the kernel's word (/proc), before and after.

Contract: imports the standard library, and nothing that imports more. It answers only what is certain and good;
wherever it cannot, as with two of them, with none, with one that is not ready, over TLS, or on a system without
/proc, the whole command does.
"""

from __future__ import annotations

import json
import os
import socket
import sys

from eventwatch.core.readiness import is_standby, summary

#: Seconds for an answer; less than the time that Docker gives the whole check.
DEADLINE = 4.0
#: The header by which an answer says whose it is: a process id, and what `probe.identity` says.
IDENTITY = "X-Eventwatch"
_SETTINGS = (b"EVENTWATCH_", b"DB_", b"DOCKER_")
#: How Linux says that a socket listens.
LISTENING = "0A"
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - everywhere includes here
#: Bytes of an answer.
_LONGEST = 1_000_000


def ask_nearby() -> str | None:
    """What to say of the eventwatch that runs here if it is ready or standing by; None when this cannot tell."""
    try:
        # What started it, such as an init, has the same words, and does not listen.
        ours = filter(_is_ours, map(int, filter(str.isdigit, os.listdir("/proc"))))
        listening = [(pid, *where) for pid in ours if (where := _listens(pid)) is not None]
        if len(listening) != 1:
            return None
        [(pid, descriptor, address)] = listening
        before = os.readlink(descriptor)
        answer = _ask(address)
        if os.readlink(descriptor) != before:
            return None
        said = _understood(answer, pid)
        return said if said.isprintable() else None
    except (OSError, ValueError, LookupError):
        return None


def _is_ours(pid: int) -> bool:
    """Whether a process is `eventwatch run` with the settings that we would read."""
    place = f"/proc/{pid}"
    try:
        with open(f"{place}/cmdline", "rb") as file:
            words = file.read().split(b"\0")[:-1]
        if words[-1:] != [b"run"] or words[-2].rpartition(b"/")[2] != b"eventwatch":
            return False
        with open(f"{place}/environ", "rb") as file:
            variables = dict(line.split(b"=", 1) for line in file.read().split(b"\0") if b"=" in line)
        return (
            os.stat(place).st_uid == os.getuid()
            and _settings_in(variables) == _settings_in(dict(os.environb))
            and all(
                os.readlink(f"{place}/{what}") == os.readlink(f"/proc/self/{what}") for what in ("cwd", "ns/mnt")
            )
        )
    except (OSError, LookupError):  # it ended meanwhile, or is none of ours
        return False


def _settings_in(variables: dict[bytes, bytes]) -> dict[bytes, bytes]:
    return {name: value for name, value in variables.items() if name.startswith(_SETTINGS)}


def _listens(pid: int) -> tuple[str, tuple[str, int]] | None:
    """A process's descriptor that listens, and where; None if there is none."""
    sockets = {}
    for number in os.listdir(f"/proc/{pid}/fd"):
        descriptor = f"/proc/{pid}/fd/{number}"
        try:
            sockets[os.readlink(descriptor)] = descriptor
        except FileNotFoundError:  # closed meanwhile
            continue
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        with open(f"/proc/self/net/{table}", encoding="ascii") as file:
            for row in map(str.split, file):
                if row[3] == LISTENING and f"socket:[{row[9]}]" in sockets:
                    return sockets[f"socket:[{row[9]}]"], _address(family, row[1])
    return None


def _address(family: int, written: str) -> tuple[str, int]:
    """An address as Linux writes it: words of the machine's own byte order."""
    address, _, port = written.partition(":")
    words = (bytes.fromhex(address[at : at + 8]) for at in range(0, len(address), 8))
    host = socket.inet_ntop(family, b"".join(word[:: -1 if sys.byteorder == "little" else 1] for word in words))
    return EVERYWHERE.get(host, host), int(port, 16)


def _ask(address: tuple[str, int]) -> bytes:
    with socket.create_connection(address, DEADLINE) as connection:
        connection.sendall(b"GET /readyz HTTP/1.0\r\n\r\n")
        answer = b""
        while len(answer) <= _LONGEST and (piece := connection.recv(65536)):
            answer += piece
    return answer


def _understood(answer: bytes, pid: int) -> str:
    """What an answer comes to. LookupError unless it is that process's, and good."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode("ascii").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    reasons = [str(reason) for reason in json.loads(body)]
    ready = status.split()[1] == "200"
    if headers[IDENTITY.lower()].split()[0] != str(pid) or not (ready or is_standby(reasons)):
        raise LookupError(pid)
    return summary(ready, reasons)
