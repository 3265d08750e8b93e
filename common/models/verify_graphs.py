"""CUDA graphs for verify steps (draft_tree.py says what these are): recorded once a batch size and number of nodes.

As for decode (graph_runner.py) the inputs lie at fixed addresses, and batches between two sizes are padded. A tree's mask and
depths are worked out inside the graph, from its parents, and so is the plan of the step; walking the tree is not part of it, since
tokens are drawn in between.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from common.attention.kv_cache import PagedKVCache
from common.attention.sequence_table import SequenceTable, StepInputs
from common.distributed.transfer import copy_to
from common.draft_tree import DraftTree
from common.layers.adapter_rows import AdapterBlocks
from common.models.decoder import CausalLM
from common.models.graph_runner import StepGraphs, batch_sizes

# of a recorded step, all trees together: a larger one has launches long enough, and logits by the gigabyte
MOST_NODES = 512


@dataclass(frozen=True)
class VerifiedStep:
    """What a replay leaves: the step as it was planned, this rank's logits [B * N, V/R], hidden [B * N, D], and what entered the
    layers that were asked for. Valid until the next run."""

    inputs: StepInputs
    logits: torch.Tensor
    hidden: torch.Tensor
    entering: dict[int, torch.Tensor] | None

    def of(self, batch: int, nodes: int) -> "VerifiedStep":
        """Without the padding behind the first `batch` sequences."""
        n, step = batch * nodes, self.inputs
        meta = replace(step.meta, slot_mapping=step.meta.slot_mapping[:n])
        inputs = StepInputs(step.input_ids[:n], step.positions[:n], step.rows[:batch], meta)
        entering = self.entering and {layer: hidden[:n] for layer, hidden in self.entering.items()}
        return VerifiedStep(inputs, self.logits[:n], self.hidden[:n], entering)


class VerifyGraphs(StepGraphs):
    """`run` is the model and compute_logits over a tree for each sequence, with the same result as without graphs.

    nodes: the numbers of nodes that trees have; 1 is a plain decode step whose hidden states somebody wants. layers: those whose
    inputs are noted, for a drafter. chains: all trees are. `holds` says which steps are recorded.

    inputs, int64: rows [size], positions [size], tokens [size, N], parents [size, N].
    """

    kind = "verify"

    def __init__(
        self, model: CausalLM, attention: type, cache: PagedKVCache, table: SequenceTable, max_batch: int,
        nodes: Sequence[int], layers: Sequence[int] = (), max_loras: int = 0, chains: bool = False,
    ):  # fmt: skip
        self.layers, self.chains = layers, chains
        self.sizes = {n: batch_sizes(max(1, min(max_batch, MOST_NODES // n))) for n in nodes}
        shapes = sorted(((size, n) for n, sizes in self.sizes.items() for size in sizes), key=lambda s: -s[0] * s[1])
        rows, numbers = [size * n for size, n in shapes], max(2 * size * (1 + n) for size, n in shapes)
        super().__init__(model, attention, cache, table, max_loras, shapes, rows, numbers)

    def holds(self, batch: int, nodes: int, chain: bool = True) -> bool:
        return nodes in self.sizes and batch <= self.sizes[nodes][-1] and (chain or not self.chains)

    @torch.inference_mode()
    def run(
        self, rows: np.ndarray, positions: np.ndarray, tree: DraftTree, adapters: np.ndarray | None = None
    ) -> VerifiedStep:
        """rows, positions [B] of the roots; adapters [B]: LoRA slots, None for none."""
        batch, nodes = tree.tokens.shape
        size = self.sizes[nodes][bisect.bisect_left(self.sizes[nodes], batch)]
        numbers = np.full((2, size), -1, dtype=np.int64)
        numbers[:, :batch] = rows, positions
        copy_to(numbers, self.inputs[: 2 * size])
        tokens, parents = self._trees(size, nodes)
        tokens[:batch] = tree.tokens
        if not self.chains:
            parents[:batch] = tree.parents
            _make_chains(parents[batch:])  # of padding, which must be trees too
        return self._replay((size, nodes), None if adapters is None else np.repeat(adapters, nodes)).of(batch, nodes)

    def _trees(self, size: int, nodes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens, parents [size, N] in `inputs`."""
        return self.inputs[2 * size : 2 * size * (1 + nodes)].view(2, size, nodes).unbind(0)

    def _pad(self, shape: tuple[int, int]) -> None:
        size, nodes = shape
        self.inputs.zero_()
        self.inputs[: 2 * size] = -1
        _make_chains(self._trees(size, nodes)[1])

    def _step(self, shape: tuple[int, int], adapters: AdapterBlocks | None = None) -> VerifiedStep:
        size, nodes = shape
        rows, positions, (tokens, parents) = self.inputs[:size], self.inputs[size : 2 * size], self._trees(size, nodes)
        tree = DraftTree.chain(tokens) if self.chains else DraftTree(tokens, parents)
        pages = self.table.page_table.shape[1]
        step = self.table.tree_level(rows, positions, tree.tokens, tree.depth, tree.ancestors, pages)
        attention = self.attention(self.cache, step.meta)
        live = (rows >= 0).repeat_interleave(nodes) if self.model.config.mixture else None
        entering = dict.fromkeys(self.layers) if self.layers else None
        hidden = self.model(step.input_ids, step.positions, attention, live=live, entering=entering, adapters=adapters)
        return VerifiedStep(step, self.model.compute_logits(hidden, adapters), hidden, entering)


def _make_chains(parents: torch.Tensor) -> None:
    parents.copy_(torch.arange(-1, parents.shape[1] - 1, device=parents.device).expand_as(parents))
