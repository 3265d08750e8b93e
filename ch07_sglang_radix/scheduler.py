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

What rank 0 decides here is written into a task and executed by all ranks (control_plane.py). On the other
ranks a TPScheduler only follows. Who goes first is schedule_policy.py's business, who gets in prefill_adder.py's.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ch07_sglang_radix.control_plane import ControlPlane
from ch07_sglang_radix.invariants import check_invariants
from ch07_sglang_radix.memory_pool import ReqToTokenPool, TokenToKVPool
from ch07_sglang_radix.prefill_adder import Answer, PrefillAdder
from ch07_sglang_radix.radix_cache import RadixCache
from ch07_sglang_radix.request import Req, RequestOutput, StopText
from ch07_sglang_radix.request_memory import RequestMemory
from ch07_sglang_radix.schedule_batch import ScheduleBatch
from ch07_sglang_radix.schedule_policy import SchedulePolicy
from ch07_sglang_radix.tasks import DecodeTask, PrefillSequence, PrefillTask, StopTask
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from ch07_sglang_radix.trace import Trace
from common.distributed.messages import share
from common.sampling.batch import SamplingBatch, uniform
from common.sampling.params import SamplingParams
from common.sampling.sampler import Drawn

RETRACT_DECODE_STEPS = 20  # after a retraction this many steps fit for everyone left
NO_CHUNKS = -1
DEFAULT_CHUNK = {"cpu": 1024, "cuda": 8192}  # tokens a step: on a CPU what its caches like, on a GPU SGLang's default
MAX_BEST = 1024  # with a larger top_k every rank sends all its logits
LAST_TOKEN = -1  # in a prefill task: the last token of the row, which may be known to the device only
INIT_NEW_TOKEN_RATIO, MIN_NEW_TOKEN_RATIO, RATIO_DECAY_STEPS = 0.7, 0.1, 600


@dataclass(frozen=True)
class _Queued:
    """A step that all ranks have been told to do: who gets a token out of it, and the tokens."""

    reqs: list[Req]
    drawn: Drawn | None


class TPScheduler:
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
    instead of all. seed: for requests that bring none. check: test the conservation of pages after every step.
    trace: a file to which every step writes a line (trace.py).
    """

    def __init__(
        self, wrapper: TPRadixAttentionModelWrapper, *, chunked_prefill_size: int | None = None,
        enable_mixed_chunk: bool = False, small_request_share: float = 0.0, schedule_policy: str = "fcfs",
        disable_radix_cache: bool = False, radix_eviction_policy: str = "lru", radix_bigram: bool = False,
        overlap: bool | None = None, gather_best: bool = False, seed: int = 0, check: bool = False,
        trace: str | Path | None = None,
    ):  # fmt: skip
        if chunked_prefill_size is None:
            default = DEFAULT_CHUNK[wrapper.tp.device.type]
            chunked_prefill_size = max(default // wrapper.page_size, 1) * wrapper.page_size
        _check_chunk(chunked_prefill_size, wrapper.page_size)
        if not 0 <= small_request_share < 1:
            raise ValueError(f"small_request_share={small_request_share} must be in [0, 1); 0 reserves nothing")
        self.wrapper, self.tp, self.page_size = wrapper, wrapper.tp, wrapper.page_size
        self.control = ControlPlane(wrapper)
        self.chunked_prefill_size, self.enable_mixed_chunk = chunked_prefill_size, enable_mixed_chunk
        self.small_request_share, self.seed, self.check = small_request_share, seed, check
        self.overlap = wrapper.tp.device.type == "cuda" if overlap is None else overlap
        self.gather_best = gather_best
        self.steps = {"prefill": 0, "decode": 0}
        self.work = {"tokens": 0, "samplings": 0, "sampled": 0}  # rows fed in; steps that sampled; tokens they gave
        self.retractions = self.num_finished = 0
        self.served = {"prompt": 0, "cached": 0}  # tokens of the prompts admitted so far, and how many were in the tree
        self.last_prefill: list[tuple[Req, int]] = []  # the newest prefill: who, and how many tokens computed
        self.results: dict[int, RequestOutput] = {}
        self._num_requests = 0
        self.trace: Trace | None = None
        if self.tp.rank > 0:
            return  # rank 0 alone has a queue, a tree and pools
        self.pool = TokenToKVPool(wrapper.kv_cache)
        self.req_to_token = ReqToTokenPool(wrapper.max_running_requests, wrapper.max_context + self.page_size)
        self.tree = RadixCache(self.pool, self.req_to_token, disable_radix_cache, radix_eviction_policy, radix_bigram)
        self.policy = SchedulePolicy(schedule_policy, self.tree, seed)
        self.waiting: list[Req] = []
        self.running: list[Req] = []
        self.grown: dict[int, Req] = {}  # who got a token since somebody has emptied this
        self.memory = RequestMemory(self.pool, self.req_to_token, self.tree)
        self.chunked: Req | None = None  # the one request whose prompt is computed in part
        self.new_token_ratio = INIT_NEW_TOKEN_RATIO
        self._queued: _Queued | None = None  # the step whose tokens nobody has looked at
        self._decoding = self._empty_batch()
        self.resumed: Req | None = None  # whose prompt the newest prefill step goes on with
        self.held: dict[int, str] = {}  # who was asked for the newest prefill step and did not get in: later, full
        self._mixed: list[Req] = []  # running requests that take part in the prefill step
        self._owes_decode = False  # those that run have waited for a prefill step
        if trace:
            self.trace = Trace(trace, self)

    # --- for the user

    def add_request(
        self, text: str | None = None, max_new_tokens: int = 20, *, input_ids: Sequence[int] | None = None,
        sampling_params: SamplingParams | None = None,
    ) -> int:  # fmt: skip
        """Queue one request, a text or token ids; returns its id.

        `sampling_params`, if given, replaces max_new_tokens. Raises ValueError for an empty prompt, a token
        id outside the vocabulary, and lengths that the model or the pool can never hold.
        """
        params = sampling_params or SamplingParams(max_new_tokens=max_new_tokens)
        if (text is None) == (input_ids is None):
            raise ValueError("give either text or input_ids")
        ids = self.encode(text) if input_ids is None else list(map(int, input_ids))
        self.check_request(ids, params)
        return self.enqueue(text, ids, params)

    def enqueue(
        self, text: str | None, ids: list[int], params: SamplingParams, *, stop: Sequence[str] = (),
        extra_key: Hashable = None, priority: int = 0,
    ) -> int:  # fmt: skip
        """What add_request does once `check_request` has found nothing wrong; returns the id.

        stop: strings that end the answer. extra_key: namespace of the radix tree. priority: for the schedule and the
        eviction policy of that name.
        """
        rid, self._num_requests = self._num_requests, self._num_requests + 1
        if self.tp.rank == 0:
            seed = params.seed if params.seed is not None else int(uniform(self.seed, rid) * (1 << 24))
            stops = frozenset(params.stop_token_ids + (() if params.ignore_eos else self.wrapper.config.eos_token_ids))
            stop_text = StopText(tuple(stop), self.wrapper.tokenizer.decode) if stop else None
            self.waiting.append(
                Req(
                    rid, text, ids, params, seed, extra_key, priority, stops=stops, stop_text=stop_text,
                    wanted=params.max_new_tokens,
                )
            )  # fmt: skip
        return rid

    def _empty_batch(self) -> ScheduleBatch:
        return ScheduleBatch(self.memory, bool(self.wrapper.table.tile_members))

    def process_requests(self, arrivals: Callable[[int], bool] | None = None) -> dict[int, RequestOutput]:
        """Run until every request is done; returns {request id: output}, equal on all ranks.

        `arrivals(step)` is called on rank 0 before each step: it may add requests, and returns whether more
        are to come. A ValueError of its own (a request refused) ends the run, with that error on every rank.
        """
        refused = None
        if self.tp.rank > 0:
            self.control.follow()
        else:
            refused = self._run_to_the_end(arrivals)
            self.control.send_task(StopTask(self.step_number))
        return self.share_results(refused)

    def share_results(self, refused: str | None = None) -> dict[int, RequestOutput]:
        """After rank 0 has sent a StopTask: what has finished, the same on all ranks."""
        outputs = [vars(r) for r in self.results.values()]
        report = {"refused": refused, "next_id": self._num_requests, "steps": self.steps, "work": self.work}
        report = share(report | {"outputs": outputs}, self.tp)
        self._num_requests, self.steps, self.work = report["next_id"], report["steps"], report["work"]
        self.grown = {}
        if report["refused"]:
            raise ValueError(report["refused"])
        self.results = {}
        return {r["request_id"]: RequestOutput(**r) for r in sorted(report["outputs"], key=lambda r: r["request_id"])}

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
        return bool(self.waiting or self.running or self.chunked or self._queued)

    @property
    def decoding(self) -> list[Req]:
        """The requests of the newest decode step."""
        return self._decoding.reqs

    @property
    def step_number(self) -> int:
        return self.steps["prefill"] + self.steps["decode"]

    # --- one step (rank 0)

    def step(self) -> bool:
        """Schedule, execute, sample, account. False if there was nothing to do."""
        if self.trace:
            self.trace.begin()
        decoding = any(req.wanted for req in self.running)
        batch = None if decoding and self._owes_decode else self._next_prefill()
        if batch:
            self.last_prefill = batch
            self._owes_decode = not self.enable_mixed_chunk
            queued = self._queue_prefill(batch)
        elif decoding and any(req.wanted for req in self.running):
            self._owes_decode = False
            queued = self._queue_decode()
        elif self._queued is None:
            if self.waiting:
                raise AssertionError(
                    f"request {self.waiting[0].rid} cannot start although nothing runs: pages were lost"
                )
            return False
        else:
            queued = None
        if self.trace:
            self.trace.queued()
        self._settle()
        self._queued = queued
        if not self.overlap:
            self._settle()
        if self.check:
            check_invariants(self)
        if self.trace:
            self.trace.end()
        return True

    def _next_prefill(self) -> list[tuple[Req, int]]:
        """[(request, tokens to compute)]: the chunked request first, then the queue in the policy's order."""
        if not self.chunked and not (self.waiting and self.req_to_token.num_free):
            return []
        budget, self._mixed = self.chunked_prefill_size if self.chunked_prefill_size > 0 else 1 << 62, []
        if self.enable_mixed_chunk and any(req.wanted for req in self.running):
            self._make_room()  # decodes of the step come first
            self._mixed = [req for req in self.running if req.wanted]
            self.memory.grow_by_a_page([req for req in self._mixed if req.kv_len == req.allocated_len])
            budget = max(budget - len(self._mixed), self.page_size)
        promised = sum(req.max_len - req.seq_len for req in self.running) * self.new_token_ratio
        adder = PrefillAdder(self.memory, budget, promised, self.waiting, self.small_request_share)
        if self.chunked:
            adder.add_chunk(self.chunked)
        self.held, self.resumed = {}, self.chunked
        for req in self.policy.order(self.waiting):
            first = req.cached_tokens is None  # it has not been in before, and gone back
            answer = adder.add(req)
            if answer is not Answer.ADDED:
                self.held[req.rid] = answer.value
            if answer is Answer.FULL:
                break
            if answer is Answer.ADDED and first:
                self.policy.admitted(req.kv_len, len(req.prompt_ids))
                self.served["prompt"] += len(req.prompt_ids)
                self.served["cached"] += req.kv_len
        self.chunked = adder.chunked
        if adder.batch:
            added = {req for req, _ in adder.batch}
            last = max((i for i, req in enumerate(self.waiting) if req in added), default=-1)
            for req in self.waiting[: last + 1]:
                req.passed_over += req not in added
            self.waiting = [req for req in self.waiting if req not in added]
        return adder.batch

    def _queue_prefill(self, batch: list[tuple[Req, int]]) -> _Queued:
        """A prefill step; with `enable_mixed_chunk` the running requests take part with a token each."""
        decodes = self._mixed
        sequences = [PrefillSequence(req.row, req.kv_len, n, int(req.kv_len + n == req.seq_len)) for req, n in batch]
        sequences += [PrefillSequence(req.row, req.kv_len, 1, 1) for req in decodes]
        tokens = [req.all_ids[req.kv_len : req.kv_len + n] for req, n in batch]
        tokens += [np.full(len(decodes), LAST_TOKEN)]  # which may be known to the device only
        done = [req for req, n in batch if req.kv_len + n == req.seq_len]
        emitting = done + decodes
        updates = self.memory.page_updates([*(req for req, _ in batch), *decodes])
        token_ids = tuple(np.concatenate(tokens).tolist())
        task = PrefillTask(self.step_number, updates, tuple(sequences), token_ids, self._best(emitting))
        queued = self._queue(task, emitting)
        self.work["tokens"] += len(token_ids)
        self.steps["prefill"] += 1
        for req, n in batch:
            req.kv_len += n
            self.tree.cache_unfinished_req(req)
        for req in decodes:
            req.kv_len += 1
        self.running += done
        if decodes:
            self._decoding = self._empty_batch()  # its positions have moved on without it
        return queued

    def _queue_decode(self) -> _Queued:
        self._make_room()
        reqs = [req for req in self.running if req.wanted]
        if not reqs:  # room was made by looking at the last step's tokens, and they were the last
            return _Queued([], None)
        batch = self._decoding
        batch.become(reqs)
        self.memory.grow_by_a_page([req for req in batch.reqs if req.kv_len == req.allocated_len])
        updates = self.memory.page_updates(batch.reqs)
        rows, positions = tuple(batch.rows.tolist()), tuple(batch.positions.tolist())
        task = DecodeTask(self.step_number, updates, rows, positions, self._best(batch.reqs), batch.alike)
        queued = self._queue(task, batch.reqs)
        self.work["tokens"] += self.wrapper.decode_rows(len(rows), bool(batch.alike))
        self.steps["decode"] += 1
        decay = (INIT_NEW_TOKEN_RATIO - MIN_NEW_TOKEN_RATIO) / RATIO_DECAY_STEPS
        self.new_token_ratio = max(self.new_token_ratio - decay, MIN_NEW_TOKEN_RATIO)
        batch.advance()
        return queued

    def _queue(self, task: PrefillTask | DecodeTask, emitting: list[Req]) -> _Queued:
        self.work["samplings"] += bool(emitting)
        self.work["sampled"] += len(emitting)
        if self.trace:
            self.trace.task(task)
        logits = self.control.execute(task)
        if not emitting:
            return _Queued([], None)
        for req in emitting:
            req.pending += 1
            req.wanted -= 1
        if any(req.params.needs_last_token for req in emitting):
            self._settle()  # a penalty, say, must know every token before the one it is for
        if isinstance(task, DecodeTask):
            sampling = self._decoding.next_sampling()
        else:
            sampling = SamplingBatch([req.sampling_row() for req in emitting])
        return _Queued(list(emitting), self.control.sample(logits, sampling))

    def _best(self, reqs: list[Req]) -> int:
        """How many of its best logits each rank gives in this step; 0: all."""
        params = [req.params for req in reqs]
        if not self.gather_best or any(p.logprobs or p.edits or not (p.greedy or p.top_k > 0) for p in params):
            return 0
        best = max((1 if p.greedy else p.top_k for p in params), default=0)
        return best if best <= MAX_BEST else 0

    def _settle(self) -> None:
        """Look at the tokens of the step that was queued last: append them, and end who has come to an end."""
        step, self._queued = self._queued, None
        if step is None or step.drawn is None:
            return
        taken = step.drawn.take()
        ended = False
        for i, req in enumerate(step.reqs):
            req.pending -= 1
            if req.finish_reason:  # it had ended when this step was on its way already
                continue
            told = taken.logprobs[i]
            req.take_token(taken.tokens[i], told.logprob if told else None)
            self.grown[req.rid] = req
            if req.finish_reason:
                ended = True
                self._end(req)
        if ended:
            self.running = [req for req in self.running if req.finish_reason is None]

    def _end(self, req: Req) -> None:
        """A running request has come to its end: leave to the tree what is known, take the rest back."""
        # without what a step that is on its way still computes for it
        req.kv_len = len(req.prompt_ids) + max(len(req.output_ids) - 1, 0)
        self.memory.finish(req)
        self._report(req)

    def _report(self, req: Req) -> None:
        self.num_finished += 1
        self.grown[req.rid] = req
        self.results[req.rid] = self.output_of(req)

    def abort(self, rid: int) -> bool:
        """End a request wherever it is (rank 0, between two steps); its pages are free or in the tree at once.

        False if it is unknown or has ended.
        """
        for req in [*self.waiting, *([self.chunked] if self.chunked else []), *self.running]:
            if req.rid == rid:
                break
        else:
            return False
        req.finish_reason = {"type": "abort"}
        if req in self.running:
            self.running.remove(req)
            self._end(req)
            return True
        if req is self.chunked:
            self.chunked = None
            self.memory.release(req)
        else:
            self.waiting.remove(req)
        self._report(req)
        return True

    def _make_room(self) -> None:
        """Before a decode step: if not every request can have its next slot, retract until they can.

        Those with the fewest tokens out go first (ties: the longest prompt), until RETRACT_DECODE_STEPS more
        steps fit for each of the others. The last one stays: alone it fits, or add_request had refused it.
        """
        if self.memory.obtainable_slots() >= len(self.running) * self.page_size or not self._lacks_room(1):
            return
        self._settle()  # requests may have ended, and those that go back to the queue need all their tokens
        retracted = []
        if self._lacks_room(1) and self.chunked:  # it has no outputs yet, and what it computed stays in the tree
            self.memory.release(self.chunked)
            retracted.append(self.chunked)
            self.chunked = None
        if not self._lacks_room(1):
            self._retracted(retracted)
            return
        by_loss = sorted(self.running, key=lambda r: (len(r.output_ids), -len(r.prompt_ids)))
        while len(self.running) > 1 and self._lacks_room(RETRACT_DECODE_STEPS):
            req = by_loss.pop(0)
            self.running.remove(req)
            self.memory.release(req)
            retracted.append(req)
        self._retracted(retracted)
        decoded = sum(len(r.output_ids) for r in self.running)
        total = sum(r.params.max_new_tokens for r in self.running)
        self.new_token_ratio = min(1.0, (decoded + RETRACT_DECODE_STEPS * len(self.running)) / total)

    def _retracted(self, reqs: list[Req]) -> None:
        """Back into the queue, in front: they came first."""
        self.retractions += len(reqs)
        self.waiting = sorted(reqs, key=lambda req: req.rid) + self.waiting

    def _lacks_room(self, steps: int) -> bool:
        return self.memory.slots_needed(self.running, steps) > self.memory.obtainable_slots()

    # --- words in and out

    def encode(self, text: str) -> list[int]:
        if self.wrapper.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer; give input_ids instead of text")
        return self.wrapper.tokenizer.encode(text)

    def check_request(self, ids: Sequence[int], params: SamplingParams) -> None:
        """Raises ValueError for what add_request would refuse."""
        vocab = self.wrapper.config.vocab_size
        if not ids:
            raise ValueError("the prompt is empty: there is no token to continue from")
        if min(ids) < 0 or max(ids) >= vocab:
            bad = next(i for i in ids if not 0 <= i < vocab)
            raise ValueError(f"token id {bad} is outside the vocabulary 0..{vocab - 1}")
        total, limit = len(ids) + params.max_new_tokens, self.wrapper.config.max_position_embeddings
        said = f"prompt {len(ids)} + max_new_tokens {params.max_new_tokens} = {total} tokens"
        if total > limit:
            raise ValueError(
                f"{said}, but the model ends at {limit}; shorten the prompt or ask for at most {max(limit - len(ids), 0)}"
            )
        pool = self.wrapper.kv_cache.num_pages * self.page_size
        if -(-total // self.page_size) * self.page_size > pool:
            raise ValueError(f"{said}, but the pool holds {pool}; shorten the request or raise max_total_tokens")

    def output_of(self, req: Req) -> RequestOutput:
        """What a request has so far; finish_reason is None while it runs."""
        text = self.wrapper.tokenizer.decode(req.output_ids) if self.wrapper.tokenizer else ""
        return RequestOutput(
            request_id=req.rid, prompt=req.prompt, prompt_ids=req.prompt_ids,
            text=req.stop_text.cut(text) if req.stop_text else text, output_ids=list(req.output_ids),
            cached_tokens=req.cached_tokens or 0, finish_reason=req.finish_reason, logprobs=list(req.logprobs),
        )  # fmt: skip


def _check_chunk(size: int, page_size: int) -> None:
    if size < 1 and size != NO_CHUNKS:
        raise ValueError(f"chunked_prefill_size={size} must be at least 1, or {NO_CHUNKS} for no limit")
    if size > 0 and size % page_size:
        below, above = size // page_size * page_size, -(-size // page_size) * page_size
        way_out = f"{below} or {above}" if below else f"{above}"
        raise ValueError(f"page_size={page_size} does not divide chunked_prefill_size={size}; use {way_out}")
