"""A short soak with a fixed seed; `EVENTWATCH_TEST_SOAK_SECONDS` and `EVENTWATCH_TEST_SOAK_SEED` change it."""

from __future__ import annotations

import os
from pathlib import Path

from tests.faults.soak import Soak

SECONDS = float(os.environ.get("EVENTWATCH_TEST_SOAK_SECONDS", "45"))
SEED = int(os.environ.get("EVENTWATCH_TEST_SOAK_SEED", "4"))


async def test_every_document_is_right_after_each_of_many_random_faults(tmp_path: Path) -> None:
    figures = await Soak(SEED, tmp_path, print).run(SECONDS)
    print(figures)  # noqa: T201 - pytest shows it with -s, or when the test fails
    assert figures.cycles >= 2
    assert not figures.divergent, "\n".join(figures.divergent)
    assert not figures.lost_requests, "\n".join(figures.lost_requests)
