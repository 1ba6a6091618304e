"""Settings: defaults, sources and their order, rules, messages, and that secrets stay secret."""

from __future__ import annotations

import math
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from eventwatch.core.durations import format_duration, parse_duration
from eventwatch.core.errors import ConfigError
from eventwatch.settings.model import Keywords, Settings, load_settings, mask_url

PASSWORD = "hunter2"  # a literal, so that its absence can be asserted
URL = f"mongodb://ann:{PASSWORD}@db.example:27017/"


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.upper().startswith(("EVENTWATCH_", "DOCKER_", "DB_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))  # whatever context its user has chosen
    monkeypatch.chdir(tmp_path)


def url_of(settings: Settings) -> str:
    return settings.mongo_url.get_secret_value()


def problem(**environment: str) -> str:
    """The message with which these variables are refused."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with pytest.raises(ConfigError) as caught:
            load_settings(None)
    return str(caught.value)


class TestDefaults:
    def test_each_default_is_the_one_of_the_contract(self) -> None:
        assert Settings(_env_file=None).effective() == {
            "EVENTWATCH_MONGO_URL": "embedded",
            "EVENTWATCH_MONGO_DATABASE": "TSM",
            "EVENTWATCH_DOCKER_HOST": "",
            "DOCKER_TLS_VERIFY": "",
            "DOCKER_CERT_PATH": "",
            "EVENTWATCH_NODE_NETWORK": "tool-server-network",
            "EVENTWATCH_NODE_PORT": "31942",
            "EVENTWATCH_HEALTH_CHECK": "true",
            "EVENTWATCH_IDLE_TIMEOUT": "30m",
            "EVENTWATCH_IDLE_ACTIVITY": "",
            "EVENTWATCH_SWEEP_INTERVAL": "30s",
            "EVENTWATCH_SETTLE_DELAY": "250ms",
            "EVENTWATCH_ORPHAN_GRACE": "30s",
            "EVENTWATCH_STOP_TIMEOUT": "10s",
            "EVENTWATCH_STOP_CONCURRENCY": "10",
            "EVENTWATCH_DELETE_LIMIT": "",
            "EVENTWATCH_STOP_LIMIT": "",
            "EVENTWATCH_DRY_RUN": "false",
            "EVENTWATCH_REGISTER_LABEL": "",
            "EVENTWATCH_STOP_NODES_ON_EXIT": "false",
            "EVENTWATCH_LEASE_DURATION": "15s",
            "EVENTWATCH_DRAIN_TIMEOUT": "10s",
            "EVENTWATCH_HTTP_LISTEN": "127.0.0.1:9471",
            "EVENTWATCH_HTTP_ALLOWED_HOSTS": "",
            "EVENTWATCH_HTTP_TOKEN_FILE": "",
            "EVENTWATCH_HTTP_TLS_CERT_FILE": "",
            "EVENTWATCH_HTTP_TLS_KEY_FILE": "",
            "EVENTWATCH_HISTORY": "true",
            "EVENTWATCH_LOG_LEVEL": "INFO",
            "EVENTWATCH_LOG_FORMAT": "console",
        }

    def test_durations_are_seconds(self) -> None:
        settings = Settings(_env_file=None)
        assert (settings.idle_timeout, settings.settle_delay) == (1800.0, 0.25)

    def test_what_is_off_is_none(self) -> None:
        settings = Settings(_env_file=None)
        assert (settings.docker_host, settings.register_label) == (None, None)
        assert (settings.delete_limit, settings.stop_limit) == (None, None)

    def test_settings_cannot_be_changed(self) -> None:
        settings = Settings(_env_file=None)
        with pytest.raises(ValidationError, match="frozen"):
            settings.dry_run = True  # type: ignore[misc]


class TestDurations:
    @pytest.mark.parametrize(
        ("written", "seconds"),
        [
            pytest.param(90, 90.0, id="integer"),
            pytest.param(0.25, 0.25, id="float"),
            pytest.param("90", 90.0, id="bare text"),
            pytest.param("90s", 90.0, id="seconds"),
            pytest.param("250ms", 0.25, id="milliseconds"),
            pytest.param("30m", 1800.0, id="minutes"),
            pytest.param("2h", 7200.0, id="hours"),
            pytest.param("1d", 86400.0, id="days"),
            pytest.param("1.5h", 5400.0, id="fraction"),
            pytest.param(" 5s ", 5.0, id="surrounding blanks"),
            pytest.param("0", 0.0, id="zero"),
        ],
    )
    def test_a_duration_is_read(self, written: object, seconds: float) -> None:
        assert parse_duration(written) == seconds

    @pytest.mark.parametrize(
        "written",
        [
            "-1",
            "-1s",
            -0.5,
            "nan",
            math.nan,
            "inf",
            math.inf,
            "",
            "5 parsecs",
            "30m1h",
            "1e3",
            "30M",
            "٣s",
            True,
            None,
            [5],
        ],
    )
    def test_anything_else_is_refused_with_the_accepted_forms(self, written: object) -> None:
        with pytest.raises(ValueError, match="seconds or a duration such as 90, 90s, 250ms, 30m, 1h30m or 1d"):
            parse_duration(written)

    def test_a_duration_that_would_overflow_dates_is_refused(self) -> None:
        with pytest.raises(ValueError, match="at most 3650d"):
            parse_duration("3651d")

    @pytest.mark.parametrize(
        ("seconds", "written"),
        [
            (0, "0s"),
            (0.25, "250ms"),
            (0.0005, "0.5ms"),
            (1, "1s"),
            (1.5, "1500ms"),
            (90, "90s"),
            (1800, "30m"),
            (5400, "90m"),
            (7200, "2h"),
            (86400, "1d"),
            (100000, "100000s"),
        ],
    )
    def test_a_duration_is_written_in_the_largest_unit_that_divides_it(self, seconds: float, written: str) -> None:
        assert format_duration(seconds) == written

    @hypothesis_settings(database=None)
    @given(st.floats(min_value=0, max_value=3650 * 86400.0))
    def test_what_is_written_reads_back_as_the_same_number(self, seconds: float) -> None:
        assert parse_duration(format_duration(seconds)) == seconds


class TestSources:
    def test_the_environment_is_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EVENTWATCH_IDLE_TIMEOUT", "2h")
        assert load_settings().idle_timeout == 7200.0

    def test_the_env_file_is_read(self, tmp_path: Path) -> None:
        (tmp_path / ".env").write_text("EVENTWATCH_NODE_PORT=8080\n")
        assert load_settings().node_port == 8080

    def test_an_env_file_with_a_byte_order_mark_is_read(self, tmp_path: Path) -> None:
        (tmp_path / ".env").write_bytes(b"\xef\xbb\xbfEVENTWATCH_NODE_PORT=8080\n")
        assert load_settings().node_port == 8080

    def test_without_an_env_file_none_is_read(self, tmp_path: Path) -> None:
        (tmp_path / ".env").write_text("EVENTWATCH_NODE_PORT=8080\n")
        assert load_settings(None).node_port == Settings(_env_file=None).node_port == 31942

    def test_a_keyword_beats_the_environment_beats_the_env_file_beats_a_secret_file(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        secrets = tmp_path / "secrets"
        secrets.mkdir()
        seen = []
        (secrets / "eventwatch_node_port").write_text("1\n")
        seen.append(Settings(_secrets_dir=secrets).node_port)
        (tmp_path / ".env").write_text("EVENTWATCH_NODE_PORT=2")
        seen.append(Settings(_secrets_dir=secrets).node_port)
        monkeypatch.setenv("EVENTWATCH_NODE_PORT", "3")
        seen.append(Settings(_secrets_dir=secrets).node_port)
        seen.append(Settings(_secrets_dir=secrets, node_port=4).node_port)
        assert seen == [1, 2, 3, 4]

    def test_a_missing_secrets_folder_passes_without_a_warning(self, tmp_path: Path) -> None:
        assert Settings(_env_file=None, _secrets_dir=tmp_path / "absent").node_port == 31942

    def test_foreign_files_among_the_secrets_are_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "manager_tls_key").write_bytes(b"\xff")
        assert Settings(_env_file=None, _secrets_dir=tmp_path).node_port == 31942

    def test_an_empty_value_counts_as_not_set(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / ".env").write_text("EVENTWATCH_NODE_PORT=8080\n")
        monkeypatch.setenv("EVENTWATCH_NODE_PORT", "")
        assert load_settings().node_port == 8080

    def test_an_empty_address_turns_http_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EVENTWATCH_HTTP_LISTEN", "")
        settings = load_settings()
        assert (settings.http_listen, settings.http_address) == (None, None)

    def test_an_empty_label_overrides_one_in_the_env_file(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        (tmp_path / ".env").write_text("EVENTWATCH_REGISTER_LABEL=node\n")
        monkeypatch.setenv("EVENTWATCH_REGISTER_LABEL", "")
        assert load_settings().register_label is None

    def test_dockers_own_names_are_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DOCKER_HOST", "tcp://engine:2376")
        monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
        monkeypatch.setenv("DOCKER_CERT_PATH", "/certs")
        settings = load_settings()
        assert (settings.docker_host, settings.docker_tls_verify, settings.docker_cert_path) == (
            "tcp://engine:2376",
            True,
            "/certs",
        )

    def test_our_docker_host_comes_before_dockers(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("DOCKER_HOST", "tcp://engine:2376")
        (tmp_path / ".env").write_text("EVENTWATCH_DOCKER_HOST=unix:///run/docker.sock\n")
        assert load_settings().docker_host == "unix:///run/docker.sock"

    def test_any_text_turns_tls_on_as_for_the_docker_command(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DOCKER_TLS_VERIFY", "0")
        assert load_settings().docker_tls_verify is True

    def test_tls_is_not_verified_where_there_is_none(self) -> None:
        said = problem(DOCKER_HOST="http://engine:2375", DOCKER_TLS_VERIFY="1")
        assert said.startswith("DOCKER_TLS_VERIFY: must be empty for an engine on http://")
        assert "\n" not in said
        for url in ("https://engine:2376", "tcp://engine:2376", "unix:///run/docker.sock", None):
            assert Settings(_env_file=None, docker_host=url, docker_tls_verify=True).docker_tls_verify

    def test_settings_written_as_effective_read_back_the_same(self, tmp_path: Path) -> None:
        settings = Settings(
            _env_file=None,
            docker_host="tcp://engine:2376",
            docker_tls_verify=True,
            idle_timeout="90m",
            delete_limit=7,
            stop_limit=3,
            http_listen="",
            register_label="team=blue",
            log_level="debug",
            dry_run=True,
        )
        path = tmp_path / "written.env"
        path.write_text("".join(f"{name}='{value}'\n" for name, value in settings.effective().items()))
        assert load_settings(path) == settings


class TestSecretFile:
    def test_the_url_may_stand_in_a_file(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "url").write_text(f"{URL}\n")
        monkeypatch.setenv("EVENTWATCH_MONGO_URL_FILE", str(tmp_path / "url"))
        assert url_of(load_settings()) == URL

    def test_the_env_file_may_name_that_file(self, tmp_path: Path) -> None:
        (tmp_path / "url").write_text(URL)
        (tmp_path / ".env").write_text(f"EVENTWATCH_MONGO_URL_FILE={tmp_path / 'url'}\n")
        assert url_of(load_settings()) == URL

    def test_the_secrets_folder_may_hold_the_url(self, tmp_path: Path) -> None:
        (tmp_path / "eventwatch_mongo_url").write_text(f"{URL}\n")
        assert url_of(Settings(_env_file=None, _secrets_dir=tmp_path)) == URL

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "absent"
        assert problem(EVENTWATCH_MONGO_URL_FILE=str(path)) == (
            f"EVENTWATCH_MONGO_URL: cannot be read, No such file or directory ({path})"
        )

    def test_an_empty_file_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "url"
        path.write_text("\n")
        assert problem(EVENTWATCH_MONGO_URL_FILE=str(path)) == f"EVENTWATCH_MONGO_URL: the file is empty ({path})"

    def test_url_and_file_together_are_refused(self, tmp_path: Path) -> None:
        message = problem(EVENTWATCH_MONGO_URL=URL, EVENTWATCH_MONGO_URL_FILE=str(tmp_path / "url"))
        assert message == "EVENTWATCH_MONGO_URL_FILE: set either this or EVENTWATCH_MONGO_URL, not both"

    def test_a_wrong_url_in_a_file_is_cited_by_its_place_only(self, tmp_path: Path) -> None:
        path = tmp_path / "url"
        path.write_text(f"postgres://ann:{PASSWORD}@db/")
        message = problem(EVENTWATCH_MONGO_URL_FILE=str(path))
        assert message.startswith("EVENTWATCH_MONGO_URL: must be mongodb://")
        assert message.endswith(f"({path})")
        assert PASSWORD not in message


class TestManagerNames:
    def test_they_build_url_and_database(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {
            "HOST": "db",
            "USERNAME": "a@b",
            "PASSWORD": "p:/w",
            "COLLECTION": "nodes",
        }.items():
            monkeypatch.setenv(f"DB_{name}", value)
        settings = load_settings()
        assert url_of(settings) == "mongodb://a%40b:p%3A%2Fw@db:27017/"
        assert settings.mongo_database == "nodes"

    def test_they_are_read_from_the_env_file(self, tmp_path: Path) -> None:
        (tmp_path / ".env").write_text("DB_HOST=db\nDB_PORT=27018\nSECRET_KEY=x\n")
        settings = load_settings()
        assert (url_of(settings), settings.mongo_database) == ("mongodb://db:27018/", "TSM")

    def test_an_ipv6_address_is_bracketed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DB_HOST", "fd00::1")
        assert url_of(load_settings()) == "mongodb://[fd00::1]:27017/"

    def test_our_url_comes_first_from_any_source(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("DB_HOST", "db")
        monkeypatch.setenv("DB_COLLECTION", "nodes")
        (tmp_path / ".env").write_text("EVENTWATCH_MONGO_URL=embedded\n")
        from_file = load_settings()
        from_keyword = Settings(_env_file=None, mongo_url=URL)
        assert (url_of(from_file), from_file.mongo_database) == ("embedded", "TSM")
        assert (url_of(from_keyword), from_keyword.mongo_database) == (URL, "TSM")

    def test_our_database_name_comes_before_theirs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DB_HOST", "db")
        monkeypatch.setenv("DB_COLLECTION", "theirs")
        monkeypatch.setenv("EVENTWATCH_MONGO_DATABASE", "ours")
        assert load_settings().mongo_database == "ours"

    def test_without_a_host_they_mean_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DB_COLLECTION", "nodes")
        monkeypatch.setenv("DB_PORT", "not ours to judge")
        settings = load_settings()
        assert (url_of(settings), settings.mongo_database) == ("embedded", "TSM")

    def test_the_password_may_be_in_a_file(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "password").write_text(PASSWORD + "\n")
        monkeypatch.setenv("DB_PASSWORD_FILE", "password")
        assert url_of(load_settings()) == "embedded"
        monkeypatch.setenv("DB_HOST", "db")
        monkeypatch.setenv("DB_USERNAME", "ann")
        assert url_of(load_settings()) == f"mongodb://ann:{PASSWORD}@db:27017/"

    @pytest.mark.parametrize(
        ("environment", "message"),
        [
            (
                {"DB_HOST": "db", "DB_USERNAME": "ann", "DB_PASSWORD": PASSWORD, "DB_PASSWORD_FILE": "password"},
                "DB_PASSWORD_FILE: set either this or DB_PASSWORD, not both",
            ),
            (
                {"DB_HOST": "db", "DB_USERNAME": "ann", "DB_PASSWORD_FILE": "nowhere"},
                "DB_PASSWORD: cannot be read, No such file or directory (nowhere)",
            ),
            ({"DB_HOST": "db", "DB_PORT": "70000"}, "DB_PORT: must be between 1 and 65535, got '70000'"),
            ({"DB_HOST": "db:27017"}, "DB_HOST: must be one host name or address, without port"),
            ({"DB_HOST": "ann@db"}, "DB_HOST: must be one host name or address, without port"),
            ({"DB_HOST": "db", "DB_USERNAME": "ann"}, "DB_PASSWORD: must be set when DB_USERNAME is"),
            ({"DB_HOST": "db", "DB_PASSWORD": PASSWORD}, "DB_USERNAME: must be set when DB_PASSWORD is"),
        ],
    )
    def test_a_wrong_one_is_named(self, environment: dict[str, str], message: str) -> None:
        assert problem(**environment) == message


class TestNames:
    def test_an_unknown_name_is_told_the_nearest(self) -> None:
        assert problem(EVENTWATCH_NODE_PROT="1") == (
            "EVENTWATCH_NODE_PROT: unknown setting, the nearest right name is EVENTWATCH_NODE_PORT"
        )

    def test_an_unknown_name_in_the_env_file_is_told_its_line(self, tmp_path: Path) -> None:
        (tmp_path / ".env").write_text("# ours\n\nOTHER=1\nEVENTWATCH_SWEEP=30s\n")
        with pytest.raises(ConfigError) as caught:
            load_settings()
        assert str(caught.value) == (
            "EVENTWATCH_SWEEP: unknown setting, the nearest right name is EVENTWATCH_SWEEP_INTERVAL (.env:4)"
        )

    def test_a_lower_case_name_is_told_the_right_one(self) -> None:
        assert problem(eventwatch_dry_run="1").endswith("the nearest right name is EVENTWATCH_DRY_RUN")

    def test_a_prefixed_docker_name_is_told_dockers_own(self) -> None:
        assert problem(EVENTWATCH_DOCKER_TLS_VERIFY="1").endswith("the nearest right name is DOCKER_TLS_VERIFY")

    def test_the_value_of_an_unknown_name_is_not_shown(self) -> None:
        assert PASSWORD not in problem(EVENTWATCH_MONGO_PASSWORD=PASSWORD)

    def test_an_unknown_keyword_is_told_the_nearest(self) -> None:
        with pytest.raises(ValidationError, match="nearest right name is node_port"):
            Settings(_env_file=None, node_prot=1)  # type: ignore[call-arg]

    def test_bare_settings_refuse_an_unknown_name_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EVENTWATCH_NODE_PROT", "1")
        with pytest.raises(ValidationError, match="nearest right name is EVENTWATCH_NODE_PORT"):
            Settings(_env_file=None)

    def test_foreign_names_are_ignored(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("NODE_PORT", "1")
        monkeypatch.setenv("EVENTWATCHER_NODE_PORT", "2")
        (tmp_path / ".env").write_text("node_port=3\nwhatever = 4\nnot even a pair\n")
        assert load_settings().node_port == 31942


class TestRules:
    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("MONGO_DATABASE", "a.b", "must be a database name"),
            ("DOCKER_HOST", "engine:2375", "must be a URL of unix://"),
            ("NODE_NETWORK", "two words", "must be the name of a Docker network"),
            ("NODE_PORT", "0", "must be between 1 and 65535"),
            ("NODE_PORT", "65536", "must be between 1 and 65535"),
            ("NODE_PORT", "http", "must be between 1 and 65535"),
            ("HEALTH_CHECK", "maybe", "must be true or false"),
            ("HISTORY", "maybe", "must be true or false"),
            ("IDLE_TIMEOUT", "-5", "must be seconds or a duration such as"),
            ("SWEEP_INTERVAL", "0", "must be more than 0"),
            ("SETTLE_DELAY", "30s", "must be less than EVENTWATCH_SWEEP_INTERVAL (30s)"),
            ("STOP_CONCURRENCY", "0", "must be a whole number, at least 1"),
            ("DELETE_LIMIT", "-1", "must be a whole number, at least 0"),
            ("REGISTER_LABEL", "=blue", "must be a label, KEY or KEY=VALUE"),
            ("LEASE_DURATION", "900ms", "must be at least 1s"),
            ("HTTP_LISTEN", "9471", "must be HOST:PORT"),
            ("HTTP_LISTEN", "::1:9471", "must be HOST:PORT"),
            ("HTTP_LISTEN", "localhost:70000", "must be HOST:PORT"),
            ("LOG_LEVEL", "loud", "must be TRACE, DEBUG,"),
            ("LOG_FORMAT", "xml", "must be console or json"),
        ],
    )
    def test_a_wrong_value_is_refused_by_name_rule_and_value(self, name: str, value: str, message: str) -> None:
        said = problem(**{f"EVENTWATCH_{name}": value})
        assert said.startswith(f"EVENTWATCH_{name}: {message}")
        assert said.endswith(f", got {value!r}")

    @pytest.mark.parametrize(
        ("field", "value", "kept"),
        [
            ("mongo_database", "a" * 63, "a" * 63),
            ("docker_host", "ssh://root@engine", "ssh://root@engine"),
            ("idle_timeout", 0, 0.0),
            ("delete_limit", 0, 0),
            ("stop_limit", 0, 0),
            ("lease_duration", 1, 1.0),
            ("register_label", "team=", "team="),
            ("http_listen", "localhost:0", "localhost:0"),
            ("log_level", "trace", "TRACE"),
        ],
    )
    def test_a_value_at_the_edge_is_kept(self, field: str, value: object, kept: object) -> None:
        arguments: dict[str, Any] = {field: value}
        assert getattr(Settings(_env_file=None, **arguments), field) == kept

    def test_a_sweep_interval_below_the_default_settle_delay_is_refused(self) -> None:
        assert problem(EVENTWATCH_SWEEP_INTERVAL="200ms") == (
            "EVENTWATCH_SETTLE_DELAY: must be less than EVENTWATCH_SWEEP_INTERVAL (200ms), got 250ms"
        )

    @pytest.mark.parametrize(
        ("written", "address"), [("0.0.0.0:80", ("0.0.0.0", 80)), ("[::1]:9471", ("::1", 9471))]
    )
    def test_the_http_address_is_host_and_port(self, written: str, address: tuple[str, int]) -> None:
        assert Settings(_env_file=None, http_listen=written).http_address == address

    @pytest.mark.parametrize("url", ["mongodb://db", "mongodb+srv://db.example/?x=y", "embedded", URL])
    def test_each_kind_of_mongo_url_is_kept(self, url: str) -> None:
        assert url_of(Settings(_env_file=None, mongo_url=url)) == url

    @pytest.mark.parametrize("url", ["", "Embedded", "db:27017", "mongodb://", "http://db", "mongodb:///x"])
    def test_any_other_mongo_url_is_refused(self, url: str) -> None:
        with pytest.raises(ValidationError, match="must be mongodb://"):
            Settings(_env_file=None, mongo_url=url)


class TestMessages:
    def test_all_problems_are_told_at_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / ".env").write_text("OTHER=1\nexport EVENTWATCH_NODE_PORT=70000\n\nEVENTWATCH_LOG_FORMAT=xml\n")
        monkeypatch.setenv("EVENTWATCH_IDLE", "1")
        with pytest.raises(ConfigError) as caught:
            load_settings()
        assert str(caught.value).split("; ") == [
            "EVENTWATCH_NODE_PORT: must be between 1 and 65535, got '70000' (.env:2)",
            "EVENTWATCH_LOG_FORMAT: must be console or json, got 'xml' (.env:4)",
            "EVENTWATCH_IDLE: unknown setting, the nearest right name is EVENTWATCH_IDLE_TIMEOUT",
        ]

    def test_the_line_is_that_of_the_last_mention_which_wins(self, tmp_path: Path) -> None:
        (tmp_path / ".env").write_text(
            'A="EVENTWATCH_NODE_PORT=1\n"\nEVENTWATCH_NODE_PORT=x\nEVENTWATCH_NODE_PORT=y\n'
        )
        with pytest.raises(ConfigError, match=r"got 'y' \(\.env:4\)"):
            load_settings()

    def test_a_broken_line_of_ours_is_told(self, tmp_path: Path) -> None:
        (tmp_path / ".env").write_text("A=1\nEVENTWATCH_NODE_PORT='80\n")
        with pytest.raises(ConfigError, match=r"\.env:2: cannot be parsed as NAME=value"):
            load_settings()

    def test_an_env_file_that_was_asked_for_must_exist(self) -> None:
        with pytest.raises(ConfigError, match=r"prod\.env: no such file"):
            load_settings("prod.env")

    def test_an_env_file_that_is_not_text_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / ".env").write_bytes(b"EVENTWATCH_NODE_PORT=\xff\n")
        with pytest.raises(ConfigError, match=r"^\.env: cannot be read"):
            load_settings()

    def test_dockers_own_name_is_cited_when_it_is_the_wrong_one(self) -> None:
        assert problem(DOCKER_HOST="engine").startswith("DOCKER_HOST: must be a URL")


class TestSecrets:
    def test_no_rendering_of_the_settings_shows_the_password(self) -> None:
        settings = Settings(_env_file=None, mongo_url=URL)
        shown = [repr(settings), str(settings), str(settings.model_dump()), settings.model_dump_json()]
        assert [text for text in (*shown, str(settings.effective())) if PASSWORD in text] == []

    def test_the_effective_url_shows_all_but_the_password(self) -> None:
        effective = Settings(_env_file=None, mongo_url=URL).effective()
        assert effective["EVENTWATCH_MONGO_URL"] == "mongodb://ann:***@db.example:27017/"

    def test_a_refused_url_is_neither_in_the_error_nor_in_its_parts(self) -> None:
        with pytest.raises(ValidationError) as caught:
            Settings(_env_file=None, mongo_url=f"mysql://ann:{PASSWORD}@db", node_port=0)
        assert PASSWORD not in str(caught.value) + repr(caught.value.errors()) + caught.value.json()

    def test_a_refused_url_is_not_in_the_configuration_error(self) -> None:
        assert problem(EVENTWATCH_MONGO_URL=f"mysql://ann:{PASSWORD}@db").endswith("or embedded")

    def test_a_password_in_the_wrong_setting_is_masked(self) -> None:
        message = problem(EVENTWATCH_MONGO_DATABASE=URL)
        assert "mongodb://ann:***@db.example" in message
        assert PASSWORD not in message

    def test_the_host_application_may_pickle_its_settings(self) -> None:
        settings = Settings(_env_file=None, mongo_url=URL)
        assert pickle.loads(pickle.dumps(settings)) == settings

    @pytest.mark.parametrize(
        ("url", "masked"),
        [
            ("mongodb://h:1/", "mongodb://h:1/"),
            ("mongodb://u@h/", "mongodb://u@h/"),
            ("mongodb://u:p@h1:1,h2:2/db?a=b", "mongodb://u:***@h1:1,h2:2/db?a=b"),
            ("mongodb+srv://u:p%40q@h/", "mongodb+srv://u:***@h/"),
            ("mongodb://u:p@ss/w?rd@h/", "mongodb://u:***@h/"),
            ("mongodb://u:@h/", "mongodb://u:***@h/"),
            (
                "mongodb://h/?tls=true&tlsCertificateKeyFilePassword=p&a=b",
                "mongodb://h/?tls=true&tlsCertificateKeyFilePassword=***&a=b",
            ),
            ("mongodb://h/?proxyPassword=p", "mongodb://h/?proxyPassword=***"),
            (
                "mongodb://h/?authMechanismProperties=A:b,AWS_SESSION_TOKEN:p",
                "mongodb://h/?authMechanismProperties=A:b,AWS_SESSION_TOKEN:***",
            ),
            ("embedded", "embedded"),
        ],
    )
    def test_a_url_is_masked(self, url: str, masked: str) -> None:
        assert mask_url(url) == masked


def test_type_checkers_know_every_keyword() -> None:
    known = {name for name in Keywords.__annotations__ if not name.startswith("_")}
    assert known == set(Settings.model_fields)


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("", {}),
        ("cpu", {"cpu": 0.05}),
        (" CPU , network=10 ", {"cpu": 0.05, "network": 10.0}),
        ("cpu=1.5", {"cpu": 1.5}),
    ],
)
def test_activities_are_read_with_their_thresholds(written: str, found: dict[str, float]) -> None:
    assert Settings(_env_file=None, idle_activity=written).activities == found


@pytest.mark.parametrize(
    "written", ["disk", "cpu=0", "cpu=-1", "cpu=nan", "cpu,cpu", "cpu=1e9", "network=x", "cpu=²", ",", "cpu,"]
)
def test_other_activities_are_refused(written: str) -> None:
    with pytest.raises(ValidationError, match="must be cpu, network or both"):
        Settings(_env_file=None, idle_activity=written)
