"""Parsing what engines say, in all their dialects."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from eventwatch.core.facts import Event, Usage, is_container_id, parse_time
from eventwatch.engine.wire import MalformedEventError, parse_container, parse_ending, parse_event, parse_usage


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


def test_health_is_read_from_the_action_or_from_podmans_word_beside_it() -> None:
    docker = parse_event(container_event("health_status: unhealthy"))
    podman = parse_event(container_event("health_status") | {"HealthStatus": "unhealthy"})
    assert docker == podman == Event("health_status", "c1", 7, health="unhealthy")


@pytest.mark.parametrize("odd", ["", "reset", None, 7, ["healthy"], {}])
def test_a_health_that_podman_does_not_name_proves_nothing(odd: object) -> None:
    assert parse_event(container_event("health_status") | {"HealthStatus": odd}) == Event("health_status", "c1", 7)


def test_a_network_event_is_about_its_container() -> None:
    raw = {
        "Type": "network",
        "Action": "disconnect",
        "timeNano": 9,
        "Actor": {"ID": "n1", "Attributes": {"container": "c1", "name": "tool-server-network"}},
    }
    assert parse_event(raw) == Event("disconnect", "c1", 9, detail="n1", network="tool-server-network")


@pytest.mark.parametrize("attributes", [{"image": "", "name": "one", "network": "net"}, {"name": "one"}])
def test_podmans_network_event_names_the_container_as_its_subject(attributes: dict[str, str]) -> None:
    raw = {"Type": "network", "Action": "connect", "timeNano": 9, "Actor": {"ID": "c1", "Attributes": attributes}}
    assert parse_event(raw) == Event("connect", "c1", 9, network=attributes.get("network", ""))


@pytest.mark.parametrize("action", ["destroy", "die", "start"])
def test_a_networks_own_events_are_not_its_containers(action: str) -> None:
    actor = {"ID": "n1", "Attributes": {"container": "c1", "name": "net"}}
    assert parse_event({"Type": "network", "Action": action, "timeNano": 9, "Actor": actor}) is None


def test_events_about_other_things_are_nobodys() -> None:
    image = {"Type": "image", "Action": "pull", "Actor": {"ID": "i"}, "timeNano": 1}
    network_create = {"Type": "network", "Action": "create", "Actor": {"ID": "n", "Attributes": {}}, "timeNano": 1}
    assert parse_event(image) is None
    assert parse_event(network_create) is None


@pytest.mark.parametrize(
    "raw",
    [
        None,
        [],
        "start",
        3,
        {},
        {"Type": "container"},
        container_event("start") | {"Actor": None},
        container_event("start") | {"timeNano": "7"},
        container_event("start") | {"timeNano": True},
        container_event("start") | {"Action": 3},
        container_event("start") | {"Actor": {"ID": None}},
        container_event("die") | {"Actor": {"ID": "c1", "Attributes": ["x"]}},
    ],
)
def test_what_is_no_event_is_malformed(raw: object) -> None:
    with pytest.raises(MalformedEventError):
        parse_event(raw)


def inspection(status: str, health: str | None = None, ip: str = "10.0.0.2", **more: Any) -> dict[str, Any]:
    state: dict[str, Any] = {"Status": status, "StartedAt": "2026-05-01T12:00:00.123456789Z"}
    if health is not None:
        state["Health"] = {"Status": health}
    return {
        "Id": "c1",
        "Name": "/one",
        "State": state | more,
        "Config": {"Labels": {"a": "1"}, "ExposedPorts": {"31942/tcp": {}, "53/udp": {}}},
        "NetworkSettings": {"Networks": {"net": {"IPAddress": ip}}},
    }


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


def test_a_time_that_lies_ahead_of_the_engines_clock_does_not_count() -> None:
    started = 1_777_636_800_123_456_000
    for not_after, expected in ((started - 1, 5), (started, started), (None, started)):
        seen = parse_container(inspection("running"), network="net", as_of=5, not_after=not_after)
        assert seen.time_nano == expected
        assert seen.started_at is not None


@pytest.mark.parametrize(
    ("exposed", "ports"),
    [
        ({"80/tcp": {}, "443": {}, "53/udp": {}}, (80, 443)),
        ({"\u00b2/tcp": {}, "99999/tcp": {}, "0/tcp": {}, "-1/tcp": {}, "9" * 5000 + "/tcp": {}, "x/tcp": {}}, ()),
    ],
)
def test_what_is_no_port_is_not_exposed(exposed: dict[str, Any], ports: tuple[int, ...]) -> None:
    container = inspection("running")
    container["Config"]["ExposedPorts"] = exposed
    assert parse_container(container, network="net").tcp_ports == ports


def reachable() -> dict[str, Any]:
    """What a published container on two networks looks like, on Engine 28."""
    container = inspection("running") | {
        "RestartCount": 3,
        "Created": "2026-05-01T11:59:59Z",
        "HostConfig": {"PortBindings": {"80/tcp": [{"HostPort": "8080"}], "81/tcp": [{"HostPort": ""}]}},
    }
    container["Config"]["Hostname"] = "host"
    container["NetworkSettings"] = {
        "Ports": {"80/tcp": [{"HostPort": "8080"}, {"HostPort": "8081"}], "31942/tcp": None},
        "Networks": {
            "net": {"IPAddress": "10.0.0.2", "GlobalIPv6Address": "fd00::2", "Aliases": ["db", "c1"]},
            "other": {"IPAddress": "10.1.0.2", "GlobalIPv6Address": "", "Aliases": None, "DNSNames": ["mongo"]},
        },
    }
    return container


def test_an_observation_tells_what_others_reach_the_container_by() -> None:
    seen = parse_container(reachable(), network="net")
    assert seen.names == {"one", "host", "db", "c1", "mongo"}
    assert seen.addresses == {"10.0.0.2", "fd00::2", "10.1.0.2"}
    assert seen.published_ports == {8080, 8081}
    assert seen.restart_count == 3
    assert seen.created_at == datetime(2026, 5, 1, 11, 59, 59, tzinfo=UTC)


@pytest.mark.parametrize(
    ("said", "meant"), [("stopping", "running"), ("stopped", "exited"), ("initialized", "created")]
)
def test_podmans_states_are_dockers_and_never_ours(said: str, meant: str) -> None:
    container = reachable()
    container["State"]["Status"] = said
    assert parse_container(container, network="net").status == meant


def test_an_inspection_without_these_says_nothing_of_them() -> None:
    seen = parse_container({"Id": "c1", "State": {"Status": "created"}}, network="net")
    assert (seen.restart_count, seen.created_at) == (0, None)
    assert (seen.names, seen.addresses, seen.published_ports) == (frozenset(), frozenset(), frozenset())


@pytest.mark.parametrize(
    "junk", [None, 7, -7, 1.5, True, "text", [], [None], {}, {"a": 1}, ["x", 7, {"HostPort": []}]]
)
def test_junk_where_these_stand_spoils_nothing(junk: Any) -> None:
    container = reachable() | {"RestartCount": junk, "Created": junk}
    container["Config"] |= {"Hostname": junk, "Labels": junk}
    container["HostConfig"] = {"PortBindings": {"80/tcp": junk}}
    container["NetworkSettings"]["Ports"] = {"80/tcp": junk, "81/tcp": [{"HostPort": junk}]}
    container["NetworkSettings"]["Networks"]["other"] = {
        "Aliases": junk,
        "DNSNames": junk,
        "GlobalIPv6Address": junk,
    }
    container["NetworkSettings"]["Networks"]["third"] = junk
    assert parse_container(container, network="net").status == "running"
    for part in ("HostConfig", "NetworkSettings"):
        whole = reachable() | {part: junk if part == "HostConfig" else {"Ports": junk}}
        assert parse_container(whole, network="net").status == "running"


@pytest.mark.parametrize("status", [None, 7, "run\x1b[31m", "\ud800", ["running"]])
def test_a_status_that_no_document_can_hold_is_refused(status: Any) -> None:
    with pytest.raises(TypeError):
        parse_container(inspection(status), network="net")


@pytest.mark.parametrize("text", ["9999-12-31T23:59:59-14:00", 7, ["2026-05-01T12:00:00Z"]])
def test_a_time_that_cannot_be_read_is_never(text: Any) -> None:
    assert parse_time(text) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0" * 64, True),
        ("0123456789abcdef" * 4, True),
        ("A" * 64, False),
        ("a" * 63, False),
        ("a" * 65, False),
        ("a" * 64 + "\n", False),
        ("\u0661" * 64, False),
        ("", False),
        (None, False),
        (7, False),
    ],
)
def test_only_64_hex_digits_are_an_id(text: object, expected: bool) -> None:
    assert is_container_id(text) is expected


@pytest.mark.parametrize("odd", ["\ud800", "", "a" * 129, "a\n", "\x1b[2J", "é"])
def test_what_no_database_could_be_asked_for_is_no_id(odd: str) -> None:
    raw: dict[str, Any] = {"Type": "container", "Action": "start", "timeNano": 9, "Actor": {"ID": odd}}
    with pytest.raises(MalformedEventError, match="is no id"):
        parse_event(raw)
    raw = {"Type": "network", "Action": "connect", "timeNano": 9}
    assert parse_event(raw | {"Actor": {"ID": "n", "Attributes": {"container": odd}}}) is None


def test_an_ending_tells_code_signal_memory_and_the_last_failed_check() -> None:
    log = [{"ExitCode": 1, "Output": "refused\x1b[2J" + "x" * 1000}, {"ExitCode": 0, "Output": "fine"}]
    state = {"Status": "exited", "ExitCode": 137, "OOMKilled": True, "Error": "", "Health": {"Log": log}}
    told = str(parse_ending({"State": state}))
    assert told.startswith("exit code 137 (SIGKILL), out of memory; its last health check said: refused\\x1b[2Jxx")
    assert len(told) < 400
    assert str(parse_ending({"State": {"Status": "dead", "ExitCode": "x", "Health": 7}})) == "no exit code"
    assert parse_ending({"State": {"Status": "exited", "Restarting": True}}) is None
    assert parse_ending({"State": {"Status": "running"}}) is None


@pytest.mark.parametrize(
    ("stats", "usage"),
    [
        (
            {"cpu_stats": {"cpu_usage": {"total_usage": 5}}, "networks": {"eth0": {"rx_bytes": 1, "tx_bytes": 2}}},
            (5, 3),
        ),
        ({"cpu_stats": {"cpu_usage": {"total_usage": -5}}, "networks": {"eth0": {"rx_bytes": 1}}}, (None, None)),
        ({"cpu_stats": {"cpu_usage": {"total_usage": float("nan")}}, "networks": {}}, (None, None)),
        ({"cpu_stats": {"cpu_usage": {"total_usage": True}}, "networks": {"eth0": 7}}, (None, None)),
        ({"cpu_stats": {"cpu_usage": {"total_usage": 2**70}}, "networks": [1]}, (None, None)),
        ({"cpu_stats": 7}, (None, None)),
        ({}, (None, None)),
    ],
)
def test_usage_is_read_where_it_is_one(stats: dict[str, Any], usage: tuple[int | None, int | None]) -> None:
    assert parse_usage(stats) == Usage(*usage)


@pytest.mark.parametrize(
    ("configured", "checked"),
    [
        (None, False),
        ({"Test": ["CMD", "true"]}, True),
        ({"Test": ["CMD-SHELL", "true"]}, True),
        ({"Test": ["NONE"]}, False),
        ({"Test": []}, False),
        ({"Test": 7}, False),
        ("CMD", False),
    ],
)
@pytest.mark.parametrize("status", ["created", "exited", "running"])
def test_whether_a_container_has_a_health_check_is_told_by_what_it_was_made_with(
    status: str, configured: object, checked: bool
) -> None:
    container = inspection(status) | {"Config": {"Healthcheck": configured}}
    assert parse_container(container, network="n").checked is checked
