"""How a tree of guesses grows, level by level, and which of its nodes are kept (EAGLE-2, Li et al. 2024, section 4).

A drafter gives each node's best next tokens with their log-probabilities; summed from the root they say how likely it is that a
node's whole path is what the target will write, as far as the drafter knows. So:

    expand   each level, only the `topk` best of the candidates get children: the work of a level does not grow with its depth
    rerank   in the end the best N - 1 of all candidates stay, of whichever level: a likely child of a likely node is worth more
             than the second guess at the first token

A node is never better than its parent, so what is kept is a tree. Equals are taken in the order in which they were found, parents
before their children: all ranks come to the same tree from the same numbers.
"""

import torch

from common.draft_tree import DraftTree
from common.layers.vocab import first_best


class Growth:
    """Trees of B sequences. `start`, then `grow` once a level; tokens, parents and window say what the drafter is to run next:

    tokens [B, k]      of the nodes that get children
    parents [B, k]     which of the nodes that ran last they stand below; of the first level 0, the root
    window [B, k, W]   which of the W nodes that ran so far, with these k at the end, each sees: its path without the root
    """

    def __init__(self):
        self._scores: list[torch.Tensor] = []  # [B, n] of each level's candidates, like the next two
        self._tokens: list[torch.Tensor] = []
        self._below: list[torch.Tensor] = []  # the candidate that is their parent, -1 the root
        self._count = 0

    def start(self, logprobs: torch.Tensor, tokens: torch.Tensor) -> None:
        """[B, k]: the best tokens behind the root."""
        batch, k = tokens.shape
        self._add(logprobs.clamp(max=0), tokens, torch.full_like(tokens, -1))
        self.parents = torch.zeros_like(tokens)
        self.tokens, self._expanded = tokens, torch.arange(k, device=tokens.device).expand(batch, k)
        self._score = self._scores[0]
        self.window = torch.eye(k, dtype=torch.bool, device=tokens.device).expand(batch, k, k)

    def grow(self, logprobs: torch.Tensor, tokens: torch.Tensor) -> None:
        """[B, k, k]: the best tokens behind each of the nodes that ran last."""
        batch, k, _ = tokens.shape
        base = self._count
        # a log-probability that rounding has put above 0 would set a child before its parent
        scores = (self._score.unsqueeze(-1) + logprobs.clamp(max=0)).flatten(1)  # [B, k * k]
        tokens = tokens.flatten(1)
        self._add(scores, tokens, self._expanded.repeat_interleave(k, dim=1))
        self._score, chosen = first_best(scores, k)  # [B, k]
        self.parents, self.tokens, self._expanded = chosen // k, tokens.gather(1, chosen), base + chosen
        above = self.window.gather(1, self.parents.unsqueeze(-1).expand(-1, -1, self.window.shape[2]))
        own = torch.eye(k, dtype=torch.bool, device=tokens.device).expand(batch, k, k)
        self.window = torch.cat((above, own), dim=2)

    def tree(self, last_tokens: torch.Tensor, nodes: int) -> DraftTree:
        """The best nodes - 1 of all candidates below last_tokens [B]; where there are not so many, token 0 below the root."""
        scores, tokens, below = (torch.cat(parts, dim=1) for parts in (self._scores, self._tokens, self._below))
        missing = nodes - 1 - scores.shape[1]
        if missing > 0:
            fill = torch.nn.functional.pad
            scores, tokens = fill(scores, (0, missing), value=-torch.inf), fill(tokens, (0, missing))
            below = fill(below, (0, missing), value=-1)
        kept = first_best(scores, nodes - 1)[1].sort(dim=1).values  # [B, N-1] by level: parents first
        order = torch.arange(1, nodes, device=kept.device).expand(kept.shape)
        number = torch.zeros_like(below).scatter_(1, kept, order)  # of a candidate in the tree
        below = below.gather(1, kept)
        parents = torch.where(below < 0, 0, number.gather(1, below.clamp(min=0)))
        root = torch.full_like(last_tokens, -1).unsqueeze(1)
        return DraftTree(
            torch.cat((last_tokens.unsqueeze(1), tokens.gather(1, kept)), dim=1), torch.cat((root, parents), dim=1)
        )

    def _add(self, scores: torch.Tensor, tokens: torch.Tensor, below: torch.Tensor) -> None:
        self._scores.append(scores)
        self._tokens.append(tokens)
        self._below.append(below)
        self._count += tokens.shape[1]
