"""What the README says is so: its settings, its commands, the files and messages that it names.

Here is what needs no engine; `tests/e2e/test_readme.py` runs its commands and snippets. Not promised: that its
prose is right.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from eventwatch.cli import main as cli
from eventwatch.core.policy import KNOWN_ACTIONS
from tests.readme import (
    CONTRIBUTING,
    EXAMPLE,
    README,
    ROOT,
    blocks,
    code_spans,
    commands,
    settings_table,
    with_settings_table,
)

TEXT = README.read_text()
PACKAGE = ROOT / "eventwatch"
#: The commands that the parser knows.
LISTED = set(re.findall(r"^    (\w+) ", cli._parser().format_help(), re.MULTILINE))


def section(heading: str, text: str = TEXT) -> str:
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


WHERE = section("Where things are", CONTRIBUTING.read_text())


def first_cells(text: str) -> list[str]:
    return [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]


def test_the_table_of_settings_is_what_the_model_says() -> None:
    assert with_settings_table(TEXT) == TEXT, "renew it: python -m tests.readme"


def test_the_table_holds_every_setting_of_the_example() -> None:
    names = re.findall(r"^#(\w+)=", EXAMPLE.read_text(), re.MULTILINE)
    listed = [name for cell in first_cells(settings_table())[1:] for name in re.findall(r"`(\w+)`", cell)]
    assert len(names) > 25
    assert listed == names


def test_the_table_does_not_depend_on_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = settings_table()
    (tmp_path / ".env").write_text("EVENTWATCH_NODE_PORT=1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVENTWATCH_IDLE_TIMEOUT", "5s")
    monkeypatch.setenv("EVENTWATCH_NONSENSE", "x")
    assert settings_table() == before


def test_a_cell_of_a_table_holds_no_bar() -> None:
    for table in re.findall(r"(?:^\|.*\n)+", TEXT, re.MULTILINE):
        widths = {line.count("|") for line in table.splitlines()}
        assert len(widths) == 1, table


def test_every_block_says_what_it_is() -> None:
    assert [str(block) for block in blocks(TEXT) if block.language not in {"sh", "python", "yaml", "text"}] == []
    assert TEXT.count("\n```") == 2 * len(blocks(TEXT))


def test_every_eventwatch_command_is_one() -> None:
    """Also those in the prose, and all options. The parser ends the program at one that it does not know."""
    said = [text for text in (*commands(TEXT), *code_spans(TEXT)) if text.startswith("eventwatch ")]
    assert len(said) > 15
    for command in said:
        words = shlex.split(command)[1:]
        if len(words) == 1 and command not in commands(TEXT):
            assert words[0] in LISTED  # mentioned by its name only
        else:
            cli._parser().parse_args(words)


def test_every_command_of_eventwatch_is_shown() -> None:
    shown = {command.split()[1] for command in commands(TEXT) if command.startswith("eventwatch ")}
    assert shown == LISTED


def test_every_setting_that_is_named_exists() -> None:
    known = {*re.findall(r"^#(\w+)=", EXAMPLE.read_text(), re.MULTILINE)}
    # One that names a file with the value, and the pytest plugin's.
    known |= {"EVENTWATCH_MONGO_URL_FILE", "EVENTWATCH_TEST_MONGO_URL"}
    assert set(re.findall(r"EVENTWATCH_[A-Z_]*[A-Z]", TEXT)) <= known


def test_every_event_is_in_the_table() -> None:
    rows = [cell for cell in first_cells(section("What it writes")) if cell.startswith("`")]
    assert set(re.findall(r"\w+", " ".join(rows))) >= KNOWN_ACTIONS


def test_every_module_has_its_role_and_nothing_else_has() -> None:
    there = {path.name for path in PACKAGE.glob("*.py") if not path.name.startswith("__")}
    there |= {f"{path.name}/" for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    named = re.findall(r"`([^`]+)`", " ".join(first_cells(WHERE)[1:]))
    assert sorted(named) == sorted(there)


def test_each_package_says_what_its_modules_do() -> None:
    for package in PACKAGE.glob("*/__init__.py"):
        modules = {path.stem for path in package.parent.glob("*.py") if path.stem != "__init__"}
        assert modules <= set(re.findall(r"`(\w+)`", package.read_text())), package


def test_the_path_of_an_event_can_be_followed() -> None:
    source = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    steps = re.findall(r"`(\w+)\.(\w+)`", WHERE.rpartition("Follow one event")[2])
    assert len(steps) == 5
    for owner, method in steps:
        body = re.split(rf"^class {owner}\b", source, flags=re.MULTILINE)[1].partition("\nclass ")[0]
        assert f"def {method}(" in body, f"{owner}.{method}"


def test_every_message_among_the_symptoms_is_one_of_ours() -> None:
    source = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    source = re.sub(r"\{[^{}\n]*\}", "…", source)
    quoted = [
        span
        for cell in first_cells(section("When something is wrong"))
        for span in re.findall(r"`([^`]+)`", cell)
        if " " in span
    ]
    assert len(quoted) >= 8
    for message in quoted:
        for part in re.split(r" ?… ?|: ", message):
            assert part in source, message


def test_every_file_that_is_named_or_linked_is_there() -> None:
    headings = {
        re.sub(r"[^\w -]", "", line[3:]).lower().replace(" ", "-")
        for line in re.findall(r"^## .*$", TEXT, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        assert target.removeprefix("#") in headings if target.startswith("#") else (ROOT / target).exists(), target
    for path in (span for span in code_spans(TEXT) if re.fullmatch(r"eventwatch/[\w/]+", span)):
        assert (ROOT / path).exists(), path
