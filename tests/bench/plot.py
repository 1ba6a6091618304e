"""Draws how stale documents are: for each program the share of changes seen within a time (log scale)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from tests.bench.programs import BenchError
from tests.bench.report import number, percentile

COLORS: Final = {"floor": "#7f7f7f", "eventwatch": "#1f77b4", "poller": "#d62728"}


def draw_staleness(samples: Mapping[str, Sequence[float]], path: Path) -> None:
    """Write a PNG; raises BenchError without matplotlib (the `bench` extra)."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - only the plot needs it
        from matplotlib.ticker import FuncFormatter  # noqa: PLC0415
    except ModuleNotFoundError:
        raise BenchError("no plot without matplotlib: pip install 'eventwatch[bench]'") from None
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for name, values in samples.items():
        ordered = sorted(values)
        shares = [(rank + 1) / len(ordered) for rank in range(len(ordered))]
        median, slow = percentile(values, 0.5), percentile(values, 0.99)
        label = f"{name}: p50 {number(median)} ms, p99 {number(slow)} ms ({len(values)} changes)"
        axes.step(ordered, shares, where="post", label=label, color=COLORS.get(name), linewidth=1.8)
        axes.plot(median, 0.5, "o", color=COLORS.get(name), markersize=5)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(0, 1.005)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.set_xlabel("staleness (ms): from the engine's timeNano to the change seen by another client")
    axes.set_ylabel("share of changes")
    axes.set_title("How long documents are wrong after start, die, pause, unpause and health changes")
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(loc="lower right", frameon=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
