"""Who is answered: by which host name, from which site, with which token, over which TLS.

Contract:
- A host is an IP address, `localhost`, the host that is listened on, or one of EVENTWATCH_HTTP_ALLOWED_HOSTS. Any
  other name could be a foreign page's that resolves to us (DNS rebinding).
- A browser's request on behalf of another site is refused, save opening the status page itself.
- With a token, everything but the probes asks for it: as a bearer token, or as the password of any user.
- Whole container ids are shown to those who have shown a token, and to whoever asks for a node by its whole id.
  Without a token no answer depends on a digit that is not shown, so that none can be guessed one by one.

Not promised: protection from other programs on the same machine without a token; that a renewed certificate or
token is noticed before the next start.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
import re
import socket
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Self
from urllib.parse import urlsplit

from eventwatch.core.errors import ConfigError
from eventwatch.core.text import path_of, why_unreadable

#: Bytes of a token file; more is no token but a mistake.
LONGEST_TOKEN: Final = 4096
#: What names a container, a checker or an engine in a reason.
_ID: Final = re.compile(
    r"\b(?:[0-9a-f]{12,64}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[A-Z0-9]{4}(?::[A-Z0-9]{4}){11})\b"
)

#: Digits of a container's id by which people name it, and which everybody may read.
SHORT_ID: Final = 12
#: What a note about a fleet says before it names hosts and engines.
_OTHERS = re.compile(r"(fleet: [^:]*):.*", re.DOTALL)
_WHOLE_ID: Final = re.compile(rb"\b([0-9a-f]{%d})[0-9a-f]{%d}\b" % (SHORT_ID, 64 - SHORT_ID))


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Who is answered. `token` and `tls` are None where none is asked for."""

    hosts: frozenset[str] = frozenset()
    token: bytes | None = None
    tls: ssl.SSLContext | None = None

    @classmethod
    def load(
        cls,
        *,
        hosts: Iterable[str] = (),
        token_file: str | None = None,
        cert_file: str | None = None,
        key_file: str | None = None,
    ) -> Self:
        """Read the files. ConfigError names the setting and the file of one that cannot be used."""
        return cls(
            hosts=frozenset(_bare(host) for host in hosts),
            token=read_token(token_file) if token_file else None,
            tls=load_tls(cert_file, key_file) if cert_file and key_file else None,
        )

    def serves_host(self, host: str) -> bool:
        """Whether a request with this Host header is for us. Without one it is from no browser."""
        name = _bare(_without_port(host))
        return not name or name == "localhost" or is_address(name) or name in self.hosts

    def accepts_token(self, authorization: str) -> bool:
        """Whether an Authorization header bears the token, as such or as a password. In constant time."""
        if self.token is None:
            return True
        scheme, _, credentials = authorization.strip().partition(" ")
        given = b""
        if scheme.lower() == "bearer":
            given = credentials.strip().encode(errors="surrogateescape")
        elif scheme.lower() == "basic":
            try:
                given = base64.b64decode(credentials.strip(), validate=True).partition(b":")[2]
            except (binascii.Error, ValueError):
                given = b""
        return hmac.compare_digest(given, self.token)


def is_foreign(headers: Mapping[str, str], path: str) -> bool:
    """Whether a browser asks on behalf of another site; following a link to the status page is no such request."""
    site, mode = headers.get("Sec-Fetch-Site", ""), headers.get("Sec-Fetch-Mode", "")
    if site in {"cross-site", "same-site"} and not (mode == "navigate" and path == "/"):
        return True
    origin = headers.get("Origin")
    if origin is None:
        return False
    try:
        return urlsplit(origin).netloc.lower() != headers.get("Host", "").lower()
    except ValueError:  # no URL
        return True


def without_ids(reason: str) -> str:
    """A reason for those who may not know which container, checker, engine or host it is about."""
    return _ID.sub("...", _OTHERS.sub(r"\1", reason))


def short_ids(text: bytes) -> bytes:
    """The text with each whole container id cut to its first twelve digits, by which people name it."""
    return _WHOLE_ID.sub(rb"\1", text)


def is_address(host: str) -> bool:
    """Whether this is an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address or name."""
    if not is_address(host):
        return _bare(host) == "localhost"
    address = ipaddress.ip_address(host)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def page_url(host: str, port: int, *, names: Iterable[str], tls: bool) -> str:
    """The address of the status page for those on other machines; empty where only this one can reach it.

    `names` are those that may be asked for. What listens on all addresses and has no name is told by the address
    with which this machine would send something; nothing is sent.
    """
    if not port or is_loopback(host):
        return ""
    if is_address(host) and ipaddress.ip_address(host).is_unspecified:
        host = next((name for name in sorted(names) if not is_address(name) and not is_loopback(name)), "")
        host = host or _own_address()
    scheme = "https" if tls else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/" if host else ""


def _own_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a datagram socket only looks up its route
            return str(probe.getsockname()[0])
        except OSError:
            return ""


def read_token(file: str) -> bytes:
    """The token in a file: one line of visible ASCII characters."""
    setting = "EVENTWATCH_HTTP_TOKEN_FILE"
    path = path_of(file)
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{setting}: {file} is no file")
        with path.open("rb") as stream:
            token = stream.read(LONGEST_TOKEN + 1).strip()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting}: {file} cannot be read, {why_unreadable(error)}") from None
    if not token:
        raise ConfigError(f"{setting}: {file} is empty")
    if len(token) > LONGEST_TOKEN or re.fullmatch(rb"[!-~]+", token) is None:
        raise ConfigError(f"{setting}: {file} must hold one line of visible ASCII characters, without spaces")
    return token


def load_tls(cert_file: str, key_file: str) -> ssl.SSLContext:
    """TLS with the certificate chain and the key in these PEM files."""
    files = (("EVENTWATCH_HTTP_TLS_CERT_FILE", cert_file), ("EVENTWATCH_HTTP_TLS_KEY_FILE", key_file))
    for setting, file in files:
        try:
            if not path_of(file).read_bytes().strip():
                raise ConfigError(f"{setting}: {file} is empty")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{setting}: {file} cannot be read, {why_unreadable(error)}") from None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.set_alpn_protocols(["http/1.1"])
    cert, key = (str(path_of(file)) for _, file in files)
    try:
        context.load_cert_chain(cert, key, password="")  # nobody is there to be asked for one
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or "no PEM, or a key with a password"
        raise ConfigError(
            f"{files[0][0]} and {files[1][0]}: {cert_file} and {key_file} are no certificate and its key, {reason}"
        ) from None
    return context


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if re.search(r":[0-9]*$", host) and host.count(":") == 1 else host


def _bare(host: str) -> str:
    return host.strip().lower().removesuffix(".")
