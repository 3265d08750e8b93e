"""The rows of a step, as arrays: whose logits they are, and what each needs to draw its next token."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from common.distributed.transfer import upload
from common.sampling.edits import LogitsEdit, gather_edits
from common.sampling.params import MASK64, SamplingParams

LARGEST_TOP_K = 1 << 24  # no vocabulary is as large, and up to here float32 has every whole number


@dataclass(frozen=True)
class SamplingRow:
    """One row of a step's logits: whose it is and what came before it."""

    params: SamplingParams
    seed: int
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]  # put out so far
    ahead: int = 0  # tokens drawn already that are not in output_ids yet: the step before is still running
    end_ids: Collection[int] = ()  # tokens that min_new_tokens holds back: stop_token_ids and the model's end tokens
    edits: Sequence[LogitsEdit] = ()  # of a capability that has more to say than the params

    @property
    def drawn(self) -> int:
        """How many tokens this request has drawn: the number of its next random number."""
        return len(self.output_ids) + self.ahead


class Decision(Protocol):
    """A rule in the place of drawing each row by itself: probabilities [B, V] -> tokens [B], -1 for rows that do not count."""

    def __call__(self, p: torch.Tensor) -> torch.Tensor: ...


class SamplingBatch:
    """A step's rows as arrays, one number a row, so that nobody walks over them again while the batch stays the same.

    `advance()` moves every row on to its next token. If `needs_last_token`, the rows' `output_ids` must hold every
    token before the one that is drawn when `sample` is called; they are read then, so the same lists may have grown.
    """

    def __init__(self, rows: Sequence[SamplingRow]):
        self.rows = rows
        params = [row.params for row in rows]
        self.all_greedy = all(p.greedy for p in params)
        self.truncated = any(p.truncated and not p.greedy for p in params)
        edits = [(i, (*row.edits, *row.params.edits), row) for i, row in enumerate(rows)]
        self.needs_last_token = any(edit.needs_last_token for _, own, _ in edits for edit in own)
        self.edits = gather_edits(edits)
        self.asked = [i for i, p in enumerate(params) if p.logprobs]  # rows whose log-probabilities are told
        self.seeds = np.array([row.seed & MASK64 for row in rows], dtype=np.uint64)
        self.counts = np.array([row.drawn for row in rows], dtype=np.uint64)
        self.advanced = 0  # tokens that each row has drawn since
        self.decision: Decision | None = None
        self._params = params
        self._columns: torch.Tensor | None = None
        self._numbers: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def advance(self) -> None:
        self.advanced += 1

    def edited(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [B, V] after the edits of all rows; another tensor if there are any."""
        if not self.edits:
            return logits
        logits = logits.to(torch.float32, copy=True)
        for edit in self.edits:
            edit.apply(logits, self.advanced)
        return logits

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
                else (
                    p.temperature, p.top_k if 0 < p.top_k < LARGEST_TOP_K else 0, p.top_p,
                    math.log(p.min_p) if p.min_p else -math.inf,
                )
                for p in self._params
            ]  # fmt: skip
            self._columns = upload(np.array(table, dtype=np.float32).T, device)
        return self._columns


def uniform(seed, n):
    """The n-th number in [0, 1) of a seed: a counter through splitmix64, so there is no state to keep or lose.

    Takes integers, or uint64 arrays of equal length.
    """
    x = (seed * _as(seed, 0x9E3779B97F4A7C15) + (n + _as(n, 1)) * _as(n, 0xD1342543DE82EF95)) & _as(seed, MASK64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = ((x ^ (x >> _as(x, shift))) * _as(x, factor)) & _as(x, MASK64)
    return ((x ^ (x >> _as(x, 31))) >> _as(x, 40)) / (1 << 24)  # 24 bits: every value is exact in float32


def derived_seed(seed: int, n: int) -> int:
    """The n-th of the seeds that one seed stands for: of requests that bring none, of several answers to a prompt."""
    return int(uniform(seed, n) * (1 << 24))


def _as(like, number: int):
    """`number` in the arithmetic of `like`: a uint64 array wraps around by itself, an int is cut by the mask."""
    return np.uint64(number) if isinstance(like, np.ndarray) else number
