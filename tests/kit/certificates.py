"""Certificates for a test's own servers and clients, made by openssl, good for two days."""

from __future__ import annotations

import ssl
from pathlib import Path

from tests.kit.processes import run


def make_certificates(folder: Path, address: str) -> None:
    """A CA (`ca.pem`), and what it has signed: a server at an IP address and a client.

    The server's are `server.crt`, `server.key` and both in `server.pem`; the client's have Docker's names,
    `cert.pem` and `key.pem`.
    """
    ca, key = folder / "ca.pem", folder / "ca.key"
    new_key = ("-newkey", "rsa:2048", "-nodes", "-subj")
    openssl("req", "-x509", "-days", "2", *new_key, "/CN=ca", "-keyout", key, "-out", ca)
    for name, signed, its_key, extension in (
        ("server", "server.crt", "server.key", f"subjectAltName=IP:{address}\nextendedKeyUsage=serverAuth"),
        ("client", "cert.pem", "key.pem", "extendedKeyUsage=clientAuth"),
    ):
        request, extensions = folder / f"{name}.csr", folder / f"{name}.ext"
        extensions.write_text(extension + "\n")
        openssl("req", *new_key, f"/CN={name}", "-keyout", folder / its_key, "-out", request)
        signing = ("-CA", ca, "-CAkey", key, "-CAcreateserial", "-extfile", extensions)
        openssl("x509", "-req", "-days", "2", "-in", request, *signing, "-out", folder / signed)
    (folder / "server.pem").write_text((folder / "server.key").read_text() + (folder / "server.crt").read_text())


def trusting(folder: Path) -> ssl.SSLContext:
    """What a client of the server needs. As Docker's instructions say, the CA names no key usage."""
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def openssl(*arguments: str | Path) -> None:
    run("openssl", *arguments)
