from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tests.container.sidecars import fetch
from tests.kit.eventwatch import started
from tests.kit.images import prometheus_and_promtool
from tests.kit.mongod import free_port
from tests.kit.processes import ROOT, run
from tests.kit.waiting import eventually
from tests.kit.world import World

MONITORING = ROOT / "eventwatch" / "monitoring"
NAME = re.compile(r"\beventwatch_\w+")


@contextmanager
def prometheus(folder: Path, target: int) -> Iterator[str]:
    program, _ = prometheus_and_promtool()
    port = free_port()
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(MONITORING / "alerts.yaml")],
        "scrape_configs": [
            {"job_name": "eventwatch", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]},
        ],
    }
    (folder / "prometheus.json").write_text(json.dumps(config))  # JSON is YAML
    command = [
        *(str(program), f"--config.file={folder / 'prometheus.json'}", f"--storage.tsdb.path={folder / 'data'}"),
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with closing(started(*command, env=os.environ, cwd=folder)):
        yield f"http://127.0.0.1:{port}"


async def query(server: str, expression: str) -> list[Any]:
    status, body = await fetch(f"{server}/api/v1/query?query={expression}")
    return list(json.loads(body)["data"]["result"]) if status == 200 else []


async def test_a_real_prometheus_scrapes_the_metrics_and_no_alert_fires(world: World, tmp_path: Path) -> None:
    port = free_port()
    async with world.watching(http_listen=f"127.0.0.1:{port}", sweep_interval=1):
        await world.start("scraped")
        with prometheus(tmp_path, port) as server:
            await eventually(lambda: query(server, 'eventwatch_nodes{status="running"}==1'), 20)
            assert await query(server, "eventwatch_stream_connected==1")
            assert await query(server, 'eventwatch_events_total{action="start"}')
            # Before the first scrape, that of an absent target is pending.
            await eventually(lambda: all_inactive(server), 5)
        _, metrics = await fetch(f"http://127.0.0.1:{port}/metrics")
    _, promtool = prometheus_and_promtool()
    page = tmp_path / "metrics"
    page.write_text(metrics)
    assert run("sh", "-c", '"$0" check metrics <"$1"', promtool, page).output == ""
    missing = (names_in("alerts.yaml") | names_in("dashboard.json")) - set(NAME.findall(metrics))
    assert not missing


async def all_inactive(server: str) -> bool:
    _, body = await fetch(f"{server}/api/v1/rules")
    rules = [rule for group in json.loads(body)["data"]["groups"] for rule in group["rules"]]
    return bool(rules) and all(rule["state"] == "inactive" for rule in rules)


def names_in(file: str) -> set[str]:
    return set(NAME.findall((MONITORING / file).read_text()))


def test_the_alert_rules_are_sound() -> None:
    _, promtool = prometheus_and_promtool()
    said = run(promtool, "check", "rules", MONITORING / "alerts.yaml").output
    assert "rules found" in said


#: For each rule, what makes it fire, what does not, as series of one value a minute, and after how many minutes.
ENGINE = {'eventwatch_engine_info{job="eventwatch",instance="a",engine="E1"}': "1x90"}
TWO_ENGINES = ENGINE | {
    'eventwatch_engine_info{job="eventwatch",instance="b",engine="E2"}': "1x90",
    'eventwatch_leader{job="eventwatch",instance="b"}': "1x90",
}
A = '{job="eventwatch",instance="a"}'
CASES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "EventwatchDown": ({f"up{A}": "0x90"}, {f"up{A}": "1x90"}),
    "EventwatchAbsent": ({'up{job="another"}': "1x90"}, {f"up{A}": "0x90"}),
    "EventwatchTargetGone": (
        {f"up{A}": "1x48 _x42", 'up{job="eventwatch",instance="b"}': "1x90"},
        {f"up{A}": "1x90", 'up{job="eventwatch",instance="b"}': "1x90"},
    ),
    "EventwatchCrashLoop": (
        {f"process_start_time_seconds{A}": "0+60x90"},
        {f"process_start_time_seconds{A}": "10x50 20x40"},
    ),
    # One leader elsewhere does not make up for it; a standby beside a leader is as it should be.
    "EventwatchNoLeader": (
        TWO_ENGINES | {f"eventwatch_leader{A}": "0x90"},
        TWO_ENGINES
        | {f"eventwatch_leader{A}": "1x90"}
        | {
            'eventwatch_engine_info{job="eventwatch",instance="c",engine="E1"}': "1x90",
            'eventwatch_leader{job="eventwatch",instance="c"}': "0x90",
        },
    ),
    # Every watcher of a fleet tells of the same ones.
    "EventwatchEngineDead": (
        {f"eventwatch_engines_dead{A}": "2x90", 'eventwatch_engines_dead{job="eventwatch",instance="b"}': "2x90"},
        {f"eventwatch_engines_dead{A}": "0x90"},
    ),
    "EventwatchNoEngine": ({f"eventwatch_ready{A}": "0x90"}, ENGINE | {f"eventwatch_ready{A}": "0x90"}),
    "EventwatchNotReady": (
        {f"eventwatch_ready{A}": "0x90", f"eventwatch_leader{A}": "1x90"},
        {f"eventwatch_ready{A}": "0x90", f"eventwatch_leader{A}": "0x90"},
    ),
    "EventwatchStreamDown": (
        {f"eventwatch_stream_connected{A}": "0x90", f"eventwatch_leader{A}": "1x90"},
        {f"eventwatch_stream_connected{A}": "0x90", f"eventwatch_leader{A}": "0x90"},
    ),
    "EventwatchStreamDeaf": (
        {'eventwatch_stream_reconnects_total{job="eventwatch",reason="deaf"}': "0+1x90"},
        {'eventwatch_stream_reconnects_total{job="eventwatch",reason="rotated"}': "0+1x90"},
    ),
    "EventwatchSweepLate": (
        {f"eventwatch_sweep_last_success_timestamp_seconds{A}": "0x90", f"eventwatch_leader{A}": "1x90"},
        {f"eventwatch_sweep_last_success_timestamp_seconds{A}": "0+60x90", f"eventwatch_leader{A}": "1x90"},
    ),
    "EventwatchBrakeEngaged": ({f"eventwatch_brake_engaged{A}": "1x90"}, {f"eventwatch_brake_engaged{A}": "0x90"}),
    "EventwatchDrift": (
        {f"eventwatch_drift_corrections_total{A}": "0+5x90"},
        {f"eventwatch_drift_corrections_total{A}": "0+1x90"},
    ),
    "EventwatchSlow": (
        {
            'eventwatch_event_latency_seconds_bucket{job="eventwatch",instance="a",le="1"}': "0x90",
            'eventwatch_event_latency_seconds_bucket{job="eventwatch",instance="a",le="5"}': "0+9x90",
            'eventwatch_event_latency_seconds_bucket{job="eventwatch",instance="a",le="+Inf"}': "0+9x90",
        },
        {
            'eventwatch_event_latency_seconds_bucket{job="eventwatch",instance="a",le="1"}': "0+9x90",
            'eventwatch_event_latency_seconds_bucket{job="eventwatch",instance="a",le="+Inf"}': "0+9x90",
        },
    ),
    "EventwatchStopsFail": (
        {'eventwatch_stops_total{job="eventwatch",result="failed"}': "0+1x90"},
        {'eventwatch_stops_total{job="eventwatch",result="stopped"}': "0+1x90"},
    ),
    # One that gets well and ill again, each for less than 5 minutes, is another matter than one that stays ill.
    "EventwatchNodeUnhealthy": (
        {f"eventwatch_nodes_unhealthy_longest_seconds{A}": "0+60x90"},
        {f"eventwatch_nodes_unhealthy_longest_seconds{A}": "240x90"},
    ),
    "EventwatchNodeCrashLoop": (
        {f"eventwatch_nodes_crash_looping{A}": "0x50 1x40"},
        {f"eventwatch_nodes_crash_looping{A}": "1x50 0x40"},
    ),
    "EventwatchNodeOutOfMemory": (
        {'eventwatch_node_ends_total{job="eventwatch",kind="oom"}': "0x55 1x35"},
        {
            'eventwatch_node_ends_total{job="eventwatch",kind="oom"}': "7x90",
            'eventwatch_node_ends_total{job="eventwatch",kind="failed"}': "0+1x90",
        },
    ),
}


def test_each_alert_fires_when_it_should_and_only_then(tmp_path: Path) -> None:
    rules = (MONITORING / "alerts.yaml").read_text()
    assert set(re.findall(r"- alert: (\w+)", rules)) == CASES.keys()
    # By promtool's own view of the firing alerts, of which this test wants to know the names alone.
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": series, "values": values} for series, values in side.items()],
            "promql_expr_test": [
                {
                    "expr": f'count(ALERTS{{alertname="{name}",alertstate="firing"}}) > bool 0',
                    "eval_time": "59m",
                    "exp_samples": [{"labels": "{}", "value": 1}] if fires else [],
                }
            ],
        }
        for name, sides in CASES.items()
        for side, fires in zip(sides, (True, False), strict=True)
    ]
    file = tmp_path / "tests.json"
    content = {"rule_files": [str(MONITORING / "alerts.yaml")], "evaluation_interval": "1m", "tests": tests}
    file.write_text(json.dumps(content))  # JSON is YAML
    _, promtool = prometheus_and_promtool()
    checked = run(promtool, "test", "rules", file, check=False)
    assert checked.code == 0, checked.output
