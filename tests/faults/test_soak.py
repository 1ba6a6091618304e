"""Short soaks with fixed seeds; `EVENTWATCH_TEST_SOAK_SECONDS` and `EVENTWATCH_TEST_SOAK_SEED` change them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults.soak import Soak

SECONDS = float(os.environ.get("EVENTWATCH_TEST_SOAK_SECONDS", "45"))
SEED = os.environ.get("EVENTWATCH_TEST_SOAK_SEED")


# With 3, one engine's watcher is away in the first cycle, while the other's starts anew.
@pytest.mark.parametrize(("engines", "seed"), [(1, 4), (2, 3)])
async def test_every_document_is_right_after_each_of_many_random_faults(
    tmp_path: Path, engines: int, seed: int
) -> None:
    soak = Soak(int(SEED or seed), tmp_path, print, engines=engines, replacing=engines > 1)
    figures = await soak.run(SECONDS)
    print(figures)  # noqa: T201 - pytest shows it with -s, or when the test fails
    assert not figures.wrong, "\n".join(figures.wrong)
    assert figures.cycles >= 2
