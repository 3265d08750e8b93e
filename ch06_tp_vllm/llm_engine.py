"""The loop: add requests at any time, `step`, look at what has grown.

    engine = LLMEngine(model)
    engine.add_request("a", "What is a block table?", SamplingParams(max_tokens=40))
    while engine.has_unfinished_requests():
        for output in engine.step():
            ...

LLMEngine(tensor_parallel_size=2) starts the other rank itself. Under torchrun it joins: every rank makes the same calls and gets
the same outputs. Rank 0 schedules and samples. Each question of a step has a place of its own:

    may this request be queued        input_processor.py, common/request/intake.py
    who runs, and who goes back       scheduler.py
    which blocks                      block_manager.py
    whose adapter lies where          lora_request.py
    who guesses, and what is kept     ngram_proposer.py
    what a step is made of            input_batch.py
    how all ranks carry it out        model_runner.py
    what comes back                   output_processor.py
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ch06_tp_vllm.block_manager import BlockManager
from ch06_tp_vllm.engine_args import EngineArgs
from ch06_tp_vllm.input_batch import InputBatch
from ch06_tp_vllm.input_processor import WORDS, InputProcessor, Prompt, check_name
from ch06_tp_vllm.lora_request import LoRARequest, LoRASlotBook, lora_requests
from ch06_tp_vllm.model_runner import ModelRunner
from ch06_tp_vllm.ngram_proposer import SpeculativeConfig, SpeculativeStats, VerifiedStep
from ch06_tp_vllm.output_processor import Group, OutputProcessor
from ch06_tp_vllm.outputs import RequestMetrics, RequestOutput
from ch06_tp_vllm.request import Request
from ch06_tp_vllm.sampling_params import SamplingParams
from ch06_tp_vllm.scheduler import Scheduler, SchedulerOutput
from ch06_tp_vllm.trace import Trace
from common.distributed.messages import share
from common.distributed.spawn import Follower
from common.models.config import ModelConfig
from common.models.drafters.contract import DraftOptions
from common.models.hub import resolve_model
from common.models.lora_manager import LoRAOptions
from common.models.prefill_graphs import PREFILL_GRAPH_TOKENS
from common.parallel_state import get_parallel_state, initialize_tensor_parallel
from common.pool_size import VLLM_WORDS
from common.request.end import End
from common.request.intake import Intake
from common.request.queued_step import QueuedStep
from common.sampling.nodes import node_batch
from common.tiny_qwen import TINY_QWEN_PATH
from common.values import texts

DEFAULT_BUDGET = {"cpu": 1024, "cuda": 8192}  # tokens a step: on a CPU what its caches like, on a GPU vLLM's own


class LLMEngine:
    """vLLM's LLMEngine. The arguments are those of EngineArgs (engine_args.py)."""

    def __init__(self, model: str | None = None, **engine_args):
        self._build(EngineArgs(model, **engine_args))

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> "LLMEngine":
        engine = cls.__new__(cls)
        engine._build(args)
        return engine

    def _build(self, args: EngineArgs) -> None:
        blocks, size = args.num_gpu_blocks_override, args.block_size
        self.args = args
        self.speculative = (
            SpeculativeConfig.of(args.speculative_config) if args.speculative_config is not None else None
        )
        self.speculative_stats = SpeculativeStats()
        if args.enable_expert_parallel and args.tensor_parallel_size:  # before any rank is started
            config = ModelConfig.from_folder(resolve_model(args.model or TINY_QWEN_PATH))
            config.refuse_experts_layout(args.tensor_parallel_size)
        follower = Follower("ch06_tp_vllm.llm_engine:follow_rank_0", args.for_a_follower())
        self.tp = initialize_tensor_parallel(
            args.tensor_parallel_size, args.device, disable_custom_all_reduce=args.disable_custom_all_reduce,
            all_reduce=args.all_reduce, follower=follower, expert_parallel=args.enable_expert_parallel,
        )  # fmt: skip
        cut_by_experts = args.enable_expert_parallel and self.tp.size > 1
        budget = args.max_num_batched_tokens or DEFAULT_BUDGET[self.tp.device.type]
        self.runner = ModelRunner(
            args.model, args.device, size, dtype=args.dtype,
            max_running_requests=args.max_num_seqs, max_total_tokens=None if blocks is None else blocks * size,
            attention_backend=args.attention_backend, disable_cuda_graph=args.enforce_eager,
            mem_fraction_static=args.gpu_memory_utilization, kv_cache_dtype=args.kv_cache_dtype,
            tokenizer_path=args.tokenizer, skip_tokenizer_init=args.skip_tokenizer_init,
            context_length=args.max_model_len, check_finite=args.check_finite, quantization=args.quantization,
            quantized_compute=args.quantized_compute, tp=self.tp, words=VLLM_WORDS, moe_runner=args.moe_runner,
            parallel=get_parallel_state() if cut_by_experts else None, prefill_graph_tokens=min(PREFILL_GRAPH_TOKENS, budget),
            speculative=DraftOptions("NGRAM", None, 0, 0, self.speculative.nodes) if self.speculative else None,
            lora=LoRAOptions(args.max_loras, args.max_lora_rank) if args.enable_lora else None,
        )  # fmt: skip
        config, tokenizer = self.runner.config, self.runner.tokenizer
        self.blocks = BlockManager(
            self.runner.num_pages, size, num_heads=config.num_heads, num_kv_heads=config.num_kv_heads,
            tp_rank=self.tp.rank, tp_size=self.tp.size, enable_prefix_caching=args.enable_prefix_caching,
        )  # fmt: skip
        self.scheduler = Scheduler(
            self.blocks, max_num_batched_tokens=budget, max_num_seqs=args.max_num_seqs, policy=args.scheduling_policy,
            enable_chunked_prefill=args.enable_chunked_prefill,
            scheduler_reserve_full_isl=args.scheduler_reserve_full_isl, watermark=args.watermark,
            num_spec_tokens=self.speculative.num_speculative_tokens if self.speculative else 0, settle=self._settle,
            max_loras=args.max_loras,
        )  # fmt: skip
        self.loras: dict[int, LoRARequest] = {}  # those that every rank has read, by number
        self.slots = LoRASlotBook(args.max_loras)
        intake = Intake(
            tokenizer,
            config.vocab_size,
            self.runner.context_length,
            len(self.blocks.blocks) * size,
            size,
            WORDS,
            "max_model_len" if self.runner.context_length < config.max_position_embeddings else None,
        )
        step_limit = None if args.enable_chunked_prefill else budget
        self.inputs = InputProcessor(intake, config, args.seed, step_limit)
        self.batch = InputBatch(self._settle, size, group=bool(self.runner.table.tile_members))
        self.outputs = OutputProcessor(tokenizer)
        on_gpu = self.tp.device.type == "cuda" and self.speculative is None  # guesses need the last step's tokens
        self.async_scheduling = on_gpu if args.async_scheduling is None else args.async_scheduling
        self.num_steps = self._num_requests = 0
        self._queued: QueuedStep[Request] | None = None  # the step whose tokens nobody has looked at
        has_trace = args.trace is not None and self.tp.rank == 0
        self.trace = Trace(args.trace, self.tp.ledger, self.scheduler) if has_trace else None

    # --- for the user

    def add_request(
        self, request_id: str, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0,
        cache_salt: str | None = None, lora_request: LoRARequest | None = None,
    ) -> None:  # fmt: skip
        """Queue a prompt: a text, token ids, {"prompt": text} or {"prompt_token_ids": ids}. `priority`: lower goes first.

        lora_request: its adapter, which is read now if nobody has asked for it before.
        cache_salt (here or in the dict): its blocks are shared only with requests of the same salt. Raises ValueError, and
        nothing has changed, for a request id in use, an empty prompt, a token outside the vocabulary, lengths that can never
        fit, and values of a wrong kind.
        """
        params = SamplingParams() if params is None else params
        check_name(request_id)
        priority = self.inputs.intake.priority(priority)
        if request_id in self.groups:
            raise ValueError(f"request id {request_id!r} is in use; finish or abort it first")
        words, ids, salt = self.inputs.read(prompt)
        own = self.inputs.salt(cache_salt)
        if own and salt and own != salt:
            raise ValueError(f"cache_salt={own!r}, but the prompt says {salt!r}; give one of the two")
        row = self.inputs.check(ids, params)
        adapter = self.adapter(lora_request)
        requests = self.inputs.requests(
            request_id, ids, params, row, priority, own or salt, self._num_requests, adapter
        )
        self._num_requests += len(requests)
        self.outputs.add(Group(request_id, words, params, requests, RequestMetrics(arrival_time=time.time())))
        if self.tp.rank == 0:
            for request in requests:
                self.scheduler.add(request)

    def adapter(self, wanted: LoRARequest | None) -> int:
        """Its number, 0 for none; all ranks have read it when this returns. Raises ValueError, and none has kept it."""
        if wanted is None:
            return 0
        (wanted,) = lora_requests(wanted, 1)
        if not self.args.enable_lora:
            raise ValueError(
                f"lora_request asks for {wanted.lora_name}, and there is no room for adapters; start with enable_lora=True"
            )
        number, known = wanted.lora_int_id, self.loras.get(wanted.lora_int_id)
        if known is None:
            self.runner.together.check()
            if self.tp.spawned and self.tp.rank == 0:
                self.runner.tell_adapter(number, wanted.lora_path)
            if wrong := self.runner.load_adapter(number, wanted.lora_path):
                raise ValueError(wrong)
            self.loras[number] = wanted
        elif known != wanted:
            raise ValueError(
                f"lora_int_id={number} is {known.lora_name} from {known.lora_path}; give {wanted.lora_name} a number of its own"
            )
        return number

    def abort_request(self, request_ids: str | Sequence[str]) -> None:
        """Drop requests, wherever they are; their blocks are free at once. Those that are unknown or have finished are left
        out, as in vLLM."""
        for name in texts("request_id", request_ids):
            group = self.groups.pop(name, None)
            self.outputs.grown.pop(name, None)
            for request in group.requests if group else ():
                if not request.ended:
                    request.finish(End("abort"))
                    self.scheduler.finish(request)
                    if self.trace:
                        self.trace.aborted(request)

    @property
    def groups(self) -> dict[str, Group]:
        """The unfinished requests of the user, by id."""
        return self.outputs.groups

    def get_num_unfinished_requests(self) -> int:
        """A prompt with n answers counts once (vLLM counts each answer)."""
        return len(self.groups)

    def has_unfinished_requests(self) -> bool:
        return bool(self.groups)

    def step(self) -> list[RequestOutput]:
        """One iteration; returns the requests that got a token, each with all it has so far.

        On more than one rank all call it together, and rank 0's outputs come back on every rank.
        """
        outputs = []
        if self.tp.rank == 0:
            if self.groups:
                self.run_step()
            self.runner.stop()
            outputs = self.outputs.take_outputs()
        else:
            self.runner.follow()
        if self.tp.size > 1:
            outputs = [RequestOutput.from_json(value) for value in share([o.to_json() for o in outputs], self.tp)]
            if self.tp.rank > 0:
                for output in outputs:
                    if output.finished:
                        del self.groups[output.request_id]
        return outputs

    def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks. False, and nothing is done, while requests hold some."""
        if self.blocks.num_free_blocks < len(self.blocks.blocks):
            return False
        self.blocks.reset_prefix_cache()
        return True

    # --- rank 0

    def run_step(self) -> None:
        """Schedule, execute, sample, account (rank 0, while there are unfinished requests)."""
        if self.trace:
            self.trace.begin()
        output = self.scheduler.schedule()
        if self.trace:
            self.trace.scheduled(output)
        if not output.scheduled and self._queued is None and not self.outputs.grown:
            raise AssertionError(f"{len(self.scheduler.waiting)} requests wait and none can start: blocks were lost")
        queued = self._queue(output) if output.scheduled else None
        if self.trace:
            self.trace.queued()
        self._settle()
        self._queued = queued
        if not self.async_scheduling:
            self._settle()
        if self.args.check:
            self.blocks.check(self.scheduler.running)
        if self.trace:
            self.trace.end(self.num_steps)

    def _queue(self, output: SchedulerOutput) -> QueuedStep[Request] | None:
        """Tell all ranks what to do; afterwards every number stands as if it were done."""
        self._note_first(output)
        output, alike = self.batch.in_order(output)
        emitting = [s.request for s in output.scheduled if s.emits]
        guesses = self.speculative.propose(emitting) if output.num_spec_tokens else None
        try:
            if guesses is not None:
                return self._verify(output, guesses)
            for adapter, slot in self.slots.place({s.request.adapter for s in output.scheduled} - {0}):
                self.runner.place_adapter(adapter, slot)
            logits = self.runner.run(self.batch.metadata(output, self.slots.slots, alike))
            self.runner.score_prompts(output)
        except BaseException as error:
            self._fail([s.request for s in output.scheduled], error)
            if self.tp.size > 1 or not isinstance(error, Exception):
                raise  # the other ranks are somewhere in the middle of it; or somebody wants us to stop
            return None
        self.num_steps += 1
        for s in output.scheduled:
            s.request.num_computed_tokens += s.num_new
            self._cache(s.request)
        for request in emitting:
            request.pending += 1
            request.drawn_here = True
        if not emitting:
            return QueuedStep()
        return QueuedStep(emitting, self.runner.sample(logits, self.batch.sampling(emitting)))

    def _verify(self, output: SchedulerOutput, guesses: np.ndarray) -> VerifiedStep:
        """A step of all decodes, with guesses [B, n] behind the last tokens."""
        requests = [s.request for s in output.scheduled]
        logits = self.runner.run(self.batch.verify_metadata(output, guesses))
        self.num_steps += 1
        for request in requests:
            request.pending += 1
        rows = [request.sampling_row() for request in requests]
        drawn = self.runner.sample(logits, node_batch(rows, self.runner.verifier.waiting.tree))
        step = VerifiedStep(requests, drawn, self.runner.verifier.accepted)
        for request, run in zip(requests, step.runs, strict=True):
            request.pending += len(run) - 1
            request.num_computed_tokens += len(run)
            self.speculative_stats.num_accepted_tokens += len(run) - 1
        self.speculative_stats.num_drafts += len(requests)
        self.speculative_stats.num_draft_tokens += guesses.size
        return step

    def _note_first(self, output: SchedulerOutput) -> None:
        for s in output.scheduled:
            group = self.groups[s.request.group]
            if group.metrics.first_scheduled_time is None:
                group.metrics = replace(group.metrics, first_scheduled_time=time.time())

    def _settle(self) -> None:
        """Look at the tokens of the step that was queued last: append them, and end who has come to an end."""
        step, self._queued = self._queued, None
        if step is None:
            return
        for request in self.outputs.take(step):
            self._cache(request)
            if request.ended:
                self.scheduler.finish(request)

    def _fail(self, requests: list[Request], error: BaseException) -> None:
        """A step could not be carried out: its requests end with the error, and nobody else."""
        self.outputs.fail(requests, error)
        self.batch.forget()
        self.slots.forget()  # what was to be written may not be there
        for request in requests:
            self.scheduler.finish(request)

    def _cache(self, request: Request) -> None:
        """Name the full blocks whose tokens are computed, or queued to be, and known by now, unless allocate_slots could."""
        if request.num_computed_tokens < (request.num_blocks_named + 1) * self.blocks.block_size:
            return  # no new full block, as in most steps
        # the last token of a finished request was never fed in, or in a step too many
        known = len(request.prompt_token_ids) + len(request.output_token_ids) - request.status.finished
        self.blocks.cache_full_blocks(request, min(request.num_computed_tokens, known))


def follow_rank_0(**engine_args) -> None:
    """What a rank does that rank 0 has started: the same engine, and then whatever rank 0 says until it leaves. It hears token
    ids alone: the tokenizer, which transformers may take two seconds to load, is rank 0's."""
    engine = LLMEngine(**engine_args | {"skip_tokenizer_init": True})
    while True:
        engine.runner.follow()
