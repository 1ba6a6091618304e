"""Settings that are nearly right: understood, or one line that names setting, file and line, without a secret."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import ValidationError

from eventwatch.core.durations import parse_duration
from eventwatch.core.errors import ConfigError
from eventwatch.http.access import read_token
from eventwatch.settings.model import Settings, load_settings
from tests.unit.test_settings import PASSWORD, problem


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.upper().startswith(("EVENTWATCH_", "DOCKER_", "DB_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))  # whatever context its user has chosen
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("1h30m", 5400), ("1d 2h", 93600), ("1m30s500ms", 90.5), ("2m5ms", 120.005), (timedelta(minutes=2), 120)],
)
def test_a_duration_may_have_several_units_or_be_a_timedelta(written: object, seconds: float) -> None:
    assert parse_duration(written) == seconds
    assert Settings(_env_file=None, idle_timeout=written).idle_timeout == seconds  # type: ignore[arg-type]


@pytest.mark.parametrize("written", ["", " ", "30m1h", "1h1h", "1h30", "-1h", "1.5h30m", timedelta(seconds=-1)])
def test_other_durations_are_refused(written: object) -> None:
    with pytest.raises(ValueError, match="must be seconds or a duration"):
        parse_duration(written)


@pytest.mark.parametrize("url", ["tcp//ann:{}@host:1", "tcp:/ann:{}@host", "ann:{}@host", "tcp:://ann:{}@host"])
def test_the_password_of_a_mistyped_engine_url_is_masked(url: str) -> None:
    message = problem(EVENTWATCH_DOCKER_HOST=url.format(PASSWORD))
    assert PASSWORD not in message
    assert "EVENTWATCH_DOCKER_HOST: must be a URL" in message
    assert "@host" in message


def test_an_engines_password_is_nowhere_shown() -> None:
    settings = Settings(_env_file=None, docker_host=f"tcp://ann:{PASSWORD}@host:2375")
    assert PASSWORD not in str((settings.effective(), settings.watched))


def test_a_url_in_the_place_of_a_secret_files_name_is_masked() -> None:
    message = problem(EVENTWATCH_MONGO_URL_FILE=f"mongodb://ann:{PASSWORD}@db.example/")
    assert PASSWORD not in message
    assert "cannot be read" in message


def test_the_content_of_a_secret_file_that_is_no_url_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / "url").write_text(PASSWORD)
    message = problem(EVENTWATCH_MONGO_URL_FILE=str(tmp_path / "url"))
    assert PASSWORD not in message
    assert str(tmp_path / "url") in message


def test_a_misspelt_secret_is_an_error_with_the_nearest_right_name(tmp_path: Path) -> None:
    (tmp_path / "eventwatch_mongo_ulr").write_text("mongodb://db/")
    with pytest.raises(ValidationError, match="unknown setting, the nearest right name is EVENTWATCH_MONGO_URL"):
        Settings(_env_file=None, _secrets_dir=tmp_path)


def test_a_secret_that_a_setting_names_may_be_called_anything(tmp_path: Path) -> None:
    token = tmp_path / "eventwatch_the_token"
    token.write_text("x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVENTWATCH_HTTP_TOKEN_FILE", str(token))
        assert Settings(_env_file=None, _secrets_dir=tmp_path).http_token_file == str(token)


def test_an_env_file_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".env").mkdir()
    with pytest.raises(ConfigError, match=r"^\.env: is a folder"):
        load_settings()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("A=1\nEVENTWATCH_DRY_RUN\n", 2),
        ("EVENTWATCH_DRY_RUN true\n", 1),
        ("A=1\n\nDB_HOST mongo\n", 3),
        ("DOCKER_HOST\n", 1),
    ],
)
def test_a_line_that_sets_nothing_is_told_with_its_number(tmp_path: Path, text: str, line: int) -> None:
    (tmp_path / ".env").write_text(text)
    with pytest.raises(ConfigError, match=rf"^\.env:{line}: cannot be parsed as NAME=value"):
        load_settings()


@pytest.mark.parametrize("name", ["FOO_FILE", "EVENTWATCH_MONGO_URL_FILE", "EVENTWATCH_HTTP_TOKEN_FILE"])
def test_a_file_of_an_unknown_user_is_an_error_only_where_it_is_ours(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "~nosuchuser/x")
    if name == "EVENTWATCH_MONGO_URL_FILE":
        with pytest.raises(ConfigError, match="~nosuchuser"):
            load_settings(None)
    else:
        settings = load_settings(None)
        if settings.http_token_file:
            with pytest.raises(ConfigError, match=r"EVENTWATCH_HTTP_TOKEN_FILE: ~nosuchuser/x cannot be read"):
                read_token(settings.http_token_file)
