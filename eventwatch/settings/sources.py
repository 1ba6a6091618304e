"""Where settings are written: the environment, `.env`, secret files, the manager's `DB_*`, Docker's contexts.

Why one source instead of pydantic-settings' several: a value keeps its name and place (file and line) up to the
error that cites it, a mistyped name is an error in every layer, and `DB_*` rank below all of ours.

Contract: the values by field, as texts; what is wrong with a source is passed on as a `SourceError` in their
place.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from dotenv.parser import parse_stream
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
)

from eventwatch.core.text import path_of, why_unreadable
from eventwatch.settings.docker_context import ContextError, current_context

PREFIX = "EVENTWATCH_"
_TEST_PREFIX = "EVENTWATCH_TEST_"
_DOCKER_NAMES = {"docker_tls_verify": "DOCKER_TLS_VERIFY", "docker_cert_path": "DOCKER_CERT_PATH"}
_CONTEXT_NAMES = ("DOCKER_CONTEXT", "DOCKER_CONFIG")
_MANAGER_NAMES = ("DB_HOST", "DB_PORT", "DB_USERNAME", "DB_PASSWORD", "DB_COLLECTION")
_OURS = re.compile(r"\b(EVENTWATCH_|DB_|DOCKER_(HOST|TLS_VERIFY|CERT_PATH|CONTEXT|CONFIG))")
_EMPTY_IS_OFF = frozenset({"EVENTWATCH_HTTP_LISTEN", "EVENTWATCH_REGISTER_LABEL"})
_HOST = re.compile(r"[\w.-]+|\[?([0-9A-Fa-f.]*:){2,}[0-9A-Fa-f.]*\]?")

#: Fields whose value may be in a file that `NAME_FILE` names, and appears nowhere.
SECRETS = frozenset({"mongo_url"})
MAX_PORT = 65535


# Of a line that cannot be read we tell ourselves, once, with the file's name.
logging.getLogger("dotenv.main").addHandler(logging.NullHandler())


class Located(str):
    """A value as it was written, with its name and place, so that an error can cite both."""

    __slots__ = ("name", "place")

    name: str
    place: str

    def __new__(cls, text: str, name: str, place: str) -> Self:
        """Keep the name of the variable, and `FILE:LINE` or nothing."""
        self = super().__new__(cls, text)
        self.name = name
        self.place = place
        return self


@dataclass(frozen=True)
class SourceError:
    """Something wrong with a source rather than with a value. Passed on as if it were a field named so."""

    message: str
    place: str = ""


_Found = dict[str, Located]
_Problems = dict[str, SourceError]


def env_name(field: str) -> str:
    """Name the environment variable that sets a field of `Settings`."""
    return _DOCKER_NAMES.get(field, PREFIX + field.upper())


def _names(field: str) -> tuple[str, ...]:
    return (env_name(field), "DOCKER_HOST") if field == "docker_host" else (env_name(field),)


def _file_names() -> dict[str, str]:
    return {env_name(field) + "_FILE": env_name(field) for field in SECRETS}


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the known name that is most like this one."""
    by_stem = {candidate.upper().removeprefix(PREFIX): candidate for candidate in known}
    stem = name.upper().removeprefix(PREFIX)
    return by_stem[difflib.get_close_matches(stem, by_stem, n=1, cutoff=0.0)[0]]


def _unknown_names(layer: _Found, fields: Iterable[str]) -> Iterator[tuple[str, SourceError]]:
    known = [*(env_name(field) for field in fields), *_file_names()]
    for name, text in layer.items():
        # EVENTWATCH_TEST_* are the pytest plugin's, whose tests may run beside the code that reads settings.
        if name.upper().startswith(PREFIX) and not name.startswith(_TEST_PREFIX) and name not in known:
            yield (
                name,
                SourceError(f"unknown setting, the nearest right name is {nearest(name, known)}", text.place),
            )


def _env_file_lines(path: Path, encoding: str | None) -> tuple[dict[str, int], list[int]]:
    """Line number of each name in an env file, and of each line with a name of ours that sets nothing."""
    lines: dict[str, int] = {}
    broken: list[int] = []
    with path.open(encoding=encoding) as stream:
        for binding in parse_stream(stream):
            text = binding.original.string
            line = binding.original.line + len(text[: len(text) - len(text.lstrip())].splitlines())
            if binding.key is not None:
                lines[binding.key] = line
            ours = _OURS.search(text) is not None
            if ours and (binding.error or (binding.key is not None and binding.value is None)):
                broken.append(line)
    return lines, broken


def _from_environment() -> _Found:
    return {name: Located(value, name, "") for name, value in os.environ.items()}


def _from_env_file(source: DotEnvSettingsSource) -> tuple[_Found, _Problems]:
    files = source.env_file
    paths = [files] if isinstance(files, (str, os.PathLike)) else files or []
    places: dict[str, str] = {}
    problems: _Problems = {}
    for path in (path_of(file) for file in paths):
        if path.is_file():  # a pipe can be read once only, and that was done
            lines, broken = _env_file_lines(path, source.env_file_encoding)
            places |= {name: f"{path}:{line}" for name, line in lines.items()}
            problems |= {f"{path}:{line}": SourceError("cannot be parsed as NAME=value") for line in broken}
    found = {
        name: Located(value, name, places.get(name, ""))
        for name, value in source.env_vars.items()
        if value is not None
    }
    return found, problems


def _from_secret_files(source: SecretsSettingsSource, known: Iterable[str]) -> tuple[_Found, _Problems]:
    folders = source.secrets_dir
    paths = [folders] if isinstance(folders, (str, os.PathLike)) else folders or []
    names = frozenset(known)
    found: _Found = {}
    problems: _Problems = {}
    for folder in (path_of(path) for path in paths):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            name = path.name.upper()
            if name in names and path.is_file():
                _read_secret(name, path, found, problems)
            elif name.startswith(PREFIX) and not path.is_dir():
                nearest_name = nearest(name, sorted(n for n in names if n.startswith(PREFIX)))
                problems[name] = SourceError(
                    f"unknown setting, the nearest right name is {nearest_name}", str(path)
                )
    return found, problems


def _pointed_at(layers: Iterable[_Found]) -> frozenset[Path]:
    """The files that settings name: those may be called anything."""
    values = (text for layer in layers for name, text in layer.items() if name.endswith("_FILE"))
    return frozenset(path_of(text) for text in values if text)


def _read_secret(name: str, path: Path, found: _Found, problems: _Problems) -> None:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        problems[name] = SourceError("cannot be read, it is not UTF-8 text", str(path))
    except (OSError, ValueError) as error:
        problems[name] = SourceError(f"cannot be read, {why_unreadable(error)}", str(path))
    else:
        found[name] = Located(text, name, str(path))


def _follow_file_names(layer: _Found) -> tuple[_Found, _Problems]:
    """Replace `NAME_FILE` by `NAME` with the content of that file."""
    found = dict(layer)
    problems: _Problems = {}
    for file_name, name in _file_names().items():
        pointer = found.pop(file_name, None)
        if not pointer:
            continue
        if found.get(name):
            problems[file_name] = SourceError(f"set either this or {name}, not both", pointer.place)
            continue
        _read_secret(name, path_of(pointer), found, problems)
        if found.get(name) == "":
            problems[name] = SourceError("the file is empty", found[name].place)
    return found, problems


def _is_set(text: Located) -> bool:
    return bool(text) or text.name in _EMPTY_IS_OFF


def _manager_database(given: Mapping[str, Located]) -> tuple[_Found, _Problems]:
    """Build the URL and the database name from the manager's own `DB_*` names."""
    host, port = given["DB_HOST"], given.get("DB_PORT", Located("27017", "DB_PORT", ""))
    username, password = given.get("DB_USERNAME"), given.get("DB_PASSWORD")
    problems: _Problems = {}
    if file := given.get("DB_PASSWORD_FILE"):
        read: _Found = {}
        if password:
            problems["DB_PASSWORD_FILE"] = SourceError("set either this or DB_PASSWORD, not both", file.place)
        else:
            _read_secret("DB_PASSWORD", path_of(file), read, problems)
            password = read.get("DB_PASSWORD")
    if _HOST.fullmatch(host) is None:
        problems["DB_HOST"] = SourceError("must be one host name or address, without port", host.place)
    if re.fullmatch(r"[0-9]{1,5}", port) is None or not 1 <= int(port) <= MAX_PORT:
        problems["DB_PORT"] = SourceError(f"must be between 1 and {MAX_PORT}, got {str(port)!r}", port.place)
    if username and not password and "DB_PASSWORD" not in problems:
        problems["DB_PASSWORD"] = SourceError("must be set when DB_USERNAME is", username.place)
    if password and not username:
        problems["DB_USERNAME"] = SourceError("must be set when DB_PASSWORD is", password.place)
    login = f"{quote(username, safe='')}:{quote(password, safe='')}@" if username and password else ""
    address = f"[{host}]" if ":" in host and not host.startswith("[") else host
    found = {"mongo_url": Located(f"mongodb://{login}{address}:{port}/", "DB_HOST", host.place)}
    if "DB_COLLECTION" in given:
        found["mongo_database"] = given["DB_COLLECTION"]
    return ({} if problems else found), problems


def _docker_context(given: Mapping[str, Located]) -> tuple[_Found, _Problems]:
    """Engine and certificates of the Docker context that is current, which has none of the environment's."""
    named, folder = (given.get(name, Located("", name, "")) for name in _CONTEXT_NAMES)
    source = named.name if named else folder.name
    try:
        context = current_context(named, folder)
    except ContextError as error:
        return {}, {source: SourceError(str(error), error.place)}
    if context is None:
        return {}, {}
    return {
        "docker_host": Located(context.host, source, context.place),
        "docker_tls_verify": Located("1" if context.tls else "", source, context.place),
        "docker_cert_path": Located(context.tls, source, context.place),
    }, {}


class LayeredSource(PydanticBaseSettingsSource):
    """Environment, `.env` and secret files as one source, so that `DB_*` ranks below all of ours."""

    def __init__(
        self,
        settings_cls: type[BaseSettings],
        env_file: DotEnvSettingsSource,
        secret_files: SecretsSettingsSource,
    ) -> None:
        super().__init__(settings_cls)
        self._env_file = env_file
        self._secret_files = secret_files

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Part of the base class; unused, for values are looked up by all their names at once."""
        raise NotImplementedError

    def __call__(self) -> dict[str, Any]:
        """Read every place; the first one that sets a field wins."""
        fields = self.settings_cls.model_fields
        known = {*(name for field in fields for name in _names(field)), *_CONTEXT_NAMES, *_MANAGER_NAMES}
        env_file, problems = _from_env_file(self._env_file)
        secret_files, unreadable = _from_secret_files(self._secret_files, known)
        layers = (secret_files, env_file, _from_environment())  # the last one wins
        named = _pointed_at(layers)
        problems |= {name: problem for name, problem in unreadable.items() if Path(problem.place) not in named}
        given: _Found = {}
        for layer in layers:
            found, unfollowed = _follow_file_names(layer)
            problems |= unfollowed | dict(_unknown_names(layer, fields))
            given |= {name: text for name, text in found.items() if _is_set(text)}

        values: _Found = {}
        for field in fields:
            text = next((given[name] for name in _names(field) if name in given), None)
            if text is not None:
                values[field] = text
        if "DB_HOST" in given and "mongo_url" not in values and "mongo_url" not in self.current_state:
            from_manager, unusable = _manager_database(given)
            problems |= unusable
            values = from_manager | values
        if "docker_host" not in values and "docker_host" not in self.current_state:
            from_context, unusable = _docker_context(given)
            problems |= unusable
            values |= from_context
        return {**values, **problems}
