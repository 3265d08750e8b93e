"""The rows of a step, as arrays: whose logits they are, and what each needs to draw its next token."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
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
    """A step's rows as arrays, one number a row, so that nobody walks over them again from one step to the next.

    `advance()` moves every row on to its next token; rows leave by `filter_batch` and join by `merge_batch`, and nobody looks at
    those that stay. If `needs_last_token`, the rows' `output_ids` must hold every token before the one that is drawn when
    `sample` is called; they are read then, so the same lists may have grown.
    """

    def __init__(self, rows: Sequence[SamplingRow]):
        self.advanced = 0  # tokens that each row has drawn since the batch was made or has changed
        self.decision: Decision | None = None
        self._become(rows, *_arrays(rows))

    def __len__(self) -> int:
        return len(self.rows)

    def advance(self) -> None:
        self.advanced += 1

    def filter_batch(self, keep: np.ndarray) -> None:
        """The rows keep [n] are the batch from now on, in this order. This and the next are SGLang's names (0.5.23,
        srt/sampling/sampling_batch_info.py, SamplingBatchInfo); vLLM's persistent batch has condense and add_request."""
        self._become([self.rows[i] for i in keep.tolist()], *(column[..., keep] for column in self._moved_on()))

    def merge_batch(self, rows: Sequence[SamplingRow]) -> None:
        """These join at the end: about to draw the token that the others draw next, if nobody calls `advance` before."""
        columns = zip(self._moved_on(), _arrays(rows), strict=True)
        self._become([*self.rows, *rows], *(np.concatenate(parts, axis=-1) for parts in columns))

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
        """What a kernel makes them of, [2, B] int64: each row's seed, and its tokens before it has `advanced`."""
        if self._numbers is None:
            self._numbers = upload(np.stack((self.seeds, self.counts)).view(np.int64), device)
        return self._numbers

    def columns(self, device: torch.device) -> torch.Tensor:
        """[4, B] float32: temperature (0: greedy), top_k (0: no limit), top_p, log(min_p)."""
        if self._there is None:
            self._there = upload(self._columns, device)
        return self._there

    def _moved_on(self) -> tuple[np.ndarray, ...]:
        """The arrays, with the tokens drawn since among the counts."""
        return self.seeds, self.counts + np.uint64(self.advanced), self._columns, self._flags

    def _become(
        self, rows: Sequence[SamplingRow], seeds: np.ndarray, counts: np.ndarray, columns: np.ndarray, flags: np.ndarray
    ) -> None:
        """seeds, counts [B], columns [4, B], flags [2, B]: see `_arrays`."""
        self.rows, self.seeds, self.counts, self._columns, self._flags = rows, seeds, counts, columns, flags
        self.advanced = 0
        temperature, top_k, top_p, log_min_p = columns
        self.all_greedy = not temperature.any()
        truncated = (top_k > 0) | (top_p < 1) | (log_min_p > -np.inf)
        self.truncated = bool(truncated.any())
        # how many tokens top-k leaves at most: to any row that is truncated, to one that has a top-k, to one that has a top-p
        left = np.where(top_k > 0, top_k, np.inf)
        self.most_kept = float(left.max(initial=0, where=truncated))
        self.largest_top_k = float(top_k.max(initial=0))
        self.widest_top_p = float(left.max(initial=0, where=top_p < 1))
        asks, has_edits = flags
        self.asked: list[int] = asks.nonzero()[0].tolist()  # rows whose log-probabilities are told
        edits = [(i, (*rows[i].edits, *rows[i].params.edits), self._now(i)) for i in has_edits.nonzero()[0].tolist()]
        self.needs_last_token = any(edit.needs_last_token for _, own, _ in edits for edit in own)
        self.edits = gather_edits(edits)
        self._there: torch.Tensor | None = None
        self._numbers: torch.Tensor | None = None

    def _now(self, i: int) -> SamplingRow:
        """Row i as an edit is to see it: `drawn` is what it has drawn by now."""
        row = self.rows[i]
        return replace(row, ahead=int(self.counts[i]) - len(row.output_ids))


def _arrays(rows: Sequence[SamplingRow]) -> tuple[np.ndarray, ...]:
    """seeds, counts [B] of tokens drawn, columns [4, B] as SamplingBatch.columns has them, flags [2, B]: asks for
    log-probabilities, has edits."""
    seeds = np.array([row.seed & MASK64 for row in rows], dtype=np.uint64)
    counts = np.array([row.drawn for row in rows], dtype=np.uint64)
    columns = np.array([_column(row.params) for row in rows], dtype=np.float32).reshape(-1, 4).T
    flags = [(row.params.logprobs, bool(row.edits or row.params.edits)) for row in rows]
    return seeds, counts, columns, np.array(flags, dtype=bool).reshape(-1, 2).T


def _column(p: SamplingParams) -> tuple[float, float, float, float]:
    if p.greedy:
        return 0.0, 0, 1.0, -math.inf
    top_k = p.top_k if 0 < p.top_k < LARGEST_TOP_K else 0
    return p.temperature, top_k, p.top_p, math.log(p.min_p) if p.min_p else -math.inf


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
