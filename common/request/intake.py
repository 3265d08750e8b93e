"""The door of both engines: what a user asks for -> a request that can run, or one ValueError before anything is queued.

An engine that has let a request in must be able to end it. So everything that could go wrong because of a value is looked at
here, once, for `LLM`, `LLMEngine`, `Engine` and `TPScheduler` alike: what is text and what is a token, lengths against the
model and the pool, stop texts against a missing tokenizer, namespaces that must be comparable on every rank.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from typing import Any, TypeVar

from common.sampling.params import SamplingParams
from common.text.tokenizer import Tokenizer
from common.values import prompt_ids, shown, text, whole

MANY_NAMES = 10  # more are no help in an error
MANY_WRONG = 2  # of each kind: who has more begins with these
PLAIN = (bool, int, float, str, dict, list)  # what a default may be
F = TypeVar("F", bound=Callable)
PRIORITY_LIMIT = 1 << 31  # SGLang and vLLM send priorities as machine integers; so does a task


@dataclass(frozen=True)
class Words:
    """How an engine calls things, so that an error says what its user can change."""

    max_tokens: str  # max_tokens | max_new_tokens
    token_ids: str  # prompt_token_ids | input_ids
    pool: str  # the argument that makes the pool larger


@dataclass(frozen=True)
class Intake:
    """vocab_size V; model_limit: positions of the model; pool_tokens: slots of the whole pool, by pages of page_size."""

    tokenizer: Tokenizer | None
    vocab_size: int
    model_limit: int
    pool_tokens: int
    page_size: int
    words: Words

    def ids(self, prompt: Any, name: str = "the prompt") -> list[int]:
        """A text or token ids (a list, or an array or tensor of one dimension) -> token ids, all of them in the vocabulary."""
        if isinstance(prompt, str):
            text(name, prompt)
            if self.tokenizer is None:
                raise ValueError(f"this checkpoint has no tokenizer; give {self.words.token_ids} instead of text")
            prompt = self.tokenizer.encode(prompt)
        return prompt_ids(name, prompt, self.vocab_size)

    def fits(self, ids: Sequence[int], params: SamplingParams) -> None:
        """Raises ValueError for a request that could never come to its end, or speaks of tokens that are not there."""
        max_tokens = params.max_new_tokens
        params.check_vocabulary(self.vocab_size)
        if not ids:
            raise ValueError("the prompt is empty: there is no token to continue from")
        total = len(ids) + max_tokens
        said = f"prompt {len(ids)} + {self.words.max_tokens} {max_tokens} = {total} tokens"
        if total > self.model_limit:
            left = self.model_limit - len(ids)
            way_out = f" or ask for at most {left}" if left > 0 else f" to {self.model_limit - 1} or fewer"
            raise ValueError(f"{said}, but the model ends at {self.model_limit}; shorten the prompt{way_out}")
        if -(-total // self.page_size) * self.page_size > self.pool_tokens:
            raise ValueError(
                f"{said}, but the pool holds {self.pool_tokens}; shorten the request or raise {self.words.pool}"
            )

    def room_for(self, ids: Sequence[int]) -> int:
        """The most tokens that can follow `ids`."""
        whole_pages = self.pool_tokens // self.page_size * self.page_size
        return max(1, min(self.model_limit, whole_pages) - len(ids))

    def stops(self, stop: Sequence[str]) -> None:
        """Raises ValueError if there is no text to find them in."""
        if stop and self.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer, so no text to stop at; use stop_token_ids")

    @staticmethod
    def namespace(name: str, value: Any) -> str | None:
        """A salt or an extra key: keeps what this request caches apart from what those of other keys cache."""
        return text(name, value, empty=False, none=True)

    @staticmethod
    def priority(value: Any) -> int:
        return whole("priority", value, -PRIORITY_LIMIT, PRIORITY_LIMIT - 1)


def without_idle(given: Mapping[str, Any], idle: Mapping[str, Any]) -> dict[str, Any]:
    """`given` less those names of `idle` whose value asks for nothing: None, or the default that stands there.

    Scripts for vLLM and SGLang spell defaults out (pipeline_parallel_size=1, quantization=None), and an engine without
    pipelines does what they ask for.
    """
    return {name: value for name, value in given.items() if not (name in idle and _asks_nothing(value, idle[name]))}


def _asks_nothing(value: Any, default: Any) -> bool:
    return value is None or (
        type(value) in PLAIN and value == default and (type(value) is bool) == (type(default) is bool)
    )


def refuse_unknown(
    what: str, given: Iterable[str], known: Sequence[str], elsewhere: Mapping[str, str] | None = None, where: str = ""
) -> None:
    """Raises ValueError for names that nobody here would read; `elsewhere` says what to use instead of some, `where` has all."""
    wrong, elsewhere = sorted(set(map(str, given)) - set(known)), elsewhere or {}
    if not wrong:
        return
    absent, unknown = [[name for name in wrong if (name in elsewhere) == there][:MANY_WRONG] for there in (True, False)]
    said = [f"{what} {name} is not here: {elsewhere[name]}" for name in absent]
    if unknown:
        names = ", ".join(one if one.isidentifier() and len(one) < 60 else shown(one) for one in unknown)
        near = dict.fromkeys(close for name in unknown for close in get_close_matches(name, known, 3))
        if len(known) <= MANY_NAMES:
            way_out = f"known: {', '.join(sorted(known))}"
        elif near:
            way_out = f"did you mean {' or '.join(near)}?"
        else:
            way_out = where or f"there are {len(known)}, and none is like it"
        said.append(f"unknown {what} {names}; {way_out}")
    raise ValueError("; ".join(said))


def says_names(what: str, elsewhere: Mapping[str, str], idle: Mapping[str, Any]) -> Callable[[F], F]:
    """Of a method, or of a class for its constructor: leaves out what asks for nothing, and refuses a name that it has not
    in a line that helps, where Python would raise a TypeError that does not."""

    def decorate(made: F) -> F:
        if isinstance(made, type):
            made.__init__ = decorate(made.__init__)
            return made
        known = list(signature(made).parameters)[1:]  # without self
        where = f"help({made.__qualname__.removesuffix('.__init__')}) has them all"

        @wraps(made)
        def call(self, *args, **given):
            given = without_idle(given, idle)
            refuse_unknown(what, given, known, elsewhere, where)
            return made(self, *args, **given)

        return call

    return decorate
