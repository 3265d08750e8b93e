"""What became of a request, in vLLM's shape."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Logprob:
    """rank: 1 is the most probable token of its position."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


Logprobs = list[dict[int, Logprob] | None]  # a position: {token id: Logprob}


@dataclass(frozen=True)
class RequestMetrics:
    """Seconds of the clock (time.time), rank 0's; None: not yet."""

    arrival_time: float = 0.0
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass(frozen=True)
class CompletionOutput:
    """One answer. `text` only grows, and never shows half a character.

    finish_reason: None while it grows, then stop, length, abort or error. stop_reason: which of the stop_token_ids or
    stop texts ended it, None if it was the model's own end; what went wrong, if it was an error. logprobs: for each token
    {token id: Logprob}, of the chosen one and as many of the best as were asked for.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A prompt and its n answers so far. `text` leaves special tokens out (unless told not to), `token_ids` keeps them.

    prompt_logprobs: for each token of the prompt, given those before it; None for the first.
    """

    request_id: str
    prompt: str | None  # None if it came as token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int
    prompt_logprobs: Logprobs | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> "RequestOutput":
        answers = [CompletionOutput(**one | {"logprobs": _logprobs(one["logprobs"])}) for one in value["outputs"]]
        rest = {"prompt_logprobs": _logprobs(value["prompt_logprobs"]), "metrics": RequestMetrics(**value["metrics"])}
        return RequestOutput(**value | {"outputs": answers} | rest)


def _logprobs(values: list[dict[str, dict] | None] | None) -> Logprobs | None:
    """Behind a trip through JSON: its keys are texts."""
    return values and [one and {int(token): Logprob(**told) for token, told in one.items()} for one in values]
