"""Continuous batching over a radix cache: rank 0's side of every decision.

A step is either a prefill or a decode. Prefill goes first: it turns waiting requests into running ones, and
the larger the running batch, the more a decode step is worth. Requests join and leave at any step.

With overlap, step N+1 is prepared and queued while a GPU still computes step N, and only then are N's tokens
looked at:

    GPU        | step N      | step N+1    | step N+2    |
    rank 0     | queue N+1, take N's tokens | queue N+2, take N+1's ...

The tokens themselves never leave the device in between: N+1 reads them where N left them. An end that its
length tells is known ahead; a stop token is seen one step late, and that step's token is thrown away.

What rank 0 decides here is written into a task and executed by all ranks (control_plane.py). On the other
ranks a TPScheduler only follows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ch07_sglang_radix.control_plane import ControlPlane
from ch07_sglang_radix.invariants import check_invariants
from ch07_sglang_radix.memory_pool import ReqToTokenPool, TokenToKVPool
from ch07_sglang_radix.radix_cache import MatchResult, RadixCache
from ch07_sglang_radix.request import Req, RequestOutput
from ch07_sglang_radix.request_memory import RequestMemory
from ch07_sglang_radix.tasks import Alike, DecodeTask, PrefillSequence, PrefillTask, StopTask
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.messages import share
from common.sampler import Drawn, SamplingBatch, SamplingParams, uniform

CLIP_MAX_NEW_TOKENS = 4096  # admission does not reserve more than this for one request
RETRACT_DECODE_STEPS = 20  # after a retraction this many steps fit for everyone left
NO_CHUNKS = -1
DEFAULT_CHUNK = {"cpu": 1024, "cuda": 8192}  # tokens a step: on a CPU what its caches like, on a GPU SGLang's default
MAX_BEST = 1024  # with a larger top_k every rank sends all its logits
IN_BATCH_PREFIX = 32  # tokens shared with a prompt of this very step that are worth a step's wait
INIT_NEW_TOKEN_RATIO, MIN_NEW_TOKEN_RATIO, RATIO_DECAY_STEPS = 0.7, 0.1, 600


@dataclass(frozen=True)
class _Queued:
    """A step that all ranks have been told to do: who gets a token out of it, and the tokens."""

    reqs: list[Req]
    drawn: Drawn | None


class _DecodeBatch:
    """The running requests as arrays, kept from one decode step to the next while they stay the same."""

    def __init__(self, reqs: list[Req], alike: tuple[Alike, ...] = ()):
        self.reqs, self.alike = reqs, alike
        self.members = set(reqs)
        self.rows = tuple(req.row for req in reqs)
        self.positions = np.array([req.kv_len for req in reqs])  # of the next step [B]
        self.sampling: SamplingBatch | None = None


class TPScheduler:
    """Requests in, tokens out, on as many ranks as the wrapper has.

    Every rank makes the same calls (`add_request`, `process_requests`); rank 0 keeps the queue, the others
    execute its tasks, and all get the same results.

    chunked_prefill_size: prompt tokens a step computes at most; a longer prompt is computed in chunks of
    whole pages. None takes the device's default, -1 is no limit. disable_radix_cache: no prefix is shared.
    overlap: queue a step before the last one's tokens are seen; None: on a GPU, where queueing is not doing.
    gather_best: where all requests of a step are greedy or have a small top_k, every rank sends its best logits
    instead of all. seed: for requests that bring none. check: test the conservation of pages after every step.
    """

    def __init__(
        self, wrapper: TPRadixAttentionModelWrapper, *, chunked_prefill_size: int | None = None,
        disable_radix_cache: bool = False, overlap: bool | None = None, gather_best: bool = False, seed: int = 0,
        check: bool = False,
    ):  # fmt: skip
        if chunked_prefill_size is None:
            default = DEFAULT_CHUNK[wrapper.tp.device.type]
            chunked_prefill_size = max(default // wrapper.page_size, 1) * wrapper.page_size
        _check_chunk(chunked_prefill_size, wrapper.page_size)
        self.wrapper, self.tp, self.page_size = wrapper, wrapper.tp, wrapper.page_size
        self.control = ControlPlane(wrapper)
        self.chunked_prefill_size, self.seed, self.check = chunked_prefill_size, seed, check
        self.overlap = wrapper.tp.device.type == "cuda" if overlap is None else overlap
        self.gather_best = gather_best
        self.steps = {"prefill": 0, "decode": 0}
        self.work = {"tokens": 0, "samplings": 0, "sampled": 0}  # rows fed in; steps that sampled; tokens they gave
        self.retractions = 0
        self.last_prefill: list[tuple[Req, int]] = []  # the newest prefill: who, and how many tokens computed
        self.results: dict[int, RequestOutput] = {}
        self._num_requests = 0
        if self.tp.rank == 0:
            self.pool = TokenToKVPool(wrapper.kv_cache)
            self.req_to_token = ReqToTokenPool(wrapper.max_running_requests, wrapper.max_context + self.page_size)
            self.tree = RadixCache(self.pool, self.req_to_token, disable=disable_radix_cache)
            self.waiting: list[Req] = []
            self.running: list[Req] = []
            self.memory = RequestMemory(self.pool, self.req_to_token, self.tree)
            self.chunked: Req | None = None  # the one request whose prompt is computed in part
            self.new_token_ratio = INIT_NEW_TOKEN_RATIO
            self._queued: _Queued | None = None  # the step whose tokens nobody has looked at
            self._decoding = _DecodeBatch([])

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

    def enqueue(self, text: str | None, ids: list[int], params: SamplingParams) -> int:
        """What add_request does once `check_request` has found nothing wrong; returns the id."""
        rid, self._num_requests = self._num_requests, self._num_requests + 1
        if self.tp.rank == 0:
            seed = params.seed if params.seed is not None else int(uniform(self.seed, rid) * (1 << 24))
            stops = frozenset(params.stop_token_ids + (() if params.ignore_eos else self.wrapper.config.eos_token_ids))
            self.waiting.append(Req(rid, text, ids, params, seed, stops=stops, wanted=params.max_new_tokens))
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
            refused = self._run_to_the_end(arrivals)
            self.control.send_task(StopTask(self.step_number))
        outputs = [vars(r) for r in self.results.values()]
        report = {"refused": refused, "next_id": self._num_requests, "steps": self.steps, "work": self.work}
        report = share(report | {"outputs": outputs}, self.tp)
        self._num_requests, self.steps, self.work = report["next_id"], report["steps"], report["work"]
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
    def step_number(self) -> int:
        return self.steps["prefill"] + self.steps["decode"]

    # --- one step (rank 0)

    def step(self) -> bool:
        """Schedule, execute, sample, account. False if there was nothing to do."""
        if batch := self._next_prefill():
            self.last_prefill = batch
            queued = self._queue_prefill(batch)
        elif any(req.wanted for req in self.running):
            queued = self._queue_decode()
        elif self._queued is None:
            if self.waiting:
                raise AssertionError(
                    f"request {self.waiting[0].rid} cannot start although nothing runs: pages were lost"
                )
            return False
        else:
            queued = None
        self._settle()
        self._queued = queued
        if not self.overlap:
            self._settle()
        if self.check:
            check_invariants(self)
        return True

    def _next_prefill(self) -> list[tuple[Req, int]]:
        """[(request, tokens to compute)]: the chunked request first, then the queue in order of arrival."""
        budget = self.chunked_prefill_size if self.chunked_prefill_size > 0 else 1 << 62
        batch: list[tuple[Req, int]] = []
        reserved = 0
        if req := self.chunked:
            n = self._extend(req, budget)
            batch.append((req, n))
            budget -= n
            reserved += req.max_len - req.seq_len
        # a tree of what this very step computes, without pages behind it
        computing = RadixCache(TokenToKVPool(page_size=self.page_size), disable=self.tree.disable)
        running = sum(r.max_len - r.seq_len for r in self.running) * self.new_token_ratio if self.waiting else 0
        for req in list(self.waiting):
            if budget <= 0 or self.chunked or self.req_to_token.num_free == 0:
                break
            match = self.tree.match_prefix(req.all_ids[:-1])
            ahead = computing.match_prefix(req.all_ids[:-1])
            if len(ahead.slots) - len(match.slots) >= IN_BATCH_PREFIX:
                continue  # another prompt of this step computes what it could share: let it hit in the next
            if not self._admit(req, match, reserved + running):
                break
            n = self._extend(req, budget)
            if n == 0:  # less than a page of budget left
                self.memory.release(req)
                break
            self.waiting.remove(req)
            batch.append((req, n))
            if req.cached_tokens is None:  # not again after a retraction: it would find its own tokens
                req.cached_tokens = req.kv_len
            budget -= n
            reserved += req.max_len - req.seq_len
            computing.insert(req.all_ids[: req.kv_len + n], np.zeros(req.kv_len + n, dtype=np.int64))
        return batch

    def _admit(self, req: Req, match: MatchResult, promised: float) -> bool:
        """Give the request its place, if the pool will probably hold its whole answer.

        SGLang's rule: what it needs against what is free or evictable, less what the running requests will
        still need, a share new_token_ratio of their worst case, and what this step has promised already.
        """
        self.tree.inc_lock_ref(match.last_node)  # first: locking may shrink what is evictable
        worst = req.seq_len + min(req.max_len - req.seq_len, CLIP_MAX_NEW_TOKENS)
        if self.memory.whole_pages(worst) - len(match.slots) > self.memory.obtainable_slots() - promised:
            self.tree.dec_lock_ref(match.last_node)
            return False
        self.memory.admit(req, match)
        return True

    def _extend(self, req: Req, budget: int) -> int:
        """Get slots for the next part of the prompt; returns its length. A chunk ends at a page's end."""
        n = req.seq_len - req.kv_len
        if n > budget:
            n = budget // self.page_size * self.page_size
        if n:
            self.memory.grow(req, req.kv_len + n)
        self.chunked = req if 0 < n < req.seq_len - req.kv_len else None
        return n

    def _queue_prefill(self, batch: list[tuple[Req, int]]) -> _Queued:
        sequences, tokens, emitting = [], [], []
        for req, n in batch:
            done = req.kv_len + n == req.seq_len
            sequences.append(PrefillSequence(req.row, req.kv_len, n, int(done)))
            tokens += req.all_ids[req.kv_len : req.kv_len + n]
            if done:
                emitting.append(req)
        updates = self.memory.page_updates([req for req, _ in batch])
        task = PrefillTask(self.step_number, updates, tuple(sequences), tuple(tokens), self._best(emitting))
        queued = self._queue(task, emitting, len(tokens))
        self.steps["prefill"] += 1
        for req, n in batch:
            req.kv_len += n
            self.tree.cache_unfinished_req(req)
        self.running += emitting
        return queued

    def _queue_decode(self) -> _Queued:
        self._make_room()
        reqs = [req for req in self.running if req.wanted]
        if not reqs:  # room was made by looking at the last step's tokens, and they were the last
            return _Queued([], None)
        if len(reqs) != len(self._decoding.reqs) or not self._decoding.members.issuperset(reqs):
            alike = self.memory.alike(reqs) if self.wrapper.table.tile_members else (reqs, ())
            self._decoding = _DecodeBatch(*alike)
        batch = self._decoding
        reqs = batch.reqs
        self.memory.grow_by_a_page([req for req in reqs if req.kv_len == req.allocated_len])
        updates = self.memory.page_updates(reqs)
        positions = tuple(batch.positions.tolist())
        task = DecodeTask(self.step_number, updates, batch.rows, positions, self._best(reqs), batch.alike)
        queued = self._queue(task, reqs, self.wrapper.decode_rows(len(reqs), bool(batch.alike)))
        self.steps["decode"] += 1
        decay = (INIT_NEW_TOKEN_RATIO - MIN_NEW_TOKEN_RATIO) / RATIO_DECAY_STEPS
        self.new_token_ratio = max(self.new_token_ratio - decay, MIN_NEW_TOKEN_RATIO)
        batch.positions += 1
        for req in reqs:
            req.kv_len += 1
        return queued

    def _queue(self, task: PrefillTask | DecodeTask, emitting: list[Req], tokens: int) -> _Queued:
        self.work["tokens"] += tokens
        self.work["samplings"] += bool(emitting)
        self.work["sampled"] += len(emitting)
        logits = self.control.execute(task)
        if not emitting:
            return _Queued([], None)
        for req in emitting:
            req.pending += 1
            req.wanted -= 1
        return _Queued(emitting, self.control.sample(logits, self._sampling(task, emitting)))

    def _sampling(self, task: PrefillTask | DecodeTask, reqs: list[Req]) -> SamplingBatch:
        """The parameters of the step's rows; those of a decode batch that has not changed are still there."""
        batch = self._decoding.sampling if isinstance(task, DecodeTask) else None
        if batch and not batch.penalized:
            batch.advance()
            return batch
        if any(req.params.penalized for req in reqs):
            self._settle()  # a penalty must know every token before the one it is for
        batch = SamplingBatch([req.sampling_row() for req in reqs])
        if isinstance(task, DecodeTask):
            self._decoding.sampling = batch
        return batch

    def _best(self, reqs: list[Req]) -> int:
        """How many of its best logits each rank gives in this step; 0: all."""
        params = [req.params for req in reqs]
        if not self.gather_best or any(p.logprobs or p.penalized or not (p.greedy or p.top_k > 0) for p in params):
            return 0
        best = max((1 if p.greedy else p.top_k for p in params), default=0)
        return best if best <= MAX_BEST else 0

    def _settle(self) -> None:
        """Look at the tokens of the step that was queued last: append them, and end who has come to an end."""
        step, self._queued = self._queued, None
        if step is None or step.drawn is None:
            return
        tokens, logprobs = step.drawn.take()
        ended = False
        for i, req in enumerate(step.reqs):
            req.pending -= 1
            if req.finish_reason:  # it had ended when this step was on its way already
                continue
            req.take_token(tokens[i], logprobs[i] if logprobs else None)
            if req.finish_reason:
                ended = True
                req.kv_len = len(req.prompt_ids) + len(req.output_ids) - 1  # without what a later step computes for it
                self.memory.finish(req)
                self.results[req.rid] = self._output(req)
        if ended:
            self.running = [req for req in self.running if req.finish_reason is None]

    def _make_room(self) -> None:
        """Before a decode step: if not every request can have its next slot, retract until they can.

        Those with the fewest tokens out go first (ties: the longest prompt), until RETRACT_DECODE_STEPS more
        steps fit for each of the others. The last one stays: alone it fits, or add_request had refused it.
        """
        if self.memory.obtainable_slots() >= len(self.running) * self.page_size or not self._lacks_room(1):
            return
        self._settle()  # requests may have ended, and those that go back to the queue need all their tokens
        if not self._lacks_room(1):
            return
        by_loss = sorted(self.running, key=lambda r: (len(r.output_ids), -len(r.prompt_ids)))
        retracted = []
        while len(self.running) > 1 and self._lacks_room(RETRACT_DECODE_STEPS):
            req = by_loss.pop(0)
            self.running.remove(req)
            self.memory.release(req)
            retracted.append(req)
        self.retractions += len(retracted)
        self._decoding = _DecodeBatch([])
        self.waiting = sorted(retracted, key=lambda r: r.rid) + self.waiting  # they came first
        decoded = sum(len(r.output_ids) for r in self.running)
        total = sum(r.params.max_new_tokens for r in self.running)
        self.new_token_ratio = min(1.0, (decoded + RETRACT_DECODE_STEPS * len(self.running)) / total)

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

    def _output(self, req: Req) -> RequestOutput:
        text = self.wrapper.tokenizer.decode if self.wrapper.tokenizer else lambda ids: ""
        return RequestOutput(
            request_id=req.rid, prompt=req.prompt,
            prompt_ids=req.prompt_ids, text=text(req.output_ids), output_ids=req.output_ids,
            cached_tokens=req.cached_tokens or 0, finish_reason=req.finish_reason, logprobs=req.logprobs,
        )  # fmt: skip


def _check_chunk(size: int, page_size: int) -> None:
    if size < 1 and size != NO_CHUNKS:
        raise ValueError(f"chunked_prefill_size={size} must be at least 1, or {NO_CHUNKS} for no limit")
    if size > 0 and size % page_size:
        below, above = size // page_size * page_size, -(-size // page_size) * page_size
        way_out = f"{below} or {above}" if below else f"{above}"
        raise ValueError(f"page_size={page_size} does not divide chunked_prefill_size={size}; use {way_out}")
