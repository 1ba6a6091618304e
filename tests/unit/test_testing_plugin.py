"""The pytest plugin's module, apart from its fixtures (tests/plugin_project shows those)."""

from __future__ import annotations

import sys

import pytest

from eventwatch import testing
from eventwatch.settings.model import load_settings
from tests.kit.processes import run


@pytest.mark.parametrize("name", testing.__all__)
def test_what_it_offers_is_there(name: str) -> None:
    assert getattr(testing, name).__name__ == name


def test_what_it_does_not_offer_is_not() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = testing.nothing


def test_that_pytest_imports_it_at_every_start_costs_nobody_an_engine_or_a_database() -> None:
    code = "import sys, eventwatch.testing; print(sorted({'aiodocker', 'beanie', 'pymongo'} & sys.modules.keys()))"
    assert run(sys.executable, "-c", code).stdout == "[]\n"


def test_the_variable_that_names_a_mongod_for_tests_is_no_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(testing.URL_VARIABLE, "mongodb://127.0.0.1:1")
    assert load_settings(None)
