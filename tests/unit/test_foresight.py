"""Inspections asked for at a `connect`: when an answer counts for the `start`, and what it costs if not."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from eventwatch.core.errors import EngineError
from eventwatch.core.facts import Cause, Claim, Observation, Recorded
from eventwatch.pipeline.foresight import FEW, KEPT, LATE, LONGEST, MOST, PATIENCE
from tests.unit.scene import NODE, RUNNING, Scene, opened
from tests.unit.simulated import MS, START

PATIENCE_MS, KEPT_MS, LONGEST_MS = (round(seconds * 1000) for seconds in (PATIENCE, KEPT, LONGEST))


def running_since(at_ms: int, ip: str = "10.0.0.1") -> Observation:
    started = datetime.fromtimestamp(START // 1_000_000_000, UTC).replace(microsecond=at_ms * 1000)
    return replace(RUNNING, ip=ip, started_at=started, time_nano=START + at_ms * MS)


def more_nodes(scene: Scene, count: int, *, status: str = "exited") -> list[str]:
    """Give as many more nodes a document."""
    nodes = [f"{number:064x}" for number in range(count)]
    for node in nodes:
        scene.store.put(Recorded(node, node[:12], status, "none", "", 1))
    scene.reconciler.replace_known(dict(scene.store.documents), known_before=dict(scene.roster.known))
    return nodes


def says(scene: Scene) -> tuple[str | None, str | None]:
    return scene.document.status, scene.document.ip


@pytest.mark.parametrize("first", ["answer", "start"])
@pytest.mark.parametrize("since", [20, 3], ids=["behind the connect", "before it, as of Engine 28.5"])
async def test_an_answer_asked_for_at_the_connect_counts_for_the_start(first: str, since: int) -> None:
    async with opened(status="exited") as scene:
        scene.on_event("die", 1)
        scene.on_event("connect", 5)
        await scene.pass_ms(1)
        (asked,) = scene.engine.asked
        acts: list[Callable[[], object]] = [
            lambda: asked.set_result(running_since(since)),
            lambda: scene.on_event("start", 21),
        ]
        for act in acts if first == "answer" else reversed(acts):
            assert says(scene) == ("exited", "")
            act()
            await scene.pass_ms(5)
        await scene.pass_ms(50)
        scene.on_event("die", 20)  # of the run before, and late
        await scene.pass_ms(5)
        assert says(scene) == ("running", "10.0.0.1")
        assert len(scene.engine.asked) == 1
        await scene.pass_ms(300)
        assert len(scene.engine.asked) == 2  # it settles as ever


@pytest.mark.parametrize(
    "told",
    [
        replace(RUNNING, status="created", ip=""),
        replace(RUNNING, found=False),
        running_since(0, "10.0.0.9"),  # of the run before
        running_since(40, "10.0.0.9"),  # of the run after
        replace(running_since(20, "10.0.0.9"), status="paused"),
    ],
    ids=["created", "gone", "earlier", "later", "paused"],
)
@pytest.mark.parametrize("first", ["answer", "start"])
async def test_what_does_not_show_this_run_is_not_believed(first: str, told: Observation) -> None:
    async with opened(status="exited") as scene:
        scene.on_event("die", 1)
        scene.on_event("connect", 5)
        await scene.pass_ms(1)
        acts: list[Callable[[], object]] = [
            lambda: scene.engine.asked[0].set_result(told),
            lambda: scene.on_event("start", 21),
        ]
        for act in acts if first == "answer" else reversed(acts):
            act()
            await scene.pass_ms(5)
        assert says(scene) == ("exited", "")
        scene.engine.asked[1].set_result(running_since(20))
        await scene.pass_ms(50)
        assert says(scene) == ("running", "10.0.0.1")


@pytest.mark.parametrize("action", ["die", "disconnect", "pause", "health_status", "destroy"])
async def test_whatever_is_told_before_the_start_drops_the_question(action: str) -> None:
    async with opened(status="exited") as scene:
        scene.on_event("connect", 1)
        await scene.pass_ms(1)
        scene.on_event(action, 5, "healthy" if action == "health_status" else None)
        await scene.pass_ms(1)
        assert scene.engine.asked[0].cancelled()
        assert not len(scene.reconciler.foresight)


async def test_a_death_right_after_the_start_is_not_undone_by_the_answer_to_the_start() -> None:
    """Start, die, and start again, before the first answer: each start has an answer of its own."""
    async with opened(status="exited") as scene:
        scene.on_event("connect", 1)
        await scene.pass_ms(1)
        scene.on_event("start", 21)
        scene.on_event("die", 23)
        await scene.pass_ms(50)
        assert [asked.cancelled() for asked in scene.engine.asked] == [True]  # its lock would hold up an inspector
        assert says(scene) == ("exited", "")
        scene.on_event("connect", 24)
        await scene.pass_ms(1)
        scene.on_event("start", 60)
        scene.engine.asked[1].set_result(running_since(20, "10.0.0.9"))
        await scene.pass_ms(5)
        assert says(scene) == ("exited", "")
        scene.engine.asked[2].set_result(running_since(59, "10.0.0.2"))
        await scene.pass_ms(50)
        assert says(scene) == ("running", "10.0.0.2")


async def test_a_second_start_while_the_first_waits_is_inspected() -> None:
    """What ended the first run was lost."""
    async with opened(status="exited") as scene:
        scene.on_event("connect", 1)
        await scene.pass_ms(1)
        scene.on_event("start", 21)
        scene.on_event("start", 60)
        await scene.pass_ms(1)
        first, second = scene.engine.asked
        assert first.cancelled()
        second.set_result(running_since(59, "10.0.0.2"))
        await scene.pass_ms(50)
        assert says(scene) == ("running", "10.0.0.2")


@pytest.mark.parametrize("action", ["health_status", "disconnect"])
async def test_a_start_that_waits_is_inspected_when_its_question_is_dropped(action: str) -> None:
    async with opened(status="exited") as scene:
        scene.on_event("connect", 1)
        await scene.pass_ms(1)
        scene.on_event("start", 21)
        scene.on_event(action, 22, "healthy" if action == "health_status" else None)
        await scene.pass_ms(1)
        assert len(scene.engine.asked) == 2
        scene.engine.asked[1].set_result(replace(running_since(20), health="healthy"))
        await scene.pass_ms(50)
        assert (*says(scene), scene.document.health) == ("running", "10.0.0.1", "healthy")


async def test_an_engine_that_does_not_answer_the_question_is_asked_as_ever() -> None:
    async with opened(status="exited") as scene:
        scene.on_event("connect", 1)
        await scene.pass_ms(1)
        scene.on_event("start", 21)
        await scene.pass_ms(PATIENCE_MS - 2)
        assert len(scene.engine.asked) == 1
        await scene.pass_ms(3)
        assert len(scene.engine.asked) == 2
        scene.engine.asked[1].set_result(running_since(20))
        await scene.pass_ms(50)
        assert says(scene) == ("running", "10.0.0.1")
        assert scene.engine.asked[0].cancelled()


@pytest.mark.parametrize("first", ["failure", "start"])
async def test_a_question_that_fails_is_asked_again_for_the_start(first: str) -> None:
    async with opened(status="exited") as scene:
        scene.on_event("connect", 1)
        await scene.pass_ms(1)
        failure = EngineError("internal error", status=500)
        acts: list[Callable[[], object]] = [
            lambda: scene.engine.asked[0].set_exception(failure),
            lambda: scene.on_event("start", 21),
        ]
        for act in acts if first == "failure" else reversed(acts):
            act()
            await scene.pass_ms(1)
        scene.engine.asked[1].set_result(running_since(20))
        await scene.pass_ms(50)
        assert says(scene) == ("running", "10.0.0.1")


async def test_an_answer_waits_no_longer_than_a_moment_for_its_start() -> None:
    """Nothing tells then how much was lost before the next start."""
    async with opened(status="exited") as scene:
        scene.on_event("connect", 1)
        await scene.pass_ms(1)
        scene.engine.asked[0].set_result(running_since(20, "10.0.0.9"))
        await scene.pass_ms(KEPT_MS + 1)
        scene.on_event("start", 2000)
        await scene.pass_ms(5)
        assert says(scene) == ("exited", "")
        assert len(scene.engine.asked) == 2


async def test_a_new_connection_of_the_stream_drops_the_questions_and_no_start() -> None:
    other = "b" * 64
    async with opened(status="exited") as scene:
        scene.store.put(Recorded(other, other[:12], "exited", "none", "", 1))
        scene.reconciler.replace_known(dict(scene.store.documents), known_before=dict(scene.roster.known))
        scene.on_event("connect", 1)
        scene.on_event("connect", 1, node=other)
        await scene.pass_ms(1)
        scene.on_event("start", 21)
        scene.reconciler.foresight.drop_all()
        await scene.pass_ms(1)
        assert scene.engine.asked_about == [NODE, other, NODE]
        assert [asked.cancelled() for asked in scene.engine.asked] == [True, True, False]


async def test_a_sweeps_answer_that_was_taken_in_between_drops_the_question() -> None:
    """Which of the two is newer, nobody can tell."""
    async with opened(status="exited") as scene:
        scene.on_event("connect", 1)
        await scene.pass_ms(1)
        seen = scene.roster.events_seen(NODE)
        assert scene.reconciler.accept_if_unchanged(running_since(20), since=seen, cause=Cause.SWEEP)
        await scene.pass_ms(1)
        assert scene.engine.asked[0].cancelled()


async def test_no_more_than_a_few_are_asked_about_and_the_others_start_as_ever() -> None:
    async with opened(status="exited") as scene:
        nodes = more_nodes(scene, 1000)
        for node in nodes:
            scene.on_event("connect", 1, node=node)
        await scene.pass_ms(1)
        assert scene.engine.asked_about == nodes[:MOST]
        scene.on_event("start", 21, node=nodes[-1])
        await scene.pass_ms(1)
        assert scene.engine.asked_about[MOST:] == [nodes[-1]]  # no inspector is kept busy by the questions


async def test_a_connect_behind_which_no_start_comes_is_forgotten() -> None:
    async with opened(status="exited") as scene:
        scene.on_event("connect", 1)
        await scene.pass_ms(LONGEST_MS + 2)
        assert scene.engine.asked[0].cancelled()
        assert not len(scene.reconciler.foresight)


async def test_a_running_node_that_joins_another_network_has_no_start_ahead_and_settles() -> None:
    async with opened() as scene:
        scene.on_event("connect", 30)
        await scene.pass_ms(1)
        assert not len(scene.reconciler.foresight)
        await scene.pass_ms(300)
        scene.engine.asked[0].set_result(running_since(20, "10.0.0.9"))
        await scene.pass_ms(5)
        assert says(scene) == ("running", "10.0.0.9")


async def test_a_node_that_was_forgotten_meanwhile_is_not_written() -> None:
    async with opened(status="exited") as scene:
        scene.on_event("connect", 1)
        await scene.pass_ms(1)
        scene.on_event("start", 21)
        scene.roster.forget(NODE)
        scene.engine.asked[0].set_result(running_since(20))
        await scene.pass_ms(50)
        assert says(scene) == ("exited", "")


# -- the address ----------------------------------------------------------------------------------------------


@asynccontextmanager
async def ended(*, health: str = "starting") -> AsyncIterator[Scene]:
    """A node that has ended, and of which an inspection has told whether it has a health check."""
    async with opened(status="exited") as scene:
        scene.roster.note_start(replace(RUNNING, health=health, checked=health != "none"))
        yield scene


@pytest.mark.parametrize("first", ["address", "start"])
@pytest.mark.parametrize("health", ["starting", "none"])
async def test_a_start_is_written_with_its_address_and_inspected_when_it_is_quiet(first: str, health: str) -> None:
    async with ended(health="healthy" if health == "starting" else health) as scene:
        scene.on_event("connect", 1)
        await scene.pass_ms(1)
        acts: list[Callable[[], object]] = [
            lambda: scene.engine.looks[0].set_result({NODE: "10.0.0.7"}),
            lambda: scene.on_event("start", 21),
        ]
        for act in acts if first == "address" else reversed(acts):
            assert says(scene) == ("exited", "")
            act()
            await scene.pass_ms(5)
        assert (*says(scene), scene.document.health) == ("running", "10.0.0.7", health)
        assert not scene.engine.asked
        scene.on_event("die", 20)  # of the run before, and late
        await scene.pass_ms(300)
        assert says(scene) == ("running", "10.0.0.7")
        scene.engine.asked[0].set_result(running_since(20, "10.0.0.8"))  # by which a lie lasts no longer
        await scene.pass_ms(50)
        assert says(scene) == ("running", "10.0.0.8")


@pytest.mark.parametrize("action", ["die", "disconnect", "pause", "health_status", "destroy"])
async def test_whatever_is_told_before_the_start_drops_the_address(action: str) -> None:
    async with ended() as scene:
        scene.on_event("connect", 1)
        await scene.pass_ms(1)
        scene.engine.looks[0].set_result({NODE: "10.0.0.9"})
        await scene.pass_ms(1)
        scene.on_event(action, 5, "healthy" if action == "health_status" else None)
        scene.on_event("start", 21)
        await scene.pass_ms(5)
        assert scene.store.documents.get(NODE) is None or scene.document.ip == ""


@pytest.mark.parametrize("known", ["asked", "answered"])
async def test_another_connect_is_about_another_endpoint(known: str) -> None:
    """The events in between were lost."""
    async with ended() as scene:
        scene.on_event("connect", 1)
        await scene.pass_ms(1)
        if known == "answered":
            scene.engine.looks[0].set_result({NODE: "10.0.0.9"})
            await scene.pass_ms(1)
        scene.on_event("connect", 30)
        await scene.pass_ms(1)
        if known == "asked":
            scene.engine.looks[0].set_result({NODE: "10.0.0.9"})
            await scene.pass_ms(1)
        scene.engine.looks[1].set_result({NODE: "10.0.0.2"})
        scene.on_event("start", 21)  # of the endpoint before, and late
        await scene.pass_ms(5)
        assert says(scene) == ("exited", "")
        scene.on_event("start", 60)
        await scene.pass_ms(5)
        assert says(scene) == ("running", "10.0.0.2")


async def test_one_look_at_the_network_serves_all_who_asked_before_it() -> None:
    async with ended() as scene:
        nodes = more_nodes(scene, 100)
        for node in nodes:
            scene.roster.note_start(replace(RUNNING, node_id=node))
        early, late = nodes[:60], nodes[60:]
        addresses = {node: f"10.0.1.{number}" for number, node in enumerate(nodes)}
        for some in (early, late):
            for node in some:
                scene.on_event("connect", 1, node=node)
            await scene.pass_ms(1)
        assert len(scene.engine.looks) == 1
        scene.engine.looks[0].set_result(addresses | dict.fromkeys(late, "10.0.0.9"))  # of an endpoint before
        await scene.pass_ms(1)
        scene.engine.looks[1].set_result(addresses)
        await scene.pass_ms(1)
        for node in nodes:
            scene.on_event("start", 21, node=node)
        await scene.pass_ms(50)
        assert {node: scene.store.documents[node].ip for node in nodes} == addresses
        assert (len(scene.engine.looks), scene.engine.asked) == (2, [])


async def test_a_network_without_addresses_leads_to_no_more_inspections_than_ever() -> None:
    async with ended() as scene:
        nodes = more_nodes(scene, 100)
        for node in nodes:
            scene.roster.note_start(replace(RUNNING, node_id=node))
        for node in nodes:
            scene.on_event("connect", 1, node=node)
        await scene.pass_ms(1)
        scene.engine.looks[0].set_result({})
        await scene.pass_ms(1)
        assert scene.engine.asked_about == nodes[:MOST]


async def test_an_address_counts_for_one_start() -> None:
    async with ended() as scene:
        scene.on_event("connect", 1)
        await scene.pass_ms(1)
        scene.engine.looks[0].set_result({NODE: "10.0.0.1"})
        scene.on_event("start", 21)
        await scene.pass_ms(5)
        scene.on_event("die", 30)
        scene.on_event("start", 40)  # its connect was lost
        await scene.pass_ms(5)
        assert says(scene) == ("exited", "")
        assert scene.engine.asked_about == [NODE]


async def test_where_the_network_has_no_address_the_node_is_inspected() -> None:
    async with ended() as scene:
        scene.on_event("connect", 1)
        await scene.pass_ms(1)
        scene.engine.looks[0].set_result({})
        await scene.pass_ms(1)
        scene.on_event("start", 21)
        scene.engine.asked[0].set_result(running_since(20))
        await scene.pass_ms(5)
        assert says(scene) == ("running", "10.0.0.1")


async def test_an_engine_that_refuses_to_tell_of_networks_is_asked_again_with_a_new_stream() -> None:
    async with ended() as scene:
        scene.on_event("connect", 1)
        await scene.pass_ms(1)
        scene.engine.looks[0].set_exception(EngineError("denied", status=403))
        await scene.pass_ms(1)
        assert scene.engine.asked_about == [NODE]
        scene.on_event("disconnect", 5)
        scene.on_event("connect", 6)
        await scene.pass_ms(1)
        assert (len(scene.engine.looks), scene.engine.asked_about) == (1, [NODE, NODE])
        scene.reconciler.foresight.drop_all()
        scene.on_event("connect", 7)
        await scene.pass_ms(1)
        assert len(scene.engine.looks) == 2


@pytest.mark.parametrize("between", [False, True], ids=["in a row", "one in time between"])
async def test_a_network_that_is_late_again_and_again_holds_up_no_more_starts(between: bool) -> None:
    async with ended() as scene:
        at = 0

        async def start(*, in_time: bool) -> None:
            nonlocal at
            scene.on_event("connect", at + 1)
            await scene.pass_ms(1)
            if in_time:
                for _ in range(2):  # the look under way, and the one behind it
                    scene.engine.looks[-1].set_result({NODE: "10.0.0.1"})
                    await scene.pass_ms(1)
            scene.on_event("start", at + 21)
            await scene.pass_ms(PATIENCE_MS + 1)
            for asked in scene.engine.asked:
                if not asked.done():
                    asked.set_result(running_since(at + 20))
            await scene.pass_ms(50)
            assert says(scene) == ("running", "10.0.0.1")
            scene.on_event("die", at + 30)
            await scene.pass_ms(50)
            at += 150

        late = [False] * (LATE - 1)
        for in_time in [*late, True, *late] if between else [*late, False]:
            await start(in_time=in_time)
        asked = len(scene.engine.asked)
        scene.on_event("connect", at + 1)
        await scene.pass_ms(1)
        assert len(scene.engine.asked) == asked + (not between)  # else the network is asked again


async def test_a_start_that_is_told_behind_its_own_end_is_not_believed() -> None:
    """While it ends, the network may still have its address."""
    async with ended() as scene:
        scene.on_event("die", 30)
        scene.on_event("connect", 1)
        await scene.pass_ms(1)
        for look in scene.engine.looks:
            look.set_result({NODE: "10.0.0.9"})
        scene.on_event("start", 21)
        await scene.pass_ms(5)
        assert says(scene) == ("exited", "")
        assert scene.engine.asked_about == [NODE]


async def test_only_the_nodes_network_is_asked() -> None:
    async with ended() as scene:
        scene.on_event("connect", 1, network="other")
        await scene.pass_ms(1)
        assert not scene.engine.looks
        scene.on_event("start", 21)
        await scene.pass_ms(1)
        assert scene.engine.asked_about == [NODE]


async def test_with_many_nodes_no_network_is_asked_since_it_tells_of_all() -> None:
    async with ended() as scene:
        more_nodes(scene, FEW, status="running")
        scene.on_event("connect", 1)
        await scene.pass_ms(1)
        assert (len(scene.engine.looks), scene.engine.asked_about) == (0, [NODE])


async def test_a_node_that_is_being_stopped_is_inspected() -> None:
    """Its document is to say `stopping` as long as that is true."""
    async with ended() as scene:
        scene.on_event("connect", 1)
        await scene.pass_ms(1)
        scene.engine.looks[0].set_result({NODE: "10.0.0.1"})
        scene.writer.claims[NODE] = Claim(None)
        scene.on_event("start", 21)
        await scene.pass_ms(5)
        assert (says(scene), scene.engine.asked_about) == (("exited", ""), [NODE])


async def test_nobody_waits_for_the_lock_of_a_node_whose_start_is_ahead() -> None:
    async with ended() as scene:
        scene.on_event("connect", 1)
        await scene.pass_ms(1)
        scene.engine.looks[0].set_result({NODE: "10.0.0.1"})
        await scene.pass_ms(1000)
        assert not scene.engine.asked
        await scene.pass_ms(LONGEST_MS)
        assert scene.engine.asked_about == [NODE]
