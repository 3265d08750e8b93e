"""SGLang's words for a call -> requests that can run; what became of them -> SGLang's dictionaries.

A prompt with n = 3 is three requests, each with a seed of its own. Everything is looked at before anything is queued.
SGLang keeps the same in managers/io_struct.py (GenerateReqInput).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ch07_sglang_radix.handoff import Handoff
from ch07_sglang_radix.lora import lora_names
from ch07_sglang_radix.request import RequestOutput
from common.arguments import refuse_unknown, without_idle
from common.request.intake import Intake
from common.sampling.batch import derived_seed
from common.sampling.grammar import KINDS
from common.sampling.logprobs import TokenLogprobs
from common.sampling.params import SamplingParams
from common.text.answer import compiled
from common.text.tokenizer import Tokenizer
from common.values import flag, one_each, prompts, shown, text, texts, token_ids, walked, whole
from common.vision.pictures import Pictures

RENAMED = {"sampling_seed": "seed"}  # SGLang's name -> ours; all other names are the same
SAMPLING = (
    "max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "sampling_seed", "stop_token_ids", "ignore_eos", "logit_bias",
)  # fmt: skip
TEXT_FLAGS = {"no_stop_trim": False, "skip_special_tokens": True, "spaces_between_special_tokens": True}
PARAM_NAMES = (*SAMPLING, *TEXT_FLAGS, *KINDS, "n", "stop", "stop_regex")
ELSEWHERE = {
    "max_tokens": "SGLang calls it max_new_tokens", "seed": "SGLang calls it sampling_seed",
    "structural_tag": "write it as ebnf, in Lark's form: a lazy rule for what comes before a tag",
    "custom_params": "custom logit processors are not here",
    "beam_width": "beams are not here; use n and compare the log-probabilities",
    "best_of": "use n, and keep the best by its log-probabilities",
}  # fmt: skip
# None asks for nothing of these
IDLE = ("json_schema", "regex", "ebnf", "structural_tag", "custom_params", "beam_width")
MAX_ANSWERS = 1024  # n
OUTPUTS_ONLY = -1  # logprob_start_len

assert {RENAMED.get(name, name) for name in SAMPLING} <= {field.name for field in fields(SamplingParams)}


@dataclass(frozen=True)
class GenerateRequest:
    """One answer that is wanted. words: how its text is made and what ends it, AnswerText's arguments. name: the user's rid."""

    ids: list[int]
    params: SamplingParams
    words: Mapping[str, Any]
    extra_key: str | None
    priority: int
    name: str | None = None
    routing_key: str | None = None
    handoff: Handoff | None = None
    pictures: Pictures | None = None
    lora_path: str | None = None  # its adapter's name


@dataclass(frozen=True)
class LogprobOptions:
    """What is told about log-probabilities; start: first prompt token of which, -1 is none."""

    wanted: bool = False
    start: int = OUTPUTS_ONLY
    top: int = 0
    ids: tuple[int, ...] = ()
    texts: bool = False  # of the tokens, too

    @classmethod
    def of(cls, wanted: Any, start: Any, top: Any, ids: Any, texts: Any = False) -> "LogprobOptions":
        wanted = flag("return_logprob", wanted)
        start = OUTPUTS_ONLY if start is None else whole("logprob_start_len", start, OUTPUTS_ONLY)
        top = whole("top_logprobs_num", 0 if top is None else top, 0)
        ids = token_ids("token_ids_logprob", () if ids is None else ids)
        texts = flag("return_text_in_logprobs", texts)
        if not wanted and (start != OUTPUTS_ONLY or top or ids or texts):
            raise ValueError(
                "logprob_start_len, top_logprobs_num, token_ids_logprob and return_text_in_logprobs need return_logprob=True"
            )
        return cls(wanted, start, top, ids, texts)

    def params(self) -> dict[str, Any]:
        """The same in the sampler's terms."""
        if not self.wanted:
            return {}
        told = {"logprobs": True, "top_logprobs": self.top, "token_ids_logprob": self.ids}
        return told if self.start == OUTPUTS_ONLY else told | {"prompt_logprobs": self.top, "logprob_start": self.start}


@dataclass(frozen=True)
class GenerateCall:
    """A call: its requests in order, and whether one dictionary is wanted instead of a list."""

    requests: list[GenerateRequest]
    single: bool
    logprobs: LogprobOptions
    tokenizer: Tokenizer | None

    @classmethod
    def of(
        cls, intake: Intake, prompt: Any, input_ids: Any, sampling_params: Any, logprobs: LogprobOptions, rid: Any,
        extra_key: Any, priority: Any, routing_key: Any, require_reasoning: Any = False, handoff: Handoff | None = None,
        image_data: Any = None, lora_path: Any = None, enable_lora: bool = False,
        one_seed: int | None = None,
    ) -> "GenerateCall":  # fmt: skip
        """Raises ValueError, in one line, for whatever cannot run. handoff: of the first answer. one_seed: what
        the seed of all requests that bring none is made of; None if each of them gets another."""
        if (prompt is None) == (input_ids is None):
            raise ValueError("give either prompt or input_ids")
        intake = intake.from_now()
        extra_key, priority = intake.namespace("extra_key", extra_key), intake.priority(priority)
        routing_key = text("routing_key", routing_key, empty=False, none=True)
        more = logprobs.params() | {"after_thinking": flag("require_reasoning", require_reasoning)}
        several, single = _prompts(prompt, input_ids)
        given = one_each("sampling_params", sampling_params, len(several), Mapping, {})
        adapters = lora_names(lora_path, len(several), enable_lora)
        requests: list[GenerateRequest] = []
        shown_with = images_of_each(image_data, len(several), single)
        names = _names(rid, len(several), single)
        for one, images, values, name, adapter in zip(several, shown_with, given, names, adapters, strict=True):
            ids, pictures = intake.shown(intake.ids(one), images)
            params, n, words = _params(values, more)
            if handoff and handoff.mode == "prefill":  # the rest is the other engine's
                params = replace(params, max_new_tokens=1, min_new_tokens=min(params.min_new_tokens, 1))
            intake.stops((*words["stop"], *words["stop_regex"]))
            intake.fits(ids, params)
            single = single and n == 1
            for i in range(n):
                own = f"{name}_{i}" if name and n > 1 else name
                mine = handoff and handoff.next(len(requests))
                own_params = _sibling(params, i, one_seed)
                requests.append(
                    GenerateRequest(
                        ids, own_params, words, extra_key, priority, own, routing_key, mine, pictures, adapter
                    )
                )
        return cls(requests, single, logprobs, intake.tokenizer)

    def result(self, out: RequestOutput, i: int) -> dict[str, Any]:
        """What SGLang's Engine returns for the i-th answer."""
        meta = {
            "id": self.requests[i].name or out.request_id, "prompt_tokens": out.prompt_tokens,
            "cached_tokens": out.cached_tokens, "completion_tokens": out.completion_tokens,
            "finish_reason": out.finish_reason, "weight_version": out.weight_version,
        }  # fmt: skip
        if out.cached_tokens_details:
            meta["cached_tokens_details"] = out.cached_tokens_details
        if out.drafts:
            right, guessed = out.drafts["spec_num_correct_drafts"], out.drafts["spec_num_proposed_drafts"]
            meta |= out.drafts | {
                "spec_accept_rate": right / guessed if guessed else 0.0,
                "spec_accept_length": out.completion_tokens / out.drafts["spec_verify_ct"],
            }
        if self.logprobs.wanted:
            meta |= self._told("output", out.logprobs)
            if self.logprobs.start != OUTPUTS_ONLY:
                first = [] if self.logprobs.start else [TokenLogprobs(out.prompt_ids[0], None, 0)]
                meta |= self._told("input", [*first, *out.prompt_logprobs])
        return {"text": out.text, "output_ids": out.output_ids, "meta_info": meta}

    def _told(self, which: str, told: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """[(log-probability, token id, its text or None)], and lists of such for the best ones and for those asked for."""
        say = self.tokenizer.token_text if self.logprobs.texts and self.tokenizer else lambda token: None
        lists = {f"{which}_token_logprobs": [(one.logprob, one.token, say(one.token)) for one in told]}
        if self.logprobs.top:
            lists[f"{which}_top_logprobs"] = [[(p, token, say(token)) for token, p in one.top] for one in told]
        if self.logprobs.ids:
            lists[f"{which}_token_ids_logprobs"] = [[(p, token, say(token)) for token, p in one.wanted] for one in told]
        return lists

    def results(self, outputs: list[RequestOutput]) -> dict[str, Any] | list[dict[str, Any]]:
        answers = [self.result(out, i) for i, out in enumerate(outputs)]
        return answers[0] if self.single else answers


def _prompts(prompt: Any, input_ids: Any) -> tuple[list[Any], bool]:
    """(prompts one by one, whether a single one was given)."""
    if isinstance(prompt, str):
        return [prompt], True
    if prompt is not None:
        several = walked("prompt", prompt, "a text or several; token ids go into input_ids")
        for one in several:
            if not isinstance(one, str):
                raise ValueError(f"prompt holds {shown(one)}, which is no text; token ids go into input_ids")
        return several, False
    several, single = prompts("input_ids", input_ids, "token ids, or several lists of them; a text goes into prompt")
    for one in several:
        if isinstance(one, str):
            raise ValueError(f"input_ids holds {shown(one)}, which is a text; texts go into prompt")
    return several, single


def images_of_each(image_data: Any, prompts: int, single: bool) -> list[list[Any]]:
    """SGLang's image_data: for one prompt a picture or a list of them; for several a list with such a thing, or None, for each."""
    if image_data is None:
        return [[] for _ in range(prompts)]
    if single:
        return [list(image_data) if isinstance(image_data, list | tuple) else [image_data]]
    if not isinstance(image_data, list | tuple) or len(image_data) != prompts:
        raise ValueError(f"image_data: {prompts} prompts need a list with the picture, the pictures or None for each")
    return [[] if one is None else list(one) if isinstance(one, list | tuple) else [one] for one in image_data]


def _names(rid: Any, n: int, single: bool) -> list[str | None]:
    """The user's rids, one a prompt; one text for a list is a_0, a_1, ... as in SGLang (managers/io_struct.py)."""
    if rid is None:
        return [None] * n
    if isinstance(rid, str):
        rid = text("rid", rid, empty=False)
        rid = [rid] if single else [f"{rid}_{i}" for i in range(n)]
    names = list(texts("rid", rid))
    if len(names) != n or len(set(names)) != n:
        raise ValueError(f"{len(set(names))} different rids for {n} prompts; give one for each")
    return names


def _params(given: Mapping[str, Any], more: Mapping[str, Any]) -> tuple[SamplingParams, int, dict[str, Any]]:
    """SGLang's dictionary, and parameters that stand outside of it -> our parameters, n, AnswerText's arguments."""
    given = without_idle(given, dict.fromkeys(IDLE))
    refuse_unknown(
        "sampling parameter", given, PARAM_NAMES, ELSEWHERE, "generate_request.py's PARAM_NAMES has them all"
    )
    known = {RENAMED.get(key, key): value for key, value in given.items() if value is not None}
    n = whole("n", known.pop("n", 1), 1, MAX_ANSWERS)
    flags = {name: flag(name, known.pop(name, default)) for name, default in TEXT_FLAGS.items()}
    stop, patterns = (texts(name, known.pop(name, None)) for name in ("stop", "stop_regex"))
    for pattern in patterns:
        compiled(pattern)
    grammars = [(kind, known.pop(kind)) for kind in KINDS if kind in known]
    if len(grammars) > 1:
        raise ValueError(f"{' and '.join(kind for kind, _ in grammars)}: an answer has one grammar; give one")
    params = SamplingParams(**known, **more, grammar=grammars[0] if grammars else None)
    words = {
        "stop": stop, "stop_regex": patterns, "include_stop": flags["no_stop_trim"], "not_before": params.min_new_tokens,
        "skip_special_tokens": flags["skip_special_tokens"],
        "spaces_between_special_tokens": flags["spaces_between_special_tokens"],
    }  # fmt: skip
    return params, n, words


def _sibling(params: SamplingParams, i: int, one_seed: int | None) -> SamplingParams:
    """The i-th of n answers draws with a seed of its own."""
    seed = params.seed if params.seed is not None or one_seed is None else derived_seed(one_seed, 0)
    return params if i == 0 or seed is None else replace(params, seed=derived_seed(seed, i))


def check_rid(rid: Any) -> int | str:
    """An id that `generate` has told, or the user's own."""
    if rid is None:
        raise ValueError("nothing says which request to end; give rid=, or abort_all=True for all of them")
    return text("rid", rid, empty=False) if isinstance(rid, str) else whole("rid", rid, 0)
