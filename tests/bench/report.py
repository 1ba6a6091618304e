"""What was measured, as values: per round, as median and spread, and against its budget; as a table and as JSON.

A ratio is taken round by round, between two measurements made next to each other, and the median of the rounds
counts: what slows the whole machine for a minute slows both. Percentiles of latencies are pooled over all
rounds, because the 99th of one round would be its slowest event; their spread is that of the rounds.

Nothing here passes or fails: a figure that misses its budget is a line that says so.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal

from rich.console import Console
from rich.table import Table

Of = Literal["ratio", "value"]


@dataclass(frozen=True)
class Budget:
    """A limit for the ratio, or for eventwatch's value itself."""

    of: Of
    at_most: float | None = None
    at_least: float | None = None

    def __str__(self) -> str:
        bounds = [f"≤ {self.at_most:g}"] if self.at_most is not None else []
        bounds += [f"≥ {self.at_least:g}"] if self.at_least is not None else []
        return " ".join(bounds) + (" x" if self.of == "ratio" else "")

    def reached(self, number: float) -> bool:
        low_enough = self.at_most is None or number <= self.at_most
        return low_enough and (self.at_least is None or number >= self.at_least)


@dataclass
class Series:
    """One side of a figure: its value in each round, and a pooled one where the rounds are too small for it."""

    rounds: list[float] = field(default_factory=list)
    pooled: float | None = None

    @property
    def value(self) -> float:
        return self.pooled if self.pooled is not None else statistics.median(self.rounds)

    @property
    def spread(self) -> tuple[float, float]:
        return min(self.rounds), max(self.rounds)


@dataclass
class Figure:
    """One line of the table. `other` is what eventwatch is compared with; `inverse`: that to ours."""

    name: str
    unit: str
    ours: Series
    other: Series | None = None
    compared_with: str = "floor"
    inverse: bool = False
    budget: Budget | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        if self.other is None:
            return None
        if self.ours.pooled is not None and self.other.pooled is not None:
            return self._of(self.ours.pooled, self.other.pooled)
        if len(self.ours.rounds) == len(self.other.rounds):
            return statistics.median(self.ratios)
        return self._of(self.ours.value, self.other.value)

    @property
    def ratios(self) -> list[float]:
        if self.other is None:
            return []
        return [self._of(a, b) for a, b in zip(self.ours.rounds, self.other.rounds, strict=False)]

    def _of(self, ours: float, other: float) -> float:
        above, below = (other, ours) if self.inverse else (ours, other)
        return above / below if below else float("inf")

    @property
    def reached(self) -> bool | None:
        """Whether the budget is met; None when there is none."""
        if self.budget is None:
            return None
        number = self.ours.value if self.budget.of == "value" else self.ratio
        return number is not None and self.budget.reached(number)

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": self.unit,
            "eventwatch": _series_json(self.ours),
            "compared_with": self.compared_with if self.other else None,
            "other": _series_json(self.other) if self.other else None,
            "ratio": self.ratio,
            "ratio_rounds": self.ratios,
            "budget": str(self.budget) if self.budget else None,
            "reached": self.reached,
            "note": self.note,
        }


def _series_json(series: Series) -> dict[str, Any]:
    low, high = series.spread
    return {"value": series.value, "lowest": low, "highest": high, "rounds": series.rounds}


@dataclass
class Report:
    """All figures of a run, and the raw samples behind the plot (ms, by program)."""

    figures: list[Figure] = field(default_factory=list)
    staleness: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def write_json(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "machine": machine(),
            "figures": [figure.as_json() for figure in self.figures],
            "failed": self.failed,
            "details": self.details,
            "staleness_ms": self.staleness,
        }
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def print(self, console: Console) -> None:
        table = Table(title="eventwatch beside its floor (median, lowest to highest round)")
        for heading in ("figure", "eventwatch", "compared with", "ratio", "budget", "reached"):
            table.add_column(heading, justify="left" if heading == "figure" else "right", overflow="fold")
        for figure in self.figures:
            other = f"{show(figure.other, figure.unit)} {figure.compared_with}" if figure.other else ""
            reached = {True: "[green]yes", False: "[red]no", None: ""}[figure.reached]
            ratio = f"{figure.ratio:.3g}" if figure.ratio is not None else ""
            if len(figure.ratios) > 1:
                ratio += f" ({min(figure.ratios):.2g} to {max(figure.ratios):.2g})"
            budget = str(figure.budget) if figure.budget else ""
            table.add_row(figure.name, show(figure.ours, figure.unit), other, ratio, budget, reached)
        console.print(table)
        for figure in self.figures:
            if figure.note:
                console.print(f"{figure.name}: {figure.note}", highlight=False, style="dim")
        for name, why in self.failed.items():
            console.print(f"[red]{name} was not measured:[/red] {why}", highlight=False)


def show(series: Series, unit: str) -> str:
    low, high = series.spread
    spread = f" ({number(low)} to {number(high)})" if len(series.rounds) > 1 else ""
    return f"{number(series.value)} {unit}{spread}"


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percentile(samples: Iterable[float], share: float) -> float:
    """By nearest rank, so that the 99th of 100 samples is one that was measured."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, round(share * len(ordered)))]


def pooled(rounds: Sequence[Sequence[float]], share: float) -> Series:
    """A percentile of all rounds' samples together."""
    every = [sample for samples in rounds for sample in samples]
    return Series([percentile(samples, share) for samples in rounds], percentile(every, share))


PACKAGES: Final = ("aiodocker", "aiohttp", "beanie", "pymongo")


def machine() -> dict[str, Any]:
    return {
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
        **{name: version(name) for name in PACKAGES},
    }
