"""A manager that writes back what it read long before, against eventwatch's looks, without a sweep to help."""

from __future__ import annotations

import asyncio
from contextlib import closing
from pathlib import Path

from tests.faults.harness import CALL, Oracle, World
from tests.faults.stale_race import race
from tests.kit.eventwatch import Eventwatch
from tests.kit.truth import manager_document


async def test_what_a_manager_writes_back_stale_does_not_stand(world: World, tmp_path: Path) -> None:
    """The distribution is what `python -m tests.faults.stale_race` prints; this holds on any machine."""
    with closing(Eventwatch(tmp_path, world.settings(sweep_interval="10m", log_format="json"))) as eventwatch:
        eventwatch.start()
        took = await race(world, seconds=6)
        assert world.put_back, "nothing was ever put back"
        assert took
        assert max(took) < 4 * CALL
        assert not await Oracle(world).lost_requests()
        await eventwatch.says('"cause": "look"')
        assert "Traceback" not in eventwatch.output


async def test_a_document_is_made_true_or_deleted_however_late_a_manager_inserts_it(
    world: World, tmp_path: Path
) -> None:
    settings = world.settings(sweep_interval="10m", orphan_grace="1s")
    with closing(Eventwatch(tmp_path, settings)) as eventwatch:
        eventwatch.start()
        await Oracle(world).recovered()
        late = await world.maker.start("late")
        one = next(iter(world.nodes.values()))
        kept = await world.documents.find_one({"_id": one.id})
        assert kept is not None
        await one.remove()
        await asyncio.sleep(3)  # longer than anybody waits for a document
        await world.insert(late)
        # Saved by a manager that does not know yet that the container is gone.
        await world.documents.insert_one(manager_document(one.id, status="running"))
        await Oracle(world).recovered()
