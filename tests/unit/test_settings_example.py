"""`settings.env.example` and the model say the same."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from eventwatch.settings.model import Settings, load_settings
from eventwatch.settings.sources import env_name

EXAMPLE = Path(__file__).parents[2] / "settings.env.example"
SETTING = re.compile(r"((?:^# .*\n)+)^#(\w+)=(.*)$", re.MULTILINE)


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("EVENTWATCH_", "DOCKER_", "DB_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))  # whatever context its user has chosen
    monkeypatch.chdir(tmp_path)


def blocks() -> list[tuple[str, str, str]]:
    """Each setting of the example in order: its documentation on one line, its name, its value."""
    found = SETTING.findall(EXAMPLE.read_text())
    return [
        (" ".join(doc.replace("\n# ", " ").removeprefix("# ").split()), name, value) for doc, name, value in found
    ]


def without_manager_block(found: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    return [block for block in found if not block[1].startswith("DB_")]


def test_every_setting_is_in_the_example_in_the_order_of_the_model() -> None:
    names = [name for _, name, _ in without_manager_block(blocks())]
    assert names == [env_name(field) for field in Settings.model_fields]


def test_the_example_shows_the_defaults() -> None:
    shown = {name: value for _, name, value in without_manager_block(blocks())}
    assert shown == Settings(_env_file=None).effective()


def test_the_example_documents_each_setting_as_the_model_does() -> None:
    shown = {name: doc for doc, name, _ in without_manager_block(blocks())}
    documented = {
        env_name(field): " ".join((info.description or "").split())
        for field, info in Settings.model_fields.items()
    }
    assert shown == documented


def test_every_setting_is_documented() -> None:
    assert [field for field, info in Settings.model_fields.items() if len(info.description or "") < 40] == []


def test_the_example_ends_with_the_names_of_the_manager() -> None:
    names = re.findall(r"^#(\w+)=", EXAMPLE.read_text(), re.MULTILINE)
    login = ["DB_USERNAME", "DB_PASSWORD", "DB_PASSWORD_FILE"]
    assert names[-6:] == ["DB_HOST", "DB_PORT", *login, "DB_COLLECTION"]


def test_the_example_changes_nothing_as_it_stands() -> None:
    assert load_settings(EXAMPLE) == Settings(_env_file=None)


def test_the_example_changes_nothing_when_every_line_is_uncommented(tmp_path: Path) -> None:
    copy = tmp_path / "all.env"
    copy.write_text(re.sub(r"^#(\w+=)", r"\1", EXAMPLE.read_text(), flags=re.MULTILINE))
    assert load_settings(copy) == Settings(_env_file=None)
