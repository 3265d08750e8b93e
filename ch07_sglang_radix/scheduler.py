"""Continuous batching over a radix cache: rank 0's side of every decision.

A step is either a prefill or a decode. Prefill goes first: it turns waiting requests into running ones, and
the larger the running batch, the more a decode step is worth. But those that run wait for one prefill step (one chunk)
at most: then a decode step is due. With `enable_mixed_chunk` they need not wait, they take part in the prefill
step with a token each. Requests join and leave at any step.

With overlap, step N+1 is prepared and queued while a GPU still computes step N, and only then are N's tokens
looked at:

    GPU        | step N      | step N+1    | step N+2    |
    rank 0     | queue N+1, take N's tokens | queue N+2, take N+1's ...

The tokens themselves never leave the device in between: N+1 reads them where N left them. An end that its
length tells is known ahead; a stop token is seen one step late, and that step's token is thrown away.

What rank 0 decides is written into a task and executed by all ranks (control_plane.py). On the other ranks a TPScheduler only
follows. This file is the loop; each of its questions has a place of its own:

    what is known                     scheduler_state.py
    may this request be queued        common/request/intake.py
    who may enter, and who first      admission.py, schedule_policy.py, prefill_adder.py
    what must its text be             grammar_manager.py, common/sampling/grammar.py
    what a step is made of            step_tasks.py, tasks.py
    what comes back                   outcome.py, common/request/queued_step.py
    no page left: who goes back       retraction.py
    what a request holds              request_memory.py, radix_cache.py
    is nothing lost                   invariants.py
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ch07_sglang_radix.admission import DEFAULT_CHUNK, Admission, chunk_size
from ch07_sglang_radix.grammar_manager import GrammarManager
from ch07_sglang_radix.invariants import check_invariants
from ch07_sglang_radix.outcome import Outcome
from ch07_sglang_radix.prefill_adder import Answer
from ch07_sglang_radix.request import Req, RequestOutput
from ch07_sglang_radix.retraction import Retraction
from ch07_sglang_radix.scheduler_state import SchedulerState
from ch07_sglang_radix.step_tasks import StepTasks
from ch07_sglang_radix.tasks import DecodeTask, PrefillTask, StopTask
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from ch07_sglang_radix.trace import Trace
from common.distributed.messages import share
from common.parallel_state import RankFailure
from common.request.intake import Intake, Words
from common.request.queued_step import QueuedStep
from common.sampling.batch import uniform
from common.sampling.params import SamplingParams
from common.text.answer import AnswerText
from common.values import flag, shown, whole

HELD_S = 0.002  # between two looks at closed gates, while nothing else is to be done
PROBE = -1  # the number of a request that is not counted
WORDS = Words("max_new_tokens", "input_ids", "max_total_tokens")


class TPScheduler(SchedulerState):
    """Requests in, tokens out, on as many ranks as the wrapper has.

    Every rank makes the same calls (`add_request`, `process_requests`); rank 0 keeps the queue, the others
    execute its tasks, and all get the same results.

    chunked_prefill_size: prompt tokens a step computes at most; a longer prompt is computed in chunks of
    whole pages. None takes the device's default, -1 is no limit. enable_mixed_chunk: running requests take part in
    prefill steps. small_request_share: so much of a step a long prompt's chunk leaves to prompts that fit into it.
    schedule_policy: see schedule_policy.py. disable_radix_cache: no prefix is shared. radix_eviction_policy: see
    eviction.py. radix_bigram: see RadixCache.
    overlap: queue a step before the last one's tokens are seen; None: on a GPU, where queueing is not doing.
    gather_best: where all requests of a step are greedy or have a small top_k, every rank sends its best logits
    instead of all. seed: for requests that bring none. schedule_conservativeness: times the share of its worst case that
    a running request is expected to need, when others ask to enter. check: test the conservation of pages after every step.
    trace: a file to which every step writes a line (trace.py).

    `after_step`: called after each step, in order; the check and the trace are its first users.
    """

    def __init__(
        self, wrapper: TPRadixAttentionModelWrapper, *, chunked_prefill_size: int | None = None,
        enable_mixed_chunk: bool = False, small_request_share: float = 0.0, schedule_policy: str = "fcfs",
        disable_radix_cache: bool = False, radix_eviction_policy: str = "lru", radix_bigram: bool = False,
        overlap: bool | None = None, gather_best: bool = False, seed: int = 0, schedule_conservativeness: float = 1.0,
        check: bool = False, trace: str | Path | None = None,
    ):  # fmt: skip
        default = DEFAULT_CHUNK[wrapper.tp.device.type]
        self.chunked_prefill_size = chunk_size(chunked_prefill_size, wrapper.page_size, default)
        if not 0 <= small_request_share < 1:
            raise ValueError(f"small_request_share={small_request_share} must be in [0, 1); 0 reserves nothing")
        switches = {
            "enable_mixed_chunk": enable_mixed_chunk, "disable_radix_cache": disable_radix_cache,
            "radix_bigram": radix_bigram, "gather_best": gather_best, "check": check,
        }  # fmt: skip
        for name, value in switches.items():
            flag(name, value)
        whole("seed", seed, -(1 << 63), (1 << 63) - 1)
        super().__init__(
            wrapper, schedule_policy=schedule_policy, disable_radix_cache=disable_radix_cache,
            radix_eviction_policy=radix_eviction_policy, radix_bigram=radix_bigram, seed=seed,
            schedule_conservativeness=schedule_conservativeness,
        )  # fmt: skip
        self.overlap = wrapper.tp.device.type == "cuda" if overlap is None else overlap
        config = wrapper.config
        self.intake = Intake(
            wrapper.tokenizer, config.vocab_size, wrapper.context_length,
            wrapper.kv_cache.num_pages * self.page_size, self.page_size, WORDS,
            "context_length" if wrapper.context_length < config.max_position_embeddings else None,
        )  # fmt: skip
        self.trace: Trace | None = None
        self.after_step: list[Callable[[], None]] = []
        if self.tp.rank > 0:
            return
        self.outcome = Outcome(self)
        self.retraction = Retraction(self, self._settle)
        limits = (self.chunked_prefill_size, enable_mixed_chunk, small_request_share)
        self.admission = Admission(self, *limits, self.retraction.make_room)
        self.grammars = GrammarManager(wrapper)
        self.admission.gates.append(self.grammars)
        self.step_tasks = StepTasks(self, gather_best)
        self._queued: QueuedStep[Req] | None = None  # the step whose tokens nobody has looked at
        self._owes_decode = False  # those that run have waited for a prefill step
        if check:
            self.after_step.append(partial(check_invariants, self))
        if trace:
            self.trace = Trace(trace, self)
            self.after_step.append(self.trace.end)

    # --- for the user

    def add_request(
        self, text: str | None = None, max_new_tokens: int = 20, *, input_ids: Sequence[int] | None = None,
        sampling_params: SamplingParams | None = None,
    ) -> int:  # fmt: skip
        """Queue one request, a text or token ids; returns its id.

        `sampling_params`, if given, replaces max_new_tokens. Raises ValueError, and nothing is queued, for an empty prompt, a
        token id outside the vocabulary, lengths that the model or the pool can never hold, and values of a wrong kind.
        """
        if (text is None) == (input_ids is None):
            raise ValueError("give either text or input_ids")
        if text is not None and not isinstance(text, str):
            raise ValueError(f"text={shown(text)} must be a text; token ids go into input_ids")
        if isinstance(input_ids, str):
            raise ValueError(f"input_ids={shown(input_ids)} must be token ids; a text goes into text")
        if sampling_params is None:
            sampling_params = SamplingParams(max_new_tokens=max_new_tokens)
        elif not isinstance(sampling_params, SamplingParams):
            raise ValueError(f"sampling_params={shown(sampling_params)} must be a SamplingParams")
        ids = self.intake.ids(input_ids if text is None else text)
        self.intake.fits(ids, sampling_params)
        return self.enqueue(text, ids, sampling_params)

    def enqueue(
        self, text: str | None, ids: list[int], params: SamplingParams, *, words: Mapping[str, Any] | None = None,
        extra_key: str | None = None, priority: int = 0, name: str | None = None,
        routing_key: str | None = None, shows_text: bool = True, probe: bool = False,
    ) -> int:  # fmt: skip
        """What add_request does once the intake has found nothing wrong; returns the id.

        words: AnswerText's arguments: what ends the answer, and how its text is made. extra_key: namespace of the radix tree.
        priority: for the schedule and the eviction policy of that name. name: the user's own, to abort it by.
        routing_key: for the schedule policy of that name. shows_text: False if others turn tokens into text, and only stop
        texts are looked for here. probe: does the engine live? Counted nowhere and cached nowhere; one at a time.
        """
        rid = PROBE if probe else self.num_requests
        self.num_requests += not probe
        if self.tp.rank == 0:
            seed = params.seed if params.seed is not None else int(uniform(self.seed, rid) * (1 << 24))
            ends = frozenset(params.stop_token_ids + self.wrapper.config.eos_token_ids)
            stops = frozenset(params.stop_token_ids) if params.ignore_eos else ends
            if params.grammar:
                ends = stops = ends | self.grammars.end_ids
            needs_text = shows_text or any((words or {}).get(name) for name in ("stop", "stop_regex"))
            req = Req(
                rid, text, ids, params, seed, extra_key, priority, name, routing_key, probe, stops=stops, held_back=ends,
                text=AnswerText(self.wrapper.tokenizer if needs_text else None, ids, **(words or {})),
                wanted=params.max_new_tokens,
            )  # fmt: skip
            self.grammars.start(req)
            self.waiting.append(req)
        return rid

    def process_requests(self, arrivals: Callable[[int], bool] | None = None) -> dict[int, RequestOutput]:
        """Run until every request is done; returns {request id: output}, equal on all ranks.

        `arrivals(step)` is called on rank 0 before each step: it may add requests, and returns whether more
        are to come. A ValueError of its own (a request refused) ends the run, with that error on every rank.
        """
        refused = None
        if self.tp.rank > 0:
            self.control.follow()
        else:
            try:
                refused = self._run_to_the_end(arrivals)
            except BaseException as error:
                self.drop_all()
                if self.tp.size > 1 and not isinstance(error, RankFailure | KeyboardInterrupt):
                    self.control.send_task(StopTask(self.step_number))
                    share({"refused": f"rank 0 has stopped: {error}"}, self.tp)
                raise
            self.control.send_task(StopTask(self.step_number))
        return self.share_results(refused)

    def share_results(self, refused: str | None = None) -> dict[int, RequestOutput]:
        """After rank 0 has sent a StopTask: what has finished, the same on all ranks."""
        outputs, self.grown = sorted(self.results.values(), key=lambda output: output.request_id), {}
        if self.tp.size > 1:
            report = share(
                {
                    "refused": refused, "next_id": self.num_requests, "steps": self.steps, "work": self.work,
                    "outputs": [output.to_json() for output in outputs],
                },
                self.tp,
            )  # fmt: skip
            refused = report["refused"]
            if "outputs" in report:
                self.num_requests, self.steps, self.work = report["next_id"], report["steps"], report["work"]
                outputs = [RequestOutput.from_json(value) for value in report["outputs"]]
        if refused:  # what has finished is still there for the next call
            raise ValueError(refused)
        self.results = {}
        return {output.request_id: output for output in outputs}

    def _run_to_the_end(self, arrivals: Callable[[int], bool] | None) -> str | None:
        """Rank 0: step until nothing is left and nothing more comes; returns why `arrivals` gave up, if it did."""
        more = True
        while more:
            try:
                coming = arrivals is not None and arrivals(self.step_number)
            except ValueError as error:  # the other ranks wait for a task: tell them instead of leaving
                return str(error)
            more = self.step() or coming
        return None

    @property
    def busy(self) -> bool:
        """Is anything waiting, running or on its way?"""
        return bool(self.unfinished or self._queued)

    # --- one step (rank 0)

    def step(self) -> bool:
        """Schedule, execute, sample, account. False if there was nothing to do."""
        if self.trace:
            self.trace.begin()
        self.grammars.take(self.outcome.refuse)
        decoding = any(req.wanted for req in self.running)
        batch = None if decoding and self._owes_decode else self.admission.next_prefill()
        if batch and batch.reqs:
            self._owes_decode = not self.admission.enable_mixed_chunk
            task, emitting = self.step_tasks.prefill(batch)
            reqs = [req for req, _ in batch.reqs] + batch.decodes
            queued = self._queue(task, reqs, emitting, partial(self.step_tasks.prefill_queued, batch, emitting))
        elif decoding and any(req.wanted for req in self.running):
            self._owes_decode = False
            queued = self._queue_decode()
        elif self._queued is None:
            if not self.waiting:
                return False
            if Answer.HELD.value not in self.held.values():
                first = self.waiting[0].rid
                raise AssertionError(f"request {first} cannot start although nothing runs: pages were lost")
            time.sleep(HELD_S)
            return True
        else:
            queued = None
        if self.trace:
            self.trace.queued()
        self._settle()
        self._queued = queued
        if not self.overlap:
            self._settle()
        for call in list(self.after_step):  # one may take itself out
            call()
        return True

    def _queue_decode(self) -> QueuedStep[Req]:
        self.retraction.make_room()
        reqs = [req for req in self.running if req.wanted]
        if not reqs:  # room was made by looking at the last step's tokens, and they were the last
            return QueuedStep()
        task, emitting = self.step_tasks.decode(reqs)
        return self._queue(task, reqs, emitting, self.step_tasks.decode_queued)

    def _queue(
        self, task: PrefillTask | DecodeTask, reqs: Sequence[Req], emitting: Sequence[Req], queued: Callable[[], None]
    ) -> QueuedStep[Req]:
        """Have all ranks do it for `reqs`, and draw a token for each of `emitting`; `queued` moves the lengths on."""
        self.work["samplings"] += bool(emitting)
        self.work["sampled"] += sum(not req.probe for req in emitting)
        if self.trace:
            self.trace.task(task)
        try:
            logits = self.control.execute(task)
        except BaseException as error:
            self.outcome.fail(reqs, error)
            if self.control.tp.size > 1 or not isinstance(error, Exception):
                raise  # the other ranks are somewhere in the middle of it; or somebody wants us to stop
            return QueuedStep()
        if "scored" in task.columns:
            self.step_tasks.score_prompts(task, reqs)
        for req in emitting:
            req.pending += 1
            req.wanted -= 1
        drawn = None
        if emitting:
            if any(req.grammar or req.params.needs_last_token for req in emitting):
                self._settle()  # a grammar or a penalty must know every token before the one it is for
            drawn = self.control.sample(logits, self.step_tasks.sampling(task, emitting))
        queued()
        return QueuedStep(list(emitting), drawn)

    def _settle(self) -> None:
        """Look at the tokens of the step that was queued last."""
        step, self._queued = self._queued, None
        if step:
            self.outcome.take(step)

    def abort(self, rid: int | str) -> int:
        """End a request wherever it is (rank 0, between two steps); its pages are free or in the tree at once.

        Returns how many there were to end. A text is the user's own name of a request, and of all its n answers.
        """
        if not isinstance(rid, str):
            return int(self.outcome.abort(rid))
        ours = [r.rid for r in self.unfinished if r.name == rid or (r.name or "").startswith(f"{rid}_")]
        return sum(map(self.outcome.abort, ours))

    def output_of(self, req: Req) -> RequestOutput:
        """What a request has so far; finish_reason is None while it runs."""
        return self.outcome.output_of(req)

    def drop_all(self) -> None:
        """Forget every request and what is on its way (rank 0); their pages are free or in the tree at once."""
        for req in self.unfinished:
            self.abort(req.rid)
        self._queued, self.batch = None, self.empty_batch()
        self.results, self.grown = {}, {}
