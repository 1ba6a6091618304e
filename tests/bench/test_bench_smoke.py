"""Whether the benchmark works at all: the cheapest figure, once. What it measures is looked at by nobody."""

from __future__ import annotations

import json
from pathlib import Path

from tests.bench.__main__ import main


def test_benchmark_measures_and_reports_a_figure(tmp_path: Path) -> None:
    results = tmp_path / "bench.json"

    code = main(["--tiny", "--only", "startup", "--json", str(results), "--plot", str(tmp_path / "no.png")])

    content = json.loads(results.read_text())
    assert (code, content["failed"]) == (0, {})
    assert [figure["name"] for figure in content["figures"]] == ["start to first event written"]
    assert content["figures"][0]["ratio"] > 0
