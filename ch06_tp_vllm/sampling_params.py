"""vLLM's SamplingParams, for the names; what they mean is in common/sampling/params.py."""

import json
from dataclasses import dataclass, fields
from enum import Enum
from functools import cached_property
from typing import Any

from common.arguments import says_names
from common.sampling.grammar import check_grammar
from common.sampling.params import SamplingParams as RowParams
from common.text.tokenizer import Tokenizer
from common.values import MAX_INT, flag, shown, texts, token_ids, whole

MAX_ANSWERS = 1024  # n
SWITCHES = (
    "include_stop_str_in_output", "detokenize", "skip_special_tokens", "spaces_between_special_tokens", "ignore_eos",
)  # fmt: skip
AS_IN_A_ROW = (
    "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "logit_bias",
    "allowed_token_ids",
)  # fmt: skip


class RequestOutputKind(Enum):
    """What a step returns of a request: all it has so far, what is new, or nothing until it has ended."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


# what vLLM has, or had, and this engine has not: the way out; None asks for nothing of it, and so does vLLM's default
ELSEWHERE = {
    "max_new_tokens": "vLLM calls it max_tokens",
    "best_of": "use n, and keep the best by cumulative_logprob",
    "use_beam_search": "beams are not here; use n and compare cumulative_logprob",
    "length_penalty": "beams are not here; use n and divide cumulative_logprob by the length",
    "early_stopping": "beams are not here; use n",
    "do_sample": "temperature=0 takes the best token, any other draws",
    "num_return_sequences": "vLLM calls it n",
    "logits_processors": "use logit_bias, bad_words or allowed_token_ids",
    "truncate_prompt_tokens": "shorten the prompt before",
    "logprob_token_ids": "use logprobs=, the best ones",
    "flat_logprobs": "log-probabilities are a list of dictionaries",
    "thinking_token_budget": "use max_tokens",
    "stream_interval": "every token is told of; leave it out",
    "repetition_detection": "use repetition_penalty or frequency_penalty",
    "extra_args": "nobody here would read it",
}
IDLE = dict.fromkeys(name for name in ELSEWHERE if name != "max_new_tokens") | {"flat_logprobs": False, "best_of": 1}


@dataclass(frozen=True)
class StructuredOutputsParams:
    """What an answer must be, by exactly one of: json, a schema (a text or a dict); regex; choice, one of several texts; grammar,
    in Lark's form or GBNF's; json_object=True, any object. Its JSON has no white space: disable_any_whitespace is always on.
    """

    json: Any = None
    regex: Any = None
    choice: Any = None
    grammar: Any = None
    json_object: bool | None = None

    def __post_init__(self):
        if len(self._given) != 1:
            raise ValueError(
                f"structured_outputs says by one of its fields what an answer must be, not by {len(self._given)}"
            )
        _ = self.row

    @property
    def _given(self) -> list[str]:
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]

    @cached_property
    def row(self) -> tuple[str, str]:
        """The same in the sampler's terms: grammar.py."""
        (name,) = self._given
        value = getattr(self, name)
        if name == "json_object":
            if not flag(name, value):
                raise ValueError("json_object=False says nothing; leave structured_outputs out")
            return check_grammar(("json_schema", '{"type": "object"}'))
        if name == "choice":
            if not (words := texts(name, value)):
                raise ValueError("choice is empty: no answer would be right")
            return check_grammar(("ebnf", "start: " + " | ".join(map(json.dumps, words))))
        if name == "json" and isinstance(value, dict):
            try:
                value = json.dumps(value)
            except (TypeError, ValueError, RecursionError) as error:
                raise ValueError(f"json={shown(value)} is no JSON: {error}") from None
        return check_grammar(({"json": "json_schema", "regex": "regex", "grammar": "ebnf"}[name], value))


@says_names("sampling parameter", ELSEWHERE, IDLE)
@dataclass(frozen=True)
class SamplingParams:
    """How to answer one prompt: n answers of at most max_tokens each. As in vLLM the default draws (temperature 1).

    max_tokens: None is as many as the model and the pool allow. top_k: 0 or -1 is no limit. stop: texts that end an answer;
    they are in it only with include_stop_str_in_output. bad_words: texts that are never completed. logit_bias: {token id: what is
    added to its logit}. structured_outputs: what the answer must be. logprobs: None, or how many of the best beside each
    chosen token; prompt_logprobs the same for the tokens of the prompt. detokenize=False leaves `text` empty. output_kind:
    see RequestOutputKind.
    Raises ValueError for a value of a wrong kind or outside its range.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: Any = ()
    stop_token_ids: Any = ()
    bad_words: Any = ()
    logit_bias: Any = None
    allowed_token_ids: Any = None
    structured_outputs: StructuredOutputsParams | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self):
        n, most = whole("n", self.n, 1, MAX_ANSWERS), self.max_tokens
        if type(self.seed) is int and self.seed == -1:  # vLLM's other way to say None
            self._keep({"seed": None})
        kept = {
            "n": n, "stop": texts("stop", self.stop), "bad_words": texts("bad_words", self.bad_words),
            "stop_token_ids": token_ids("stop_token_ids", _several_ids(self.stop_token_ids)),
            "top_k": whole("top_k", self.top_k, -1, say=", 0 or -1 for no limit"),
            "max_tokens": None if most is None else whole("max_tokens", most, 1),
        }  # fmt: skip
        limit = (MAX_INT, "") if most is None else (kept["max_tokens"], f" (max_tokens={kept['max_tokens']})")
        kept["min_tokens"] = whole("min_tokens", self.min_tokens, 0, *limit)
        kept |= {name: flag(name, getattr(self, name)) for name in SWITCHES}
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                kept[name] = whole(name, getattr(self, name), 0)
        if not isinstance(self.output_kind, RequestOutputKind):
            raise ValueError(f"output_kind={shown(self.output_kind)} must be a RequestOutputKind")
        if not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            raise ValueError(f"structured_outputs={shown(self.structured_outputs)} must be a StructuredOutputsParams")
        if kept["stop"] and not kept["detokenize"]:
            raise ValueError("stop needs the text of the answer; leave detokenize=True, or use stop_token_ids")
        self._keep(kept)
        row = self.row(self.max_tokens or max(1, self.min_tokens), None)
        self._keep({name: getattr(row, name) for name in AS_IN_A_ROW if getattr(self, name) is not None})

    def _keep(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def row(self, max_tokens: int, tokenizer: Tokenizer | None) -> RowParams:
        """The same in the sampler's terms, for an answer of at most so many tokens."""
        words = tuple(ids for word in self.bad_words for ids in _spellings(word, tokenizer)) if tokenizer else ()
        return RowParams(
            max_new_tokens=max_tokens, temperature=self.temperature, top_k=-1 if self.top_k == 0 else self.top_k,
            top_p=self.top_p, min_p=self.min_p, repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty, frequency_penalty=self.frequency_penalty, seed=self.seed,
            stop_token_ids=self.stop_token_ids, ignore_eos=self.ignore_eos, min_new_tokens=self.min_tokens,
            logit_bias=() if self.logit_bias is None else self.logit_bias, allowed_token_ids=self.allowed_token_ids,
            bad_words_ids=words, logprobs=self.logprobs is not None, top_logprobs=self.logprobs or 0,
            prompt_logprobs=self.prompt_logprobs,
            grammar=self.structured_outputs.row if self.structured_outputs else None,
        )  # fmt: skip


def _several_ids(given: Any) -> Any:
    """None, one id, or several."""
    return () if given is None else (given,) if isinstance(given, int) else given


def _spellings(word: str, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of a word at the beginning of a text, and behind a space if that has as many and begins with another one: as in
    vLLM 0.33 (sampling_params.py, update_from_tokenizer), so a word of two tokens may still come as one that has the space.
    """
    bare, spaced = (tokenizer.encode_bare(text) for text in (word.lstrip(), " " + word.lstrip()))
    if not bare:
        raise ValueError(f"bad_words: {shown(word)} has no token that could be forbidden; leave it out")
    return [bare, spaced] if len(spaced) == len(bare) and spaced[0] != bare[0] else [bare]
