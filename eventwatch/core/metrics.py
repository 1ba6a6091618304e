"""The numbers that eventwatch shows, under the names that dashboards and alert rules rely on.

One `Metrics` per watcher, on a registry of its own, so that a host application's registry stays its own. No
label is unbounded: actions, kinds, reasons and results come from fixed sets, containers never appear.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from eventwatch.core.details import End
from eventwatch.core.errors import FAILURES
from eventwatch.core.version import eventwatch_version

STATUSES: Final = ("created", "running", "paused", "restarting", "removing", "exited", "dead", "stopping")
HEALTHS: Final = ("starting", "healthy", "unhealthy", "none")
RECONNECT_REASONS: Final = ("eof", "broken", "refused", "rotated", "deaf")

_LATENCY_BUCKETS: Final = (
    0.001,
    0.002,
    0.003,
    0.005,
    0.0075,
    0.01,
    0.02,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
    60,
)


def quantile(values: Iterable[float], part: float) -> float | None:
    """The smallest of the values that this part of them (0 to 1) does not exceed; None without any."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else None


def totals(counter: Counter) -> dict[str, float]:
    """What a counter with one label stands at, by that label's values."""
    samples = [sample for metric in counter.collect() for sample in metric.samples]
    return {next(iter(s.labels.values())): s.value for s in samples if s.name.endswith("_total")}


class _Failures(Collector):
    """What has failed so far, which is counted where it fails."""

    def collect(self) -> Iterable[Metric]:
        """The counter of each part."""
        text = "Calls to the engine and the database that failed, and errors of our own; of the whole process."
        family = CounterMetricFamily("eventwatch_errors", text, labels=["part"])
        for part, count in FAILURES.items():
            family.add_metric([part], count)
        yield family


class Metrics:
    """Counters and gauges; all known label values exist from the start, so that a rate is never missing."""

    def __init__(self, actions: Iterable[str] = ()) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        build = Gauge("eventwatch_build_info", "1, with what runs as labels.", ["version"], registry=self.registry)
        build.labels(eventwatch_version()).set(1)
        self._engine = Gauge(
            "eventwatch_engine_info",
            "1, with the id of the engine that is watched, or stood by for, as label.",
            ["engine"],
            registry=self.registry,
        )
        self.ready = self._gauge("eventwatch_ready", "1 while /readyz answers 200.")
        self.lease_left = self._gauge(
            "eventwatch_lease_left_seconds", "For how long the lease is ours without another renewal."
        )
        self.events = self._counter("eventwatch_events", "Events received, duplicates left out.", "action")
        self.latency = Histogram(
            "eventwatch_event_latency_seconds",
            "From the engine's timeNano of an event to the acknowledged write that it caused.",
            buckets=_LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.writes = self._counter("eventwatch_writes", "Changes sent to the database.", "kind")
        self.connected = self._gauge("eventwatch_stream_connected", "1 while the event stream is open.")
        self.reconnects = self._counter("eventwatch_stream_reconnects", "Ends of the event stream.", "reason")
        self.gaps = Counter("eventwatch_stream_gaps", "Reconnects that lost events.", registry=self.registry)
        self.last_event = self._gauge(
            "eventwatch_last_event_timestamp_seconds", "Engine time of the newest event."
        )
        self.sweep_duration = Histogram(
            "eventwatch_sweep_duration_seconds", "Duration of a full pass.", registry=self.registry
        )
        self.sweep_success = self._gauge(
            "eventwatch_sweep_last_success_timestamp_seconds", "When the last full pass ended well."
        )
        self.drift = self._counter("eventwatch_drift_corrections", "Fields that only a sweep put right.", "field")
        self.stops = self._counter("eventwatch_stops", "Stops of nodes by eventwatch.", "reason", "result")
        self.nodes = Gauge("eventwatch_nodes", "Nodes by recorded status.", ["status"], registry=self.registry)
        self.healths = Gauge(
            "eventwatch_nodes_health", "Nodes by recorded health.", ["health"], registry=self.registry
        )
        self.registry.register(_Failures())
        self.unvouched = self._gauge(
            "eventwatch_nodes_unvouched", "Nodes whose last inspection failed, so that they cannot be vouched for."
        )
        self.ends = self._counter("eventwatch_node_ends", "Ends of nodes, by what kind they were.", "kind")
        self.crash_looping = self._gauge(
            "eventwatch_nodes_crash_looping", "Nodes that their restart policy starts again and again."
        )
        self.longest_unhealthy = self._gauge(
            "eventwatch_nodes_unhealthy_longest_seconds",
            "For how long the running node has been unhealthy that has been so the longest.",
        )
        self.leader = self._gauge("eventwatch_leader", "1 while this process holds the engine's lease.")
        self.queue_depth = self._gauge("eventwatch_queue_depth", "Nodes that wait for an inspection or a write.")
        self._brake = self._gauge("eventwatch_brake_engaged", "1 while sweeps refuse to delete, or to stop, many.")
        self._stop_brake = self._gauge("eventwatch_stop_brake_engaged", "1 while sweeps refuse to stop many.")
        self.engines_dead = self._gauge(
            "eventwatch_engines_dead", "Engines without a sign of life for minutes that still have documents."
        )
        self.clock_skew = Gauge(
            "eventwatch_clock_skew_seconds",
            "How far another clock is ahead of ours.",
            ["clock"],
            registry=self.registry,
        )
        for action in actions:
            self.events.labels(action)
        for kind in ("hint", "settle", "sweep", "look", "idle", "delete", "register"):
            self.writes.labels(kind)
        for reason in RECONNECT_REASONS:
            self.reconnects.labels(reason)
        for field in ("status", "health", "ip", "port", "deleted"):
            self.drift.labels(field)
        for kind in End:
            self.ends.labels(str(kind))
        for result in ("stopped", "failed", "withdrawn"):
            self.stops.labels("idle", result)

    def show_engine(self, engine_id: str) -> None:
        """Name the engine that this process watches, or stands by for."""
        self._engine.clear()
        self._engine.labels(engine_id).set(1)

    def corrections(self) -> int:
        """How many fields sweeps have put right."""
        return round(sum(totals(self.drift).values()))

    def show_brakes(self, deleting: bool, stopping: bool) -> None:
        """Set the gauges of the two brakes."""
        self._brake.set(deleting or stopping)
        self._stop_brake.set(stopping)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, registry=self.registry)

    def show_nodes(self, states: Iterable[tuple[str | None, str | None]]) -> None:
        """Set the gauges of nodes, of each of which `states` has status and health."""
        tallies = tuple(dict.fromkeys((*known, "other"), 0) for known in (STATUSES, HEALTHS))
        for state in states:
            for tally, value in zip(tallies, state, strict=True):
                tally[value if value in tally else "other"] += 1
        for gauge, tally in zip((self.nodes, self.healths), tallies, strict=True):
            for name, count in tally.items():
                gauge.labels(name).set(count)
