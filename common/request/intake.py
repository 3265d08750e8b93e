"""The door of both engines: what a user asks for -> a request that can run, or one ValueError before anything is queued.

An engine that has let a request in must be able to end it. So everything that could go wrong because of a value is looked at
here, once, for `LLM`, `LLMEngine`, `Engine` and `TPScheduler` alike: what is text and what is a token, lengths against the
model and the pool, stop texts against a missing tokenizer, namespaces that must be comparable on every rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from common.sampling.params import SamplingParams
from common.text.tokenizer import Tokenizer
from common.values import prompt_ids, text, whole

NO_TOKENIZER = "there is no tokenizer (none lies beside the model, or skip_tokenizer_init=True)"
PRIORITY_LIMIT = 1 << 31  # SGLang and vLLM send priorities as machine integers; so does a task


@dataclass(frozen=True)
class Words:
    """How an engine calls things, so that an error says what its user can change."""

    max_tokens: str  # max_tokens | max_new_tokens
    token_ids: str  # prompt_token_ids | input_ids
    pool: str  # the argument that makes the pool larger


class Eyes(Protocol):
    """What a model that sees lets in (ch07_sglang_radix/images/intake.py)."""

    def from_now(self) -> "Eyes":
        """For one request: what it fetches from elsewhere has its time from now on, all of it together."""

    def opened(self, image: Any) -> Any:
        """A picture as it travels. Raises ValueError for what is none."""

    def __call__(self, ids: list[int], opened: Sequence[Any]) -> tuple[list[int], Any]:
        """Token ids with room for the rows of each, and the pictures of the prompt."""


@dataclass(frozen=True)
class Intake:
    """vocab_size V; model_limit: tokens of a request, shortened_by the argument of this name or the model's positions;
    pool_tokens: slots of the whole pool, by pages of page_size. see: of a model that sees, (token ids, pictures) -> the ids with
    room for them, and the pictures of the prompt."""

    tokenizer: Tokenizer | None
    vocab_size: int
    model_limit: int
    pool_tokens: int
    page_size: int
    words: Words
    shortened_by: str | None = None
    see: Eyes | None = None

    def ids(self, prompt: Any, name: str = "the prompt") -> list[int]:
        """A text or token ids (a list, or an array or tensor of one dimension) -> token ids, all of them in the vocabulary."""
        if isinstance(prompt, str):
            text(name, prompt)
            if self.tokenizer is None:
                raise ValueError(f"{NO_TOKENIZER}; give {self.words.token_ids} instead of text")
            prompt = self.tokenizer.encode(prompt)
        return prompt_ids(name, prompt, self.vocab_size)

    def from_now(self) -> "Intake":
        """The same for one request, whose pictures have a limited time to come, all of them together."""
        return self if self.see is None else replace(self, see=self.see.from_now())

    def opened(self, images: Sequence[Any]) -> list[Any]:
        """The same pictures as they travel, which know how many rows they have; `shown` takes them, too. May take a while."""
        if self.see is None and images:
            raise ValueError("image_data: this model reads text only; use one with a vision tower, or leave it out")
        return [self.see.opened(one) for one in images]

    def shown(self, ids: list[int], images: Sequence[Any]) -> tuple[list[int], Any]:
        """A prompt with its pictures (None if it has none)."""
        opened = self.opened(images)
        return (ids, None) if self.see is None else self.see(ids, opened)

    def fits(self, ids: Sequence[int], params: SamplingParams) -> None:
        """Raises ValueError for a request that could never come to its end, or speaks of tokens that are not there."""
        max_tokens = params.max_new_tokens
        params.check_vocabulary(self.vocab_size)
        if params.grammar and self.tokenizer is None:
            raise ValueError(f"{NO_TOKENIZER}, so no text for {params.grammar[0]} to hold for; leave it out")
        if not ids:
            raise ValueError("the prompt is empty: there is no token to continue from")
        total = len(ids) + max_tokens
        said = f"prompt {len(ids)} + {self.words.max_tokens} {max_tokens} = {total} tokens"
        if total > self.model_limit:
            left = self.model_limit - len(ids)
            way_out = f" or ask for at most {left}" if left > 0 else f" to {self.model_limit - 1} or fewer"
            end = f"{self.shortened_by} is" if self.shortened_by else "the model ends at"
            raise ValueError(f"{said}, but {end} {self.model_limit}; shorten the prompt{way_out}")
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
            raise ValueError(f"{NO_TOKENIZER}, so no text to stop at; use stop_token_ids")

    @staticmethod
    def namespace(name: str, value: Any) -> str | None:
        """A salt or an extra key: keeps what this request caches apart from what those of other keys cache."""
        return text(name, value, empty=False, none=True)

    @staticmethod
    def priority(value: Any) -> int:
        return whole("priority", value, -PRIORITY_LIMIT, PRIORITY_LIMIT - 1)
