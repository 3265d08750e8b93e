"""What comes back: tokens are appended, requests end, results are laid out for whoever waits."""

from collections.abc import Iterable, Sequence

from ch07_sglang_radix.request import Req, RequestOutput
from ch07_sglang_radix.scheduler_state import SchedulerState
from common.request.end import End
from common.request.queued_step import QueuedStep
from common.sampling.logprobs import TokenLogprobs
from common.sampling.sampler import problem


class Outcome:
    """Every way out of the scheduler: to the end, aborted, or with the step that failed."""

    def __init__(self, state: SchedulerState):
        self.state = state

    def take(self, taken: Iterable[tuple[Req, int, TokenLogprobs | None]]) -> None:
        """Append a step's tokens (QueuedStep.take), and end who has come to an end."""
        s, ended, grown = self.state, False, self.state.front.grown
        for req, token, told in taken:
            if req.ended:
                continue  # the rest of a run, behind its end
            if token < 0:
                s.running.remove(req)
                self._fail(req, (req.grammar and req.grammar.error) or problem(token))
                continue
            req.answer.take(token, told)  # Req.take_token without its call: 256 of them in every step
            grown[req.rid] = req
            if req.answer.end:
                req.finish(req.answer.end)
                ended = True
                self.end(req)
        if ended:
            s.running = [req for req in s.running if not req.ended]

    def take_steps(self, steps: Sequence[QueuedStep[Req]]) -> None:
        """The same for several decode steps of the same requests: each request's tokens at one go, if none of them can end it."""
        drawn, one_by_one = [step.drawn.take() for step in steps], []
        runs = zip(*[one.tokens for one in drawn], strict=True)
        told = zip(*[one.logprobs for one in drawn], strict=True)
        for req, run, of_run in zip(steps[0].requests, runs, told, strict=True):
            req.pending -= len(run)
            if req.ended:
                continue
            if req.answer.goes_on_with(run):
                self.state.front.grown[req.rid] = req
            else:
                one_by_one += [(req, *one) for one in zip(run, of_run, strict=True)]
        self.take(one_by_one)

    def end(self, req: Req) -> None:
        """A running request has come to its end: leave to the tree what is known, take the rest back."""
        # without what a step that is on its way still computes for it
        req.kv_len = len(req.prompt_ids) + max(len(req.output_ids) - 1, 0)
        rolls_back = req.session is not None and req.answer.end.kind == "abort"
        if req.probe or rolls_back:
            self.state.memory.release(req)
        else:
            self.state.memory.finish(req)
        self.report(req)

    def report(self, req: Req) -> None:
        s = self.state.front
        s.num_finished += not req.probe
        s.grown[req.rid] = req
        s.results[req.rid] = self.output_of(req)

    def abort(self, rid: int) -> bool:
        """End a request wherever it is; False if it is unknown or has ended."""
        s = self.state
        req = next((req for req in s.unfinished if req.rid == rid), None)
        if req is None:
            return False
        self.stop(req, End("abort"))
        return True

    def stop(self, req: Req, end: End) -> None:
        """A request that has not ended comes to this end, wherever it is."""
        s = self.state
        req.finish(end)
        if req in s.running:
            s.running.remove(req)
            self.end(req)
            return
        if req is s.chunked:
            s.chunked = None
            s.memory.release(req)
        else:
            (s.waiting if req in s.waiting else s.elsewhere).remove(req)
        self.report(req)

    def refuse(self, req: Req, why: str) -> None:
        """A waiting request can never run, by its own fault."""
        self.stop(req, End("refused", message=why))

    def fail(self, reqs: Sequence[Req], error: BaseException) -> None:
        """A step could not be carried out: its requests end with the error, and nobody else."""
        reason = " ".join((f"{type(error).__name__}: {error}" if str(error) else type(error).__name__).split())
        s = self.state
        s.forget_batches()
        for req in reqs:
            if req is s.chunked:
                s.chunked = None
            if req in s.running:
                s.running.remove(req)
            self._fail(req, reason)

    def _fail(self, req: Req, why: str) -> None:
        """It has left its list: what it holds comes back, and nothing of it goes into the tree, it may be wrong."""
        req.finish(End("error", message=why))
        self.state.memory.release(req)
        self.report(req)

    def output_of(self, req: Req) -> RequestOutput:
        """What a request has so far; finish_reason is None while it runs."""
        return RequestOutput(
            request_id=req.rid, prompt=req.prompt, prompt_ids=req.prompt_ids, text=req.answer.shown(),
            output_ids=list(req.output_ids), cached_tokens=req.cached_tokens or 0, finish_reason=req.finish_reason,
            logprobs=list(req.answer.logprobs), prompt_logprobs=list(req.prompt_logprobs), drafts=req.drafts,
            weight_version=self.state.front.weight_version, cached_tokens_details=req.cached_tokens_details,
        )  # fmt: skip
