"""The rows of a verify step: every node of a tree is drawn from as if the text up to it were true.

A node's history is its sequence's tokens and the guesses on the path to it; its random number is the one that a plain decode would
use at that place, which the depth says. So what is drawn along the path that comes out is what would have been drawn one by one.
"""

from collections.abc import Sequence

import numpy as np
import torch

from common.distributed.transfer import Download, upload
from common.draft_tree import DraftTree
from common.sampling.acceptance import Rule, decide
from common.sampling.batch import SamplingBatch, SamplingRow, uniform
from common.sampling.params import MASK64

# streams of random numbers beside the one that tokens are drawn with
COINS, LAST = np.uint64(0x9E6C63D0876A9A47), np.uint64(0xB5297A4D2F1E8C3B)


def node_batch(rows: Sequence[SamplingRow], tree: DraftTree, rule: Rule | None = None) -> SamplingBatch:
    """rows [B], of the roots -> a batch of B * N rows, sequence by sequence.

    Where a row has edits (a penalty, a grammar), every node gets its history; its `output_ids` must then hold all tokens up to the
    root, and the tree is waited for. rule: which guesses are kept, if not those that are drawn (acceptance.py); it then depends on
    the guesses, and on how steps fall, which tokens come out.
    """
    if any(row.edits or row.params.edits for row in rows):
        batch = SamplingBatch([one for row in _histories(rows, tree) for one in row])
    else:
        batch = _NodeBatch(rows, tree)
    if rule:
        batch.decision = _ByRule(rows, tree, rule)
    return batch


class _ByRule:
    """A Decision: the path that a rule takes down each tree. Waits for the device."""

    def __init__(self, rows: Sequence[SamplingRow], tree: DraftTree, rule: Rule):
        self.tree, self.rule = tree, rule
        self.seeds = np.array([row.seed & MASK64 for row in rows], dtype=np.uint64)
        self.counts = np.array([row.drawn for row in rows], dtype=np.uint64)

    def __call__(self, p: torch.Tensor) -> torch.Tensor:
        batch, nodes = self.tree.tokens.shape
        numbers = self.counts[:, None] * np.uint64(nodes) + np.arange(nodes, dtype=np.uint64)
        coins = uniform(np.broadcast_to(self.seeds[:, None] ^ COINS, numbers.shape), numbers)
        coins, last = (upload(u.astype(np.float32), p.device) for u in (coins, uniform(self.seeds ^ LAST, self.counts)))
        return decide(self.tree, p.view(batch, nodes, -1), coins, last, self.rule).flatten()


class _NodeBatch(SamplingBatch):
    """No edits: one number a node, which the depth brings; trees that a GPU has made need not be known here."""

    def __init__(self, rows: Sequence[SamplingRow], tree: DraftTree):
        super().__init__(rows)
        self._depth, (_, self._nodes) = tree.depth, tree.depth.shape
        self.rows = [row for row in rows for _ in range(self._nodes)]
        self.asked = [b * self._nodes + i for b in self.asked for i in range(self._nodes)]

    def uniforms(self, device: torch.device) -> torch.Tensor:
        ahead = self.counts[:, None] + np.arange(self._nodes, dtype=np.uint64)  # [B, N]: by depth
        numbers = uniform(np.broadcast_to(self.seeds[:, None], ahead.shape), ahead).astype(np.float32)
        return upload(numbers, device).gather(1, self._depth).flatten()

    def numbers(self, device: torch.device) -> torch.Tensor:
        seeds, counts = super().numbers(device).unsqueeze(-1)  # [B, 1] each
        return torch.stack((seeds.expand_as(self._depth), counts + self._depth)).flatten(1)

    def columns(self, device: torch.device) -> torch.Tensor:
        return super().columns(device).repeat_interleave(self._nodes, dim=1)


def _histories(rows: Sequence[SamplingRow], tree: DraftTree) -> list[list[SamplingRow]]:
    """Of each sequence, each node's row; an edit that remembers what it has read gets a branch of its own for every node."""
    guesses, parents = Download(tree.tokens), Download(tree.parents)
    branches = []
    for row, tokens, up in zip(rows, guesses.numpy().tolist(), parents.numpy().tolist(), strict=True):
        paths: list[list[int]] = [[]]
        for token, parent in zip(tokens[1:], up[1:], strict=True):
            paths.append([*paths[parent], token])
        branches.append([
            SamplingRow(
                row.params, row.seed, row.prompt_ids, [*row.output_ids, *path], row.ahead, row.end_ids,
                [edit.branch(row.output_ids) for edit in row.edits],
            )
            for path in paths
        ])  # fmt: skip
    return branches
