"""A tree of guesses for each sequence, and the walk that says which of them were right.

Node 0 of a tree, its root, is the last token that is known; every other node is a guess of the token behind its parent. All
nodes are fed to the model in one step, and at each of them a token is drawn as if the text up to it were true:

    node     0    1    2    3    4        0 the ─ 1 sun ─ 3 is
    token    the  sun  sky  is   was        │          └─ 4 was
    parent   -1   0    0    1    1          └── 2 sky
    drawn    sun  was  is   hot  red      path 0, 1, 4: out come `sun was red`, three tokens for one step

The walk goes from the root to the child that carries what was drawn there, as long as there is one. Every token that was drawn
on the way is a token of the text; the last of them, the bonus token, no child carried. So a step yields at least one token, the
one that a plain decode would have drawn, and no guess however wrong can change the text. SpecInfer (Miao et al. 2024) calls it
verification of a token tree; a chain (Leviathan et al. 2023) is a tree in which every node has one child at most.

Plain tensor operations on whichever device: nobody waits for a GPU, and a CUDA graph can hold them.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class DraftTree:
    """tokens [B, N]: node 0 the last token, then guesses. parents [B, N]: parents[b, i] < i, and -1 for the root; int64.
    q [B, N, V]: what the guesses below each node were drawn from; None if they were chosen, or on ranks that need not know."""

    tokens: torch.Tensor
    parents: torch.Tensor
    q: torch.Tensor | None = None

    @classmethod
    def chain(cls, tokens: torch.Tensor, q: torch.Tensor | None = None) -> "DraftTree":
        """tokens [B, N], each a guess of what follows the one before."""
        return DraftChain(tokens, torch.arange(-1, tokens.shape[1] - 1, device=tokens.device).expand(tokens.shape), q)

    @cached_property
    def ancestors(self) -> torch.Tensor:
        """[B, N, N] bool: [b, i, j] says that j lies on the path from the root to i, both ends included."""
        batch, n = self.parents.shape
        up = self.parents.clamp(min=0)  # 2^round generations up; the root stays where it is
        seen = torch.eye(n, dtype=torch.bool, device=up.device).expand(batch, n, n)
        for _ in range((n - 1).bit_length()):  # each round doubles the generations that are seen
            seen = seen | seen.gather(1, up.unsqueeze(-1).expand(batch, n, n))
            up = up.gather(1, up)
        return seen

    @cached_property
    def depth(self) -> torch.Tensor:
        """[B, N]: tokens between the root and a node; siblings have the same."""
        return self.ancestors.sum(dim=-1) - 1


class DraftChain(DraftTree):
    """A tree that is known to be a chain: what is searched for in others is plain here, in a third of the launches."""

    @cached_property
    def ancestors(self) -> torch.Tensor:
        batch, n = self.tokens.shape
        return torch.ones(n, n, dtype=torch.bool, device=self.tokens.device).tril().expand(batch, n, n)

    @cached_property
    def depth(self) -> torch.Tensor:
        return torch.arange(self.tokens.shape[1], device=self.tokens.device).expand(self.tokens.shape)


class Accepted(NamedTuple):
    """What came out of a step, sequence by sequence.

    nodes [B, N]: the path that was right, the root first. tokens [B, N]: what was drawn at each of these nodes. Behind a
    sequence's end both are -1. counts [B] >= 1: how many.
    """

    nodes: torch.Tensor
    tokens: torch.Tensor
    counts: torch.Tensor

    @property
    def last_tokens(self) -> torch.Tensor:
        """The bonus tokens [B], that the sequences go on with."""
        return self.tokens.gather(1, self.counts.unsqueeze(1) - 1).squeeze(1)

    def moves(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """slots [B, N] of the nodes -> (from, to) [B * (N-1)]: then the path lies in the first slots of its sequence, in order.

        What stands behind the path stays; no slot is written twice.
        """
        own = torch.arange(slots.shape[1], device=slots.device)
        return slots.gather(1, self.nodes.where(self.nodes >= 0, own))[:, 1:].flatten(), slots[:, 1:].flatten()


def walk(tree: DraftTree, drawn: torch.Tensor) -> Accepted:
    """drawn [B, N]: the token that was drawn at each node.

    Of two nodes with the same text before them the one counts that leads further: the same token was drawn at both.
    """
    n = tree.tokens.shape[1]
    order = torch.arange(n, device=drawn.device)
    if isinstance(tree, DraftChain):
        right = tree.tokens[:, 1:] == drawn[:, :-1]  # [B, N-1]
        counts = right.cumprod(dim=1).sum(dim=1) + 1
        behind = order >= counts.unsqueeze(1)
        return Accepted(order.expand(drawn.shape).masked_fill(behind, -1), drawn.masked_fill(behind, -1), counts)
    wrong = tree.tokens != drawn.gather(
        1, tree.parents.clamp(min=0)
    )  # [B, N]: the node does not carry what its parent drew
    wrong.masked_fill_(order == 0, False)
    lost = (tree.ancestors & wrong.unsqueeze(1)).any(dim=-1)  # [B, N]: it, or one on the path to it, is wrong
    # the deepest, and of these the first: which index `max` gives for equal values is nobody's promise
    best = (tree.depth * n + (n - 1 - order)).masked_fill_(lost, -1).max(dim=1).values
    last = n - 1 - best % n
    path = tree.ancestors.gather(1, last[:, None, None].expand(-1, 1, n)).squeeze(1)  # [B, N]
    nodes = order.where(path, n).sort(dim=1).values  # ascending: a parent has a smaller number than its children
    behind = nodes == n
    tokens = drawn.gather(1, nodes.clamp(max=n - 1)).masked_fill_(behind, -1)
    return Accepted(nodes.masked_fill_(behind, -1), tokens, path.sum(dim=1))
