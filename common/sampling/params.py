"""How to choose the tokens of one request, and which of their log-probabilities to tell.

Both chapters have parameters of their own, with vLLM's and SGLang's names and defaults; this is what both become.
When a request stops is not said here, but for the number of its tokens and the ids that end it: stop texts are the
detokenizer's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from common.sampling.edits import AllowedTokens, BadWords, LogitBias, LogitsEdit, MinNewTokens, Penalties
from common.sampling.grammar import check_grammar
from common.values import flag, real, several, shown, token_ids, whole

UNLIMITED_TOP_K = -1
MASK64 = (1 << 64) - 1

# name: (least, most, what the message adds); in float32 nothing in these ranges overflows or becomes 0
_RANGES = {
    "temperature": (0, 1000, "; 0 is greedy"),
    "min_p": (0, 1, "; 0 keeps every token"),
    "repetition_penalty": (0.01, 100, "; 1 is none"),
    "presence_penalty": (-2, 2, "; 0 is none"),
    "frequency_penalty": (-2, 2, "; 0 is none"),
}
MAX_BIAS = 100.0  # OpenAI's range; vLLM cuts to it silently (sampling_params.py, from_optional), SGLang takes any


@dataclass(frozen=True)
class SamplingParams:
    """The values of one request. temperature = 0 is greedy, and the default.

    Numbers of NumPy and torch, lists, sets and arrays are taken; afterwards all fields are ints, floats and tuples.
    Raises ValueError, in one line that names the field, for a value of a wrong kind or outside its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = UNLIMITED_TOP_K  # more than the vocabulary has: no limit
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # divides (multiplies) positive (negative) logits of tokens seen so far
    presence_penalty: float = 0.0  # subtracted once for each token already put out
    frequency_penalty: float = 0.0  # subtracted as often as the token was put out
    seed: int | None = None  # any int; its lowest 64 bits count, and are what is kept
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    min_new_tokens: int = 0  # so many come before a token may end the answer
    logit_bias: tuple[tuple[int, float], ...] = ()  # {token id: what is added to its logit}
    allowed_token_ids: tuple[int, ...] | None = None  # nothing else may be drawn
    bad_words_ids: tuple[tuple[int, ...], ...] = ()  # a token that would complete one of these is not drawn

    # what the text must be: grammar.py. Not among the edits: a request has a matcher of its own, which remembers its tokens
    grammar: tuple[str, str] | None = None  # (json_schema | regex | ebnf, its text)
    after_thinking: bool = False  # it holds from behind </think> on

    # log-probabilities, all under the model's own distribution: before edits and temperature
    logprobs: bool = False  # of each chosen token, with its rank
    top_logprobs: int = 0  # and of so many of the best
    token_ids_logprob: tuple[int, ...] = ()  # and of these
    prompt_logprobs: int | None = None  # of each prompt token given those before, and of so many of the best there
    logprob_start: int = 0  # first prompt position of which that is told (position 0 has no token before it)

    def __post_init__(self):
        kept = {
            "max_new_tokens": whole("max_new_tokens", self.max_new_tokens, 1),
            "top_k": _top_k(self.top_k),
            "top_p": real("top_p", self.top_p, 0, 1, "; 1 keeps every token", open_below=True),
            "stop_token_ids": token_ids("stop_token_ids", self.stop_token_ids),
            "logit_bias": _biases(self.logit_bias),
            "bad_words_ids": _sequences("bad_words_ids", self.bad_words_ids),
            "token_ids_logprob": token_ids("token_ids_logprob", self.token_ids_logprob),
            "grammar": check_grammar(self.grammar),
        }
        kept |= {name: flag(name, getattr(self, name)) for name in ("ignore_eos", "logprobs", "after_thinking")}
        kept |= {name: real(name, getattr(self, name), *limits) for name, limits in _RANGES.items()}
        most = kept["max_new_tokens"]
        kept["min_new_tokens"] = whole("min_new_tokens", self.min_new_tokens, 0, most, f" (max_new_tokens={most})")
        for name in ("top_logprobs", "logprob_start"):
            kept[name] = whole(name, getattr(self, name), 0)
        if self.seed is not None:
            kept["seed"] = whole("seed", self.seed, -math.inf, math.inf) & MASK64
        if self.prompt_logprobs is not None:
            kept["prompt_logprobs"] = whole("prompt_logprobs", self.prompt_logprobs, 0)
        if self.allowed_token_ids is not None:
            kept["allowed_token_ids"] = token_ids("allowed_token_ids", self.allowed_token_ids)
            if not kept["allowed_token_ids"]:
                raise ValueError("allowed_token_ids is empty: no token could be drawn; leave it out to allow all")
        if not kept["logprobs"]:
            for name in ("top_logprobs", "token_ids_logprob"):
                if kept[name] and self.prompt_logprobs is None:
                    raise ValueError(f"{name}={shown(kept[name])} needs logprobs=True")
        for name, value in kept.items():
            object.__setattr__(self, name, value)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError if a token id is outside 0..vocab_size - 1, or more best tokens are wanted than there are."""
        lists = {
            "stop_token_ids": self.stop_token_ids,
            "logit_bias": tuple(token for token, _ in self.logit_bias),
            "allowed_token_ids": self.allowed_token_ids or (),
            "bad_words_ids": tuple(chain.from_iterable(self.bad_words_ids)),
            "token_ids_logprob": self.token_ids_logprob,
        }
        for name, ids in lists.items():
            if ids and max(ids) >= vocab_size:
                raise ValueError(f"{name}: token id {max(ids)} is outside the vocabulary 0..{vocab_size - 1}")
        for name in ("top_logprobs", "prompt_logprobs"):
            if (getattr(self, name) or 0) > vocab_size:
                raise ValueError(f"{name}={getattr(self, name)}, but the vocabulary has {vocab_size} tokens")

    @cached_property
    def edits(self) -> tuple[LogitsEdit, ...]:
        """What is done to the logits before a token is drawn, in the order in which it is done."""
        found = []
        if self.allowed_token_ids is not None:
            found.append(AllowedTokens(self.allowed_token_ids))
        if self.bad_words_ids:
            found.append(BadWords(self.bad_words_ids))
        if self.min_new_tokens:
            found.append(MinNewTokens(self.min_new_tokens))
        if self.logit_bias:
            found.append(LogitBias(self.logit_bias))
        penalties = Penalties(self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return (*found, penalties) if penalties != Penalties() else tuple(found)

    @cached_property
    def needs_last_token(self) -> bool:
        """Whether every token before must be known when one is drawn: then no step of it runs ahead."""
        return any(edit.needs_last_token for edit in self.edits)

    @property
    def greedy(self) -> bool:
        """The best token always wins; below 1e-5 dividing by the temperature would overflow instead."""
        return self.temperature < 1e-5 or self.top_k == 1

    @property
    def truncated(self) -> bool:
        """Only some of the tokens may be drawn."""
        return self.top_k != UNLIMITED_TOP_K or self.top_p < 1 or self.min_p > 0


def _top_k(value: Any) -> int:
    say = f", or {UNLIMITED_TOP_K} for no limit"
    top_k = whole("top_k", value, UNLIMITED_TOP_K, say=say)
    return top_k if top_k else whole("top_k", value, 1, say=say)  # 0 is one too few


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    """{id: bias}, the ids perhaps as texts as JSON has them, or pairs -> pairs."""
    what = "{token id: a number}"
    try:
        items = several("logit_bias", list(value.items()) if isinstance(value, Mapping) else value, what)
        tokens, biases = zip(*((token, bias) for token, bias in items), strict=True) if items else ((), ())
    except Exception:
        raise ValueError(f"logit_bias={shown(value)} must be {what}") from None
    ids = token_ids("logit_bias", [_number_in_text(token) for token in tokens])
    if len(set(ids)) < len(ids):
        raise ValueError(f"logit_bias={shown(value)} names a token twice")
    named = zip(ids, biases, strict=True)
    return tuple((i, real(f"logit_bias of token {i}", bias, -MAX_BIAS, MAX_BIAS)) for i, bias in named)


def _number_in_text(token: Any) -> Any:
    return int(token) if isinstance(token, str) and token.isascii() and token.isdecimal() and len(token) < 11 else token


def _sequences(name: str, value: Any) -> tuple[tuple[int, ...], ...]:
    found = tuple(token_ids(name, one) for one in several(name, value, "sequences of token ids"))
    if not all(found):
        raise ValueError(f"{name}={shown(value)}: an empty sequence forbids nothing; leave it out")
    return found
