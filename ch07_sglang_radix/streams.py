"""Answers while they grow: to one reader who turns the crank, or to many who listen to the scheduler's thread.

Stream      each `next()` steps the scheduler until something has grown; nobody else may step meanwhile
listen      the loop (async_loop.py) steps; an asyncio caller gets what its requests have
wait_for    the same for a caller that blocks
"""

import asyncio
import queue
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from functools import partial

from ch07_sglang_radix.async_loop import SchedulerLoop
from ch07_sglang_radix.generate_calls import Answer
from ch07_sglang_radix.generate_request import GenerateCall, GenerateRequest
from ch07_sglang_radix.request import RequestOutput
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tasks import StopTask
from common.parallel_state import RankFailure

Enqueue = Callable[[GenerateRequest], int]


class Stream(Iterator[Answer]):
    """The requests are queued when it is made; closing it, or dropping it unread, ends what still runs."""

    def __init__(self, scheduler: TPScheduler, call: GenerateCall, enqueue: Enqueue):
        self._scheduler, self._call = scheduler, call
        self._index = {enqueue(request): i for i, request in enumerate(call.requests)}
        self._ready: deque[Answer] = deque()
        self.closed = False

    def __next__(self) -> Answer:
        while not self._ready and not self.closed:
            if self._scheduler.replica.rank > 0:
                self._follow()
            else:
                self._step()
        if not self._ready:
            raise StopIteration
        return self._ready.popleft()

    def _step(self) -> None:
        scheduler = self._scheduler
        scheduler.refuse_to_run_while_paused()
        try:
            more = scheduler.step()
        except BaseException:
            with suppress(RankFailure):  # nobody can be told after a loss; the error that comes first names who is lost
                self.close()
            raise
        grown, scheduler.grown = scheduler.grown, {}
        for rid, req in grown.items():
            self._hand_out(rid, scheduler.results.get(rid) or scheduler.output_of(req))
        if not more:
            self.close()

    def _follow(self) -> None:
        """Rank 0 sends tasks until it closes its stream; what came out is shared then."""
        self._scheduler.control.follow()
        for rid, output in self._scheduler.share_results().items():
            self._hand_out(rid, output)
        self.closed = True

    def _hand_out(self, rid: int, output: RequestOutput) -> None:
        if rid in self._index:
            self._ready.append(self._call.result(output, self._index[rid]) | {"index": self._index[rid]})

    def close(self) -> None:
        """End what still runs and give everything back; safe to call twice."""
        if self.closed:
            return
        if self._scheduler.replica.rank > 0:
            self._follow()
            return
        self.closed = True
        for rid in self._index:
            self._scheduler.abort(rid)
        while self._scheduler.step():  # tokens that were on their way
            pass
        self._scheduler.control.send_task(StopTask(self._scheduler.step_number))
        self._scheduler.share_results()

    def __del__(self):
        if not getattr(self, "closed", True):
            self.close()


def wait_for(loop: SchedulerLoop, call: GenerateCall, enqueue: Enqueue, stream: bool) -> Iterator[Answer]:
    """What each answer has whenever it has grown, or without `stream` at its end; blocks in between. The requests are queued
    at once."""
    news: queue.SimpleQueue[tuple[int, RequestOutput | BaseException]] = queue.SimpleQueue()
    rids: list[int] = []
    deliver = lambda i, output: news.put((i, output))  # noqa: E731
    loop.submit(partial(_enqueue, loop, call, enqueue, rids, deliver, stream)).result()

    def answers() -> Iterator[Answer]:
        missing = len(call.requests)
        try:
            while missing:
                i, output = news.get()
                if isinstance(output, BaseException):
                    raise output
                missing -= output.finish_reason is not None
                yield call.result(output, i) | {"index": i}
        finally:
            if missing:
                loop.abort(rids)

    return answers()


async def listen(loop: SchedulerLoop, call: GenerateCall, enqueue: Enqueue, stream: bool) -> AsyncIterator[Answer]:
    """The same for asyncio. Who is cancelled, or leaves the iterator, has the requests aborted."""
    here, news = asyncio.get_running_loop(), asyncio.Queue()
    rids: list[int] = []

    def deliver(i: int, output: RequestOutput | BaseException) -> None:
        with suppress(RuntimeError):  # the caller's event loop is closed: nobody listens any more
            here.call_soon_threadsafe(news.put_nowait, (i, output))

    missing = len(call.requests)
    try:
        await asyncio.wrap_future(loop.submit(partial(_enqueue, loop, call, enqueue, rids, deliver, stream)))
        while missing:
            i, output = await news.get()
            if isinstance(output, BaseException):
                raise output
            missing -= output.finish_reason is not None
            yield call.result(output, i) | {"index": i}
    finally:
        if missing:
            loop.abort(rids)  # it comes after `_enqueue`


def _enqueue(
    loop: SchedulerLoop, call: GenerateCall, enqueue: Enqueue, rids: list[int],
    deliver: Callable[[int, RequestOutput | BaseException], None], stream: bool,
) -> None:  # fmt: skip
    """In the loop's thread: queue every request, and have its outputs delivered."""
    for i, request in enumerate(call.requests):
        rids.append(enqueue(request))
        loop.listen(rids[-1], partial(deliver, i), as_it_grows=stream)
