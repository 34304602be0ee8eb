"""Steps by their two drivers: outcomes, failures, and callers that leave at any moment."""

import asyncio
import threading
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import pytest

from bge_core.engine.call import adrive, drive


class Work:
    """Steps that add numbers which come from futures, and note in which threads they ran."""

    def __init__(self, *, failing=None):
        self.threads = []
        self.caught = None
        self.closed = threading.Event()
        self.pool = ThreadPoolExecutor(1)
        self.failing = failing

    def steps(self, count):
        total = 0
        try:
            for number in range(count):
                self.threads.append(threading.current_thread())
                total += yield self.pool.submit(self.give, number)
        except (ZeroDivisionError, CancelledError) as exc:
            self.caught = exc
            raise LookupError from exc
        finally:
            self.closed.set()
        return total

    def give(self, number):
        if number == self.failing:
            raise ZeroDivisionError
        return number


@pytest.fixture(params=["sync", "inline", "threads"])
def way(request):
    return request.param


@pytest.fixture
def run(way):
    async def do(steps):
        if way == "sync":
            return await asyncio.to_thread(drive, steps)
        return await adrive(steps, inline=way == "inline")

    return do


async def test_each_future_s_outcome_comes_back_and_the_last_word_is_given(run, way):
    work = Work()
    assert await run(work.steps(5)) == 10
    assert await run(work.steps(0)) == 0
    here = threading.current_thread()
    assert {thread is here for thread in work.threads} == {way == "inline"}


async def test_only_the_first_step_may_be_kept_off_the_loop():
    work = Work()
    assert await adrive(work.steps(3), inline=True, at_once=False) == 3
    here = threading.current_thread()
    assert [thread is here for thread in work.threads] == [False, True, True]


async def test_the_steps_see_a_failure_and_may_say_another_one(run):
    work = Work(failing=2)
    with pytest.raises(LookupError):
        await run(work.steps(5))
    assert isinstance(work.caught, ZeroDivisionError)
    assert work.closed.is_set()


async def test_a_future_that_somebody_else_cancels_is_a_failure_too(run):
    future: Future[int] = Future()
    seen = []

    def steps():
        try:
            yield future
        except CancelledError as exc:
            seen.append(exc)
            raise LookupError from exc

    threading.Timer(0.05, future.cancel).start()
    with pytest.raises(LookupError):
        await run(steps())
    assert len(seen) == 1


@pytest.mark.parametrize("inline", [True, False])
async def test_who_leaves_while_a_future_is_pending_cancels_it_and_closes_the_steps(inline):
    future: Future[int] = Future()
    closed = threading.Event()

    def steps():
        try:
            yield future
        finally:
            closed.set()

    task = asyncio.create_task(adrive(steps(), inline=inline))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert future.cancelled()
    assert closed.wait(10)


async def test_who_leaves_while_a_thread_is_in_a_step_has_them_closed_there():
    """A generator that runs can't be closed from outside."""
    entered, go, closed = threading.Event(), threading.Event(), threading.Event()
    where = []
    future: Future[int] = Future()

    def steps():
        try:
            entered.set()
            assert go.wait(10)
            yield future
        finally:
            where.append(threading.current_thread())
            closed.set()

    task = asyncio.create_task(adrive(steps(), inline=False))
    assert await asyncio.to_thread(entered.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not closed.is_set()
    go.set()
    assert await asyncio.to_thread(closed.wait, 10)
    assert where[0] is not threading.current_thread()


async def test_who_leaves_before_the_first_step_began_has_nothing_done():
    begun = []

    def steps():
        begun.append(1)
        yield Future()

    task = asyncio.create_task(adrive(steps(), inline=False))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0.05)
    assert begun == []


def test_ctrl_c_in_the_waiting_thread_cancels_what_is_pending():
    closed = []

    class Interrupted(Future[int]):
        def result(self, timeout=None):
            raise KeyboardInterrupt

    future = Interrupted()

    def steps():
        try:
            yield future
        finally:
            closed.append(1)

    with pytest.raises(KeyboardInterrupt):
        drive(steps())
    assert future.cancelled()
    assert closed == [1]
