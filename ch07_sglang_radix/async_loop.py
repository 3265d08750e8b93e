"""The scheduler in a thread of its own, for callers that do not wait in line: `Engine.async_generate`.

    a caller, any time            the loop (rank 0)                      other ranks: Engine.follow()
    submit(enqueue ...)  ---->    between two steps: do what came in
                                  step                  -- task ------>  execute
    on_output(output)    <----    who got a token, who has ended

Nothing but this thread touches the scheduler while it runs. With nothing to do it sleeps until something comes in, and
says so to the other ranks from time to time: a collective that waits too long would count as a dead peer.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from ch07_sglang_radix.request import RequestOutput
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tasks import StopTask

HEARTBEAT_S = 10.0


class SchedulerLoop:
    """Runs `scheduler.step()` while there is something to do. Made on rank 0 once somebody calls async_generate."""

    def __init__(self, scheduler: TPScheduler):
        self._scheduler = scheduler
        self._inbox: queue.SimpleQueue[tuple[Callable[[], Any], Future] | None] = queue.SimpleQueue()
        self._listeners: dict[int, Callable[[RequestOutput], None]] = {}
        self._growing: set[int] = set()  # whose listeners want every token
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], Any]) -> Future:
        """Have `call` done between two steps; the future brings its result, or its error."""
        done: Future = Future()
        self._inbox.put((call, done))
        if self._failure:
            self._refuse()
        return done

    def listen(self, rid: int, on_output: Callable[[RequestOutput], None], as_it_grows: bool) -> None:
        """Call `on_output`, in the loop's thread: for each new token of a request, or once, when it has ended."""
        self._listeners[rid] = on_output
        if as_it_grows:
            self._growing.add(rid)

    def abort(self, rids: list[int]) -> None:
        """Between two steps, end those of `rids` that still run; the list is read then."""
        self.submit(lambda: [self._scheduler.abort(rid) for rid in rids])

    def stop(self) -> None:
        """Finish the step that runs, tell the other ranks to leave, and end."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        busy = True
        try:
            while self._take_in(wait=not busy):
                busy = not (self._scheduler.paused or self._scheduler.weights_held) and self._scheduler.step()
                self._give_out()
            self._scheduler.control.send_task(StopTask.leave())
            self._failure = RuntimeError("the engine has been shut down")
        except BaseException as error:  # this thread has nobody to raise to
            self._failure = error
        self._refuse()
        for on_output in self._listeners.values():
            on_output(self._failure)

    def _refuse(self) -> None:
        """Whoever waits hears why nothing is done any more."""
        while True:
            try:
                item = self._inbox.get_nowait()
            except queue.Empty:
                return
            if item and item[1].set_running_or_notify_cancel():
                item[1].set_exception(self._failure)

    def _take_in(self, wait: bool) -> bool:
        """Do what has come in; False if the loop shall end."""
        while True:
            try:
                item = self._inbox.get(block=wait, timeout=HEARTBEAT_S)
            except queue.Empty:
                if not wait:
                    return True
                self._scheduler.control.send_task(StopTask(self._scheduler.step_number))
                continue
            if item is None:
                return False
            call, done = item
            if not done.set_running_or_notify_cancel():
                continue  # the caller has left before it was its turn
            try:
                done.set_result(call())
            except Exception as error:
                done.set_exception(error)
            wait = False

    def _give_out(self) -> None:
        scheduler = self._scheduler
        grown, scheduler.grown = scheduler.grown, {}
        finished, scheduler.results = scheduler.results, {}
        for rid, req in grown.items():
            if rid in self._growing and rid not in finished:
                self._listeners[rid](scheduler.output_of(req))
        for rid, output in finished.items():
            self._growing.discard(rid)
            if on_output := self._listeners.pop(rid, None):
                on_output(output)
