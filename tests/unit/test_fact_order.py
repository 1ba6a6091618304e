"""Which of two facts about a node wins: what the property tests found, each with its exact order of events."""

from __future__ import annotations

from dataclasses import replace

import pytest

from eventwatch.core.errors import EngineError
from eventwatch.core.facts import Cause
from eventwatch.core.policy import SETTLING
from tests.unit.scene import NODE, RUNNING, opened
from tests.unit.simulated import MS, START


async def test_of_two_answers_that_crossed_neither_is_believed() -> None:
    """A settle asked first may answer last; a third inspection tells."""
    async with opened() as scene:
        scene.on_event("rename", 0)
        await scene.pass_ms(300)
        (settling,) = scene.engine.asked
        seen = scene.roster.events_seen(NODE)
        assert scene.reconciler.accept_if_unchanged(replace(RUNNING, ip="10.0.0.2"), since=seen)
        await scene.pass_ms(100)
        settling.set_result(RUNNING)
        await scene.pass_ms(100)
        assert scene.document.ip == "10.0.0.2"
        scene.engine.asked[1].set_result(replace(RUNNING, ip="10.0.0.3"))
        await scene.pass_ms(100)
        assert scene.document.ip == "10.0.0.3"


async def test_a_sweeps_answer_is_dropped_when_another_was_taken_since_it_was_asked_for() -> None:
    async with opened() as scene:
        seen = scene.roster.events_seen(NODE)
        assert scene.reconciler.accept_if_unchanged(replace(RUNNING, ip="10.0.0.2"), since=seen)
        assert not scene.reconciler.accept_if_unchanged(RUNNING, since=seen)
        await scene.pass_ms(100)
        assert scene.document.ip == "10.0.0.2"


async def test_a_health_hint_before_the_answer_to_the_start_is_not_lost() -> None:
    """A document that does not say `running` yet cannot say `healthy`; the answer must not leave it so."""
    async with opened(status="created") as scene:
        scene.on_event("start", 1)
        await scene.pass_ms(1)
        scene.on_event("health_status", 2, "healthy")
        await scene.pass_ms(100)
        assert (scene.document.status, scene.document.health) == ("created", "unhealthy")
        scene.engine.asked[0].set_result(RUNNING)
        await scene.pass_ms(100)
        assert (scene.document.status, scene.document.health) == ("running", "healthy")


async def test_what_was_written_while_a_sweep_read_the_documents_stays_known() -> None:
    async with opened(status="created") as scene:
        known_before = dict(scene.roster.known)
        read = dict(scene.store.documents)
        seen = scene.roster.events_seen(NODE)
        assert scene.reconciler.accept_if_unchanged(RUNNING, since=seen, cause=Cause.SWEEP)
        await scene.pass_ms(100)
        scene.reconciler.replace_known(read, known_before=known_before)
        assert scene.roster.known[NODE].status == "running"
        scene.on_event("health_status", 2, "healthy")
        await scene.pass_ms(100)
        assert scene.document.health == "healthy"


async def test_a_document_that_was_deleted_while_a_sweep_read_it_stays_forgotten() -> None:
    async with opened() as scene:
        known_before = dict(scene.roster.known)
        read = dict(scene.store.documents)
        scene.on_event("destroy", 1)
        await scene.pass_ms(100)
        scene.reconciler.replace_known(read, known_before=known_before)
        assert scene.roster.known == {}


async def test_a_hint_older_than_what_an_inspection_proves_is_dropped() -> None:
    """A `die` that comes late, of a life before the one that was seen."""
    async with opened(status="exited") as scene:
        seen = scene.roster.events_seen(NODE)
        assert scene.reconciler.accept_if_unchanged(replace(RUNNING, time_nano=START + 50 * MS), since=seen)
        scene.on_event("die", 40)
        await scene.pass_ms(100)
        assert (scene.document.status, scene.document.ip) == ("running", "10.0.0.1")
        scene.on_event("die", 60)
        await scene.pass_ms(100)
        assert (scene.document.status, scene.document.ip) == ("exited", "")


async def test_of_two_hints_the_one_of_the_later_event_stays() -> None:
    async with opened() as scene:
        scene.on_event("die", 30)
        scene.on_event("pause", 10)
        await scene.pass_ms(100)
        assert scene.document.status == "exited"


async def test_a_settle_that_was_asked_before_a_health_hint_does_not_take_it_back() -> None:
    async with opened() as scene:
        scene.on_event("rename", 0)
        await scene.pass_ms(300)
        scene.on_event("health_status", 290, "healthy")
        scene.engine.asked[0].set_result(RUNNING)
        await scene.pass_ms(100)
        assert scene.document.health == "healthy"
        await scene.pass_ms(300)
        assert len(scene.engine.asked) == 2  # the hint has a settle of its own


@pytest.mark.parametrize("action", sorted(SETTLING))
async def test_every_event_without_a_hint_leads_to_an_inspection(action: str) -> None:
    async with opened() as scene:
        scene.on_event(action, 0)
        await scene.pass_ms(300)
        assert len(scene.engine.asked) == 1


async def test_a_node_is_asked_for_again_though_a_pass_got_an_answer_that_came_too_late() -> None:
    async with opened(status="exited") as scene:
        before = scene.roster.events_seen(NODE)  # a pass asks now
        scene.on_event("start", 1)
        asked = 0
        for ms in (1, 100, 150, 150, 150):  # all that the event led to fails
            await scene.pass_ms(ms)
            for answer in scene.engine.asked[asked:]:
                answer.set_exception(EngineError("broken", status=500))
            asked = len(scene.engine.asked)
        await scene.pass_ms(1)
        scene.inspections.succeeded(NODE)
        assert not scene.reconciler.accept_if_unchanged(RUNNING, since=before)
        await scene.pass_ms(20_000)
        for answer in scene.engine.asked[asked:]:
            answer.set_result(RUNNING)
        await scene.pass_ms(100)
        assert scene.document.status == "running"
