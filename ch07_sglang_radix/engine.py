"""The engine with SGLang's names.

    from ch07_sglang_radix import Engine
    engine = Engine(model_path)
    engine.generate("What is a radix cache?", {"max_new_tokens": 40})
    engine.generate("Is a radix cache a tree?", {"regex": "(yes|no)"})    # or json_schema, ebnf: what the answer must be
    for chunk in engine.generate("What is a radix cache?", stream=True): ...
    await engine.async_generate("What is a radix cache?")

Engine(tp_size=2, pp_size=2) starts the other three ranks itself. On several hosts each makes Engine(tp_size=..., nnodes=2,
node_rank=i, dist_init_addr="HOST:PORT"): node 0's asks, the others call `engine.follow()`, which returns when node 0 shuts down.
Under torchrun it joins them: every rank makes the same calls, and `generate` answers all of them alike. What only the scheduler
knows is rank 0's: the others get no pool, tree and queue from get_server_info, 0 from abort_request, True from flush_cache, and no
stream but its end. async_generate is rank 0's alone: the others call `engine.follow()`, which returns when rank 0 shuts down.
Engine(dp_size=2) is two replicas behind the same calls: parallelism/replica_engine.py, under torchrun replica_ranks.py.
What a user asks with is in generate_calls.py, all else that a user calls is here.
"""

import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from ch07_sglang_radix.async_loop import SchedulerLoop
from ch07_sglang_radix.engine_start import (
    draft_options,
    prefill_graph_tokens,
    prefill_tokens,
    refuse_ranks_for_another_model,
    seed,
)
from ch07_sglang_radix.generate_calls import Answer, GenerateCalls
from ch07_sglang_radix.generate_request import GenerateCall, GenerateRequest, check_rid
from ch07_sglang_radix.hicache_args import refuse_a_file_for_each_token
from ch07_sglang_radix.lora_calls import LoRACalls, lora_options
from ch07_sglang_radix.node import node_of
from ch07_sglang_radix.profiler import RankProfiler, StepsLeft, profile_name
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.server_args import DEFAULT_PAGE, ServerArgs
from ch07_sglang_radix.server_info import as_it_stands, what_it_is
from ch07_sglang_radix.streams import Stream, listen, wait_for
from ch07_sglang_radix.tasks import LEAVE
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from ch07_sglang_radix.weight_calls import EngineWeights
from common.distributed.spawn import Follower, RankZeroLeft
from common.parallel_state import ParallelState, shutdown_tensor_parallel
from common.request.intake import Intake
from common.values import flag, whole

# what several replicas need, in a wing that comes when it is asked for: processes of their own, or the ranks of torchrun
REPLICA_ENGINE = "ch07_sglang_radix.parallelism.replica_engine"
REPLICA_RANKS = "ch07_sglang_radix.parallelism.replica_ranks"
REBALANCER = "ch07_sglang_radix.experts.rebalancer"  # another wing
SPECULATIVE = "ch07_sglang_radix.speculative.attach"
DISAGGREGATION = "ch07_sglang_radix.disaggregation.attach"  # for half an engine
IMAGES = "ch07_sglang_radix.images.attach"  # for a model that sees
HICACHE = "ch07_sglang_radix.quantization.hicache"  # for a tree with lower tiers


class Engine(GenerateCalls, EngineWeights, LoRACalls):
    """A model behind one call. The arguments are those of ServerArgs (server_args.py), under SGLang's names.

    Threads may call it: they wait in line, or, once async_generate has been used, run together.
    """

    def __new__(cls, model_path: str | None = None, **server_args):
        if ServerArgs.of({"model_path": model_path} | server_args).dp_size > 1 and "WORLD_SIZE" not in os.environ:
            return import_module(REPLICA_ENGINE).ReplicaEngine(model_path, **server_args)
        return super().__new__(cls)

    def __init__(self, model_path: str | None = None, **server_args):
        self.server_args = args = ServerArgs.of({"model_path": model_path} | server_args)
        if args.ranks > 1:
            refuse_ranks_for_another_model(args)
        follower = Follower("ch07_sglang_radix.engine:follow_rank_0", args.for_a_follower(), node_of(args))
        parallel = ParallelState.initialize(
            args.tp_size, args.pp_size, args.dp_size, context_parallel_size=args.cp_size,
            attention_data_parallel_size=args.attn_dp_size, expert_parallel_size=args.ep_size, device=args.device,
            all_reduce=args.all_reduce, disable_custom_all_reduce=args.disable_custom_all_reduce, follower=follower,
        )  # fmt: skip
        tp = parallel.tp
        self._replicas = None  # ours among those of torchrun's ranks
        if args.dp_size > 1:
            self._replicas = import_module(REPLICA_RANKS).ReplicaRanks(parallel, args.load_balance_method)
        page_size = args.page_size or DEFAULT_PAGE[tp.device.type]
        refuse_a_file_for_each_token(args, page_size)  # before anything is read
        self._wrapper: TPRadixAttentionModelWrapper | None = TPRadixAttentionModelWrapper(
            args.model_path, args.device, page_size, dtype=args.dtype, max_total_tokens=args.max_total_tokens,
            max_running_requests=max(args.max_running_requests // args.attn_dp_size, 1),
            attention_backend=args.attention_backend,
            disable_cuda_graph=args.disable_cuda_graph, mem_fraction_static=args.mem_fraction_static,
            kv_cache_dtype=args.kv_cache_dtype, tokenizer_path=args.tokenizer_path,
            skip_tokenizer_init=args.skip_tokenizer_init, context_length=args.context_length,
            check_finite=args.check_finite, quantization=args.quantization,
            quantized_compute=args.quantized_compute, parallel=parallel, pp_layer_partition=args.pp_layer_partition,
            enable_layernorm_sp=args.enable_layernorm_sp, enable_all_reduce_fusion=args.enable_all_reduce_fusion,
            enable_two_batch_overlap=args.enable_two_batch_overlap, moe_runner=args.moe_runner, ep_dispatch=args.ep_dispatch,
            ep_num_redundant_experts=args.ep_num_redundant_experts, ep_dispatch_algorithm=args.ep_dispatch_algorithm,
            speculative=draft_options(args), lora=lora_options(args),
            torch_compile_max_bs=args.torch_compile_max_bs if args.enable_torch_compile else None,
            enable_deterministic_inference=args.enable_deterministic_inference,
            prefill_graph_tokens=prefill_graph_tokens(args, tp.device.type, page_size),
        )  # fmt: skip
        tiers = import_module(HICACHE) if args.enable_hierarchical_cache else None
        overlap = None if args.disable_overlap_schedule is None else not args.disable_overlap_schedule
        self._scheduler: TPScheduler | None = TPScheduler(
            self._wrapper, chunked_prefill_size=prefill_tokens(args, tp.device.type, page_size),
            enable_mixed_chunk=args.enable_mixed_chunk, small_request_share=args.small_request_share,
            schedule_policy=args.schedule_policy, disable_radix_cache=args.disable_radix_cache,
            radix_eviction_policy=args.radix_eviction_policy, overlap=overlap, gather_best=args.gather_best,
            seed=seed(args), schedule_conservativeness=args.schedule_conservativeness, check=args.check, trace=args.trace,
            num_lanes=args.pp_size + args.pp_async_batch_depth, max_lane_size=args.pp_max_micro_batch_size,
            enable_dynamic_chunking=args.enable_dynamic_chunking, num_continuous_decode_steps=args.num_continuous_decode_steps,
            radix_bigram=args.speculative_algorithm in ("EAGLE", "EAGLE3"),
            tree=tiers.tree_class if tiers else None,
        )  # fmt: skip
        if args.speculative_algorithm:
            import_module(SPECULATIVE).attach(self._scheduler, args)
        profiler = RankProfiler(f"TP-{tp.rank}" + (f"-PP-{parallel.pp.rank}" if args.pp_size > 1 else ""))
        self._scheduler.control.notes |= {"start_profile": profiler.start, "stop_profile": profiler.stop}
        self._let_weights_change(self._scheduler)
        if args.watches_experts:
            every, report = args.eplb_rebalance_num_iterations, args.expert_balancedness_report_mode
            import_module(REBALANCER).Rebalancer(
                self._scheduler, every if args.enable_eplb else None, reads=report != "off",
                says=report in ("server_log", "both"), nodes=max(args.nnodes // args.pp_size, 1),
            )  # fmt: skip
        self._attach_adapters(args)
        self._hicache = tiers.HiCache(self._scheduler, args) if tiers else None
        self.disaggregation, self.disaggregation_mode = None, args.disaggregation_mode
        if args.disaggregation_mode != "null":
            self.disaggregation = import_module(DISAGGREGATION).Disaggregation(self._scheduler, args)
        if self._wrapper.images is not None:
            import_module(IMAGES).attach(self._scheduler, args)
        self._profiled: StepsLeft | None = None
        self._loop: SchedulerLoop | None = None  # from the first async_generate on
        self._stream: Callable[[], Stream | None] = lambda: None  # the open one; not held: who drops it, closes it
        self._turn = threading.RLock()  # whoever steps the scheduler holds it

    @property
    def scheduler(self) -> TPScheduler:
        """Raises ValueError once the engine is shut down."""
        if self._scheduler is None:
            raise ValueError("this engine is shut down; make a new one")
        return self._scheduler

    @property
    def wrapper(self) -> TPRadixAttentionModelWrapper:
        return self.scheduler.wrapper

    # --- answers

    def _intake_of(self, method: str) -> Intake:
        if method == "generate" and self.server_args.node_rank > 0:
            raise ValueError("node 0 alone asks; the other nodes call engine.follow()")
        if method == "async_generate" and self._replicas:
            self._replicas.refuse(method)
        if method == "async_generate" and self.scheduler.replica.rank > 0:
            raise ValueError("async_generate is rank 0's; the other ranks call engine.follow()")
        return self.scheduler.intake

    def _answers(self, call: GenerateCall, stream: bool) -> Answer | list[Answer] | Iterator[Answer]:
        self._refuse_unknown_adapters(call)
        with self._turn:
            self._no_stream_is_open()
            if self._replicas:
                return self._replicas.generate(self.scheduler, call, self._enqueue, stream)
            if not self._loop:
                self.scheduler.refuse_to_run_while_paused()
                if stream:
                    answers = Stream(self.scheduler, call, self._enqueue)
                    self._stream = weakref.ref(answers)
                    return answers
                rids = [self._enqueue(request) for request in call.requests]
                outputs = self.scheduler.process_requests()
                return call.results([outputs[rid] for rid in rids])
        answers = wait_for(self._loop, call, self._enqueue, stream)  # no turn is held: others run meanwhile
        if stream:
            return answers
        last = {answer["index"]: answer for answer in answers}
        return _without_index(call, last)

    async def _async_answers(self, call: GenerateCall, stream: bool) -> Answer | list[Answer] | AsyncIterator[Answer]:
        self._refuse_unknown_adapters(call)
        with self._turn:
            self._no_stream_is_open()
            self._loop = self._loop or SchedulerLoop(self.scheduler)
        answers = listen(self._loop, call, self._enqueue, stream)
        if stream:
            return answers
        last = {}
        async for answer in answers:
            last[answer["index"]] = answer
        return _without_index(call, last)

    def follow(self) -> None:
        """On ranks other than 0, while rank 0 answers async_generate, and on nodes other than 0: do as it says until it shuts
        down. Raises RankFailure, with the name, when somebody has died.
        """
        with suppress(RankZeroLeft):
            while self.scheduler.control.follow().step != LEAVE:
                pass

    # --- control

    def abort_request(self, rid: int | str | None = None, abort_all: bool = False) -> int:
        """End a request, or all; returns how many were there to end. What they had comes back with finish_reason abort.

        rid: the id that its result tells, or the user's own.
        """
        if not flag("abort_all", abort_all):
            rid = check_rid(rid)

        def abort() -> int:
            every = [req.rid for req in self.scheduler.everybody]
            return sum(self.scheduler.abort(one) for one in (every if abort_all else [rid]))

        return self._at_rest(abort) if self.scheduler.replica.rank == 0 else 0

    def flush_cache(self) -> bool:
        """Forget every cached prefix. False, and nothing is done, while requests wait or run."""

        def flush() -> bool:
            scheduler = self.scheduler
            if scheduler.busy:
                return False
            for rank in scheduler.data_ranks:
                rank.memory.flush()
            for forget in scheduler.at_flush:
                forget()
            return True

        return self._at_rest(flush) if self.scheduler.replica.rank == 0 else True

    def start_profile(
        self,
        output_dir: str | Path,
        record_shapes: bool = False,
        with_stack: bool = False,
        num_steps: int | None = None,
    ) -> str:
        """torch.profiler on every rank from here to stop_profile, or to the end of the num_steps-th step.

        Returns what the names of their files begin with.
        """
        if num_steps is not None:
            num_steps = whole("num_steps", num_steps, 1)
        name = profile_name()
        self._note(
            "start_profile", folder=str(output_dir), name=name, record_shapes=record_shapes, with_stack=with_stack
        )
        if num_steps is not None and self.scheduler.replica.rank == 0:  # all ranks step when rank 0 does
            self._profiled = StepsLeft(num_steps, self.scheduler.after_step, self.scheduler.control)
        return name

    def stop_profile(self) -> str:
        """Every rank writes what it has seen; returns this rank's file."""
        if self._profiled:
            self._profiled.leave()
        return self._note("stop_profile")

    def get_server_info(self) -> dict[str, Any]:
        """What the engine is, and on rank 0 also pool, tree, queue and hit rate as they stand."""
        s = self.scheduler
        fixed = (self._replicas.facts if self._replicas else {}) | what_it_is(s)
        if s.replica.rank > 0:
            return fixed
        half = self.disaggregation.info() if self.disaggregation else {}
        return fixed | half | self._at_rest(lambda: as_it_stands(s))

    # --- inside

    def _enqueue(self, one: GenerateRequest) -> int:
        self._refuse_while_asleep()
        return self.scheduler.enqueue(
            None, one.ids, one.params, words=one.words, extra_key=one.extra_key, priority=one.priority, name=one.name,
            routing_key=one.routing_key, handoff=one.handoff, pictures=one.pictures, lora_path=one.lora_path,
        )  # fmt: skip

    def _no_stream_is_open(self) -> None:
        open_one = self._stream()
        if open_one is not None and not open_one.closed:
            raise ValueError("a stream of this engine is still open; read it to its end, or close it")

    def _note(self, note: str, /, **arguments: Any) -> Any:
        """On all ranks: those that follow are told, those that run the same script come here themselves."""
        control = self.scheduler.control
        if control.replica.spawned or self._loop:
            return self._at_rest(lambda: control.note(note, **arguments))
        return control.notes[note](**arguments)

    def _at_rest(self, call: Callable[[], Any]) -> Any:
        """Between two steps: now, or when the loop gets there."""
        return self._loop.submit(call).result() if self._loop else call()

    def shutdown(self) -> None:
        """Let go of the model and leave the process group. Safe to call twice."""
        self.__exit__(None, None, None)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """`shutdown`; with an error the other ranks hear of it (goodbyes.py)."""
        if (stream := self._stream()) is not None:
            stream.close()
        if self._loop:
            self._loop.stop()
            self._loop = None
        if self._scheduler and self._scheduler.trace:
            self._scheduler.trace.close()
        if self.disaggregation:
            self.disaggregation.close()
            self.disaggregation = None
        if self._hicache:
            self._hicache.close()
            self._hicache = None
        self._let_weights_go()
        tp = self._scheduler.tp if self._scheduler else None
        for graphs in self._wrapper.recorded if self._wrapper else ():
            graphs.forget()  # whoever still has a part of this engine in a variable: the group waits for what was recorded with it
        self._scheduler = self._wrapper = None
        if tp:
            shutdown_tensor_parallel(tp, error)


def _without_index(call: GenerateCall, last: dict[int, Answer]) -> Answer | list[Answer]:
    """The last chunk of each answer, in order, as `generate` returns them."""
    answers = [{key: value for key, value in last[i].items() if key != "index"} for i in range(len(call.requests))]
    return answers[0] if call.single else answers


def follow_rank_0(**server_args) -> None:
    """What a rank does that rank 0 has started: the same engine, and then whatever rank 0 says until it leaves. It hears token
    ids alone: the tokenizer, which transformers may take two seconds to load, is rank 0's."""
    engine = Engine(**server_args | {"skip_tokenizer_init": True})
    while True:
        engine.scheduler.control.follow()
