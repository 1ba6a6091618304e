"""How much is measured: the sizes of a real run, and those that only prove that the benchmark works."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Effort:
    """Sizes of every figure; times are in seconds. Figures whose rounds are long take fewer of them."""

    rounds: int = 3
    #: Staleness: events per round and program, one every `pace`, on this many nodes and nodes with health checks.
    events: int = 64
    pace: float = 0.12
    stirred: int = 16
    stirred_health: int = 4
    #: Containers killed at once.
    burst: int = 100
    #: Documents, from few to many; the second is the one that has a budget.
    sizes: tuple[int, ...] = (10, 1_000, 10_000)
    #: Events per round at the fewest and at the most documents, one every `scale_pace`.
    scale_events: int = 100
    scale_pace: float = 0.02
    flood: int = 30_000
    #: Events per round over which resident memory is looked at: a million in ten rounds.
    flood_memory: int = 100_000
    replayed: int = 10_000
    #: Events per round in a composed project, one every half second.
    stack_events: int = 24
    #: Nodes of a fake engine for floods, recovery and the engine's work.
    nodes: int = 200
    #: The most documents of other engines.
    foreign: int = 200_000
    #: Containers with a health check each second, and how long they are watched: one default sweep interval.
    idle_nodes: int = 50
    idle_window: float = 30.0

    @property
    def long_rounds(self) -> int:
        """Rounds of figures that take a minute each."""
        return max(1, self.rounds // 2)


TINY: Final = Effort(
    rounds=1,
    events=4,
    stirred=4,
    stirred_health=0,
    burst=4,
    sizes=(5, 20, 40),
    scale_events=10,
    flood=1_000,
    flood_memory=2_000,
    replayed=500,
    stack_events=4,
    nodes=10,
    foreign=0,
    idle_nodes=2,
    idle_window=2.0,
)
