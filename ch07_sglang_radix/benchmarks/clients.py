"""Those who send requests: one client for each program of a workload, all on rank 0.

    clients = Clients(scheduler, chat(source, scale=1))
    outputs = clients.run()       # every program to its end; afterwards the times are there

The other ranks make the same two calls and follow.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from ch07_sglang_radix.benchmarks.workloads import Program
from ch07_sglang_radix.request import RequestOutput
from ch07_sglang_radix.scheduler import TPScheduler
from common.sampling.params import SamplingParams

MAX_CALLS = 1 << 12  # of one program: its calls draw with seeds of their own, in whatever order they run


@dataclass(eq=False)
class _Client:
    number: int
    program: Program
    calls_made: int = 0
    waits_for: dict[int, list[int] | None] | None = None  # request id -> answer, of the calls that run now


class Clients:
    """Sends the calls of all programs at once, and a program's next ones when its last ones are answered.

    first_token_s: {request id: seconds from sending to its first token}; seconds: of the whole run; by `step_clock`:
    step_s: seconds of each step; host_s: those outside the model, in which rank 0 decides and accounts.
    """

    def __init__(
        self, scheduler: TPScheduler, programs: list[Program], step_clock: Callable[[], float] = time.perf_counter
    ):
        self.scheduler, self.step_clock = scheduler, step_clock
        self._clients = [_Client(i, program) for i, program in enumerate(programs)]
        self._whose: dict[int, _Client] = {}
        self._sent: dict[int, float] = {}
        self._seen: list[tuple[float, float]] = []  # before each step: time, and how much of it was the model's
        self._in_model = 0.0
        self.first_token_s: dict[int, float] = {}
        self.seconds = 0.0
        scheduler.control.execute = self._time_model(scheduler.control.execute)
        scheduler.control.sample = self._time_model(scheduler.control.sample)

    def run(self) -> dict[int, RequestOutput]:
        """Every rank calls it; the times are rank 0's."""
        began = time.perf_counter()
        outputs = self.scheduler.process_requests(self._before_step)
        self.seconds = time.perf_counter() - began
        return outputs

    @property
    def step_s(self) -> list[float]:
        return [after - before for (before, _), (after, _) in zip(self._seen, self._seen[1:], strict=False)]

    @property
    def host_s(self) -> list[float]:
        in_model = [after - before for (_, before), (_, after) in zip(self._seen, self._seen[1:], strict=False)]
        return [step - model for step, model in zip(self.step_s, in_model, strict=True)]

    def _time_model(self, call: Callable) -> Callable:
        def timed(*args):
            began = self.step_clock()
            result = call(*args)
            self._in_model += self.step_clock() - began
            return result

        return timed

    def _before_step(self, step: int) -> bool:
        now = time.perf_counter()
        if not self._seen:
            for client in self._clients:
                self._send(client, None)
        self._seen.append((self.step_clock(), self._in_model))
        for req in self.scheduler.grown.values():
            self.first_token_s.setdefault(req.rid, now - self._sent[req.rid])
            if req.finish_reason:
                client = self._whose[req.rid]
                client.waits_for[req.rid] = req.output_ids
                if None not in client.waits_for.values():
                    self._send(client, list(client.waits_for.values()))
        self.scheduler.grown.clear()
        return False  # what comes next is sent in the step after the one that answers

    def _send(self, client: _Client, answers: list[list[int]] | None) -> None:
        """Go on with the program until its next calls, and queue them."""
        try:
            calls = client.program.send(answers)
        except StopIteration:
            return
        client.waits_for = {}
        for call in calls:
            seed = client.number * MAX_CALLS + client.calls_made
            params = SamplingParams(call.new_tokens, call.temperature, seed=seed, ignore_eos=True)
            self.scheduler.intake.fits(call.ids, params)
            rid = self.scheduler.enqueue(None, call.ids, params)
            client.calls_made += 1
            client.waits_for[rid] = None
            self._whose[rid], self._sent[rid] = client, time.perf_counter()
