"""The engine with SGLang's names.

    from ch07_sglang_radix import Engine
    engine = Engine(model_path)
    engine.generate("What is a radix cache?", {"max_new_tokens": 40})
    engine.generate("Is a radix cache a tree?", {"regex": "(yes|no)"})    # or json_schema, ebnf: what the answer must be
    for chunk in engine.generate("What is a radix cache?", stream=True): ...
    await engine.async_generate("What is a radix cache?")

Engine(tp_size=2) starts the other ranks itself. Under torchrun it joins them: every rank makes the same calls, and `generate`
answers all of them alike. What only the scheduler knows is rank 0's: the others get no pool, tree and queue from get_server_info,
0 from abort_request, True from flush_cache, and no stream but its end. async_generate is rank 0's alone: the others call
`engine.follow()`, which returns when rank 0 shuts down.
"""

import secrets
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ch07_sglang_radix.admission import DEFAULT_CHUNK, NO_CHUNKS
from ch07_sglang_radix.async_loop import SchedulerLoop
from ch07_sglang_radix.generate_request import GenerateCall, GenerateRequest, LogprobOptions, check_rid
from ch07_sglang_radix.profiler import RankProfiler, StepsLeft, profile_name
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.server_args import DEFAULT_PAGE, ServerArgs
from ch07_sglang_radix.streams import Stream, listen, wait_for
from ch07_sglang_radix.tasks import LEAVE
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.arguments import says_names
from common.distributed.spawn import Follower
from common.parallel_state import initialize_tensor_parallel, shutdown_tensor_parallel
from common.values import flag, whole

Answer = dict[str, Any]
# arguments of SGLang's generate (0.5.23, srt/entrypoints/engine.py) that are not here
ELSEWHERE = dict.fromkeys(("image_data", "audio_data", "video_data"), "this engine reads text only") | {
    "cache_salt": "use extra_key, which keeps what a request caches apart too",
    "lora_path": "adapters are not here; merge them into the weights",
    "custom_logit_processor": "use logit_bias of sampling_params",
    "return_hidden_states": "answers are tokens and their log-probabilities",
    "data_parallel_rank": "one engine is one replica; start several",
}
asked = says_names("argument", ELSEWHERE, dict.fromkeys(ELSEWHERE) | {"return_hidden_states": False})


class Engine:
    """A model behind one call. The arguments are those of ServerArgs (server_args.py), under SGLang's names.

    Threads may call it: they wait in line, or, once async_generate has been used, run together.
    """

    def __init__(self, model_path: str | None = None, **server_args):
        self.server_args = args = ServerArgs.of({"model_path": model_path} | server_args)
        follower = Follower("ch07_sglang_radix.engine:follow_rank_0", args.for_a_follower())
        tp = initialize_tensor_parallel(
            args.tp_size, args.device, disable_custom_all_reduce=args.disable_custom_all_reduce, follower=follower
        )
        page_size = args.page_size or DEFAULT_PAGE[tp.device.type]
        self._wrapper: TPRadixAttentionModelWrapper | None = TPRadixAttentionModelWrapper(
            args.model_path, args.device, page_size, dtype=args.dtype, max_total_tokens=args.max_total_tokens,
            max_running_requests=args.max_running_requests, attention_backend=args.attention_backend,
            disable_cuda_graph=args.disable_cuda_graph, mem_fraction_static=args.mem_fraction_static,
            kv_cache_dtype=args.kv_cache_dtype, tokenizer_path=args.tokenizer_path,
            skip_tokenizer_init=args.skip_tokenizer_init, context_length=args.context_length,
            check_finite=args.check_finite, tp=tp,
        )  # fmt: skip
        overlap = None if args.disable_overlap_schedule is None else not args.disable_overlap_schedule
        self._scheduler: TPScheduler | None = TPScheduler(
            self._wrapper, chunked_prefill_size=_prefill_tokens(args, tp.device.type, page_size),
            enable_mixed_chunk=args.enable_mixed_chunk, small_request_share=args.small_request_share,
            schedule_policy=args.schedule_policy, disable_radix_cache=args.disable_radix_cache,
            radix_eviction_policy=args.radix_eviction_policy, overlap=overlap, gather_best=args.gather_best,
            seed=_seed(args), schedule_conservativeness=args.schedule_conservativeness, check=args.check, trace=args.trace,
        )  # fmt: skip
        profiler = RankProfiler(tp.rank)
        self._scheduler.control.notes |= {"start_profile": profiler.start, "stop_profile": profiler.stop}
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

    @asked
    def generate(
        self, prompt: str | Sequence[str] | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None, return_logprob: bool = False,
        logprob_start_len: int | None = None, top_logprobs_num: int | None = None,
        token_ids_logprob: Sequence[int] | None = None, stream: bool = False, *, rid: str | Sequence[str] | None = None,
        extra_key: str | None = None, priority: int = 0, routing_key: str | None = None, require_reasoning: bool = False,
    ) -> Answer | list[Answer] | Iterator[Answer]:  # fmt: skip
        """One prompt -> one result, a list -> a list in the same order; with n > 1 a list, n results a prompt.

        A result has `text`, `output_ids` and `meta_info`: id, prompt_tokens, cached_tokens,
        completion_tokens, finish_reason and, with return_logprob, output_token_logprobs: (log-probability, token id, None) for
        each token; top_logprobs_num and token_ids_logprob add lists of others, logprob_start_len >= 0 the same for the prompt from
        there on. Without `temperature` the answer is greedy (SGLang's own default is 1). `stop`, a string or several, ends an
        answer and is not part of it. `json_schema`, `regex` or `ebnf` says what the answer must be (grammar.py), with
        require_reasoning what must come after </think>; a grammar that cannot be compiled ends its own request, with
        finish_reason abort and status_code 400. With `stream` an iterator comes back: of each answer that has grown, all it has
        so far, and `index`, which of the answers it is; on ranks other than 0 only the whole answers, at the end. Who leaves
        the iterator early ends what still runs. Nothing runs if any prompt or parameter is refused (ValueError).
        """
        stream = flag("stream", stream)
        logprobs = LogprobOptions.of(return_logprob, logprob_start_len, top_logprobs_num, token_ids_logprob)
        own = (rid, extra_key, priority, routing_key, require_reasoning)
        call = GenerateCall.of(self.scheduler.intake, prompt, input_ids, sampling_params, logprobs, *own)
        with self._turn:
            self._no_stream_is_open()
            if not self._loop:
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

    @asked
    async def async_generate(
        self, prompt: str | Sequence[str] | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None, return_logprob: bool = False,
        logprob_start_len: int | None = None, top_logprobs_num: int | None = None,
        token_ids_logprob: Sequence[int] | None = None, stream: bool = False, *, rid: str | Sequence[str] | None = None,
        extra_key: str | None = None, priority: int = 0, routing_key: str | None = None, require_reasoning: bool = False,
    ) -> Answer | list[Answer] | AsyncIterator[Answer]:  # fmt: skip
        """`generate` for many callers at once: their requests run together. With `stream`, an async iterator.

        Rank 0 only; the other ranks are in `follow`. A caller that is cancelled has its requests aborted.
        """
        if self.scheduler.tp.rank > 0:
            raise ValueError("async_generate is rank 0's; the other ranks call engine.follow()")
        stream = flag("stream", stream)
        logprobs = LogprobOptions.of(return_logprob, logprob_start_len, top_logprobs_num, token_ids_logprob)
        own = (rid, extra_key, priority, routing_key, require_reasoning)
        call = GenerateCall.of(self.scheduler.intake, prompt, input_ids, sampling_params, logprobs, *own)
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
        """On ranks other than 0, while rank 0 answers async_generate: do as it says until it shuts down."""
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
            every = [req.rid for req in self.scheduler.unfinished]
            return sum(self.scheduler.abort(one) for one in (every if abort_all else [rid]))

        return self._at_rest(abort) if self.scheduler.tp.rank == 0 else 0

    def flush_cache(self) -> bool:
        """Forget every cached prefix. False, and nothing is done, while requests wait or run."""

        def flush() -> bool:
            scheduler = self.scheduler
            if scheduler.busy:
                return False
            scheduler.tree.flush()
            return True

        return self._at_rest(flush) if self.scheduler.tp.rank == 0 else True

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
        if num_steps is not None and self.scheduler.tp.rank == 0:  # all ranks step when rank 0 does
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
        fixed = {
            "model": {"architecture": s.wrapper.config.architecture, "layers": s.wrapper.config.num_layers},
            "tp_size": s.tp.size, "tp_rank": s.tp.rank, "device": str(s.tp.device),
            "dtype": str(s.wrapper.dtype).removeprefix("torch."),
            "kv_cache_dtype": str(s.wrapper.kv_dtype).removeprefix("torch."), "page_size": s.page_size,
            "chunked_prefill_size": s.chunked_prefill_size, "steps": dict(s.steps),
        }  # fmt: skip
        if s.tp.rank > 0:
            return fixed

        def info() -> dict[str, Any]:
            served = s.served["prompt"]
            return {
                "schedule_policy": s.policy.name, "radix_eviction_policy": s.tree.eviction,
                "max_total_num_tokens": s.pool.size, "free_tokens": s.pool.free_slots,
                "evictable_tokens": s.tree.evictable_size, "protected_tokens": s.tree.protected_size,
                "held_tokens": s.held_slots,
                "waiting": len(s.waiting), "running": len(s.admitted),
                "prompt_tokens": served, "cached_tokens": s.served["cached"],
                "hit_rate": s.served["cached"] / served if served else 0.0,
                "evicted_tokens": s.tree.evicted, "retractions": s.retractions, "new_token_ratio": s.new_token_ratio,
                "steps": dict(s.steps),
            }  # fmt: skip

        return fixed | self._at_rest(info)

    # --- inside

    def _enqueue(self, one: GenerateRequest) -> int:
        return self.scheduler.enqueue(
            None,
            one.ids,
            one.params,
            words=one.words,
            extra_key=one.extra_key,
            priority=one.priority,
            name=one.name,
            routing_key=one.routing_key,
        )

    def _no_stream_is_open(self) -> None:
        open_one = self._stream()
        if open_one is not None and not open_one.closed:
            raise ValueError("a stream of this engine is still open; read it to its end, or close it")

    def _note(self, note: str, /, **arguments: Any) -> Any:
        """On all ranks: those that follow are told, those that run the same script come here themselves."""
        control = self.scheduler.control
        if control.tp.spawned or self._loop:
            return self._at_rest(lambda: control.note(note, **arguments))
        return control.notes[note](**arguments)

    def _at_rest(self, call: Callable[[], Any]) -> Any:
        """Between two steps: now, or when the loop gets there."""
        return self._loop.submit(call).result() if self._loop else call()

    def shutdown(self) -> None:
        """Let go of the model and leave the process group. Safe to call twice."""
        if (stream := self._stream()) is not None:
            stream.close()
        if self._loop:
            self._loop.stop()
            self._loop = None
        if self._scheduler and self._scheduler.trace:
            self._scheduler.trace.close()
        tp = self._scheduler.tp if self._scheduler else None
        self._scheduler = self._wrapper = None
        if tp:
            shutdown_tensor_parallel(tp)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc) -> None:
        self.shutdown()


def _without_index(call: GenerateCall, last: dict[int, Answer]) -> Answer | list[Answer]:
    """The last chunk of each answer, in order, as `generate` returns them."""
    answers = [{key: value for key, value in last[i].items() if key != "index"} for i in range(len(call.requests))]
    return answers[0] if call.single else answers


def follow_rank_0(**server_args) -> None:
    """What a rank does that rank 0 has started: the same engine, and then whatever rank 0 says until it leaves."""
    engine = Engine(**server_args)
    while True:
        engine.scheduler.control.follow()


def _prefill_tokens(args: ServerArgs, device: str, page_size: int) -> int | None:
    """Prompt tokens of a step: chunked_prefill_size, and no more than max_prefill_tokens in whole pages."""
    if args.max_prefill_tokens is None:
        return args.chunked_prefill_size
    most = max(args.max_prefill_tokens // page_size, 1) * page_size
    chunk = DEFAULT_CHUNK[device] if args.chunked_prefill_size is None else args.chunked_prefill_size
    return most if chunk == NO_CHUNKS else min(most, chunk)


def _seed(args: ServerArgs) -> int:
    """Rank 0 alone draws, so the others need not know the number."""
    return secrets.randbits(32) if args.random_seed is None else args.random_seed
