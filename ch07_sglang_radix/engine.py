"""The engine with SGLang's names.

    from ch07_sglang_radix import Engine
    engine = Engine(model_path)
    engine.generate("What is a radix cache?", {"max_new_tokens": 40})
    for chunk in engine.generate("What is a radix cache?", stream=True): ...
    await engine.async_generate("What is a radix cache?")

Under torchrun every rank makes the same calls and gets the same results. Only async_generate is rank 0's alone: the
others call `engine.follow()`, which returns when rank 0 shuts down.
"""

import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ch07_sglang_radix.async_loop import SchedulerLoop
from ch07_sglang_radix.generate_request import GenerateCall, GenerateRequest
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.streams import Stream, listen, wait_for
from ch07_sglang_radix.tasks import LEAVE
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.parallel_state import initialize_tensor_parallel, shutdown_tensor_parallel

Answer = dict[str, Any]


class Engine:
    """A model behind one call.

    model_path: a folder in Hugging Face layout, a Hub id, or None for the bundled tiny model.
    tp_size: ranks; by default as many as torchrun started.
    The other arguments are those of TPRadixAttentionModelWrapper and TPScheduler, under SGLang's names.

    Threads may call it: they wait in line, or, once async_generate has been used, run together.
    """

    def __init__(
        self, model_path: str | None = None, *, tp_size: int | None = None, device: str = "auto",
        dtype: str | None = None, page_size: int = 16, max_total_tokens: int | None = None,
        mem_fraction_static: float | None = None, kv_cache_dtype: str = "auto", max_running_requests: int = 256,
        chunked_prefill_size: int | None = None, enable_mixed_chunk: bool = False, small_request_share: float = 0.0,
        schedule_policy: str = "fcfs", disable_radix_cache: bool = False, radix_eviction_policy: str = "lru",
        disable_overlap_schedule: bool | None = None, gather_best: bool = False, disable_cuda_graph: bool = False,
        disable_custom_all_reduce: bool = False, attention_backend: str = "auto", random_seed: int = 0,
        check: bool = False, trace: str | Path | None = None,
    ):  # fmt: skip
        tp = initialize_tensor_parallel(tp_size, device, disable_custom_all_reduce=disable_custom_all_reduce)
        self._wrapper: TPRadixAttentionModelWrapper | None = TPRadixAttentionModelWrapper(
            model_path, device, page_size, dtype=dtype, max_total_tokens=max_total_tokens,
            max_running_requests=max_running_requests, attention_backend=attention_backend,
            disable_cuda_graph=disable_cuda_graph, mem_fraction_static=mem_fraction_static,
            kv_cache_dtype=kv_cache_dtype, tp=tp,
        )  # fmt: skip
        self._scheduler: TPScheduler | None = TPScheduler(
            self._wrapper, chunked_prefill_size=chunked_prefill_size, enable_mixed_chunk=enable_mixed_chunk,
            small_request_share=small_request_share, schedule_policy=schedule_policy,
            disable_radix_cache=disable_radix_cache, radix_eviction_policy=radix_eviction_policy,
            overlap=None if disable_overlap_schedule is None else not disable_overlap_schedule, gather_best=gather_best,
            seed=random_seed, check=check, trace=trace,
        )  # fmt: skip
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

    def generate(
        self, prompt: str | Sequence[str] | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None, return_logprob: bool = False,
        stream: bool = False, *, extra_key: str | None = None, priority: int = 0,
    ) -> Answer | list[Answer] | Iterator[Answer]:  # fmt: skip
        """One prompt -> one result, a list -> a list in the same order; with n > 1 a list, n results a prompt.

        A result has `text`, `output_ids` and `meta_info`: id, prompt_tokens, cached_tokens,
        completion_tokens, finish_reason and, if asked for, output_token_logprobs. Without
        `temperature` the answer is greedy (SGLang's own default is 1). `stop`, a string or several, ends an answer
        and is not part of it. With `stream` an iterator comes back: of each answer that has grown, all it has so
        far, and `index`, which of the answers it is; on ranks other than 0 only the whole answers, at the end. Who leaves
        the iterator early ends what still runs. Nothing runs if any prompt or parameter is refused (ValueError).
        """
        call = self._call(prompt, sampling_params, input_ids, return_logprob, extra_key, priority)
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
        answers = wait_for(self._loop, call, self._enqueue)  # no turn is held: others run meanwhile
        if stream:
            return answers
        last = {answer["index"]: answer for answer in answers}
        return _without_index(call, last)

    async def async_generate(
        self, prompt: str | Sequence[str] | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None, return_logprob: bool = False,
        stream: bool = False, *, extra_key: str | None = None, priority: int = 0,
    ) -> Answer | list[Answer] | AsyncIterator[Answer]:  # fmt: skip
        """`generate` for many callers at once: their requests run together. With `stream`, an async iterator.

        Rank 0 only; the other ranks are in `follow`. A caller that is cancelled has its requests aborted.
        """
        if self.scheduler.tp.rank > 0:
            raise ValueError("async_generate is rank 0's; the other ranks call engine.follow()")
        call = self._call(prompt, sampling_params, input_ids, return_logprob, extra_key, priority)
        with self._turn:
            self._no_stream_is_open()
            self._loop = self._loop or SchedulerLoop(self.scheduler)
        answers = listen(self._loop, call, self._enqueue)
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

    def abort_request(self, rid: int | None = None, abort_all: bool = False) -> int:
        """End a request, or all; returns how many were there to end. What they had comes back with finish_reason abort."""

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
            scheduler.tree.evict(scheduler.pool.size)
            scheduler.tree.reset()
            return True

        return self._at_rest(flush) if self.scheduler.tp.rank == 0 else True

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
                "waiting": len(s.waiting), "running": len(s.admitted),
                "prompt_tokens": served, "cached_tokens": s.served["cached"],
                "hit_rate": s.served["cached"] / served if served else 0.0,
                "evicted_tokens": s.tree.evicted, "retractions": s.retractions, "new_token_ratio": s.new_token_ratio,
                "steps": dict(s.steps),
            }  # fmt: skip

        return fixed | self._at_rest(info)

    # --- inside

    def _call(self, prompt, sampling_params, input_ids, return_logprob, extra_key, priority) -> GenerateCall:
        intake = self.scheduler.intake
        return GenerateCall.of(intake, prompt, input_ids, sampling_params, return_logprob, extra_key, priority)

    def _enqueue(self, one: GenerateRequest) -> int:
        return self.scheduler.enqueue(
            None, one.ids, one.params, stop=one.stop, extra_key=one.extra_key, priority=one.priority
        )

    def _no_stream_is_open(self) -> None:
        open_one = self._stream()
        if open_one is not None and not open_one.closed:
            raise ValueError("a stream of this engine is still open; read it to its end, or close it")

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
        self._scheduler = self._wrapper = None
        shutdown_tensor_parallel()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc) -> None:
        self.shutdown()


def _without_index(call: GenerateCall, last: dict[int, Answer]) -> Answer | list[Answer]:
    """The last chunk of each answer, in order, as `generate` returns them."""
    answers = [{key: value for key, value in last[i].items() if key != "index"} for i in range(len(call.requests))]
    return answers[0] if call.single else answers
