"""Reading, checking and writing recordings, without an engine or a database."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

from eventwatch.core.errors import ConfigError, EventwatchError
from eventwatch.replay.recording import (
    DisconnectLine,
    InspectLine,
    RecordingWriter,
    clean_container,
    clean_event,
    disconnect_record,
    event_record,
    expected_path,
    header_record,
    inspect_record,
    read_expected,
    read_recording,
    write_truth,
)
from eventwatch.replay.recording import to_json as line

RECORDINGS = sorted((Path(__file__).parent.parent / "recordings").glob("*.jsonl"))
NODE = "a" * 64
OTHER = "b" * 64
HEADER = header_record(version="20.10.24", api_version="1.41", network="net", started_at=1)


def event(action: str, at: int, node_id: str = NODE) -> dict[str, Any]:
    return event_record(
        at,
        {
            "Type": "container",
            "Action": action,
            "Actor": {"ID": node_id, "Attributes": {"name": "n"}},
            "timeNano": at,
        },
    )


def inspection(at: int, node_id: str = NODE, status: str = "running") -> dict[str, Any]:
    return inspect_record(at, node_id, {"Id": node_id, "State": {"Status": status}})


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    heard: list[str] = []
    handler = logger.add(lambda message: heard.append(str(message).strip()), level="WARNING", format="{message}")
    yield heard
    logger.remove(handler)


def written(path: Path, *records: dict[str, Any], end: str = "\n") -> Path:
    path.write_text("\n".join(line(record) for record in records) + end)
    return path


def refusal(path: Path, content: str | bytes) -> str:
    file = path / "bad.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as raised:
        read_recording(file)
    text = str(raised.value)
    assert "\n" not in text
    assert raised.value.exit_code == 2
    return text.removeprefix(str(path) + "/")


GOOD = line(event("start", 5))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("", "bad.jsonl:1: is empty", id="empty"),
        pytest.param("\n \n", "bad.jsonl:1: is empty", id="blank"),
        pytest.param("event\n", "bad.jsonl:1: not JSON", id="not-json"),
        pytest.param(f"{GOOD}\n{{]\n{GOOD}\n", "bad.jsonl:2: not JSON", id="not-json-in-the-middle"),
        pytest.param(f"{GOOD}\n{{]\n", "bad.jsonl:2: not JSON", id="last-line-wrong-but-not-cut-off"),
        pytest.param('{"kind":"eve', "bad.jsonl:1: not JSON", id="only-line-cut-off"),
        pytest.param(f"{GOOD}\n[1]\n", "bad.jsonl:2: not a JSON object", id="not-an-object"),
        pytest.param(f"{GOOD}\n3", "bad.jsonl:2: not a JSON object", id="last-line-not-an-object"),
        pytest.param(f"{GOOD}\n".encode() + b"\xff\n", "bad.jsonl:2: not UTF-8", id="not-utf-8"),
        pytest.param('{"kind":"sweep","at":1}\n', "bad.jsonl:1: kind 'sweep' is none of", id="unknown-kind"),
        pytest.param('{"at":1}\n', "bad.jsonl:1: field 'kind' is missing", id="no-kind"),
        pytest.param('{"kind":"header","version":2}\n', "bad.jsonl:1: version 2 is unknown", id="unknown-version"),
        pytest.param('{"kind":"header"}\n', "bad.jsonl:1: field 'version' is missing", id="no-version"),
        pytest.param(f"{GOOD}\n{line(HEADER)}\n", "bad.jsonl:2: kind 'header' is none of", id="late-header"),
        pytest.param('{"kind":"event","event":{}}\n', "bad.jsonl:1: field 'at' is missing", id="no-at"),
        pytest.param('{"kind":"event","at":1}\n', "bad.jsonl:1: field 'event' is missing", id="no-event"),
        pytest.param('{"kind":"disconnect","at":1.5}\n', "bad.jsonl:1: field 'at' must be", id="at-is-float"),
        pytest.param('{"kind":"disconnect","at":true}\n', "bad.jsonl:1: field 'at' must be", id="at-is-bool"),
        pytest.param('{"kind":"disconnect","at":-1}\n', "bad.jsonl:1: at is negative", id="negative"),
        pytest.param('{"kind":"event","at":1,"event":{}}\n', "bad.jsonl:1: event is no event", id="no-action"),
        pytest.param('{"kind":"inspect","at":1,"id":"x"}\n', "bad.jsonl:1: field 'status'", id="no-status"),
        pytest.param(
            '{"kind":"inspect","at":1,"id":"x","status":500}\n', "bad.jsonl:1: status 500 is neither", id="status"
        ),
        pytest.param(
            '{"kind":"inspect","at":1,"id":"x","status":200}\n',
            "bad.jsonl:1: field 'container'",
            id="no-container",
        ),
        pytest.param(
            '{"kind":"inspect","at":1,"id":"x","status":200,"container":{"Id":"x"}}\n',
            "bad.jsonl:1: container is no inspection",
            id="no-state",
        ),
        pytest.param(
            '{"kind":"inspect","at":1,"id":"x","status":200,"container":{"Id":"y","State":{"Status":"dead"}}}\n',
            "bad.jsonl:1: container is 'y', not 'x'",
            id="another-container",
        ),
    ],
)
def test_a_bad_recording_is_refused_in_one_line_that_tells_where(
    content: str | bytes, message: str, tmp_path: Path
) -> None:
    assert refusal(tmp_path, content).startswith(message)


def test_a_missing_or_unreadable_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(ConfigError, match=f"^{path}: cannot be read: "):
            read_recording(path)


@pytest.mark.parametrize("cut", [1, 20, 40])
def test_a_last_line_that_was_cut_off_is_left_out_with_a_warning(
    cut: int, tmp_path: Path, warnings: list[str]
) -> None:
    path = written(tmp_path / "r.jsonl", HEADER, event("start", 5), event("die", 9))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    lines = read_recording(path).lines
    if cut == 1:  # only the line end is missing
        assert len(lines) == 2
        assert not warnings
    else:
        assert len(lines) == 1
        assert warnings == [f"{path}:3: the last line is cut off and left out"]


def test_a_cut_within_a_character_is_a_cut(tmp_path: Path, warnings: list[str]) -> None:
    path = written(tmp_path / "r.jsonl", event("start", 5), disconnect_record(7, "ü"), end="")
    path.write_bytes(path.read_bytes()[:-3])
    assert len(read_recording(path).lines) == 1
    assert len(warnings) == 1


def test_the_header_is_optional_and_fields_of_others_are_ignored(tmp_path: Path) -> None:
    path = written(tmp_path / "r.jsonl", {**event("start", 5), "note": "more"})
    recording = read_recording(path)
    assert recording.header.network == ""
    assert (recording.started_at, recording.ended_at) == (5, 5)
    assert recording.first_seen == {NODE: 5}


def test_when_an_inspection_was_asked_for(tmp_path: Path) -> None:
    path = written(
        tmp_path / "r.jsonl",
        event("start", 10),
        inspection(60),  # asked by the start
        event("die", 20, OTHER),
        event("kill", 70),
        event("die", 80),
        inspection(90),  # asked by the kill, shared by the die
        inspection(100),  # a look without an event
        disconnect_record(110, "eof"),
        inspection(220),  # the first look after the reconnect
        event("start", 210),
        inspection(230),
    )
    asked = [(look.at, look.asked) for look in read_recording(path).lines if isinstance(look, InspectLine)]
    assert asked == [(60, 10), (90, 70), (100, 100), (220, 210), (230, 210)]


def test_exec_noise_asks_for_nothing_and_shows_no_container(tmp_path: Path) -> None:
    path = written(tmp_path / "r.jsonl", event("exec_start", 10), inspection(60, OTHER), event("start", 70))
    recording = read_recording(path)
    assert recording.first_seen == {OTHER: 60, NODE: 70}
    assert recording.events == 1


def test_a_container_that_was_gone_before_anything_was_heard_of_it_is_no_node(tmp_path: Path) -> None:
    path = written(tmp_path / "r.jsonl", inspect_record(5, NODE, None), event("start", 7, OTHER))
    assert read_recording(path).first_seen == {OTHER: 7}


SECRET = "hunter2"


def test_only_the_contracts_fields_are_written() -> None:
    container = {
        "Id": NODE,
        "Name": "/n",
        "Created": "2026-01-01T00:00:00Z",
        "Path": SECRET,
        "Args": [SECRET],
        "State": {
            "Status": "exited",
            "Error": f'exec: "{SECRET}": not found',
            "ExitCode": 1,
            "Health": {"Status": "healthy", "FailingStreak": 0, "Log": [{"Output": SECRET}]},
        },
        "Config": {
            "Image": "i",
            "Labels": {"l": "v"},
            "ExposedPorts": {"80/tcp": {}},
            "Env": [f"KEY={SECRET}"],
            "Cmd": [SECRET],
            "Entrypoint": [SECRET],
            "Healthcheck": {"Test": ["CMD", SECRET]},
        },
        "HostConfig": {"Binds": [SECRET]},
        "Mounts": [{"Source": SECRET}],
        "NetworkSettings": {"Networks": {"net": {"IPAddress": "10.0.0.2"}}, "SandboxKey": SECRET},
    }
    cleaned = clean_container(container)
    assert cleaned == {
        "Id": NODE,
        "Name": "/n",
        "Created": "2026-01-01T00:00:00Z",
        "State": {"Status": "exited", "ExitCode": 1, "Health": {"Status": "healthy", "FailingStreak": 0}},
        "Config": {"Image": "i", "Labels": {"l": "v"}, "ExposedPorts": {"80/tcp": {}}},
        "NetworkSettings": {"Networks": {"net": {"IPAddress": "10.0.0.2"}}},
    }
    raw = {
        "Type": "container",
        "Action": "start",
        "Actor": {"ID": NODE, "Attributes": {"name": "n"}, "Env": SECRET},
        "timeNano": 5,
        "time": 0,
        "scope": "local",
        "Spec": SECRET,
    }
    assert SECRET not in json.dumps(clean_event(raw))
    assert clean_event(raw)["Actor"] == {"ID": NODE, "Attributes": {"name": "n"}}


def test_a_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    writer = RecordingWriter(path)
    writer.write([HEADER, event("start", 5), inspection(6)])
    assert not path.exists()
    assert len(read_recording(writer.part).lines) == 2
    writer.finish()
    assert [file.name for file in tmp_path.iterdir()] == ["r.jsonl"]
    assert writer.counts == {"header": 1, "event": 1, "inspect": 1}
    recording = read_recording(path)
    assert (recording.header.engine_version, recording.header.network, recording.started_at) == (
        "20.10.24",
        "net",
        1,
    )


def test_a_place_that_cannot_be_written_to_is_an_error_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"r\.jsonl\.part: cannot be written: No such file"):
        RecordingWriter(tmp_path / "nowhere" / "r.jsonl")
    with pytest.raises(EventwatchError, match="cannot be written"):
        write_truth(tmp_path / "nowhere" / "r.expected.json", {})


def test_the_truth_is_read_back_as_written(tmp_path: Path) -> None:
    recording = read_recording(written(tmp_path / "r.jsonl", event("start", 5)))
    truth = {NODE: {"status": "running", "health": "none", "ip": "10.0.0.2"}}
    path = expected_path(recording.path)
    assert path == tmp_path / "r.expected.json"
    write_truth(path, truth)
    assert read_expected(path, recording) == truth


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("{", ":1: not JSON", id="not-json"),
        pytest.param("\n\n]", ":3: not JSON", id="not-json-on-line-3"),
        pytest.param("[]", ":1: not a JSON object", id="a-list"),
        pytest.param(
            f'{{"{NODE}": {{"status": "running"}}}}', " must have status, health, ip", id="a-field-missing"
        ),
        pytest.param(
            f'{{"{OTHER}": {{"status": "running", "health": "none", "ip": ""}}}}',
            " is not in r.jsonl",
            id="other-ids",
        ),
    ],
)
def test_a_bad_expected_file_is_refused(content: str, message: str, tmp_path: Path) -> None:
    recording = read_recording(written(tmp_path / "r.jsonl", event("start", 5)))
    path = tmp_path / "e.json"
    path.write_text(content)
    with pytest.raises(ConfigError) as raised:
        read_expected(path, recording)
    assert str(raised.value).startswith(str(path))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_our_recordings_hold_nothing_outside_the_contract_but_their_scenario(path: Path) -> None:
    recording = read_recording(path)
    assert recording.events > 0
    assert read_expected(expected_path(path), recording)
    assert sum(isinstance(entry, DisconnectLine) for entry in recording.lines) <= 1
    for text in path.read_text().splitlines():
        record = json.loads(text)
        if record["kind"] == "inspect" and record["status"] == 200:
            container = record["container"]
            assert container.keys() <= {"Id", "Name", "Created", "State", "Config", "NetworkSettings"}
            assert container["Config"].keys() <= {"Image", "Labels", "ExposedPorts"}
