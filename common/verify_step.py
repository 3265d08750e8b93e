"""A verify step as a rank carries it out: a tree of guesses is fed in, tokens are drawn at all nodes, the path that was right
stays.

    rank 0's task      rows, positions, nodes (and guesses, where rank 0 makes them)
    every rank         tree of guesses -> target model -> logits [B * N, V/R]
    rank 0             draws a token at every node, as a plain decode would have drawn it there
    every rank         gets all of them by the broadcast that any step has, walks, and comes to the same path by itself

What a node has left in the pages at its own slot belongs, for nodes of the path, at the slot of its position: there it is
copied. The others' stay where they are: behind the sequence's end nothing counts, and the next step writes over it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from common.attention.kv_cache import PagedKVCache
from common.attention.sequence_table import SequenceTable, StepInputs
from common.distributed.transfer import upload, upload_all
from common.draft_tree import Accepted, DraftTree, walk
from common.models.draft_graphs import DraftGraphs
from common.models.drafters.contract import Drafter, DraftOptions, Draws, Roots


@dataclass(frozen=True)
class WaitingTree:
    """A step whose tokens are not drawn yet: of B sequences with N nodes each; a plain decode step has N = 1."""

    rows: np.ndarray
    positions: np.ndarray
    there: torch.Tensor  # the rows [B], on the device
    tree: DraftTree
    slots: torch.Tensor | None  # [B, N] of the nodes; None: a path lies where it belongs already
    features: torch.Tensor | None  # [B, N, F], if the drafter wants some


class Verifier:
    """accepted: what came out of the newest step whose tokens were received; waiting: the newest that was computed. drafter:
    None if rank 0 makes the guesses. graphs: of the drafter's guesses; None where they are not recorded."""

    def __init__(
        self, options: DraftOptions, drafter: Drafter | None, table: SequenceTable, cache: PagedKVCache, vocab_size: int
    ):
        self.options, self.drafter, self.table, self.cache, self.vocab_size = options, drafter, table, cache, vocab_size
        self.graphs: DraftGraphs | None = None
        self.accepted: Accepted | None = None
        self.waiting: WaitingTree | None = None

    def listening(self) -> dict[int, torch.Tensor | None] | None:
        """What the model is to note while it computes: the hidden states that enter these layers."""
        layers = (self.drafter.features or ()) if self.drafter else ()
        return dict.fromkeys(layers) if layers else None

    def features(self, hidden: torch.Tensor, heard: dict[int, torch.Tensor] | None) -> torch.Tensor | None:
        """hidden [T, D] -> what the drafter is told of these tokens [T, F]."""
        if self.drafter is None or self.drafter.features is None:
            return None
        return torch.cat([heard[layer] for layer in self.drafter.features], dim=-1) if heard else hidden

    def prefilled(self, token_ids, rows, cached, new, hidden: torch.Tensor, heard) -> None:
        """A ragged step was computed."""
        if self.drafter:
            self.drafter.prefill(self.table, token_ids, rows, cached, new, self.features(hidden, heard))

    def tree(
        self, rows: np.ndarray, positions: np.ndarray, nodes: int, guesses: Sequence[int] = (),
        parents: Sequence[int] = (), draws: Draws | None = None,
    ) -> tuple[DraftTree, bool]:  # fmt: skip
        """The tree of the step, and whether it is a chain for certain. guesses, parents: B * (N-1) numbers, if rank 0 has made
        them. draws: with what a drafter draws its guesses; None: it chooses them."""
        if not len(guesses) and nodes > 1:
            if self.drafter is None:
                raise ValueError(f"a verify step of {nodes} nodes without guesses, and this rank has no drafter")
            return self._inside(self.guess(rows, positions, nodes, draws)), self.drafter.chains
        (there,) = upload_all(self.table.device, rows)
        last = self.table.last_token[there]
        shape = (len(rows), nodes - 1)
        below = np.array(parents, dtype=np.int64).reshape(shape)
        known = np.concatenate((np.array(guesses, dtype=np.int64).reshape(shape), below), axis=1)
        tokens, parents = upload(known, self.table.device).split(nodes - 1, dim=1)
        tree = DraftTree(
            torch.cat((last[:, None], tokens), 1), torch.cat((torch.full_like(last, -1)[:, None], parents), 1)
        )
        return self._inside(tree), bool((below == np.arange(nodes - 1)).all())

    def guess(self, rows: np.ndarray, positions: np.ndarray, nodes: int, draws: Draws | None = None) -> DraftTree:
        """What the drafter makes, from a recording if there is one."""
        if self.graphs and not draws and self.graphs.holds(len(rows), nodes):
            return self.graphs.run(rows, positions)
        roots = Roots.of(rows, positions, self.table.device)
        return self.drafter.draft(self.table, roots, self.table.last_token[roots.rows], nodes, draws)

    def _inside(self, tree: DraftTree) -> DraftTree:
        """A guess that is no token of the target's becomes another one, as wrong."""
        return replace(tree, tokens=tree.tokens.clamp(0, self.vocab_size - 1))

    def waits(
        self, rows: np.ndarray, positions: np.ndarray, step: StepInputs, hidden: torch.Tensor, heard,
        tree: DraftTree | None = None, chain: bool = True,
    ) -> WaitingTree:  # fmt: skip
        """The step is computed. tree: None for a plain decode step."""
        tree = tree or DraftTree.chain(step.input_ids[:, None])
        features = self.features(hidden, heard)
        shape = tree.tokens.shape
        self.waiting = WaitingTree(
            rows, positions, step.rows, tree, None if chain else step.meta.slot_mapping.view(shape),
            None if features is None else features.view(*shape, -1),
        )  # fmt: skip
        return self.waiting

    @torch.inference_mode()
    def receive(self, step: WaitingTree, drawn: torch.Tensor) -> None:
        """drawn [B * N]: what rank 0 drew at each node."""
        self.accepted = accepted = walk(step.tree, drawn.view(step.tree.tokens.shape))
        if step.slots is not None:
            self.cache.move(*accepted.moves(step.slots))
        self.table.set_tokens(step.there, accepted.last_tokens)
        if self.drafter:
            self.drafter.accepted(self.table, step.rows, step.positions, step.tree, accepted, step.features)
