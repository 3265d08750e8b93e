"""vLLM's SamplingParams, for the names; what they mean is in common/sampling/params.py."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from common.sampling.params import SamplingParams as RowParams
from common.values import whole


@dataclass(frozen=True)
class SamplingParams:
    """How to answer one prompt: n answers of at most max_tokens each. As in vLLM the default draws (temperature 1).

    top_k: 0 or -1 is no limit. stop: texts that end an answer, and are not in it. logprobs: None, or 1 for the
    log-probability of each chosen token.
    Raises ValueError for a value outside its range.
    """

    n: int = 1
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self):
        for name in ("n", "max_tokens"):
            object.__setattr__(self, name, whole(name, getattr(self, name), 1))
        # tuples from here on
        object.__setattr__(self, "stop", _several("stop", self.stop, str))
        object.__setattr__(self, "stop_token_ids", _several("stop_token_ids", self.stop_token_ids, Integral))
        if not all(self.stop):
            raise ValueError("stop: an empty text would end every answer at once; leave it out")
        if self.logprobs not in (None, 0, 1):
            raise ValueError(f"logprobs={self.logprobs}: only the chosen token's is kept; use 1 or None")
        self.row()  # the other ranges

    def row(self) -> RowParams:
        """The same in the sampler's terms."""
        return RowParams(
            max_new_tokens=self.max_tokens, temperature=self.temperature, top_k=self.top_k or -1, top_p=self.top_p,
            min_p=self.min_p, repetition_penalty=self.repetition_penalty, presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty, seed=self.seed, stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos, logprobs=self.logprobs is not None,
        )  # fmt: skip


def _several(name: str, given: Any, kind: type) -> tuple:
    """None, one, or several -> a tuple. Raises ValueError for anything else."""
    values = () if given is None else (given,) if isinstance(given, str | int) else given
    values = tuple(values) if isinstance(values, Iterable) else (values,)
    if not all(isinstance(value, kind) for value in values):
        raise ValueError(f"{name}={given!r} must be {'texts' if kind is str else 'token ids, whole numbers'}")
    return values
