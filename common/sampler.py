"""Logits -> the next token. Only rank 0 has one: two random generators would fork the text.

The order of operations is vLLM's and SGLang's: penalties, temperature, top-k, top-p, min-p, draw. Each
request draws with its own seed, and the n-th token of a request always gets the n-th random number of that
seed, so that neither the batch it runs in nor a retraction changes its text.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

UNLIMITED_TOP_K = -1
_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingParams:
    """How to choose the tokens of one request. temperature = 0 is greedy, and the default.

    Raises ValueError for a value outside its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = UNLIMITED_TOP_K
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # divides (multiplies) positive (negative) logits of tokens seen so far
    presence_penalty: float = 0.0  # subtracted once for each token already put out
    frequency_penalty: float = 0.0  # subtracted as often as the token was put out
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False  # log-probability of each chosen token under the model's own distribution

    def __post_init__(self):
        for ok, complaint in (
            (self.max_new_tokens >= 1, f"max_new_tokens={self.max_new_tokens} must be at least 1"),
            (0 <= self.temperature < float("inf"), f"temperature={self.temperature} must be >= 0 (0 is greedy)"),
            (self.top_k == UNLIMITED_TOP_K or self.top_k >= 1, f"top_k={self.top_k} must be >= 1, or -1 for no limit"),
            (0 < self.top_p <= 1, f"top_p={self.top_p} must be in (0, 1]; 1 keeps every token"),
            (0 <= self.min_p <= 1, f"min_p={self.min_p} must be in [0, 1]; 0 keeps every token"),
            (0 < self.repetition_penalty < float("inf"), f"repetition_penalty={self.repetition_penalty} must be > 0; 1 is none"),
            (abs(self.presence_penalty) <= 2, f"presence_penalty={self.presence_penalty} must be in [-2, 2]; 0 is none"),
            (abs(self.frequency_penalty) <= 2, f"frequency_penalty={self.frequency_penalty} must be in [-2, 2]; 0 is none"),
        ):  # fmt: skip
            if not ok:
                raise ValueError(complaint)

    @property
    def greedy(self) -> bool:
        """The best token always wins; below 1e-5 dividing by the temperature would overflow instead."""
        return self.temperature < 1e-5 or self.top_k == 1

    @property
    def truncated(self) -> bool:
        """Only some of the tokens may be drawn."""
        return self.top_k != UNLIMITED_TOP_K or self.top_p < 1 or self.min_p > 0

    @property
    def penalized(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True)
class SamplingRow:
    """One row of a step's logits: whose it is and what came before it."""

    params: SamplingParams
    seed: int
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]  # put out so far


def sample(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """logits [B, V] -> (tokens [B] int64, log-probabilities [B] or None if no row asks for them)."""
    logits = logits.float()
    choice = _penalize(logits, rows) if any(row.params.penalized for row in rows) else logits
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    for how in (_best, _draw, _draw_sorted):
        members = [i for i, row in enumerate(rows) if _how(row.params) is how]
        if len(members) == len(rows):  # all alike, as nearly always: no copy of the logits
            tokens = how(choice, rows)
        elif members:
            tokens[members] = how(choice[members], [rows[i] for i in members])
    if not any(row.params.logprobs for row in rows):
        return tokens, None
    return tokens, logits.log_softmax(dim=-1).gather(1, tokens.unsqueeze(1)).squeeze(1)


def _how(params: SamplingParams) -> Callable:
    """By what is asked for, never by who else is in the batch: the same row always takes the same way."""
    if params.greedy:
        return _best
    return _draw_sorted if params.truncated else _draw


def _best(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """argmax over the vocabulary, [B, V] -> [B]. On a CPU NumPy's is vectorised and ten times as fast."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def _draw(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Inverse-CDF sampling over the whole vocabulary, in its own order: nothing has to be sorted. [B, V] -> [B]."""
    temperature = _column([row.params.temperature for row in rows], logits)
    # float64: a running float32 sum over 150,000 tokens would swallow the rare ones
    cdf = (logits / temperature).softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    return torch.searchsorted(cdf, _uniforms(rows, cdf) * cdf[:, -1:], right=True).squeeze(1)


def _draw_sorted(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """The same over the best tokens only: what top-k, top-p and min-p leave. [B, V] -> [B]."""
    params = [row.params for row in rows]
    temperature = _column([p.temperature for p in params], logits)
    top_k = _column([logits.shape[1] if p.top_k < 0 else p.top_k for p in params], logits)
    logits, order = (logits / temperature).sort(dim=-1, descending=True, stable=True)
    probs = logits.softmax(dim=-1)
    before = probs.cumsum(dim=-1) - probs  # mass of all better tokens
    keep = torch.arange(probs.shape[1], device=logits.device) < top_k
    kept_mass = (probs * keep).sum(dim=-1, keepdim=True)
    keep &= before < _column([p.top_p for p in params], logits) * kept_mass  # the token that crosses p stays
    keep &= probs >= _column([p.min_p for p in params], logits) * probs[:, :1]
    keep[:, 0] = True
    cdf = (probs * keep).cumsum(dim=-1)
    # the last kept token ends the CDF at its total; u < 1 keeps the draw in front of it
    drawn = torch.searchsorted(cdf, _uniforms(rows, cdf) * cdf[:, -1:], right=True)
    drawn = torch.minimum(drawn, keep.sum(dim=-1, keepdim=True) - 1)
    return order.gather(1, drawn).squeeze(1)


def _column(values: list, like: torch.Tensor) -> torch.Tensor:
    """One number a row, [B, 1]."""
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)


def _uniforms(rows: Sequence[SamplingRow], like: torch.Tensor) -> torch.Tensor:
    """Each row's next random number in [0, 1), [B, 1]."""
    return _column([uniform(row.seed, len(row.output_ids)) for row in rows], like)


def _penalize(logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
    """Repetition penalty over prompt and output (Keskar et al. 2019), presence and frequency over the output."""
    logits = logits.clone()
    for i, row in enumerate(rows):
        p = row.params
        if p.repetition_penalty != 1:
            seen = torch.tensor(sorted({*row.prompt_ids, *row.output_ids}), dtype=torch.int64, device=logits.device)
            x = logits[i, seen]
            logits[i, seen] = torch.where(x > 0, x / p.repetition_penalty, x * p.repetition_penalty)
        if row.output_ids and (p.presence_penalty or p.frequency_penalty):
            counts = Counter(row.output_ids)
            put_out = torch.tensor(list(counts), device=logits.device)
            times = torch.tensor(list(counts.values()), dtype=torch.float32, device=logits.device)
            logits[i, put_out] -= p.presence_penalty + p.frequency_penalty * times
    return logits


def uniform(seed: int, n: int) -> float:
    """The n-th number in [0, 1) of a seed: a counter through splitmix64, so there is no state to keep or lose."""
    x = (seed * 0x9E3779B97F4A7C15 + (n + 1) * 0xD1342543DE82EF95) & _MASK64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> shift)) * factor) & _MASK64
    return ((x ^ (x >> 31)) >> 40) / (1 << 24)  # 24 bits: every value is exact in float32
