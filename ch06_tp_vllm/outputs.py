"""What became of a request, in vLLM's shape."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class CompletionOutput:
    """One answer. finish_reason: None while it grows, then stop, length or abort; stop_reason: the stop token."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[float] | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None


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
        return RequestOutput(**value | {"outputs": [CompletionOutput(**one) for one in value["outputs"]]})
