"""Continuous batching over a radix cache: rank 0's side of every decision.

A step is either a prefill or a decode. Prefill goes first: it turns waiting requests into running ones, and
the larger the running batch, the more a decode step is worth. But those that run wait for one prefill step (one chunk)
at most: then a decode step is due. With `enable_mixed_chunk` they need not wait, they take part in the prefill
step with a token each. Requests join and leave at any step.

What rank 0 decides is written into a task and executed by all ranks (control_plane.py). On the other ranks a TPScheduler only
follows. This file is what the user sees; each question has a place of its own:

    what is known                     scheduler_state.py
    what comes after what             step_loop.py
    may this request be queued        common/request/intake.py
    prefill or decode                 data_rank.py
    who may enter, and who first      admission.py, schedule_policy.py, prefill_adder.py
    what must its text be             grammar_manager.py, common/sampling/grammar.py
    what a step is made of            step_plan.py, step_tasks.py, tasks.py
    how a step brings several tokens  verify_step.py
    what comes back                   outcome.py, common/request/queued_step.py
    no page left: who goes back       retraction.py
    what a request holds              request_memory.py, radix_cache.py, session_memory.py
    is nothing lost                   invariants.py
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ch07_sglang_radix import dynamic_chunk_sizer
from ch07_sglang_radix.admission import DEFAULT_CHUNK, chunk_size, share_of_chunk
from ch07_sglang_radix.data_rank import LOAD_BALANCE_METHODS, DataRank, pick_data_rank
from ch07_sglang_radix.handoff import Handoff
from ch07_sglang_radix.policy_names import check_continuous_decode, check_dynamic_chunking
from ch07_sglang_radix.radix_cache import RadixCache
from ch07_sglang_radix.request import Req, RequestOutput
from ch07_sglang_radix.step_loop import StepLoop
from ch07_sglang_radix.tasks import StopTask
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.distributed.messages import share
from common.parallel_state import RankFailure
from common.request.intake import Intake, Words
from common.sampling.batch import derived_seed
from common.sampling.params import SamplingParams
from common.text.answer import AnswerText
from common.values import choice, flag, shown, whole
from common.vision.pictures import Pictures

PROBE = -1  # the number of a request that is not counted
PAUSE_MODES = ("abort", "retract", "in_place")  # SGLang's
WORDS = Words("max_new_tokens", "input_ids", "max_total_tokens")


class TPScheduler(StepLoop):
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
    instead of all. seed: of it each request that brings none gets one, by its number, or where the wrapper is deterministic all
    the same. schedule_conservativeness: times the share of its worst case that
    a running request is expected to need, when others ask to enter. check: test the conservation of pages after every step.
    num_continuous_decode_steps: the tokens of so many decode steps are looked at together (step_loop.py says when).
    enable_dynamic_chunking: the next part of a long prompt is so long that it takes as long as the first (dynamic_chunk_sizer.py).
    trace: a file to which every step writes a line (trace.py). load_balance_method: which data rank a request goes to
    (data_rank.py), where the wrapper has several; each gets its share of chunked_prefill_size. num_lanes: steps on their way
    through the pipeline's stages at once, by default one a stage. max_lane_size: requests that run in a lane at most, by
    default their share. tp_size, ..., enable_layernorm_sp: how the ranks are laid out; the wrapper knows, and what is given
    must agree: else ValueError.
    """

    def __init__(
        self, wrapper: TPRadixAttentionModelWrapper, *, chunked_prefill_size: int | None = None,
        enable_mixed_chunk: bool = False, small_request_share: float = 0.0, schedule_policy: str = "fcfs",
        disable_radix_cache: bool = False, radix_eviction_policy: str = "lru", radix_bigram: bool = False,
        overlap: bool | None = None, gather_best: bool = False, seed: int = 0, schedule_conservativeness: float = 1.0,
        check: bool = False, trace: str | Path | None = None, num_lanes: int | None = None,
        max_lane_size: int | None = None, load_balance_method: str = LOAD_BALANCE_METHODS[0], tp_size: int | None = None,
        pp_size: int | None = None, dp_size: int | None = None, attn_dp_size: int | None = None, cp_size: int | None = None,
        enable_layernorm_sp: bool | None = None, enable_dynamic_chunking: bool = False, tree: type[RadixCache] | None = None,
        num_continuous_decode_steps: int = 1,
    ):  # fmt: skip
        sizes = {"tp": tp_size, "pp": pp_size, "dp": dp_size, "attn_dp": attn_dp_size, "cp": cp_size}
        wrapper.refuse_another_layout(sizes, enable_layernorm_sp)
        default, num_data_ranks = DEFAULT_CHUNK[wrapper.tp.device.type], wrapper.parallel.layout.attn_dp
        chunk = chunk_size(chunked_prefill_size, wrapper.page_size, default)
        self.chunked_prefill_size = share_of_chunk(chunk, wrapper.page_size, num_data_ranks)
        self.load_balance_method = choice("load_balance_method", load_balance_method, LOAD_BALANCE_METHODS)
        if not 0 <= small_request_share < 1:
            raise ValueError(f"small_request_share={small_request_share} must be in [0, 1); 0 reserves nothing")
        switches = {
            "enable_mixed_chunk": enable_mixed_chunk, "disable_radix_cache": disable_radix_cache,
            "radix_bigram": radix_bigram, "gather_best": gather_best, "check": check,
            "enable_dynamic_chunking": enable_dynamic_chunking,
        }  # fmt: skip
        for name, value in switches.items():
            flag(name, value)
        if wrapper.verifier and wrapper.verifier.drafter and enable_mixed_chunk:
            raise ValueError(
                "enable_mixed_chunk with speculative decoding: a drafter is told of prompts, or of running requests, in one step; "
                "leave one of the two out"
            )
        whole("num_continuous_decode_steps", num_continuous_decode_steps, 1)
        lanes = wrapper.parallel.pp.size if num_lanes is None else num_lanes
        check_continuous_decode(num_continuous_decode_steps, lanes, num_data_ranks, wrapper.verifier is not None)
        whole("seed", seed, -(1 << 63), (1 << 63) - 1)
        if enable_dynamic_chunking:
            check_dynamic_chunking(wrapper.parallel.pp.size, self.chunked_prefill_size)
        options = {
            "schedule_policy": schedule_policy, "disable_radix_cache": disable_radix_cache,
            "radix_eviction_policy": radix_eviction_policy, "radix_bigram": radix_bigram, "seed": seed,
            "schedule_conservativeness": schedule_conservativeness, "num_lanes": num_lanes, "max_lane_size": max_lane_size,
            "tree": tree,
        }  # fmt: skip
        super().__init__(wrapper, **options)
        config = wrapper.config
        self.intake = Intake(
            wrapper.tokenizer, config.vocab_size, wrapper.context_length,
            wrapper.num_pages * self.page_size, self.page_size, WORDS,
            "context_length" if wrapper.context_length < config.max_position_embeddings else None,
        )  # fmt: skip
        others = []
        if self.replica.rank == 0:
            others = [DataRank(wrapper, **options, front=self, number=i) for i in range(1, num_data_ranks)]
        self.start_loop(
            overlap,
            self.chunked_prefill_size,
            enable_mixed_chunk,
            small_request_share,
            gather_best,
            check,
            trace,
            others,
            num_continuous_decode_steps,
        )
        if enable_dynamic_chunking:
            self._size_chunks(wrapper)

    def _size_chunks(self, wrapper: TPRadixAttentionModelWrapper) -> None:
        """The next part of a long prompt is to take as long as the first one does."""
        base = self.chunked_prefill_size
        cost = dynamic_chunk_sizer.measure(wrapper, base)  # on every rank: what a stage sends, the next one receives
        if self.replica.rank == 0:
            self.admission.next_chunk = lambda done: dynamic_chunk_sizer.next_chunk(cost, base, done, self.page_size)

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
        routing_key: str | None = None, shows_text: bool = True, probe: bool = False, session: str | None = None,
        handoff: Handoff | None = None, pictures: Pictures | None = None, lora_path: str | None = None,
    ) -> int:  # fmt: skip
        """What add_request does once the intake has found nothing wrong; returns the id.

        words: AnswerText's arguments: what ends the answer, and how its text is made. extra_key: namespace of the radix tree.
        priority: for the schedule and the eviction policy of that name. name: the user's own, to abort it by.
        routing_key: for the schedule policy of that name. shows_text: False if others turn tokens into text, and only stop
        texts are looked for here. probe: does the engine live? Counted nowhere and cached nowhere; one at a time.
        session: whose turn it is, of one at a time (session_memory.py). handoff: which engine does the other half (handoff.py).
        pictures: of the prompt, which has placeholders for their rows. lora_path: name of its adapter; if there is none of this
        name any more, the request ends with that as its error.
        """
        rid = PROBE if probe else self.num_requests
        self.num_requests += not probe
        if self.replica.rank == 0:
            number = 0 if self.wrapper.deterministic else rid  # a number would tell who came before
            seed = derived_seed(self.seed, number) if params.seed is None else params.seed
            ends = frozenset(params.stop_token_ids + self.wrapper.config.eos_token_ids)
            stops = frozenset(params.stop_token_ids) if params.ignore_eos else ends
            if params.grammar:
                ends = stops = ends | self.grammars.end_ids
            lora_id = unknown = None
            if lora_path is not None:
                try:
                    lora_id = self.lora.acquire(lora_path)
                except ValueError as error:
                    unknown = str(error)
            namespace = (lora_id, extra_key) if lora_id else extra_key
            needs_text = shows_text or any((words or {}).get(name) for name in ("stop", "stop_regex"))
            req = Req(
                rid, text, ids, params, seed, namespace, priority, name, routing_key, probe, session, lora_id, handoff,
                pictures, stops=stops, held_back=ends,
                text=AnswerText(self.wrapper.tokenizer if needs_text else None, ids, **(words or {})),
                wanted=params.max_new_tokens,
            )  # fmt: skip
            self.grammars.start(req)
            rank = pick_data_rank(self.data_ranks, self.load_balance_method, rid, session)
            req.data_rank = rank.number
            rank.waiting.append(req)
            if unknown:
                rank.outcome.refuse(req, unknown)
                return rid
            for call in self.queued:
                call(req)
        return rid

    def process_requests(self, arrivals: Callable[[int], bool] | None = None) -> dict[int, RequestOutput]:
        """Run until every request is done; returns {request id: output}, equal on all ranks.

        `arrivals(step)` is called on rank 0 before each step: it may add requests, and returns whether more
        are to come. A ValueError of its own (a request refused) ends the run, with that error on every rank.
        """
        refused = None
        if self.replica.rank > 0:
            self.control.follow()
        else:
            try:
                refused = self._run_to_the_end(arrivals)
            except BaseException as error:
                in_step = not isinstance(error, RankFailure | KeyboardInterrupt)
                self.drop_all(in_step)
                if self.replica.size > 1 and in_step:
                    self.control.send_task(StopTask(self.step_number))
                    share({"refused": f"rank 0 has stopped: {error}"}, self.replica)
                raise
            self.control.send_task(StopTask(self.step_number))
        return self.share_results(refused)

    def share_results(self, refused: str | None = None) -> dict[int, RequestOutput]:
        """After rank 0 has sent a StopTask: what has finished, the same on all ranks."""
        outputs, self.grown = sorted(self.results.values(), key=lambda output: output.request_id), {}
        if self.replica.size > 1:
            report = share(
                {
                    "refused": refused, "next_id": self.num_requests, "steps": self.steps, "work": self.work,
                    "outputs": [output.to_json() for output in outputs],
                },
                self.replica,
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

    def abort(self, rid: int | str) -> int:
        """End a request wherever it is (rank 0, between two steps); its pages are free or in the tree at once.

        Returns how many there were to end. A text is the user's own name of a request, and of all its n answers.
        """
        if isinstance(rid, str):
            ours = [r for r in self.everybody if r.name == rid or (r.name or "").startswith(f"{rid}_")]
        else:
            ours = [r for r in self.everybody if r.rid == rid]
        return sum(self.data_ranks[req.data_rank].outcome.abort(req.rid) for req in ours)

    def pause(self, mode: str = PAUSE_MODES[0]) -> int:
        """No step runs until `resume`, between two steps; returns how many requests it has met. On every rank that runs a script.

        abort: they end; retract: their pages go to the tree, they to the queue; in_place: they keep them.
        """
        choice("mode", mode, PAUSE_MODES)
        self.paused = True
        if self.replica.rank > 0:
            return 0
        self.settle_all()
        met = self.everybody
        if mode == "abort":
            for req in met:
                self.abort(req.rid)
        elif mode == "retract":
            for rank in self.data_ranks:
                rank.retraction.retract_all()
        return len(met)

    def resume(self) -> None:
        self.paused = False

    def refuse_to_run_while_paused(self) -> None:
        """For whoever steps the scheduler by himself, and would wait for nothing."""
        if self.weights_held:
            raise ValueError("generation is paused while an update is held; write or drop it first, with finish_update")
        if self.paused:
            raise ValueError("generation is paused, and nothing is computed; call continue_generation() first")

    def output_of(self, req: Req) -> RequestOutput:
        """What a request has so far; finish_reason is None while it runs."""
        return self.outcome.output_of(req)

    def drop_all(self, in_step: bool = True) -> None:
        """Forget every request and what is on its way (rank 0); their pages are free or in the tree at once.

        in_step: the other ranks have all been told the same; else nothing comes back from them.
        """
        if not in_step:
            self.control.forget()
        elif self._flights:  # the stages still work on them, and their logits come back in any case
            with suppress(RankFailure):
                self.settle_all()
        for req in self.everybody:
            self.abort(req.rid)
        self._flights.clear()
        self._queued = []
        for rank in self.data_ranks:
            rank.forget_batches()
        self.results, self.grown = {}, {}
