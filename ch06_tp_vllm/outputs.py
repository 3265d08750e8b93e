"""What became of a request, in vLLM's shape."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Logprob:
    """Of the token that was chosen; only that is kept."""

    logprob: float
    decoded_token: str | None = None


@dataclass(frozen=True)
class CompletionOutput:
    """One answer. `text` only grows, and never shows half a character.

    finish_reason: None while it grows, then stop, length or abort. stop_reason: which of the stop_token_ids or
    stop texts ended it, None if it was the model's own end. logprobs: for each token {token id: Logprob}.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its n answers so far. `text` leaves special tokens out, `token_ids` keeps them."""

    request_id: str
    prompt: str | None  # None if it came as token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> "RequestOutput":
        answers = [CompletionOutput(**one | {"logprobs": _logprobs(one["logprobs"])}) for one in value["outputs"]]
        return RequestOutput(**value | {"outputs": answers})


def _logprobs(values: list[dict[str, dict]] | None) -> list[dict[int, Logprob]] | None:
    """Behind a trip through JSON: its keys are texts."""
    return values and [{int(token): Logprob(**logprob) for token, logprob in one.items()} for one in values]
