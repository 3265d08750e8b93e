"""The engine with SGLang's names.

    from ch07_sglang_radix import Engine
    engine = Engine(model_path)
    engine.generate("What is a radix cache?", {"max_new_tokens": 40})
    for chunk in engine.generate("What is a radix cache?", stream=True): ...
    await engine.async_generate("What is a radix cache?")

Under torchrun every rank makes the same calls and gets the same results. Only async_generate is rank 0's alone: the
others call `engine.follow()`, which returns when rank 0 shuts down.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from ch07_sglang_radix.async_loop import SchedulerLoop
from ch07_sglang_radix.request import RequestOutput
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tasks import LEAVE, StopTask
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.parallel_state import initialize_tensor_parallel, shutdown_tensor_parallel
from common.sampling.batch import uniform
from common.sampling.params import SamplingParams

# SGLang's name -> ours; all other names are the same
RENAMED = {"sampling_seed": "seed"}
PARAM_NAMES = {field.name for field in fields(SamplingParams)} - {"logprobs", "seed"} | set(RENAMED) | {"n", "stop"}


@dataclass(frozen=True)
class _Asked:
    """One answer that is wanted: a prompt with n = 3 is three of them."""

    ids: list[int]
    params: SamplingParams
    stop: tuple[str, ...]


class Engine:
    """A model behind one call.

    model_path: a folder in Hugging Face layout, a Hub id, or None for the bundled tiny model.
    tp_size: ranks; by default as many as torchrun started.
    The other arguments are those of TPRadixAttentionModelWrapper and TPScheduler, under SGLang's names.
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
        self.wrapper = TPRadixAttentionModelWrapper(
            model_path, device, page_size, dtype=dtype, max_total_tokens=max_total_tokens,
            max_running_requests=max_running_requests, attention_backend=attention_backend,
            disable_cuda_graph=disable_cuda_graph, mem_fraction_static=mem_fraction_static,
            kv_cache_dtype=kv_cache_dtype, tp=tp,
        )  # fmt: skip
        self.scheduler = TPScheduler(
            self.wrapper, chunked_prefill_size=chunked_prefill_size, enable_mixed_chunk=enable_mixed_chunk,
            small_request_share=small_request_share, schedule_policy=schedule_policy,
            disable_radix_cache=disable_radix_cache, radix_eviction_policy=radix_eviction_policy,
            overlap=None if disable_overlap_schedule is None else not disable_overlap_schedule, gather_best=gather_best,
            seed=random_seed, check=check, trace=trace,
        )  # fmt: skip
        self._loop: SchedulerLoop | None = None
        self._streaming = False

    # --- answers

    def generate(
        self, prompt: str | Sequence[str] | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None, return_logprob: bool = False,
        stream: bool = False, *, extra_key: Hashable = None, priority: int = 0,
    ) -> dict[str, Any] | list[dict[str, Any]] | Iterator[dict[str, Any]]:  # fmt: skip
        """One prompt -> one result, a list -> a list in the same order; with n > 1 a list, n results a prompt.

        A result has `text`, `output_ids` and `meta_info`: id, prompt_tokens, cached_tokens,
        completion_tokens, finish_reason and, if asked for, output_token_logprobs. Without
        `temperature` the answer is greedy (SGLang's own default is 1). `stop`, a string or several, ends an answer
        and is not part of it. With `stream` an iterator comes back: of each answer that has grown, all it has so
        far, and `index`, which of the answers it is; on ranks other than 0 only the whole answers, at the end. Who leaves
        the iterator early ends what still runs. Nothing runs if any prompt or parameter is refused (ValueError).
        """
        asked, single = self._asked(prompt, sampling_params, input_ids, return_logprob)
        if self._loop:
            raise ValueError("async_generate has been called on this engine: its requests go through that now")
        if self._streaming:
            raise ValueError("a stream of this engine is still open; read it to its end, or close it")
        if stream:
            return self._stream(asked, return_logprob, extra_key, priority)
        rids = [self._enqueue(one, extra_key, priority) for one in asked]
        outputs = self.scheduler.process_requests()
        results = [_result(outputs[rid], return_logprob) for rid in rids]
        return results[0] if single else results

    async def async_generate(
        self, prompt: str | Sequence[str] | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None, return_logprob: bool = False,
        stream: bool = False, *, extra_key: Hashable = None, priority: int = 0,
    ) -> dict[str, Any] | list[dict[str, Any]] | AsyncIterator[dict[str, Any]]:  # fmt: skip
        """`generate` for many callers at once: their requests run together. With `stream`, an async iterator.

        Rank 0 only; the other ranks are in `follow`. A caller that is cancelled has its requests aborted.
        """
        if self.scheduler.tp.rank > 0:
            raise ValueError("async_generate is rank 0's; the other ranks call engine.follow()")
        asked, single = self._asked(prompt, sampling_params, input_ids, return_logprob)
        self._loop = self._loop or SchedulerLoop(self.scheduler)
        answers = self._listen(asked, return_logprob, extra_key, priority)
        if stream:
            return answers
        last = {}
        async for result in answers:
            last[result["index"]] = result
        results = [{key: last[i][key] for key in ("text", "output_ids", "meta_info")} for i in range(len(asked))]
        return results[0] if single else results

    def follow(self) -> None:
        """On ranks other than 0, while rank 0 answers async_generate: do as it says until it shuts down."""
        while self.scheduler.control.follow().step != LEAVE:
            pass

    # --- control

    def abort_request(self, rid: int | None = None, abort_all: bool = False) -> int:
        """End a request, or all; returns how many were there to end. What they had comes back with finish_reason abort."""

        def abort() -> int:
            scheduler = self.scheduler
            chunked = [scheduler.chunked] if scheduler.chunked else []
            every = [req.rid for req in (*scheduler.waiting, *chunked, *scheduler.running)]
            return sum(scheduler.abort(one) for one in (every if abort_all else [rid]))

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
        """Pool, tree, queue and hit rate as they stand (rank 0; {} elsewhere)."""

        def info() -> dict[str, Any]:
            s = self.scheduler
            served = s.served["prompt"]
            return {
                "model": {"architecture": s.wrapper.config.architecture, "layers": s.wrapper.config.num_layers},
                "tp_size": s.tp.size, "device": str(s.tp.device), "dtype": str(s.wrapper.dtype).removeprefix("torch."),
                "kv_cache_dtype": str(s.wrapper.kv_dtype).removeprefix("torch."), "page_size": s.page_size,
                "schedule_policy": s.policy.name, "radix_eviction_policy": s.tree.eviction,
                "chunked_prefill_size": s.chunked_prefill_size,
                "max_total_num_tokens": s.pool.size, "free_tokens": s.pool.free_slots,
                "evictable_tokens": s.tree.evictable_size, "protected_tokens": s.tree.protected_size,
                "waiting": len(s.waiting), "running": len(s.running) + (s.chunked is not None),
                "prompt_tokens": served, "cached_tokens": s.served["cached"],
                "hit_rate": s.served["cached"] / served if served else 0.0,
                "evicted_tokens": s.tree.evicted, "retractions": s.retractions, "new_token_ratio": s.new_token_ratio,
                "steps": dict(s.steps),
            }  # fmt: skip

        return self._at_rest(info) if self.scheduler.tp.rank == 0 else {}

    # --- inside

    def _at_rest(self, call: Callable[[], Any]) -> Any:
        """Between two steps: now, or when the loop gets there."""
        return self._loop.submit(call).result() if self._loop else call()

    def _asked(self, prompt, sampling_params, input_ids, return_logprob) -> tuple[list[_Asked], bool]:
        """What is wanted, one by one, and whether it is a single answer. Raises ValueError before anything is queued."""
        if (prompt is None) == (input_ids is None):
            raise ValueError("give either prompt or input_ids")
        given = input_ids if prompt is None else prompt
        single = isinstance(given, str) or (prompt is None and (len(given) == 0 or isinstance(given[0], int)))
        texts = [given] if single else list(given)
        asked: list[_Asked] = []
        for text, one in zip(texts, _one_each(sampling_params, len(texts)), strict=True):
            ids = self.scheduler.encode(text) if isinstance(text, str) else list(map(int, text))
            params, n, stop = _params(one, return_logprob)
            if stop and self.wrapper.tokenizer is None:
                raise ValueError("this checkpoint has no tokenizer, so there is no text to find `stop` in")
            self.scheduler.check_request(ids, params)
            single = single and n == 1
            asked += [_Asked(ids, _sibling(params, i), stop) for i in range(n)]
        return asked, single

    def _enqueue(self, one: _Asked, extra_key: Hashable, priority: int) -> int:
        return self.scheduler.enqueue(None, one.ids, one.params, stop=one.stop, extra_key=extra_key, priority=priority)

    def _stream(self, asked: list[_Asked], logprobs: bool, extra_key, priority) -> Iterator[dict[str, Any]]:
        scheduler = self.scheduler
        rids = [self._enqueue(one, extra_key, priority) for one in asked]
        index = {rid: i for i, rid in enumerate(rids)}
        if scheduler.tp.rank > 0:
            scheduler.control.follow()
            for rid, output in scheduler.share_results().items():
                yield _result(output, logprobs) | {"index": index[rid]}
            return
        self._streaming, more = True, True
        try:
            while more:
                more = scheduler.step()
                grown, scheduler.grown = scheduler.grown, {}
                for rid, req in grown.items():
                    output = scheduler.results.get(rid) or scheduler.output_of(req)
                    yield _result(output, logprobs) | {"index": index[rid]}
        finally:  # also if the caller has left
            self._streaming = False
            for rid in rids:
                scheduler.abort(rid)
            while scheduler.step():  # tokens that were on their way
                pass
            scheduler.control.send_task(StopTask(scheduler.step_number))
            scheduler.share_results()

    async def _listen(self, asked, logprobs, extra_key, priority) -> AsyncIterator[dict[str, Any]]:
        here, news, loop = asyncio.get_running_loop(), asyncio.Queue(), self._loop
        rids: list[int] = []

        def deliver(i: int, output: RequestOutput | BaseException) -> None:
            with suppress(RuntimeError):  # the caller's event loop is closed: nobody listens any more
                here.call_soon_threadsafe(news.put_nowait, (i, output))

        def enqueue() -> None:
            for i, one in enumerate(asked):
                rids.append(self._enqueue(one, extra_key, priority))
                loop.listen(rids[-1], partial(deliver, i))

        missing = len(asked)
        try:
            await asyncio.wrap_future(loop.submit(enqueue))
            while missing:
                i, output = await news.get()
                if isinstance(output, BaseException):
                    raise output
                missing -= output.finish_reason is not None
                yield _result(output, logprobs) | {"index": i}
        finally:
            if missing:
                loop.submit(lambda: [self.scheduler.abort(rid) for rid in rids])  # it comes after `enqueue`

    def shutdown(self) -> None:
        """Let go of the model and leave the process group."""
        if self._loop:
            self._loop.stop()
            self._loop = None
        if self.scheduler and self.scheduler.trace:
            self.scheduler.trace.close()
        self.scheduler = self.wrapper = None
        shutdown_tensor_parallel()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc) -> None:
        self.shutdown()


def _one_each(params, n: int) -> list[Mapping[str, Any]]:
    if params is None or isinstance(params, Mapping):
        return [params or {}] * n
    if len(params) != n:
        raise ValueError(f"{len(params)} sampling_params for {n} prompts; give one for all or one for each")
    return list(params)


def _params(given: Mapping[str, Any], logprobs: bool) -> tuple[SamplingParams, int, tuple[str, ...]]:
    """SGLang's dictionary -> our parameters, n, stop strings."""
    unknown = sorted(given.keys() - PARAM_NAMES)
    if unknown:
        raise ValueError(f"unknown sampling parameter {', '.join(unknown)}; known: {', '.join(sorted(PARAM_NAMES))}")
    known = {RENAMED.get(key, key): value for key, value in given.items()}
    n, stop = known.pop("n", 1), known.pop("stop", None) or ()
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"n={n} must be a whole number, at least 1")
    stop = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stop, list | tuple) or not all(isinstance(string, str) and string for string in stop):
        raise ValueError(f"stop={stop!r} must be one string or several, and none of them empty")
    if "stop_token_ids" in known:
        known["stop_token_ids"] = tuple(known["stop_token_ids"] or ())
    return SamplingParams(**known, logprobs=logprobs), n, tuple(stop)


def _sibling(params: SamplingParams, i: int) -> SamplingParams:
    """The i-th of n answers draws with a seed of its own."""
    return params if i == 0 or params.seed is None else replace(params, seed=int(uniform(params.seed, i) * (1 << 24)))


def _result(out: RequestOutput, logprobs: bool) -> dict[str, Any]:
    meta = {
        "id": out.request_id,
        "prompt_tokens": out.prompt_tokens,
        "cached_tokens": out.cached_tokens,
        "completion_tokens": out.completion_tokens,
        "finish_reason": out.finish_reason,
    }
    if logprobs:
        meta["output_token_logprobs"] = list(zip(out.logprobs, out.output_ids, strict=True))
    return {"text": out.text, "output_ids": out.output_ids, "meta_info": meta}
