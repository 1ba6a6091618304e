"""The decisions, as tables."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from eventwatch.core.facts import Claim, Event, Observation, Owner, Recorded, Usage
from eventwatch.core.policy import (
    CLOCK_SET_BACK_NS,
    KNOWN_ACTIONS,
    Hint,
    Ownership,
    activity,
    claim_on,
    complete_hint,
    desired_fields,
    difference,
    hint_of,
    idle_timeout_of,
    idleness,
    is_older,
    label_matches,
    mass_limit,
    ownership,
    start_as_use,
    stop_timeout_of,
    why_not_to_stop,
)
from eventwatch.settings.model import ACTIVITIES

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
TIMEOUT = 1800.0


def recorded(**fields: Any) -> Recorded:
    return Recorded("a" * 64, "a" * 12, **{"status": "running", "health": "healthy", "ip": "10.0.0.2", **fields})


def seen(**fields: Any) -> Observation:
    return Observation("a" * 64, **{"status": "running", "health": "healthy", "ip": "10.0.0.2", **fields})


@pytest.mark.parametrize(
    ("action", "hint"),
    [
        ("start", Hint(inspect=True)),
        ("unpause", Hint(inspect=True)),
        ("die", Hint(fields={"status": "exited", "ip": ""})),
        ("pause", Hint(fields={"status": "paused"})),
        ("destroy", Hint(delete=True)),
        *((action, Hint()) for action in ("stop", "kill", "oom", "restart", "rename", "create", "update")),
        *((action, Hint()) for action in ("connect", "disconnect")),
    ],
)
def test_each_event_proves_what_the_event_table_says(action: str, hint: Hint) -> None:
    assert hint_of(Event(action, "x", 1), health_check=True) == hint
    assert action in KNOWN_ACTIONS


def test_a_health_event_proves_its_health_unless_health_checks_are_off() -> None:
    event = Event("health_status", "x", 1, health="healthy")
    assert hint_of(event, health_check=True) == Hint(fields={"health": "healthy"})
    assert not hint_of(event, health_check=False)


@pytest.mark.parametrize(
    ("time_nano", "as_of", "older"),
    [
        (100, 100, False),
        (101, 100, False),
        (99, 100, True),
        (0, CLOCK_SET_BACK_NS - 1, True),
        (0, CLOCK_SET_BACK_NS, False),
    ],
)
def test_a_fact_is_older_unless_the_engine_set_its_clock_back(time_nano: int, as_of: int, *, older: bool) -> None:
    assert is_older(time_nano, as_of) is older


@pytest.mark.parametrize(
    ("hint", "known", "written"),
    [
        ({"status": "exited", "ip": ""}, "healthy", {"status": "exited", "ip": "", "health": "unhealthy"}),
        ({"status": "exited", "ip": ""}, "none", {"status": "exited", "ip": ""}),
        ({"status": "paused"}, "healthy", {"status": "paused", "health": "unhealthy"}),
        ({"status": "running", "ip": "10.0.0.2"}, "healthy", {"status": "running", "ip": "10.0.0.2"}),
    ],
)
def test_a_node_that_does_not_run_is_never_written_healthy(
    hint: dict[str, str], known: str, written: dict[str, str]
) -> None:
    assert complete_hint(hint, recorded(health=known), health_check=True) == written
    assert complete_hint(hint, recorded(health=known), health_check=False) == hint


def test_a_late_healthy_of_a_node_that_exited_is_not_believed() -> None:
    known = recorded(status="exited", health="unhealthy")
    assert complete_hint({"health": "healthy"}, known, health_check=True) == {"health": "unhealthy"}


@pytest.mark.parametrize(
    ("exposed", "port"),
    [((), 31942), ((31942,), 31942), ((80, 31942), 31942), ((8080,), 8080), ((80, 443), None)],
)
def test_the_port_follows_what_the_container_exposes(exposed: tuple[int, ...], port: int | None) -> None:
    fields = desired_fields(seen(tcp_ports=exposed), node_port=31942, health_check=True)
    assert fields.get("port") == port


def test_health_is_left_alone_when_health_checks_are_off() -> None:
    assert "health" not in desired_fields(seen(), node_port=1, health_check=False)


def test_only_what_differs_is_written() -> None:
    wanted = {"status": "exited", "health": "healthy", "ip": "10.0.0.2"}
    assert difference(recorded(), wanted) == {"status": "exited"}


ASKED, STANDS = Claim(run=None), Claim(run=None, stands=True)


def test_a_claimed_node_keeps_saying_stopping_and_a_leftover_claim_does_not() -> None:
    stopping, running = recorded(status="stopping"), {"status": "running"}
    assert difference(stopping, running, claim=ASKED) == {}
    assert difference(stopping, running, claim=STANDS) == {}
    assert difference(stopping, {"status": "restarting"}, claim=STANDS) == {}
    assert difference(stopping, running) == running
    assert difference(stopping, {"status": "exited"}, claim=STANDS) == {"status": "exited"}


def test_only_a_claim_that_stands_is_put_back_after_a_manager_wrote_running() -> None:
    back = recorded(status="running")
    assert difference(back, {"status": "running"}, claim=ASKED) == {}
    assert difference(back, {"status": "running"}, claim=STANDS) == {"status": "stopping"}


def test_a_claim_is_about_one_run_of_the_container() -> None:
    started = datetime(2026, 5, 1, 11, 0, 0, 123_456, tzinfo=UTC)
    claim = Claim(run=datetime(2026, 5, 1, 11, 0, 0, 123_000))  # noqa: DTZ001 - as the database keeps it
    assert claim_on(seen(started_at=started), None, claim) is claim
    assert claim_on(seen(started_at=started + timedelta(seconds=1)), claim) is None
    assert claim_on(seen(started_at=started + timedelta(seconds=1), restart_count=1), claim) is claim


@pytest.mark.parametrize(
    ("stamp", "owner", "whose"),
    [
        ("us", None, Ownership.OWN),
        ("them", None, Ownership.OTHERS),
        (None, None, Ownership.NOBODYS),
        (None, "us", Ownership.OWN),
        (None, "them", Ownership.OTHERS),
        ("us", "them", Ownership.OTHERS),
        ("them", "us", Ownership.OWN),
    ],
)
def test_the_record_of_owners_counts_more_than_a_stamp(
    stamp: str | None, owner: str | None, whose: Ownership
) -> None:
    assert ownership(recorded(engine_id=stamp), Owner(owner) if owner else None, engine_id="us") is whose


@pytest.mark.parametrize(
    ("configured", "nodes", "limit"), [(None, 0, 5), (None, 9, 5), (None, 30, 15), (2, 30, 2), (0, 30, 0)]
)
def test_the_limit_of_a_mass_action_is_half_of_the_nodes_and_at_least_five(
    configured: int | None, nodes: int, limit: int
) -> None:
    assert mass_limit(configured, nodes) == limit


@pytest.mark.parametrize(
    ("restarts", "before", "use"),
    [
        pytest.param(0, None, NOW, id="started by somebody"),
        pytest.param(0, NOW - timedelta(hours=1), NOW, id="started again by somebody"),
        pytest.param(3, NOW - timedelta(hours=1), NOW - timedelta(hours=1), id="restarted by its policy"),
        pytest.param(3, None, NOW, id="in a crash loop at the first look"),
    ],
)
def test_a_start_by_the_restart_policy_is_no_use(restarts: int, before: datetime | None, use: datetime) -> None:
    assert start_as_use(seen(started_at=NOW, restart_count=restarts), before) == use


@pytest.mark.parametrize(
    ("networks", "labels", "label", "reason"),
    [
        (("net",), {}, None, ""),
        (("other", "net"), {}, None, ""),
        (("other",), {}, None, "its container is not on net"),
        (("other",), {"node": "1"}, None, "its container is not on net"),
        (("other",), {"node": "1"}, "node", ""),
        ((), {}, "node", "its container is not on net and has no label node"),
    ],
)
def test_only_a_container_on_the_network_or_with_the_label_may_be_stopped(
    networks: tuple[str, ...], labels: dict[str, str], label: str | None, reason: str
) -> None:
    assert why_not_to_stop(seen(networks=networks, labels=labels), network="net", label=label) == reason


def ago(seconds: float) -> datetime:
    """As the manager stores it: UTC without saying so."""
    return (NOW - timedelta(seconds=seconds)).replace(tzinfo=None)


@pytest.mark.parametrize(
    ("node", "observed", "timeout", "idle", "reason"),
    [
        pytest.param(recorded(last_req_time=ago(1800)), seen(), TIMEOUT, True, "used up", id="just idle"),
        pytest.param(recorded(last_req_time=ago(1799)), seen(), TIMEOUT, False, "1 s", id="not yet"),
        pytest.param(
            recorded(last_req_time=ago(9999)),
            seen(started_at=NOW - timedelta(seconds=60)),
            TIMEOUT,
            False,
            "1740 s",
            id="started lately",
        ),
        pytest.param(recorded(last_req_time=None), seen(), TIMEOUT, False, "no last_req_time", id="missing"),
        pytest.param(recorded(last_req_time=ago(-5)), seen(), TIMEOUT, False, "future", id="future"),
        pytest.param(recorded(last_req_time=ago(9)), seen(status="paused"), 1, False, "paused", id="paused"),
        pytest.param(recorded(last_req_time=ago(9999)), seen(), 0, False, "off", id="turned off"),
    ],
)
def test_a_node_is_idle_only_when_request_and_start_are_old_enough(
    node: Recorded, observed: Observation, timeout: float, *, idle: bool, reason: str
) -> None:
    verdict = idleness(node, observed, now=NOW, timeout=timeout)
    assert verdict.idle is idle
    assert reason in verdict.reason


def test_a_node_whose_last_request_only_its_registration_wrote_is_never_idle() -> None:
    node = recorded(last_req_time=ago(9999))
    registered = idleness(node, seen(), now=NOW, timeout=TIMEOUT, owner=Owner("us", registered=ago(9999)))
    assert (registered.idle, registered.left) == (False, None)
    assert idleness(node, seen(), now=NOW, timeout=TIMEOUT, owner=Owner("us", registered=ago(99999))).idle


def test_a_crash_loop_becomes_idle() -> None:
    node, looping = recorded(last_req_time=ago(9999)), seen(started_at=NOW, restart_count=9)
    assert not idleness(node, looping, now=NOW, timeout=TIMEOUT).idle
    assert idleness(node, looping, now=NOW, timeout=TIMEOUT, used_at=NOW - timedelta(hours=2)).idle


def test_an_aware_last_request_counts_the_same_as_a_naive_one() -> None:
    aware = (NOW - timedelta(seconds=1800)).astimezone()
    assert idleness(recorded(last_req_time=aware), seen(), now=NOW, timeout=TIMEOUT).idle


@pytest.mark.parametrize(
    ("wanted", "matches"),
    [("a", True), ("a=1", True), ("a=2", False), ("b", False), ("empty", True), ("empty=", True)],
)
def test_labels_match_as_in_the_engines_own_filter(wanted: str, *, matches: bool) -> None:
    assert label_matches(wanted, {"a": "1", "empty": ""}) is matches


@pytest.mark.parametrize(
    ("written", "label", "seconds", "problem"),
    [
        (None, None, TIMEOUT, ""),
        (None, "2h", 7200, ""),
        ("90s", "2h", 90, ""),
        (45, "2h", 45, ""),
        ("never", "1s", math.inf, ""),
        (None, " Never ", math.inf, ""),
        (None, "0", math.inf, ""),
        (
            None,
            "soon",
            TIMEOUT,
            "label eventwatch.idle-timeout is no duration such as 2h, and not never: soon; the setting stands",
        ),
        (-1, None, TIMEOUT, "field idle_timeout is no duration such as 2h, and not never: -1; the setting stands"),
        (
            math.nan,
            "2h",
            TIMEOUT,
            "field idle_timeout is no duration such as 2h, and not never: nan; the setting stands",
        ),
        (
            None,
            "1e999",
            TIMEOUT,
            "label eventwatch.idle-timeout is no duration such as 2h, and not never: 1e999; the setting stands",
        ),
        (
            None,
            "4000d",
            TIMEOUT,
            "label eventwatch.idle-timeout must be at most 3650d, or never: 4000d; the setting stands",
        ),
        (None, "\x1b[2J" + "9" * 1_000_000, TIMEOUT, None),
    ],
)
def test_a_nodes_own_idle_timeout_counts_the_documents_first(
    written: str | float | None, label: str | None, seconds: float, problem: str | None
) -> None:
    labels = {} if label is None else {"eventwatch.idle-timeout": label}
    found = idle_timeout_of(written, labels, TIMEOUT)
    assert found.seconds == seconds
    assert found.problem.isprintable()
    assert len(found.problem) < 150
    if problem is not None:
        assert found.problem == problem


def test_a_node_that_is_never_idle_is_not_stopped() -> None:
    verdict = idleness(recorded(last_req_time=ago(99999)), seen(), now=NOW, timeout=math.inf)
    assert (verdict.idle, verdict.left, verdict.reason) == (False, None, "its own idle timeout is never")


@pytest.mark.parametrize(("label", "seconds"), [(None, 10), ("3s", 3), ("never", 10), ("2h", 10), ("x", 10)])
def test_a_container_says_how_long_it_may_take_to_end(label: str | None, seconds: float) -> None:
    labels = {} if label is None else {"eventwatch.stop-timeout": label}
    found = stop_timeout_of(labels, 10)
    assert found.seconds == seconds
    assert bool(found.problem) == (label in {"never", "2h", "x"})


@pytest.mark.parametrize(
    ("first", "second", "kinds", "works"),
    [
        (Usage(0, 0), Usage(2_000_000_000, 0), {"cpu", "network"}, True),
        (Usage(0, 0), Usage(10_000_000, 5000), {"cpu", "network"}, True),
        (Usage(0, 0), Usage(10_000_000, 10), {"cpu", "network"}, False),
        (Usage(0, 0), Usage(2_000_000_000, 0), {"network"}, False),
        (Usage(9, 9), Usage(0, 0), {"cpu"}, None),
        (Usage(9, None), Usage(9, None), {"cpu"}, False),
        (Usage(9, None), Usage(9, 4), {"cpu", "network"}, None),
        (Usage(), Usage(), {"cpu", "network"}, None),
        (Usage(0), Usage(10**18), {"cpu", "network"}, True),
    ],
)
def test_work_is_what_was_used_between_two_looks(
    first: Usage, second: Usage, kinds: set[str], works: bool | None
) -> None:
    thresholds = {kind: ACTIVITIES[kind] for kind in sorted(kinds)}
    assert activity(first, second, seconds=2, thresholds=thresholds).works is works
    assert activity(first, second, seconds=0, thresholds=thresholds).works is None
