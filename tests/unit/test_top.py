"""What `eventwatch top` shows of which nodes; tests/e2e/test_top.py runs it."""

from __future__ import annotations

import pytest

from eventwatch.cli.top import matches, row_of, summary
from eventwatch.core.facts import Recorded

NODE = Recorded("ab" * 32, "ab" * 6, "exited", "unhealthy", ip="", port=80)
ROW = row_of(NODE, name="Sandbox-1", image="tools:2", reason="exit code 137 (SIGKILL), out of memory, after 2h")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", True),
        ("sandbox", True),
        ("SAND tools", True),
        ("sand missing", False),
        ("status:exited", True),
        ("status:exit health:unhealthy", True),
        ("health:healthy", False),
        ("reason:memory", True),
        ('reason:"out of memory" name:sandbox', True),
        ('reason:"out of', False),
        ("id:abab", True),
        ("id:bab", False),
        ("nothing:here", False),
    ],
)
def test_a_filter_finds_words_anywhere_or_in_a_field(text: str, *, found: bool) -> None:
    assert matches(ROW, text) is found


def test_the_first_line_counts_and_tells_of_trouble() -> None:
    other = row_of(Recorded("cd" * 32, "cd" * 6, "running", "unhealthy", ip="10.0.0.1", port=80))
    line = summary([ROW, other], 1, trouble="as of before: Database is away", sort="name")
    assert line.startswith("2 nodes: 1 exited, 1 running · 1 unhealthy · 1 shown · by name · ")
    assert line.endswith(" UTC · as of before: Database is away")
    assert summary([], 0, sort="name").startswith("0 nodes · by name")
