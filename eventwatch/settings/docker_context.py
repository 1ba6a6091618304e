"""Which engine the `docker` command would talk to: its contexts, as it keeps them in files.

Contract: the context is the one that `DOCKER_CONTEXT` names, else `currentContext` of `config.json` in
`DOCKER_CONFIG` (`~/.docker`); `default`, or none, is no context. Its engine is in
`contexts/meta/<digest>/meta.json`, its certificates are in `contexts/tls/<digest>/docker/`; the digest is the
SHA-256 of its name. What is written there and cannot be used is an error: the local engine in its place would be
the wrong one. Nothing but these files is read, and none is waited for, or read beyond what such a file has.

Not promised: that a change of the context is noticed after the start.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from eventwatch.core.text import path_of, printable, why_unreadable

#: The name that stands for no context.
DEFAULT: Final = "default"
#: Bytes of a file; real ones have less than a hundredth of that.
LONGEST_FILE: Final = 1024 * 1024
#: Characters shown of a name.
NAMED: Final = 80


class ContextError(ValueError):
    """A context that cannot be followed. `place` is the file that it was found in, or should have been."""

    def __init__(self, message: str, place: Path | str = "") -> None:
        super().__init__(message)
        self.place = printable(str(place))


@dataclass(frozen=True, slots=True)
class DockerContext:
    """An engine. `host` is its URL, nothing for Docker's own default; `tls`: the folder of its certificates."""

    name: str
    host: str
    tls: str
    place: str


def current_context(named: str = "", folder: str = "") -> DockerContext | None:
    """The context that is current, None without one; `named` is `DOCKER_CONTEXT`, `folder` is `DOCKER_CONFIG`.

    Raises ContextError.
    """
    try:
        home = path_of(folder) if folder else Path.home() / ".docker"
    except RuntimeError:  # nobody's: a user whom the system does not know, as in many a container
        if named in {"", DEFAULT}:
            return None
        shown = printable(named, NAMED)
        raise ContextError(f"there is no home with Docker context {shown}: set DOCKER_CONFIG") from None
    place = home / "config.json"
    name = named or _current_name(place, chosen=bool(folder))
    if name in {"", DEFAULT}:
        return None
    shown = printable(name, NAMED)
    digest = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()
    meta = home / "contexts" / "meta" / digest / "meta.json"
    try:
        found = _read(meta)
    except (FileNotFoundError, NotADirectoryError):
        raise ContextError(
            f"there is no Docker context {shown}: choose another by `docker context use`, or set DOCKER_HOST", meta
        ) from None
    except OSError as error:
        raise ContextError(f"Docker context {shown} cannot be read, {why_unreadable(error)}", meta) from None
    endpoint = _object(_object(found, meta).get("Endpoints"), meta).get("docker")
    endpoint = _object(endpoint, meta)
    host = endpoint.get("Host", "")
    if not isinstance(host, str):
        raise ContextError(f"Docker context {shown} has no URL as its Host", meta)
    tls = (
        _certificates(home / "contexts" / "tls" / digest / "docker") if host.startswith(("tcp:", "https:")) else ""
    )
    if endpoint.get("SkipTLSVerify") and host.startswith(("tcp:", "https:")):
        raise ContextError(
            f"Docker context {shown} skips the verification of its engine, which eventwatch does not: "
            "make it with the engine's ca.pem, or name the engine by DOCKER_HOST",
            meta,
        )
    return DockerContext(name, host, tls, str(meta))


def _current_name(config: Path, *, chosen: bool) -> str:
    try:
        found = _read(config)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        if not chosen and _is_out_of_sight(config):
            return ""
        raise ContextError(f"Docker's settings cannot be read, {why_unreadable(error)}", config) from None
    name = _object(found, config).get("currentContext", "")
    if not isinstance(name, str):
        raise ContextError("Docker's settings have a currentContext that is no name", config)
    return name


def _is_out_of_sight(config: Path) -> bool:
    """Whether not even the folder may be looked into: a service that is kept out of homes, and means none."""
    try:
        config.stat()
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def _read(path: Path) -> Any:
    """The JSON of a file. Raises OSError when it cannot be read, ContextError for what is no such file."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # no writer of a pipe is waited for
    try:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise ContextError("is no file, so it does not tell Docker's context", path)
        text = os.read(number, LONGEST_FILE + 1)
    finally:
        os.close(number)
    if len(text) > LONGEST_FILE:
        raise ContextError(f"is longer than {LONGEST_FILE} bytes, which Docker's settings are not", path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ContextError("is no JSON, so it does not tell Docker's context", path) from None


def _object(found: object, path: Path) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ContextError("is no file of Docker's: an object is missing in it", path)
    return found


def _certificates(folder: Path) -> str:
    """The folder, if it has any certificates; those that it lacks are told of where they are used."""
    try:
        return str(folder) if any(folder.iterdir()) else ""
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:
        raise ContextError(
            f"the certificates of Docker's context cannot be read, {why_unreadable(error)}", folder
        ) from None
