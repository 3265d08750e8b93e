"""Guesses that are drawn: a chain whose every guess comes from the draft's own distribution q, which is kept for whoever verifies.

A draft's best token is right as often as the target says just that: p(best). A guess that is drawn from q may be kept with
min(1, p/q), in a share of the sum of min(p, q), which is more wherever the draft is as undecided as the target is. So where
text is sampled, guesses are drawn with the request's temperature (Leviathan et al. 2023; common/sampling/acceptance.py,
`rejection_sampling`). A row that is greedy has q certain of its best token.

Every rank draws for itself and comes to the same guess. All have the same logits, by an all-gather; a guess for the place n of a
text is drawn with the n-th number of its request's seed, in a stream of its own, so none is used again for a place that counts;
and shares of q are added up as whole numbers, since a sum of floats may come out differently elsewhere.
SGLang 0.5.23 does it with --speculative-use-rejection-sampling: EAGLE and EAGLE3, chains (srt/arg_groups/speculative_hook.py).
"""

from dataclasses import dataclass

import numpy as np
import torch

from common.distributed.transfer import upload
from common.layers.vocab import join_logits
from common.parallel_state import TPGroup, all_gather
from common.sampling.batch import uniform

GUESSES = np.uint64(0xC2B2AE3D27D4EB4F)  # the stream, beside those of sampling/nodes.py
WHOLE = 1 << 40  # shares of q are counted in such parts


@dataclass(frozen=True)
class DrawnRows:
    """Of the B sequences of a verify step whose guesses are to be drawn: temperatures [B], 0 for greedy; seeds [B] uint64."""

    temperatures: np.ndarray
    seeds: np.ndarray


class Draws:
    """Of one chain for each of the B rows, whose last tokens stand at positions [B]. vocab_size V: the target's."""

    def __init__(self, rows: DrawnRows, positions: np.ndarray, vocab_size: int, device: torch.device):
        self.rows, self.positions, self.vocab_size = rows, positions.astype(np.uint64), vocab_size
        self.temperatures = upload(rows.temperatures.astype(np.float32), device).unsqueeze(1)
        self._q: list[torch.Tensor] = []  # of each guess so far [B, V]; rank 0's
        self._depth = 0

    def guess(
        self, logits_local: torch.Tensor, draft_vocab: int, ids: torch.Tensor | None, tp: TPGroup
    ) -> torch.Tensor:
        """logits_local [B, V'/R] of the draft -> the next guesses [B], the target's ids. ids [V']: where the draft's
        vocabulary is another one, which tokens of the target it says."""
        parts = [logits_local]
        if tp.size > 1:
            parts = all_gather(logits_local, tp, "draft logits")  # COMM all-gather [B, V/R]: all ranks draw alike
        logits = join_logits(parts, draft_vocab).float()
        greedy = self.temperatures == 0
        q = (logits / self.temperatures.masked_fill(greedy, 1)).softmax(dim=-1)
        certain = torch.zeros_like(q).scatter_(1, logits.argmax(dim=-1, keepdim=True), 1)
        q = torch.where(greedy, certain, q)
        self._depth += 1
        numbers = uniform(self.rows.seeds ^ GUESSES, self.positions + np.uint64(self._depth))
        u = upload(numbers, q.device).unsqueeze(1)  # [B, 1] float64
        counts = (q.double() * WHOLE).long().cumsum(dim=-1)
        at = torch.searchsorted(counts, (u * counts[:, -1:]).long(), right=True).clamp(
            max=draft_vocab - 1
        )  # NaN has no place
        if tp.rank == 0:
            self._q.append(q if ids is None else q.new_zeros(len(q), self.vocab_size).index_copy_(1, ids, q))
        return (at if ids is None else ids[at]).squeeze(1)

    def q(self, nodes: int) -> torch.Tensor | None:
        """[B, N, V] on rank 0: what the guess below each node was drawn from; below the last one is none."""
        if not self._q:
            return None
        none = self._q[0].new_zeros(len(self.temperatures), nodes - len(self._q), self.vocab_size)
        none[..., 0] = 1  # guesses that fill a chain up are token 0 for certain
        return torch.cat((torch.stack(self._q, dim=1), none), dim=1)
