"""What an operator may choose: one model, read from the environment, `.env` and secret files.

Why: a wrong setting here deletes documents or stops containers, so a value that is not understood is an error
at start, never a silent default. A mistyped name is found as surely as a mistyped value.

Contract:
- Every setting is `EVENTWATCH_` plus the field's name in capitals. Names are matched exactly; any other name
  that starts with `EVENTWATCH_` is an error. Other names belong to others and are ignored, save Docker's own
  (`DOCKER_HOST`, `DOCKER_TLS_VERIFY`, `DOCKER_CERT_PATH`, `DOCKER_CONTEXT`, `DOCKER_CONFIG`) and the manager's
  `DB_*`.
- First found wins: keyword argument, environment, `.env`, secret file, default. An empty value counts as not
  set, except where empty means off.
- `Settings(...)` raises pydantic's `ValidationError`; `load_settings` raises `ConfigError` with one line that
  names each wrong setting and where it was written.
- No secret appears in a message, a `repr` or `effective()`.

Not promised: that the database or the engine can be reached (`eventwatch doctor` tells), nor that a change to
a file is noticed after the start.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self, TypedDict, Unpack

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    SecretStr,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from eventwatch.core.durations import format_duration, parse_duration
from eventwatch.core.errors import ConfigError
from eventwatch.core.text import path_of
from eventwatch.settings.sources import (
    MAX_PORT,
    PREFIX,
    SECRETS,
    LayeredSource,
    Located,
    SourceError,
    env_name,
    nearest,
)

#: The value of `mongo_url` that asks for a private mongod.
EMBEDDED = "embedded"
#: Seconds. What lasts longer on record is no lease.
LONGEST_LEASE = 1800.0


# --- secrets in text ---------------------------------------------------------------------------------------

# Greedy up to the last "@": a password with an unescaped "/", "?" or "@" must not leak either. The price is
# that a URL with an "@" after its path loses more than its password.
_USERINFO = re.compile(r"(\w[\w+.-]*://[^:]*):.*@", re.DOTALL)
_SECRET_PARAMETER = re.compile(r"([?&;][^=&;]*(?:pass|secret|token)[^=&;]*=)[^&]*", re.IGNORECASE)
#: More than none, and no more than a machine could do.
_THRESHOLD = r"(?=.*[1-9])[0-9]{1,12}(\.[0-9]{1,6})?"
_SECRET_PROPERTY = re.compile(r"((?:pass|secret|token)\w*(?::|%3A))[^&,]*", re.IGNORECASE)


def mask_url(url: str) -> str:
    """Hide the password of a URL, and secrets among its query parameters. Other text comes back unchanged."""
    scheme, mark, rest = url.partition("://")
    if not mark:
        return url
    masked = _USERINFO.sub(r"\1:***@", scheme + mark + rest)
    return _SECRET_PROPERTY.sub(r"\1***", _SECRET_PARAMETER.sub(r"\1***", masked))


_LOOSE_USERINFO = re.compile(r"(^|[/'\"])([^:/@\s'\"]*):[^\n]*@")


def _masked(text: str) -> str:
    """Also hide what looks like the password of a URL that is none, as its writer mistyped it."""
    masked = mask_url(text)
    return _LOOSE_USERINFO.sub(r"\1\2:***@", masked) if masked == text else masked


# --- the rules of single values ----------------------------------------------------------------------------


def _expects(rule: str) -> WrapValidator:
    """Say one rule that a user understands in place of pydantic's several messages."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(f"must be {rule}") from None

    return WrapValidator(check)


def _matching(pattern: str, rule: str, *, flags: int = 0) -> AfterValidator:
    compiled = re.compile(pattern, flags)

    def check(text: str) -> str:
        if compiled.fullmatch(text) is None:
            raise ValueError(f"must be {rule}")
        return text

    return AfterValidator(check)


def _check_mongo_url(secret: SecretStr) -> SecretStr:
    url = secret.get_secret_value().strip()
    if url != EMBEDDED and re.fullmatch(r"mongodb(\+srv)?://[^\s/?].*", url) is None:
        raise ValueError(f"must be mongodb://HOST..., mongodb+srv://HOST... or {EMBEDDED}")
    return SecretStr(url)


def _parse_address(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\s:/\[\]]+)):([0-9]{1,5})", text, re.ASCII)
    if match is None or int(match[3]) > MAX_PORT:
        raise ValueError("must be HOST:PORT or [IPV6]:PORT such as 127.0.0.1:9471, or empty for off")
    return match[1] or match[2], int(match[3])


def _check_address(text: str) -> str:
    _parse_address(text)
    return text


#: What a node works by, and from how much on: the share of one CPU, the bytes a second.
ACTIVITIES: Final = {"cpu": 0.05, "network": 1024.0}


def _parse_activity(text: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for written in text.lower().split(",") if text.strip() else ():
        kind, _, threshold = (part.strip() for part in written.partition("="))
        if kind not in ACTIVITIES or kind in found or (threshold and not re.fullmatch(_THRESHOLD, threshold)):
            raise ValueError(
                "must be cpu, network or both, with thresholds or without, as in cpu=0.05,network=1024"
            )
        found[kind] = float(threshold) if threshold else ACTIVITIES[kind]
    return found


def _check_activity(text: str) -> str:
    _parse_activity(text)
    return text.replace(" ", "").lower()


def _check_host_names(text: str) -> str:
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    if not all(re.fullmatch(r"[a-z0-9_.-]{1,255}", name, re.ASCII) for name in names):
        raise ValueError("must be host names without port, separated by commas")
    return ",".join(names)


def _none_if_empty(value: object) -> object:
    return None if value == "" else value


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


def _docker_flag(value: object) -> object:
    return bool(value) if isinstance(value, str) else value


Duration = Annotated[float, BeforeValidator(parse_duration)]
"""Seconds. Reads what `parse_duration` reads."""

_Flag = Annotated[bool, _expects("true or false")]
_Port = Annotated[int, Field(ge=1, le=MAX_PORT), _expects(f"between 1 and {MAX_PORT}")]
_Positive = Annotated[int, Field(ge=1), _expects("a whole number, at least 1")]
_Limit = Annotated[int, Field(ge=0), _expects("a whole number, at least 0")]
_Optional = BeforeValidator(_none_if_empty)
_LogLevel = Annotated[
    Literal["TRACE", "DEBUG", "INFO", "SUCCESS", "WARNING", "ERROR", "CRITICAL"],
    BeforeValidator(_upper),
    _expects("TRACE, DEBUG, INFO, SUCCESS, WARNING, ERROR or CRITICAL"),
]
_LogFormat = Annotated[Literal["console", "json"], _expects("console or json")]
_DatabaseName = Annotated[
    str, _matching(r"[^/\\. \"$\0]{1,63}", 'a database name: 1 to 63 characters without space, / \\ . " or $')
]
_NetworkName = Annotated[str, _matching(r"\S+", "the name of a Docker network")]
_Label = Annotated[str, _matching(r"[^\s=]+(=.*)?", "a label, KEY or KEY=VALUE, or empty for off")]
_DockerHost = Annotated[
    str, _matching(r"(unix|tcp|https?|ssh)://\S+", "a URL of unix://, tcp://, http://, https:// or ssh://")
]
_Address = Annotated[str, AfterValidator(_check_address)]


# --- the model ---------------------------------------------------------------------------------------------


_Time = float | str | timedelta
_Switch = bool | str
_Number = int | str


class Keywords(TypedDict, total=False):
    """The keywords of `Settings`, and what each may be, for type checkers; a test compares the two."""

    mongo_url: str | SecretStr
    mongo_database: str
    docker_host: str | None
    docker_tls_verify: _Switch
    docker_cert_path: str | None
    node_network: str
    node_port: _Number
    health_check: _Switch
    idle_timeout: _Time
    idle_activity: str
    sweep_interval: _Time
    settle_delay: _Time
    orphan_grace: _Time
    stop_timeout: _Time
    stop_concurrency: _Number
    delete_limit: _Number | None
    stop_limit: _Number | None
    dry_run: _Switch
    register_label: str | None
    stop_nodes_on_exit: _Switch
    lease_duration: _Time
    drain_timeout: _Time
    http_listen: str | None
    http_allowed_hosts: str
    http_token_file: str | None
    http_tls_cert_file: str | None
    http_tls_key_file: str | None
    history: _Switch
    log_level: str
    log_format: str
    # Where the others are read from, as pydantic-settings has it.
    _env_file: str | Path | None
    _secrets_dir: str | Path | None


#: What decides whether a document agrees with its container, and when a node is idle.
JUDGING: Final = ("node_network", "node_port", "health_check", "idle_timeout", "register_label")


class Settings(BaseSettings):
    """All settings of eventwatch, checked. Cannot be changed once made; durations are seconds."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=".env",
        env_file_encoding="utf-8-sig",
        secrets_dir="/run/secrets",
        case_sensitive=True,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
        validate_default=True,
    )

    if TYPE_CHECKING:  # what a variable may be, a keyword may be too: `idle_timeout="30m"`

        def __init__(self, **values: Unpack[Keywords]) -> None: ...

    mongo_url: Annotated[SecretStr, AfterValidator(_check_mongo_url)] = SecretStr(EMBEDDED)
    """Where the node documents live: mongodb://..., mongodb+srv://... or `embedded`, a private mongod that is
    started and stopped with eventwatch and keeps its data in the user's state folder. Embedded by default, so
    that a first try needs no database. A secret: EVENTWATCH_MONGO_URL_FILE may name a file that holds it."""

    mongo_database: _DatabaseName = "TSM"
    """Name of the database that holds ToolServerNode and NodeChecker. TSM is the name the manager uses; a
    database in the path of the URL serves the login only."""

    docker_host: Annotated[_DockerHost | None, _Optional] = None
    """URL of the Docker Engine to watch. Empty: Docker's own DOCKER_HOST, without that the current Docker context
    (DOCKER_CONTEXT, or what `docker context use` chose), and without one the local socket: eventwatch looks where
    the docker command looks. ssh://[USER@]HOST[:PORT] needs the ssh command here, a key that needs no password,
    and docker there."""

    docker_tls_verify: Annotated[_Flag, BeforeValidator(_docker_flag)] = False
    """Docker's own name: any text means on, as it does for the docker command. Checks the certificate of an
    engine on tcp://. Off by default because the local socket has none."""

    docker_cert_path: Annotated[str | None, _Optional] = None
    """Docker's own name: folder with ca.pem, cert.pem and key.pem for an engine behind TLS. Empty by default,
    as for the local socket."""

    node_network: _NetworkName = "tool-server-network"
    """Name of the Docker network on which nodes are reached; a node's ip is its address there. The default is
    the manager's network."""

    node_port: _Port = 31942
    """Port on which a node serves, when the container exposes it or exposes nothing. The default is the one
    that the manager's node image serves on."""

    health_check: _Flag = True
    """Whether to keep the health field. On, because a manager that trusts a stale health sends work to a node
    that cannot do it; turn it off when something else writes that field."""

    idle_timeout: Duration = 30 * 60.0
    """A running node without a request for this long is stopped; 0 turns that off. 30 minutes outlasts the
    pauses inside one session, and still frees a forgotten node the same hour."""

    idle_activity: Annotated[str, AfterValidator(_check_activity)] = ""
    """What else than a request keeps a node from being idle: cpu, network, or both separated by a comma, each
    with the share of one CPU or the bytes a second from which on a node works, as in `cpu=0.05,network=1024`,
    which are the defaults. A node past its idle time is asked for its usage twice, 3 seconds apart, before it is
    stopped; work counts as a request now, and a node whose usage cannot be read is not stopped. Off, as it needs
    one more permission."""

    sweep_interval: Duration = 30.0
    """Time between two full passes over all documents. Events do the work in milliseconds; the sweep bounds
    how long anything they could not tell stays wrong, and idle nodes are looked for at the same time."""

    settle_delay: Duration = 0.25
    """A node is inspected once it has been quiet for this long. Long enough for the handful of events of one
    stop or restart to become one inspection, short enough to be right in well under a second. Must be less
    than the sweep interval."""

    orphan_grace: Duration = 30.0
    """How long events of a container without a document are remembered, since a manager inserts the document
    after the container has started. 30 seconds covers a slow manager without hoarding foreign containers."""

    stop_timeout: Duration = 10.0
    """Time a node gets to end by itself before the engine kills it; 0 kills at once. 10 seconds is Docker's
    own default."""

    stop_concurrency: _Positive = 10
    """How many nodes are stopped at once. Each stop holds a connection to the engine for up to the stop
    timeout; ten at a time never starve the inspections."""

    delete_limit: Annotated[_Limit | None, _Optional] = None
    """A sweep that would delete more documents than this deletes none and says why: an engine that suddenly
    knows no container is more likely wrong than right. Empty: half of the nodes, and at least 5."""

    stop_limit: Annotated[_Limit | None, _Optional] = None
    """A sweep that would stop more idle nodes than this stops none and says why: a clock or a manager that lost
    every last_req_time is more likely than so many forgotten nodes. Empty: half of the running ones, and at least
    5."""

    dry_run: _Flag = False
    """Say what would be written, deleted and stopped, and do none of it. Off by default: a sidecar that only
    talks keeps no document true."""

    register_label: Annotated[_Label | None, _Optional] = None
    """Containers with this label, KEY or KEY=VALUE, get a document when they start, so that eventwatch is of
    use without a manager. Empty, the default, is off: documents are the manager's to create."""

    stop_nodes_on_exit: _Flag = False
    """Stop all running nodes when eventwatch ends. Off, so that an upgrade of the sidecar interrupts
    no one."""

    lease_duration: Duration = 15.0
    """How long a lease lasts without renewal, and so how soon a standby takes over from a holder that cannot be
    proven dead; from 1s to 30m. 15 seconds survive a slow database without a needless takeover."""

    drain_timeout: Duration = 10.0
    """At shutdown, the time in which pending changes may still be written; 0 drops them (the next start's
    sweep finds them). 10 seconds is the time that `docker stop` grants."""

    http_listen: Annotated[_Address | None, _Optional] = "127.0.0.1:9471"
    """HOST:PORT or [IPV6]:PORT of the status page, the probes and the metrics; empty is off. Loopback only by
    default, because none of them asks for a password unless EVENTWATCH_HTTP_TOKEN_FILE is set."""

    http_allowed_hosts: Annotated[str, AfterValidator(_check_host_names)] = ""
    """Host names, separated by commas, by which HTTP is served besides IP addresses, localhost and the host that
    is listened on: a container's own name, for instance. Empty by default, so that no page on the internet can
    read the nodes through a name that it lets point here."""

    http_token_file: Annotated[str | None, _Optional] = None
    """File that holds a token which HTTP asks for, as a bearer token or as the password of any user, save for
    /livez and /readyz. Empty, the default, asks for none: on loopback only this machine can ask."""

    http_tls_cert_file: Annotated[str | None, _Optional] = None
    """PEM file with the certificate chain for HTTPS; EVENTWATCH_HTTP_TLS_KEY_FILE must be set too. Read at the
    start. Empty, the default, is HTTP, which is enough on loopback."""

    http_tls_key_file: Annotated[str | None, _Optional] = None
    """PEM file with the key of that certificate, without a password. Empty by default, as the certificate is."""

    history: _Flag = True
    """Whether the last 50 changes of each node are kept, for 30 days (collection NodeChanges), for `eventwatch
    explain`. On, because the question comes after the fact."""

    log_level: _LogLevel = "INFO"
    """Least severe message that is logged: TRACE, DEBUG, INFO, SUCCESS, WARNING, ERROR or CRITICAL. INFO
    tells every change to a document, and is silent when nothing changes. It is for the commands: inside
    `watch()` the host's configuration of loguru holds, or of `logging` after `use_standard_logging()`."""

    log_format: _LogFormat = "console"
    """`console` for people, `json` for log collectors: one object per line; for the commands. Console by
    default, since the first reader is a person at a terminal."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003  # the environment is read by our own source
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Keyword arguments first, then everything that is written somewhere."""
        if not isinstance(dotenv_settings, DotEnvSettingsSource):
            raise TypeError("pydantic-settings passed an unknown kind of env file source")
        if not isinstance(file_secret_settings, SecretsSettingsSource):
            raise TypeError("pydantic-settings passed an unknown kind of secret file source")
        return init_settings, LayeredSource(settings_cls, dotenv_settings, file_secret_settings)

    @field_validator("docker_tls_verify")
    @classmethod
    def _verifies_tls_only(cls, verify: bool, info: ValidationInfo) -> bool:
        if verify and str(info.data.get("docker_host") or "").startswith("http://"):
            raise ValueError("must be empty for an engine on http://, which is not encrypted (https:// is)")
        return verify

    @field_validator("sweep_interval")
    @classmethod
    def _sweep_takes_time(cls, seconds: float) -> float:
        if seconds == 0:
            raise ValueError("must be more than 0")
        return seconds

    @field_validator("settle_delay")
    @classmethod
    def _settles_between_sweeps(cls, seconds: float, info: ValidationInfo) -> float:
        sweep_interval = info.data.get("sweep_interval")
        if sweep_interval is not None and seconds >= sweep_interval:
            limit = f"{env_name('sweep_interval')} ({format_duration(sweep_interval)})"
            raise ValueError(f"must be less than {limit}")
        return seconds

    @field_validator("lease_duration")
    @classmethod
    def _lease_outlives_a_renewal(cls, seconds: float) -> float:
        if seconds < 1:
            raise ValueError("must be at least 1s")
        if seconds > LONGEST_LEASE:
            raise ValueError(f"must be at most {format_duration(LONGEST_LEASE)}")
        return seconds

    @field_validator("http_tls_key_file")
    @classmethod
    def _key_has_a_certificate(cls, key: str | None, info: ValidationInfo) -> str | None:
        if info.data.get("http_tls_cert_file") and not key:
            raise ValueError("must be set when EVENTWATCH_HTTP_TLS_CERT_FILE is")
        if key and not info.data.get("http_tls_cert_file"):
            raise ValueError("needs EVENTWATCH_HTTP_TLS_CERT_FILE to be set too")
        return key

    @model_validator(mode="wrap")
    @classmethod
    def _explain(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            details = [_explained(item, cls.model_fields) for item in error.errors(include_url=False)]
            raise ValidationError.from_exception_data(error.title, details) from None

    @property
    def activities(self) -> dict[str, float]:
        """What a node works by, `cpu` and `network`, and from how much on; empty when only requests count."""
        return _parse_activity(self.idle_activity)

    @property
    def http_address(self) -> tuple[str, int] | None:
        """`http_listen` as host and port; None when HTTP is off. Port 0 lets the system choose."""
        return None if self.http_listen is None else _parse_address(self.http_listen)

    @property
    def http_hosts(self) -> frozenset[str]:
        """The names by which HTTP is served: those that are allowed, and the host that is listened on."""
        listens = self.http_address[0] if self.http_address else ""
        return frozenset(filter(None, (*self.http_allowed_hosts.split(","), listens)))

    @property
    def watched(self) -> tuple[str, str, str]:
        """Engine, database server and database, without secrets."""
        return (mask_url(self.docker_host or ""), mask_url(self.mongo_url.get_secret_value()), self.mongo_database)

    def judging(self) -> dict[str, str | int | float | bool | None]:
        """The settings by which nodes are judged, for those who look from outside."""
        return {name: getattr(self, name) for name in JUDGING}

    def effective(self) -> dict[str, str]:
        """Every setting's variable with its value as a user would write it, secrets masked."""
        return {env_name(field): _written(field, getattr(self, field)) for field in type(self).model_fields}


def load_settings(env_file: str | Path | None = ".env") -> Settings:
    """Read the settings; a ConfigError names every wrong one. Only the default env file may be absent."""
    if env_file is not None:
        path = path_of(env_file)
        if path.is_dir():
            raise ConfigError(f"{env_file}: is a folder, not a file with settings")
        if str(env_file) != ".env" and not path.exists():
            raise ConfigError(f"{env_file}: no such file")
    try:
        return Settings(_env_file=env_file)
    except ValidationError as error:
        raise ConfigError("; ".join(_line(item) for item in error.errors(include_url=False))) from None
    except (OSError, UnicodeDecodeError, SettingsError) as error:
        raise ConfigError(f"{env_file}: cannot be read, {error}") from None


def _written(field: str, value: object) -> str:
    if field == "docker_tls_verify":
        return "1" if value else ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return format_duration(value)
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    return "" if value is None else mask_url(str(value))


def _explained(item: ErrorDetails, fields: Iterable[str]) -> InitErrorDetails:
    """One of pydantic's errors in our words, without the value of a secret."""
    name, value = str(item["loc"][0]) if item["loc"] else "", item["input"]
    cause = item.get("ctx", {}).get("error")
    message = str(cause) if cause is not None else item["msg"]
    if isinstance(value, SourceError):
        message = value.message
    elif item["type"] == "extra_forbidden":
        message = f"unknown setting, the nearest right name is {nearest(name, fields)}"
    if name in SECRETS:
        value = Located("", value.name, value.place) if isinstance(value, Located) else ""
    kind = PydanticCustomError("setting", "{message}", {"message": message})
    return InitErrorDetails(type=kind, loc=item["loc"], input=value)


def _line(item: ErrorDetails) -> str:
    """One problem as `NAME: what is wrong, got VALUE (PLACE)`."""
    value = item["input"]
    if isinstance(value, SourceError):
        return f"{item['loc'][0]}: {item['msg']}{_in(value.place)}"
    if isinstance(value, Located):
        got = f", got {_masked(repr(str(value)))}" if value else ""
        return f"{value.name}: {item['msg']}{got}{_in(value.place)}"
    got = format_duration(value) if isinstance(value, float) else repr(value)
    return f"{env_name(str(item['loc'][0]))}: {item['msg']}, got {got}"


def _in(place: str) -> str:
    return f" ({_masked(place)})" if place else ""
