"""The engine with SGLang's names.

    from ch07_sglang_radix import Engine
    engine = Engine(model_path)
    engine.generate("What is a radix cache?", {"max_new_tokens": 40})

Under torchrun every rank makes the same calls and gets the same results.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ch07_sglang_radix.request import RequestOutput
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.parallel_state import initialize_tensor_parallel, shutdown_tensor_parallel
from common.sampler import SamplingParams

# SGLang's name -> ours; all other names are the same
RENAMED = {"sampling_seed": "seed"}
PARAM_NAMES = {field.name for field in fields(SamplingParams)} - {"logprobs", "seed"} | set(RENAMED)


class Engine:
    """A model behind one call.

    model_path: a folder in Hugging Face layout, a Hub id, or None for the bundled tiny model.
    tp_size: ranks; by default as many as torchrun started.
    The other arguments are those of TPRadixAttentionModelWrapper and TPScheduler, under SGLang's names.
    """

    def __init__(
        self, model_path: str | None = None, *, tp_size: int | None = None, device: str = "auto",
        dtype: str | None = None, page_size: int = 16, max_total_tokens: int | None = None,
        max_running_requests: int = 256, chunked_prefill_size: int | None = None,
        disable_radix_cache: bool = False, disable_overlap_schedule: bool | None = None, gather_best: bool = False,
        disable_cuda_graph: bool = False, disable_custom_all_reduce: bool = False, attention_backend: str = "auto",
        random_seed: int = 0, check: bool = False,
    ):  # fmt: skip
        tp = initialize_tensor_parallel(tp_size, device, disable_custom_all_reduce=disable_custom_all_reduce)
        self.wrapper = TPRadixAttentionModelWrapper(
            model_path, device, page_size, dtype=dtype, max_total_tokens=max_total_tokens,
            max_running_requests=max_running_requests, attention_backend=attention_backend,
            disable_cuda_graph=disable_cuda_graph, tp=tp,
        )  # fmt: skip
        self.scheduler = TPScheduler(
            self.wrapper, chunked_prefill_size=chunked_prefill_size, disable_radix_cache=disable_radix_cache,
            overlap=None if disable_overlap_schedule is None else not disable_overlap_schedule, gather_best=gather_best,
            seed=random_seed, check=check,
        )  # fmt: skip

    def generate(
        self, prompt: str | Sequence[str] | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None, return_logprob: bool = False,
    ) -> dict[str, Any] | list[dict[str, Any]]:  # fmt: skip
        """One prompt -> one result, a list -> a list in the same order.

        A result has `text`, `output_ids` and `meta_info`: id, prompt_tokens, cached_tokens,
        completion_tokens, finish_reason and, if asked for, output_token_logprobs. Without
        `temperature` the answer is greedy (SGLang's own default is 1). Nothing runs if any prompt or
        parameter is refused (ValueError).
        """
        if (prompt is None) == (input_ids is None):
            raise ValueError("give either prompt or input_ids")
        given = input_ids if prompt is None else prompt
        single = isinstance(given, str) or (prompt is None and (len(given) == 0 or isinstance(given[0], int)))
        texts = [given] if single else list(given)
        ids = [self.scheduler.encode(t) if isinstance(t, str) else list(map(int, t)) for t in texts]
        params = [_params(p, return_logprob) for p in _one_each(sampling_params, len(texts))]
        for one, p in zip(ids, params, strict=True):
            self.scheduler.check_request(one, p)
        rids = [self.scheduler.enqueue(None, one, p) for one, p in zip(ids, params, strict=True)]
        outputs = self.scheduler.process_requests()
        results = [_result(outputs[rid], return_logprob) for rid in rids]
        return results[0] if single else results

    def shutdown(self) -> None:
        """Let go of the model and leave the process group."""
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


def _params(given: Mapping[str, Any], logprobs: bool) -> SamplingParams:
    unknown = sorted(given.keys() - PARAM_NAMES)
    if unknown:
        raise ValueError(f"unknown sampling parameter {', '.join(unknown)}; known: {', '.join(sorted(PARAM_NAMES))}")
    known = {RENAMED.get(key, key): value for key, value in given.items()}
    if "stop_token_ids" in known:
        known["stop_token_ids"] = tuple(known["stop_token_ids"] or ())
    return SamplingParams(**known, logprobs=logprobs)


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
