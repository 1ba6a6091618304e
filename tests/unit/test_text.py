"""Text from outside cannot steer a terminal, begin a line or be endless."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventwatch.core.text import printable


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("plain, even ü and 日本", "plain, even ü and 日本"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\u202ereversed\u2028next\u2029", r"\u202ereversed\u2028next\u2029"),
        ("\ud800", r"\ud800"),
        ("no\u00a0break", "no\u00a0break"),
        (None, "None"),
    ],
)
def test_what_a_terminal_obeys_is_escaped_and_the_rest_is_left(text: object, line: str) -> None:
    assert printable(text) == line


def test_a_long_text_is_cut() -> None:
    assert printable("a" * 11, 10) == "a" * 10 + "…"
    assert printable("a" * 10, 10) == "a" * 10


@given(st.text(st.characters()))
def test_nothing_that_steers_is_left_of_any_text(text: str) -> None:
    line = printable(text)
    assert len(line.splitlines()) <= 1
    assert not {"Cc", "Cf", "Cs", "Zl", "Zp"} & {unicodedata.category(char) for char in line}
