"""Logits -> the next token. Only rank 0 has one: two random generators would fork the text.

The order of operations is vLLM's and SGLang's: penalties, temperature, top-k, top-p, min-p, draw. Each
request draws with its own seed, and the n-th token of a request always gets the n-th random number of that
seed, so that neither the batch it runs in nor a retraction changes its text.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

from common.distributed.transfer import Download, upload

try:  # a CPU build of torch comes without Triton
    from common.kernels import sampling as fused
except ImportError:
    fused = None

UNLIMITED_TOP_K = -1
_MASK64 = (1 << 64) - 1


_REAL = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


def check_numbers(params: Any, whole: Sequence[str] = (), real: Sequence[str] = ()) -> None:
    """Raises ValueError if one of these attributes is not such a number."""
    for names, kind, word in ((whole, Integral, "a whole number"), (real, Real, "a number")):
        for name in names:
            if not isinstance(value := getattr(params, name), kind):
                raise ValueError(f"{name}={value!r} must be {word}")


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
        whole = ("max_new_tokens", "top_k", *(("seed",) if self.seed is not None else ()))
        check_numbers(self, whole=whole, real=_REAL)
        if not all(isinstance(token, Integral) for token in self.stop_token_ids):
            raise ValueError(f"stop_token_ids={self.stop_token_ids!r} must be token ids, whole numbers")
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
    ahead: int = 0  # tokens drawn already that are not in output_ids yet: the step before is still running

    @property
    def drawn(self) -> int:
        """How many tokens this request has drawn: the number of its next random number."""
        return len(self.output_ids) + self.ahead


class SamplingBatch:
    """A step's rows as arrays, one number a row, so that nobody walks over them again while the batch stays the same.

    `advance()` moves every row on to its next token. Penalties read the rows' `output_ids`, which must then
    hold every token before the one that is drawn.
    """

    def __init__(self, rows: Sequence[SamplingRow]):
        self.rows = rows
        params = [row.params for row in rows]
        self.all_greedy = all(p.greedy for p in params)
        self.truncated = any(p.truncated and not p.greedy for p in params)
        self.penalized = any(p.penalized for p in params)
        self.logprobs = any(p.logprobs for p in params)
        self.seeds = np.array([row.seed & _MASK64 for row in rows], dtype=np.uint64)
        self.counts = np.array([row.drawn for row in rows], dtype=np.uint64)
        self.advanced = 0  # tokens that each row has drawn since
        self._params = params
        self._columns: torch.Tensor | None = None
        self._numbers: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def advance(self) -> None:
        self.advanced += 1

    def uniforms(self, device: torch.device) -> torch.Tensor:
        """Each row's next random number in [0, 1): [B] float32."""
        return upload(uniform(self.seeds, self.counts + np.uint64(self.advanced)).astype(np.float32), device)

    def numbers(self, device: torch.device) -> torch.Tensor:
        """What a kernel makes them of, [2, B] int64: each row's seed, and its tokens when the batch was made."""
        if self._numbers is None:
            self._numbers = upload(np.stack((self.seeds, self.counts)).view(np.int64), device)
        return self._numbers

    def columns(self, device: torch.device) -> torch.Tensor:
        """[4, B] float32: temperature (0: greedy), top_k (0: no limit), top_p, log(min_p)."""
        if self._columns is None:
            table = [
                (0.0, 0, 1.0, -math.inf) if p.greedy
                else (p.temperature, max(p.top_k, 0), p.top_p, math.log(p.min_p) if p.min_p else -math.inf)
                for p in self._params
            ]  # fmt: skip
            self._columns = upload(np.array(table, dtype=np.float32).T, device)
        return self._columns


class Drawn:
    """The tokens of a step, on their way from the device."""

    def __init__(self, tokens: torch.Tensor, logprobs: torch.Tensor | None):
        self._tokens, self._logprobs = Download(tokens), None if logprobs is None else Download(logprobs)

    def take(self) -> tuple[list[int], list[float] | None]:
        """Waits until they are here."""
        return self._tokens.numpy().tolist(), None if self._logprobs is None else self._logprobs.numpy().tolist()


def sample(
    logits: torch.Tensor, rows: Sequence[SamplingRow] | SamplingBatch
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """logits [B, V] -> (tokens [B] int64, log-probabilities [B] or None if no row asks for them).

    The way a row is drawn depends on its own parameters, never on who else is in the batch. Nothing here
    waits for a GPU.
    """
    batch = rows if isinstance(rows, SamplingBatch) else SamplingBatch(rows)
    choice = _penalize(logits.float(), batch.rows) if batch.penalized else logits
    tokens = fused.sample(choice, batch) if fused and logits.is_cuda else _sample(choice.float(), batch)
    if not batch.logprobs:
        return tokens, None
    return tokens, logits.float().log_softmax(dim=-1).gather(1, tokens.unsqueeze(1)).squeeze(1)


def _sample(logits: torch.Tensor, batch: SamplingBatch) -> torch.Tensor:
    """logits [B, V] float32 -> tokens [B]: argmax for greedy rows, inverse-CDF sampling for the others."""
    if batch.all_greedy:
        return _best(logits)
    temperature, top_k, top_p, log_min_p = batch.columns(logits.device).unsqueeze(-1)  # [B, 1] each
    greedy = temperature == 0
    scaled = logits / temperature.masked_fill(greedy, 1)
    scaled -= scaled.amax(dim=-1, keepdim=True)
    if batch.truncated:
        scaled.masked_fill_(~_kept(scaled, top_k, top_p, log_min_p), -torch.inf)
    # float64: a running float32 sum over 150,000 tokens would swallow the rare ones
    cdf = scaled.exp().cumsum(dim=-1, dtype=torch.float64)
    u = batch.uniforms(cdf.device).unsqueeze(1)
    drawn = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)
    return torch.where(greedy, _best(logits).unsqueeze(1), drawn).squeeze(1)


def _best(logits: torch.Tensor) -> torch.Tensor:
    """argmax over the vocabulary, [B, V] -> [B]. On a CPU NumPy's is vectorised and ten times as fast."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(axis=-1))
    return logits.argmax(dim=-1)


def _kept(scaled, top_k, top_p, log_min_p) -> torch.Tensor:
    """Which tokens top-k, then top-p, then min-p leave: [B, V] bool. Of equal tokens the lower ids go first.

    scaled [B, V] is the logits over the temperature, its maximum 0; the others are [B, 1].
    """
    best_first, order = scaled.sort(dim=-1, descending=True, stable=True)
    weights = best_first.exp()
    rank = torch.arange(weights.shape[1], device=weights.device)
    keep = (rank < top_k) | (top_k == 0)
    weights = weights * keep
    total = weights.cumsum(dim=-1, dtype=torch.float64)
    keep &= total - weights < top_p * total[:, -1:]  # mass of all better tokens: the one that crosses p stays
    keep &= best_first >= log_min_p
    keep[:, 0] = True
    return torch.zeros_like(keep).scatter_(1, order, keep)


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


def uniform(seed, n):
    """The n-th number in [0, 1) of a seed: a counter through splitmix64, so there is no state to keep or lose.

    Takes integers, or uint64 arrays of equal length.
    """
    x = (seed * _as(seed, 0x9E3779B97F4A7C15) + (n + _as(n, 1)) * _as(n, 0xD1342543DE82EF95)) & _as(seed, _MASK64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> _as(x, shift))) * _as(x, factor)) & _as(x, _MASK64)
    return ((x ^ (x >> _as(x, 31))) >> _as(x, 40)) / (1 << 24)  # 24 bits: every value is exact in float32


def _as(like, number: int):
    """`number` in the arithmetic of `like`: a uint64 array wraps around by itself, an int is cut by the mask."""
    return np.uint64(number) if isinstance(like, np.ndarray) else number
