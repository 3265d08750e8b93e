"""CUDA graphs for a drafter's guesses: recorded once a batch size, for trees of the usual number of nodes.

A drafter runs a small model several times, one guess behind the other, and each run has as many launches as a step of the
target's, of which none takes long: launch by launch the four runs of a draft model's chain took ten times as long as a target
of 7 billion needs to verify them (speculative/README.md has the milliseconds). So all is one recording, from the rows' last
tokens to the tree.

As in all of them (graph_runner.py) the inputs lie at fixed addresses, and batches between two sizes are padded: by rows -1, which
leave nothing. Guesses that are drawn and not chosen are launched one by one: each depends on its request's seed.
"""

import bisect
from dataclasses import replace

import numpy as np
import torch

from common.attention.kv_cache import PagedKVCache
from common.attention.sequence_table import SequenceTable
from common.distributed.transfer import copy_to
from common.draft_tree import DraftTree
from common.models.decoder import CausalLM
from common.models.drafters.contract import Drafter, Roots
from common.models.graph_runner import StepGraphs, batch_sizes
from common.models.verify_graphs import MOST_NODES


class DraftGraphs(StepGraphs):
    """`run` is the drafter's `draft`, with the same tree as without graphs. inputs, int64: rows [size], positions [size]."""

    kind = "draft"

    def __init__(
        self, drafter: Drafter, nodes: int, model: CausalLM, attention: type, cache: PagedKVCache, table: SequenceTable,
        max_batch: int,
    ):  # fmt: skip
        self.drafter, self.nodes = drafter, nodes
        self.sizes = batch_sizes(max(1, min(max_batch, MOST_NODES // nodes)))
        shapes = [(size, nodes) for size in reversed(self.sizes)]
        super().__init__(model, attention, cache, table, 0, shapes, [n for n, _ in shapes], 2 * self.sizes[-1])

    def holds(self, batch: int, nodes: int) -> bool:
        return nodes == self.nodes and batch <= self.sizes[-1]

    @torch.inference_mode()
    def run(self, rows: np.ndarray, positions: np.ndarray) -> DraftTree:
        """rows, positions [B] of the roots -> trees [B, N], copied: a step may be told of its own when the next is drafted."""
        batch = len(rows)
        size = self.sizes[bisect.bisect_left(self.sizes, batch)]
        numbers = np.full((2, size), -1, dtype=np.int64)
        numbers[:, :batch] = rows, positions
        copy_to(numbers, self.inputs[: 2 * size])
        tree = self._replay((size, self.nodes))
        return replace(tree, tokens=tree.tokens[:batch].clone(), parents=tree.parents[:batch].clone())

    def _pad(self, shape: tuple[int, int]) -> None:
        self.inputs.fill_(-1)

    def _step(self, shape: tuple[int, int], adapters: None = None) -> DraftTree:
        size, nodes = shape
        rows, positions = self.inputs[:size], self.inputs[size : 2 * size]
        # the pages behind a sequence's end are looked up and not read
        roots = Roots(rows, positions, 0, self.table.page_table.shape[1] * self.table.page_size - nodes, padded=True)
        return self.drafter.draft(self.table, roots, self.table.last_token[rows], nodes)
