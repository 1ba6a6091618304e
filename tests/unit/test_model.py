"""Parsing what engines say, in all their dialects."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from eventwatch.model import Event, MalformedEventError, parse_container, parse_event, parse_time


def container_event(action: str, **attributes: str) -> dict[str, Any]:
    return {"Type": "container", "Action": action, "Actor": {"ID": "c1", "Attributes": attributes}, "timeNano": 7}


def test_a_container_event_needs_none_of_the_legacy_fields() -> None:
    assert parse_event(container_event("start")) == Event("start", "c1", 7)


def test_legacy_fields_and_labels_named_like_attributes_change_nothing() -> None:
    raw = container_event("die", exitCode="a label") | {"status": "x", "id": "y", "from": "z", "time": 1}
    assert parse_event(raw) == Event("die", "c1", 7)


@pytest.mark.parametrize(("said", "meant"), [("died", "die"), ("remove", "destroy")])
def test_podmans_words_mean_dockers(said: str, meant: str) -> None:
    assert parse_event(container_event(said)) == Event(meant, "c1", 7)


def test_health_is_read_from_the_action_or_from_podmans_attribute() -> None:
    docker = parse_event(container_event("health_status: unhealthy"))
    podman = parse_event(container_event("health_status", health_status="unhealthy"))
    assert docker == podman == Event("health_status", "c1", 7, health="unhealthy")


def test_a_network_event_is_about_its_container() -> None:
    raw = {
        "Type": "network", "Action": "disconnect", "timeNano": 9,
        "Actor": {"ID": "n1", "Attributes": {"container": "c1", "name": "tool-server-network"}},
    }  # fmt: skip
    assert parse_event(raw) == Event("disconnect", "c1", 9, detail="n1")


def test_events_about_other_things_are_nobodys() -> None:
    image = {"Type": "image", "Action": "pull", "Actor": {"ID": "i"}, "timeNano": 1}
    network_create = {"Type": "network", "Action": "create", "Actor": {"ID": "n", "Attributes": {}}, "timeNano": 1}
    assert parse_event(image) is None
    assert parse_event(network_create) is None


@pytest.mark.parametrize(
    "raw",
    [
        None, [], "start", 3, {}, {"Type": "container"},
        container_event("start") | {"Actor": None},
        container_event("start") | {"timeNano": "7"},
        container_event("start") | {"timeNano": True},
        container_event("start") | {"Action": 3},
        container_event("start") | {"Actor": {"ID": None}},
    ],
)  # fmt: skip
def test_what_is_no_event_is_malformed(raw: object) -> None:
    with pytest.raises(MalformedEventError):
        parse_event(raw)


def inspection(status: str, health: str | None = None, ip: str = "10.0.0.2", **more: Any) -> dict[str, Any]:
    state: dict[str, Any] = {"Status": status, "StartedAt": "2026-05-01T12:00:00.123456789Z"}
    if health is not None:
        state["Health"] = {"Status": health}
    return {
        "Id": "c1", "Name": "/one", "State": state | more,
        "Config": {"Labels": {"a": "1"}, "ExposedPorts": {"31942/tcp": {}, "53/udp": {}}},
        "NetworkSettings": {"Networks": {"net": {"IPAddress": ip}}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("status", "health", "expected_health", "expected_ip"),
    [
        ("running", "healthy", "healthy", "10.0.0.2"),
        ("running", None, "none", "10.0.0.2"),
        ("running", "", "none", "10.0.0.2"),
        ("paused", "unhealthy", "unhealthy", "10.0.0.2"),
        ("exited", "unhealthy", "unhealthy", ""),
        ("exited", "healthy", "unhealthy", ""),  # after a daemon crash
        ("exited", "starting", "starting", ""),
        ("restarting", None, "none", ""),
    ],
)
def test_a_stopped_node_is_neither_healthy_nor_anywhere(
    status: str, health: str | None, expected_health: str, expected_ip: str
) -> None:
    seen = parse_container(inspection(status, health), network="net")
    assert (seen.status, seen.health, seen.ip) == (status, expected_health, expected_ip)


def test_a_node_on_another_network_has_no_ip_of_ours() -> None:
    seen = parse_container(inspection("running"), network="elsewhere")
    assert seen.ip == ""
    assert seen.networks == ("net",)


def test_an_observation_is_as_of_the_latest_thing_that_it_contains() -> None:
    started = 1_777_636_800_123_456_000  # to the microsecond below: never later than it was
    assert parse_container(inspection("running"), network="net").time_nano == started
    assert parse_container(inspection("running"), network="net", as_of=started + 5).time_nano == started + 5
    finished = parse_container(inspection("exited", FinishedAt="2026-05-01T12:00:01Z"), network="net")
    assert finished.time_nano == 1_777_636_801_000_000_000


def test_udp_ports_are_not_ports_of_a_node() -> None:
    assert parse_container(inspection("running"), network="net").tcp_ports == (31942,)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-05-01T12:00:00.123456789Z", datetime(2026, 5, 1, 12, 0, 0, 123456, UTC)),
        ("2026-05-01T14:00:00.5+02:00", datetime(2026, 5, 1, 12, 0, 0, 500000, UTC)),
        ("2026-05-01T12:00:00Z", datetime(2026, 5, 1, 12, tzinfo=UTC)),
        ("0001-01-01T00:00:00Z", None),
        ("yesterday", None),
        ("", None),
        (None, None),
    ],
)
def test_engine_times_of_any_precision_are_read(text: str | None, moment: datetime | None) -> None:
    assert parse_time(text) == moment
