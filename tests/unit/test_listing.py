"""What a row of the engine's list proves of a container that was inspected before; rows are Docker's."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from eventwatch.core.facts import Observation
from eventwatch.core.listing import age_in_words, shows_no_change
from eventwatch.engine.wire import parse_container, parse_listed
from tests.kit.listed import row_of

NODE, NETWORK = "5c" * 32, "nodes"
NOW = datetime(2026, 11, 30, 12, 0, tzinfo=UTC)
MINUTE, HOUR, DAY = 60, 3600, 86400


def container(status: str = "running", *, age: float = 3 * HOUR, health: str = "healthy", **more: Any) -> Any:
    up = status in {"running", "paused"}
    state = {
        "Status": status,
        "Health": {"Status": health},
        "StartedAt": (NOW - timedelta(seconds=age)).isoformat(),
        "FinishedAt": "0001-01-01T00:00:00Z" if up else (NOW - timedelta(seconds=age / 2)).isoformat(),
        "ExitCode": 0,
    }
    networks = {NETWORK: {"IPAddress": "10.1.0.2" if up else ""}}
    return {"Id": NODE, "State": {**state, **more}, "NetworkSettings": {"Networks": networks}}


def proves(row: object, seen: Observation, *, now: datetime = NOW) -> bool:
    listed = parse_listed(row)
    return listed is not None and shows_no_change(listed, seen, network=NETWORK, now=now)


def seen_of(inspection: Any) -> Observation:
    return parse_container(inspection, network=NETWORK)


# As the daemon words it (go-units' HumanDuration).
AGES = {
    0.4: "Less than a second",
    1: "1 second",
    1.9: "1 second",
    39: "39 seconds",
    60: "About a minute",
    119: "About a minute",
    120: "2 minutes",
    59.9 * MINUTE: "59 minutes",
    HOUR: "About an hour",
    1.4 * HOUR: "About an hour",
    1.5 * HOUR: "2 hours",
    47.4 * HOUR: "47 hours",
    47.6 * HOUR: "2 days",
    13 * DAY: "13 days",
    14 * DAY: "2 weeks",
    59 * DAY: "8 weeks",
    60 * DAY: "2 months",
    729 * DAY: "24 months",
    731 * DAY: "2 years",
    -0.5: "Less than a second",
    -60: "",
}


@pytest.mark.parametrize(("seconds", "words"), AGES.items())
def test_ages_are_worded_as_the_engine_words_them(seconds: float, words: str) -> None:
    assert age_in_words(seconds) == words


@pytest.mark.parametrize("age", [0.2, 3, 59, 100, 900, 5400, 3 * HOUR, 9 * DAY, 90 * DAY])
@pytest.mark.parametrize("status", ["running", "exited"])
@pytest.mark.parametrize("later", [0, 30, 300, 7 * HOUR])
def test_a_quiet_container_shows_no_change_at_any_age_and_however_much_later(
    age: float, status: str, later: float
) -> None:
    inspection, now = container(status, age=age), NOW + timedelta(seconds=later)
    assert proves(row_of(inspection, now), seen_of(inspection), now=now)
    assert proves(row_of(inspection, now - timedelta(seconds=1)), seen_of(inspection), now=now)


def test_one_without_health_checks_and_one_that_was_never_started_show_none_either() -> None:
    for inspection in (container(Health=None), container("created", Health=None)):
        assert proves(row_of(inspection, NOW), seen_of(inspection))


@pytest.mark.parametrize(
    "after",
    [
        container("exited"),
        container("paused"),
        container(health="unhealthy"),
        container(health="starting"),
        container(Health=None),
        container(age=5),
        container(age=2 * HOUR),
        container("running") | {"NetworkSettings": {"Networks": {NETWORK: {"IPAddress": "10.1.0.3"}}}},
        container("running") | {"NetworkSettings": {"Networks": {}}},
        container("running") | {"NetworkSettings": {"Networks": {"other": {"IPAddress": "10.1.0.2"}}}},
        container("restarting"),
        container("dead"),
    ],
)
def test_whatever_a_row_shows_otherwise_is_a_sign(after: Any) -> None:
    assert not proves(row_of(after, NOW), seen_of(container()))


@pytest.mark.parametrize("after", [container(), container("exited", ExitCode=1), container("exited", age=10)])
def test_so_it_is_of_one_that_has_ended(after: Any) -> None:
    assert not proves(row_of(after, NOW), seen_of(container("exited")))


@pytest.mark.parametrize("status", ["paused", "restarting", "removing", "dead"])
def test_a_state_whose_row_hides_its_health_or_is_about_to_change_proves_nothing(status: str) -> None:
    inspection = container(status)
    assert not proves(row_of(inspection, NOW), seen_of(inspection))


@pytest.mark.parametrize(
    "odd",
    [
        {"Status": "Up 3 hours ago (healthy)"},
        {"Status": "Up seit 3 Stunden (healthy)"},
        {"Status": None},
        {"Status": ""},
        {"State": 7},
        {"NetworkSettings": None},
        {"NetworkSettings": {"Networks": {NETWORK: {"IPAddress": 5}}}},
        {"NetworkSettings": {"Networks": [NETWORK]}},
    ],
)
def test_what_we_do_not_know_is_a_sign(odd: dict[str, Any]) -> None:
    inspection = container()
    assert not proves(row_of(inspection, NOW) | odd, seen_of(inspection))


def test_a_container_that_was_not_there_is_never_proven_nor_is_a_row_of_none() -> None:
    seen = seen_of(container())
    assert not proves(row_of(container(), NOW), replace(seen, found=False))
    assert parse_listed({"Id": "../x"}) is None
    assert parse_listed(["no row"]) is None
