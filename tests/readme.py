"""The README: its table of settings, which is made here, and its fenced blocks and commands, which tests run.

The texts of the table are those of the `Settings` model, and that on the manager's `DB_*` is the one comment of
`settings.env.example`; the README has none of its own. `python -m tests.readme` writes the table into it.

Not promised: Markdown in general. This reads the README as it is written: blocks fenced by three backticks at
the beginning of a line, tables without `|` in a cell.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from eventwatch.settings.model import Settings
from eventwatch.settings.sources import env_name

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
EXAMPLE = ROOT / "settings.env.example"
BEGIN = "<!-- settings: made by `python -m tests.readme` -->"
END = "<!-- end of settings -->"
_MANAGER = re.compile(r"((?:^# .*\n)+)((?:^#DB_\w+=.*\n)+)", re.MULTILINE)
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


# -- the table of settings ----------------------------------------------------------------------------------


def settings_table() -> str:
    """The table between its two markers."""
    defaults = Settings.model_construct().effective()  # whatever the environment says
    rows = [
        (
            f"`{env_name(field)}`",
            _type_of(info.annotation),
            _shown(defaults[env_name(field)]),
            " ".join((info.description or "").split()),
        )
        for field, info in Settings.model_fields.items()
    ]
    lines = ["| name | type | default | what it does |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(cells)} |" for cells in (*rows, _manager_row())]
    return "\n".join((BEGIN, "", *lines, "", END))


def _type_of(annotation: Any) -> str:
    """A keyword's type as a user writes it; a bar would end the table's cell."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _type_of(get_args(annotation)[0])
    if origin in {Union, UnionType}:
        return " or ".join(map(_type_of, get_args(annotation)))
    if origin is Literal:
        return "one of these words"
    return "None" if annotation is NoneType else str(annotation.__name__)


def _manager_row() -> tuple[str, str, str, str]:
    """The manager's own names share one text."""
    found = _MANAGER.search(EXAMPLE.read_text())
    if found is None:
        raise ValueError(f"{EXAMPLE.name} does not end with the manager's names")
    pairs = [line.removeprefix("#").partition("=")[::2] for line in found[2].splitlines()]
    names = " ".join(f"`{name}`" for name, _ in pairs)
    defaults = ", ".join(f"`{name}` {_shown(value)}" for name, value in pairs if value)
    return (
        names,
        "environment only",
        f"{defaults}, else empty",
        " ".join(found[1].replace("\n# ", " ").removeprefix("# ").split()),
    )


def _shown(default: str) -> str:
    return f"`{default}`" if default else "empty"


def with_settings_table(readme: str) -> str:
    """The README with the table as it must be."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README lacks {BEGIN if not begin else END}")
    return before + settings_table() + after


# -- what can be run ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block, and the line of the README on which it begins."""

    language: str
    text: str
    line: int

    def __str__(self) -> str:
        return f"README.md:{self.line} ({self.language or 'no language'})"


def blocks(readme: str) -> list[Block]:
    """Every fenced block, in order."""
    return [
        Block(found[1], found[2], readme.count("\n", 0, found.start()) + 1) for found in _BLOCK.finditer(readme)
    ]


def commands(readme: str) -> list[str]:
    """Every command of the `sh` blocks, in order, without its comment; a continued one on one line."""
    text = "".join(block.text for block in blocks(readme) if block.language == "sh").replace("\\\n", " ")
    lines = (" ".join(re.sub(r"(^|\s)#.*", "", line).split()) for line in text.splitlines())
    return [line for line in lines if line]


def code_spans(readme: str) -> list[str]:
    """What stands in backticks outside of the fenced blocks; one that is broken over two lines in one."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", _BLOCK.sub("", readme))]


if __name__ == "__main__":
    README.write_text(with_settings_table(README.read_text()))
