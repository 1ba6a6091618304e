from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.conftest import free_port
from tests.container.sidecars import fetch
from tests.container.standin import ROOT, prometheus_and_promtool, sh
from tests.e2e.watching import World, eventually

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
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


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
            status, body = await fetch(f"{server}/api/v1/rules")
            assert status == 200
            rules = [rule for group in json.loads(body)["data"]["groups"] for rule in group["rules"]]
            assert rules
            assert not [rule["name"] for rule in rules if rule["state"] != "inactive"]
        status, metrics = await fetch(f"http://127.0.0.1:{port}/metrics")
    _, promtool = prometheus_and_promtool()
    page = tmp_path / "metrics"
    page.write_text(metrics)
    assert sh("sh", "-c", '"$0" check metrics <"$1"', promtool, page) == (0, "")
    missing = (names_in("alerts.yaml") | names_in("dashboard.json")) - set(NAME.findall(metrics))
    assert not missing


def names_in(file: str) -> set[str]:
    return set(NAME.findall((MONITORING / file).read_text()))


def test_the_alert_rules_are_sound() -> None:
    _, promtool = prometheus_and_promtool()
    _, said = sh(promtool, "check", "rules", MONITORING / "alerts.yaml")
    assert "rules found" in said
