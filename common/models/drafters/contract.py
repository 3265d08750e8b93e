"""What a drafter is: it lives on every rank, sees what the target model computes, and guesses how each sequence goes on.

A verify step of the target takes, for each of B sequences, N nodes of a tree: node 0 is the sequence's last token, the others are
guesses (common/draft_tree.py). What a drafter guesses decides how many tokens a step brings, and never which: every token that
comes out is drawn from the target's logits. So a drafter may be wrong, late, or have missed something, and the text is the same.

Who calls it, and when (common/executor.py), the same on every rank:

    prefill     after each ragged step of the target, with its hidden states: prompts, or parts of them
    accepted    after each verify step, once the tokens are known and walked; after a plain decode step too, as a tree of roots
    draft       at the beginning of a verify step

The target's hidden state at position i is told before token i + 1 is known, at the end of each of these steps. A drafter that needs
both keeps the state as its row's "pending" one, and begins the next call for that row with it: `draft` is told the last token,
and the tokens of a later prefill part begin at position `cached`. A row whose prefill begins elsewhere than where the drafter
stands is another request's by now, and what is pending of it is forgotten.

Its pages have the same ids as the target's: it keeps a cache of its own with as many pages, and reads the target's page table, so a
prefix that the radix tree finds is found for the drafter, too. What one page costs counts in the size of the pool.

SGLang 0.5.23 has a worker for each algorithm, with a model runner of its own for the draft (srt/speculative/eagle_worker_v2.py,
standalone_worker_v2.py, ngram_worker.py), and no Medusa heads. vLLM's are proposers (vllm/v1/spec_decode/).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn

from common.attention.kv_cache import PagedKVCache
from common.attention.sequence_table import SequenceTable, StepInputs
from common.distributed.transfer import upload_all
from common.draft_tree import Accepted, DraftTree
from common.models.decoder import CausalLM
from common.parallel_state import TPGroup


@dataclass(frozen=True)
class DraftOptions:
    """nodes N: of a tree, the root included. steps: levels below the root at most. topk: children that a node has at most, so many
    that 1 is a chain. path: the drafter's checkpoint, a folder or Hub id; None: of a guesser
    that has none, or else, which the executor fills in, what is bundled with the bundled model."""

    algorithm: str
    path: str | None
    steps: int
    topk: int
    nodes: int


@dataclass(frozen=True)
class Target:
    """What a drafter may use of the model that it drafts for, on this rank."""

    model: CausalLM  # its embedding and its head are shared, not copied
    tp: TPGroup
    attention: type  # the backend, for layers of the drafter's own
    dtype: torch.dtype
    kv_dtype: torch.dtype
    page_size: int
    num_rows: int  # rows of the sequence table
    max_context: int  # positions that a sequence may have


@dataclass(frozen=True)
class Roots:
    """Where B sequences stand: rows [B] of the table, and positions [B] of their last tokens; int64 on the device. Of the positions
    none is below `least` or above `most`, which are known without asking the device. padded: a row -1, at position -1, may be
    among them and stands for nobody: what is recorded (draft_graphs.py) has a fixed number of rows."""

    rows: torch.Tensor
    positions: torch.Tensor
    least: int
    most: int
    padded: bool = False

    @classmethod
    def of(cls, rows: np.ndarray, positions: np.ndarray, device: torch.device) -> "Roots":
        return cls(*upload_all(device, rows, positions), int(positions.min()), int(positions.max()))

    def decode(self, table: SequenceTable, depth: int) -> StepInputs:
        """The step of one token a sequence, at positions + depth."""
        pages = min(-(-(self.most + depth + 1) // table.page_size), table.page_table.shape[1])
        return table.decode_at(self.rows, self.positions + depth, pages, self.padded)


class Draws(Protocol):
    """Draws the guesses of a chain for each of B sequences (sampling/draws.py)."""

    def guess(self, logits: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
        """logits [B, V'] of the draft -> the next guesses [B]; ids [V']: its vocabulary in the target's ids."""
        ...

    def q(self, nodes: int) -> torch.Tensor | None:
        """[B, N, V], for DraftTree.q."""
        ...


class Drafter(ABC):
    """`features`: the hidden states of the target that it wants to be told. None: none, and it gets None for them. (): the last
    ones, after the final norm, [.., D]. (i, j, ...): those that enter layers i, j, ..., side by side [.., n * D]; a layer's
    input is the sum that its first norm reads. `page_bytes`: what a page of its own cache costs on this rank; 0 without one.
    `chains`: its trees are chains, always, so that no accepted token ever has to be moved.
    `cache` and `module`: its own pages, and what holds its own weights; None without. An engine that sleeps gives up both
    (common/memory_occupation.py). `draws`: of chains it can draw the guesses, and not only choose them.

    `draft` without draws launches the same for the same number of sequences and nodes: a CUDA graph holds it (draft_graphs.py).

    Everything is called under inference_mode, and nothing may wait for a GPU. rows, cached, new, positions: int64 arrays on the
    CPU, since rank 0 has decided them; tokens, trees and features: tensors on the device.
    Raises ValueError or FileNotFoundError when it is made, in one line and on every rank alike, for what cannot be.
    """

    features: Sequence[int] | None = None
    page_bytes: int = 0
    chains: bool = False
    cache: PagedKVCache | None = None
    module: nn.Module | None = None
    draws: bool = False

    def allocate(self, num_pages: int) -> None:  # noqa: B027, not every drafter has one
        """Make the cache: so many pages, those of the target. Called once, before anything else."""

    def prefill(  # noqa: B027, not every drafter listens
        self, table: SequenceTable, token_ids: np.ndarray, rows: np.ndarray, cached: np.ndarray, new: np.ndarray,
        features: torch.Tensor | None,
    ) -> None:  # fmt: skip
        """The target has computed new[b] tokens of each sequence behind cached[b] known ones, end to end in token_ids [T], with
        these features [T, F]. The drafter's own cache at positions before cached[b] may hold anything."""

    def accepted(  # noqa: B027, not every drafter listens
        self, table: SequenceTable, rows: np.ndarray, positions: np.ndarray, tree: DraftTree, accepted: Accepted,
        features: torch.Tensor | None,
    ) -> None:  # fmt: skip
        """A verify step of `tree`, whose roots stand at positions [B], was walked. features [B, N, F] of all nodes; those of
        accepted.nodes are the sequence's, at positions, positions + 1, ... (padded with -1 behind accepted.counts).
        accepted.tokens [B, N] are the tokens behind these, the last of which is the sequence's new last token."""

    @abstractmethod
    def draft(
        self, table: SequenceTable, roots: Roots, last_tokens: torch.Tensor, nodes: int, draws: Draws | None = None
    ) -> DraftTree:
        """A tree of `nodes` nodes for each sequence below its last token [B]. Every rank comes to the same one. Pages for positions
        up to positions + nodes - 1 are in the table: a drafter may write its own K and V there. draws: how guesses are drawn, for
        those that can; None: they are chosen."""
