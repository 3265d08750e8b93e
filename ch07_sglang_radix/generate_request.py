"""SGLang's words for a call -> requests that can run; what became of them -> SGLang's dictionaries.

A prompt with n = 3 is three requests, each with a seed of its own. Everything is looked at before anything is queued.
SGLang keeps the same in managers/io_struct.py (GenerateReqInput).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from ch07_sglang_radix.request import RequestOutput
from common.request.intake import Intake, refuse_unknown
from common.sampling.batch import uniform
from common.sampling.params import SamplingParams
from common.values import flag, is_one_prompt, one_each, shown, texts, whole

RENAMED = {"sampling_seed": "seed"}  # SGLang's name -> ours; all other names are the same
PARAM_NAMES = {field.name for field in fields(SamplingParams)} - {"logprobs", "seed"} | set(RENAMED) | {"n", "stop"}
MAX_ANSWERS = 1024  # n


@dataclass(frozen=True)
class GenerateRequest:
    """One answer that is wanted."""

    ids: list[int]
    params: SamplingParams
    stop: tuple[str, ...]
    extra_key: str | None
    priority: int


@dataclass(frozen=True)
class GenerateCall:
    """A call: its requests in order, and whether one dictionary is wanted instead of a list."""

    requests: list[GenerateRequest]
    single: bool
    return_logprob: bool

    @classmethod
    def of(
        cls, intake: Intake, prompt: Any, input_ids: Any, sampling_params: Any, return_logprob: Any, extra_key: Any,
        priority: Any,
    ) -> "GenerateCall":  # fmt: skip
        """Raises ValueError, in one line, for whatever cannot run."""
        if (prompt is None) == (input_ids is None):
            raise ValueError("give either prompt or input_ids")
        flag("return_logprob", return_logprob)
        extra_key, priority = intake.namespace("extra_key", extra_key), intake.priority(priority)
        prompts, single = _prompts(prompt, input_ids)
        requests: list[GenerateRequest] = []
        for one, given in zip(
            prompts, one_each("sampling_params", sampling_params, len(prompts), Mapping, {}), strict=True
        ):
            ids = intake.ids(one)
            params, n, stop = _params(given, return_logprob)
            intake.stops(stop)
            intake.fits(ids, params)
            single = single and n == 1
            requests += [GenerateRequest(ids, _sibling(params, i), stop, extra_key, priority) for i in range(n)]
        return cls(requests, single, return_logprob)

    def result(self, out: RequestOutput) -> dict[str, Any]:
        """What SGLang's Engine returns for one answer."""
        meta = {
            "id": out.request_id, "prompt_tokens": out.prompt_tokens, "cached_tokens": out.cached_tokens,
            "completion_tokens": out.completion_tokens, "finish_reason": out.finish_reason,
        }  # fmt: skip
        if self.return_logprob:
            meta["output_token_logprobs"] = list(zip(out.logprobs, out.output_ids, strict=True))
        return {"text": out.text, "output_ids": out.output_ids, "meta_info": meta}

    def results(self, outputs: list[RequestOutput]) -> dict[str, Any] | list[dict[str, Any]]:
        answers = [self.result(out) for out in outputs]
        return answers[0] if self.single else answers


def _prompts(prompt: Any, input_ids: Any) -> tuple[list[Any], bool]:
    """(prompts one by one, whether a single one was given)."""
    if prompt is not None:
        if isinstance(prompt, str):
            return [prompt], True
        if isinstance(prompt, Mapping | bytes) or not isinstance(prompt, Iterable):
            raise ValueError(f"prompt={shown(prompt)} must be a text or several; token ids go into input_ids")
        several = list(prompt)
        for one in several:
            if not isinstance(one, str):
                raise ValueError(f"prompt holds {shown(one)}, which is no text; token ids go into input_ids")
        return several, False
    if isinstance(input_ids, str | Mapping | bytes) or not isinstance(input_ids, Iterable):
        raise ValueError(
            f"input_ids={shown(input_ids)} must be token ids, or several lists of them; a text goes into prompt"
        )
    if not hasattr(input_ids, "ndim"):
        input_ids = list(input_ids)
    if is_one_prompt(input_ids):
        return [input_ids], True
    several = list(input_ids)
    for one in several:
        if isinstance(one, str):
            raise ValueError(f"input_ids holds {shown(one)}, which is a text; texts go into prompt")
    return several, False


def _params(given: Mapping[str, Any], logprobs: bool) -> tuple[SamplingParams, int, tuple[str, ...]]:
    """SGLang's dictionary -> our parameters, n, stop strings."""
    refuse_unknown("sampling parameter", list(given), sorted(PARAM_NAMES))
    known = {RENAMED.get(key, key): value for key, value in given.items()}
    n, stop = whole("n", known.pop("n", 1), 1, MAX_ANSWERS), texts("stop", known.pop("stop", None))
    if known.get("stop_token_ids", ()) is None:
        del known["stop_token_ids"]
    if isinstance(known.get("stop_token_ids"), list | set):
        known["stop_token_ids"] = tuple(known["stop_token_ids"])
    return SamplingParams(**known, logprobs=logprobs), n, stop


def _sibling(params: SamplingParams, i: int) -> SamplingParams:
    """The i-th of n answers draws with a seed of its own."""
    return params if i == 0 or params.seed is None else replace(params, seed=int(uniform(params.seed, i) * (1 << 24)))
