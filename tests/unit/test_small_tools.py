"""Queue, clock, backoff and line splitting: what each promises in its docstring."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest

from eventwatch.core.backoff import Pace
from eventwatch.core.clock import KindestClock, VirtualClock
from eventwatch.core.workqueue import WorkQueue
from eventwatch.engine.wire import engine_time, split_lines


class TestWorkQueue:
    async def test_a_key_waits_once_however_often_it_is_added(self) -> None:
        queue: WorkQueue[str] = WorkQueue()
        assert all(queue.add("a") for _ in range(5))
        assert len(queue) == 1
        assert await queue.get() == ("a", False)
        assert len(queue) == 0

    async def test_urgent_keys_come_first_and_a_waiting_key_can_become_urgent(self) -> None:
        queue: WorkQueue[str] = WorkQueue()
        for key in "abc":
            queue.add(key)
        queue.add("c", urgent=True)
        assert [await queue.get() for _ in range(3)] == [("c", True), ("a", False), ("b", False)]

    async def test_a_key_is_never_worked_on_twice_at_once(self) -> None:
        queue: WorkQueue[str] = WorkQueue()
        queue.add("a")
        await queue.get()
        queue.add("a")
        queue.add("a", urgent=True)
        waiting = asyncio.ensure_future(queue.get())
        await asyncio.sleep(0)
        assert not waiting.done()
        queue.done("a")
        assert await waiting == ("a", True)

    async def test_work_that_was_not_asked_for_again_is_over(self) -> None:
        queue: WorkQueue[str] = WorkQueue()
        queue.add("a")
        await queue.get()
        assert not queue.idle
        queue.done("a")
        assert queue.idle
        await queue.wait_idle()

    async def test_a_full_queue_refuses_new_keys_but_not_those_that_wait(self) -> None:
        queue: WorkQueue[str] = WorkQueue(maxsize=2)
        assert queue.add("a")
        assert queue.add("b")
        assert not queue.add("c")
        assert queue.add("a")


class TestVirtualClock:
    def test_timers_run_in_order_at_their_own_time(self) -> None:
        clock, seen = VirtualClock(), []
        for delay in (3.0, 1.0, 2.0):
            clock.call_later(delay, lambda: seen.append(clock.monotonic()))
        clock.advance(2.5)
        assert seen == [1.0, 2.0]
        assert clock.next_due() == 3.0
        assert clock.monotonic() == 2.5

    def test_a_timer_set_by_a_timer_runs_in_the_same_advance(self) -> None:
        clock, seen = VirtualClock(), []
        clock.call_later(1, lambda: clock.call_later(1, lambda: seen.append(clock.monotonic())))
        clock.advance(5)
        assert seen == [2.0]

    def test_a_cancelled_timer_does_not_run(self) -> None:
        clock = VirtualClock()
        clock.call_later(1, pytest.fail).cancel()
        assert clock.next_due() is None
        clock.advance(2)

    async def test_sleepers_wake_when_time_reaches_them(self) -> None:
        clock = VirtualClock()
        sleeper = asyncio.ensure_future(clock.sleep(10))
        await asyncio.sleep(0)
        clock.advance(9.9)
        await asyncio.sleep(0)
        assert not sleeper.done()
        clock.advance(0.1)
        await sleeper


class _TwoClocks(VirtualClock):
    """A wall clock that can leap without time passing."""

    leap_ns = 0

    def time_ns(self) -> int:
        return super().time_ns() + self.leap_ns


HOUR = 3600
HOUR_NS = HOUR * 1_000_000_000


class TestKindestClock:
    def test_a_wall_clock_that_leaps_ahead_is_held_back_until_it_no_longer_matters(self) -> None:
        clock = _TwoClocks()
        time = KindestClock(clock, memory=1800)
        before = time.now()
        clock.leap_ns = HOUR_NS
        assert time.now() == before
        clock.advance(1799)
        assert (time.now() - before).total_seconds() == 1799
        clock.advance(1)
        assert (time.now() - before).total_seconds() == HOUR + 1800

    def test_a_leap_backwards_is_taken_as_it_is(self) -> None:
        clock = _TwoClocks()
        time = KindestClock(clock, memory=1800)
        before = time.now()
        clock.leap_ns = -HOUR_NS
        assert (time.now() - before).total_seconds() == -HOUR

    def test_a_clock_that_is_set_right_again_stops_no_node_that_was_used_while_it_was_wrong(self) -> None:
        clock = _TwoClocks()
        time = KindestClock(clock, memory=1800)
        clock.leap_ns = -HOUR_NS
        used = time.now()
        clock.advance(10)
        time.sample()
        clock.leap_ns = 0
        assert (time.now() - used).total_seconds() == 10
        clock.advance(1799)
        assert (time.now() - used).total_seconds() == 1809
        clock.advance(2)
        assert (time.now() - used).total_seconds() == HOUR + 1811

    def test_without_a_leap_it_is_the_wall_clock(self) -> None:
        clock = VirtualClock()
        time = KindestClock(clock, memory=60)
        clock.advance(1000)
        assert time.now() == datetime.fromtimestamp(clock.time_ns() / 1e9, UTC)

    @pytest.mark.parametrize("others", [-HOUR, HOUR])
    def test_the_clock_that_is_behind_the_other_judges(self, others: int) -> None:
        clock = VirtualClock()
        time = KindestClock(clock, memory=60)
        ours = time.now()
        time.hear("engine", ours + timedelta(seconds=others), asked=clock.monotonic())
        assert time.now() == min(ours, ours + timedelta(seconds=others))
        assert time.skews() == {"engine": others}

    def test_an_answer_that_took_long_proves_only_the_skew_that_it_cannot_have_taken(self) -> None:
        clock = VirtualClock()
        time = KindestClock(clock, memory=60)
        asked, then = clock.monotonic(), time.now()
        clock.advance(8)
        time.hear("database", then, asked=asked)
        assert time.skews() == {"database": 0.0}


class TestBackoff:
    def test_delays_double_up_to_the_cap(self) -> None:
        backoff = Pace(base=1, cap=10).start(jitter=lambda: 1.0)
        assert [backoff.next_delay() for _ in range(6)] == [1, 2, 4, 8, 10, 10]

    def test_jitter_halves_them_at_most(self) -> None:
        backoff = Pace(base=1, cap=10).start(jitter=lambda: 0.0)
        assert [backoff.next_delay() for _ in range(3)] == [0.5, 1, 2]

    def test_only_a_stable_success_is_a_new_beginning(self) -> None:
        backoff = Pace(base=1, cap=10, stable=30).start(jitter=lambda: 1.0)
        backoff.next_delay()
        backoff.succeeded_for(29.9)
        assert backoff.next_delay() == 2
        backoff.succeeded_for(30)
        assert backoff.next_delay() == 1

    def test_what_an_attempt_waited_is_not_waited_for_again(self) -> None:
        backoff = Pace(base=1, cap=10).start(jitter=lambda: 1.0)
        assert [backoff.next_delay(took=3) for _ in range(4)] == [0, 0, 1, 5]

    def test_a_thousand_failures_do_not_overflow(self) -> None:
        backoff = Pace(base=1, cap=10).start(jitter=lambda: 1.0)
        assert max(backoff.next_delay() for _ in range(1000)) == 10


class TestLines:
    @staticmethod
    async def split(*chunks: bytes, limit: int = 100) -> tuple[list[bytes], list[str]]:
        async def stream() -> AsyncIterator[bytes]:
            for chunk in chunks:
                yield chunk

        complaints: list[str] = []
        return [line async for line in split_lines(stream(), complaints.append, limit=limit)], complaints

    async def test_lines_are_found_however_the_bytes_arrive(self) -> None:
        whole = b'{"a":1}\n{"b":2}\n\n{"c":3}\n'
        for size in range(1, len(whole) + 1):
            chunks = [whole[start : start + size] for start in range(0, len(whole), size)]
            assert await self.split(*chunks) == ([b'{"a":1}', b'{"b":2}', b'{"c":3}'], [])

    async def test_an_unfinished_last_line_is_dropped(self) -> None:
        assert await self.split(b"one\ntw") == ([b"one"], [])

    async def test_a_line_that_is_too_long_is_skipped_and_the_stream_goes_on(self) -> None:
        lines, complaints = await self.split(b"one\n", b"x" * 80, b"y" * 80, b"z" * 80, b"end\ntwo\n")
        assert lines == [b"one", b"two"]
        assert len(complaints) == 1
        assert "longer than 100 bytes" in complaints[0]


def test_engine_time_is_made_of_integers() -> None:
    assert engine_time(1_795_492_109_941_979_595) == "1795492109.941979595"
    assert engine_time(1_795_492_109_000_000_001) == "1795492109.000000001"
