"""Asking the eventwatch that the settings describe whether it is ready, as a health check does.

A container's asks `eventwatch.http.nearby`, at a fraction of the cost; this is for what that leaves open.
"""

from __future__ import annotations

import hashlib
import http
import http.client
import ipaddress
import json
import os
import re
import socket
import ssl
from pathlib import Path
from typing import Final

from eventwatch.core.errors import EventwatchError
from eventwatch.core.text import path_of
from eventwatch.http.nearby import DEADLINE, EVERYWHERE, IDENTITY, LISTENING

#: Where Linux tells who listens, and how it says so.
_TABLES: Final = ("/proc/self/net/tcp", "/proc/self/net/tcp6")


def identity(watched: tuple[str, ...]) -> str:
    """What an eventwatch and its own health check say alike: what is watched, and the container they are in.

    `watched` is engine and database as the settings name them, without secrets: others can read the result.
    """
    try:
        place = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        place = ""
    return hashlib.sha256("\n".join((place, *watched)).encode()).hexdigest()[:16]


def ask_readiness(
    host: str, port: int, *, watched: tuple[str, ...], certificate: str | None = None
) -> tuple[bool, list[str]]:
    """Whether our own eventwatch, which listens there, is ready, and what it says.

    EventwatchError when none answers, or what answers is another program, another user's, or an eventwatch that
    watches something else. `certificate` is the file of the one that it must show; none asks without TLS.
    """
    host = EVERYWHERE.get(host, host)
    connection = http.client.HTTPConnection(host, port, timeout=DEADLINE)
    if certificate is not None:
        # The certificate is for a name that others use; here it is compared with the file.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        connection = http.client.HTTPSConnection(host, port, timeout=DEADLINE, context=context)
    try:
        connection.connect()
        _check_owner(connection.sock, host, port)
        if certificate is not None:
            _check_certificate(connection.sock, certificate, host, port)
        connection.request("GET", "/readyz")
        with connection.getresponse() as answer:
            _check_identity(answer.getheader(IDENTITY), watched, host, port)
            return answer.status == http.HTTPStatus.OK, [str(reason) for reason in json.load(answer)]
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise EventwatchError(f"no eventwatch answers at {host} port {port}: {error}") from None
    finally:
        connection.close()


def _check_identity(shown: str | None, watched: tuple[str, ...], host: str, port: int) -> None:
    found = re.fullmatch(r"([0-9]{1,20}) ([0-9a-f]{16})", shown or "")
    if found is None:
        raise EventwatchError(f"{host} port {port} is held by another program than eventwatch")
    if found[2] != identity(watched):
        raise EventwatchError(
            f"{host} port {port} is held by another eventwatch: pid {found[1]}, "
            "with another engine or database, or in another container"
        )


def _check_certificate(connection: socket.socket, file: str, host: str, port: int) -> None:
    text = path_of(file).read_text(encoding="ascii")
    begin, end = ssl.PEM_HEADER, ssl.PEM_FOOTER
    if begin not in text or end not in text:
        raise ValueError(f"{file} holds no certificate")
    first = text[text.index(begin) : text.index(end) + len(end)]
    shown = connection.getpeercert(binary_form=True) if isinstance(connection, ssl.SSLSocket) else None
    if shown != ssl.PEM_cert_to_DER_cert(first):
        raise EventwatchError(
            f"{host} port {port} shows another certificate than {file}: another program, or one started earlier"
        )


def _check_owner(connection: socket.socket, host: str, port: int) -> None:
    """Refuse what another user listens with, where the kernel tells (Linux). Root may start it, and may ask."""
    peer, own = connection.getpeername()[0], connection.getsockname()[0]
    if os.getuid() == 0 or peer != own:
        return
    address = ipaddress.ip_address(peer.partition("%")[0])
    words = [address.packed[at : at + 4][::-1].hex().upper() for at in range(0, len(address.packed), 4)]
    wanted = {f"{written}:{port:04X}" for written in ("".join(words), "0" * 8, "0" * 32)}
    for table in _TABLES:
        try:
            rows = Path(table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for row in map(str.split, rows):
            if row[3] == LISTENING and row[1] in wanted and int(row[7]) not in {0, os.getuid()}:
                raise EventwatchError(f"{host} port {port} is held by a program of another user (uid {row[7]})")
