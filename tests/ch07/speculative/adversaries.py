"""Drafters that are right, wrong, or worse: none of them may change a token. Guessers sit on rank 0, drafters on every rank."""

from dataclasses import replace

import numpy as np
import torch

from common.draft_tree import DraftTree
from common.models.drafters.contract import Drafter, DraftOptions, Target
from common.models.drafters.load import DRAFTERS

VOCABULARY = 3584  # of the bundled model; ids beyond are no tokens
KINDS = ("right", "wrong", "random", "end", "outside", "mixed")


class Adversary:
    """A guesser. kind: what it guesses; answers: {prompt: the greedy answer}, for those that are to be right; tree: or a chain."""

    def __init__(self, kind: str, answers: dict[tuple[int, ...], list[int]], tree: bool, seed: int = 0):
        self.kind, self.answers, self.tree, self.seed = kind, answers, tree, seed

    def guess(self, reqs, nodes):
        made = [self._one(req, nodes - 1) for req in reqs]
        return np.stack([tokens for tokens, _ in made]), np.stack([parents for _, parents in made])

    def _one(self, req, count):
        rng = np.random.default_rng((self.seed, req.rid, len(req.output_ids)))
        parents = np.array([rng.integers(0, i + 1) for i in range(count)]) if self.tree else np.arange(count)
        depth = np.zeros(count + 1, dtype=np.int64)
        for i, parent in enumerate(parents):
            depth[i + 1] = depth[parent] + 1
        answer = np.array(self.answers[tuple(req.prompt_ids)], dtype=np.int64)
        at = len(req.output_ids) + depth[1:] - 1
        right = np.where(at < len(answer), answer[np.minimum(at, len(answer) - 1)], 0)
        kind = rng.choice(["right", "wrong", "random"]) if self.kind == "mixed" else self.kind
        if kind == "right":
            return right, parents
        if kind == "wrong":
            return (right + 1 + rng.integers(0, VOCABULARY - 2, count)) % VOCABULARY, parents
        if kind == "end":
            return np.full(count, 0), parents
        if kind == "outside":
            return rng.integers(VOCABULARY, 1 << 40, count) * rng.choice([-1, 1], count), parents
        return np.where(rng.random(count) < 0.5, right, rng.integers(0, VOCABULARY, count)), parents


class Scripted(Drafter):
    """A drafter whose trees follow from the last token and its position alone, right now and then by a table of what follows what.

    It also looks whether it is told what the contract promises: the features of every position, once it is known, in order.
    """

    features = (0, 2)

    def __init__(self, options: DraftOptions, target: Target):
        self.options, self.target = options, target
        self.page_bytes = 64 * target.page_size
        self.chains = options.topk == 1
        self.stands = np.full(target.num_rows, -1)  # features of positions below are known
        self.told = 0

    def allocate(self, num_pages):
        self.seen = torch.zeros(num_pages * self.target.page_size)  # the token whose feature lies at a slot; 0: none

    def prefill(self, table, token_ids, rows, cached, new, features):
        assert features.shape == (len(token_ids), 2 * self.target.model.config.hidden_size)
        self._same(features, torch.from_numpy(np.ascontiguousarray(token_ids)))
        for row, begin, n in zip(rows, cached, new, strict=True):
            self.stands[row] = begin + n

    def accepted(self, table, rows, positions, tree, accepted, features):
        assert features.shape[:2] == tree.tokens.shape
        assert (self.stands[rows] == positions).all(), "a root stands where the last step has ended"
        self._same(features.flatten(0, 1), tree.tokens.flatten())
        self.stands[rows] = positions + accepted.counts.numpy()
        assert torch.equal(table.last_token[torch.from_numpy(rows)], accepted.last_tokens)

    def draft(self, table, roots, last_tokens, nodes, draws=None):
        rows, positions = roots.rows.numpy(), roots.positions.numpy()
        assert (self.stands[rows] == positions).all()
        assert (roots.least, roots.most) == (positions.min(), positions.max())
        assert torch.equal(table.last_token[roots.rows], last_tokens)
        tokens, parents = [], []
        for last, position in zip(last_tokens.tolist(), positions.tolist(), strict=True):
            rng = np.random.default_rng((last, position))
            tokens.append([last, *rng.integers(-3, VOCABULARY + 3, nodes - 1)])
            below = rng.integers(0, np.arange(1, nodes)) if self.options.topk > 1 else np.arange(nodes - 1)
            parents.append([-1, *below])
        return DraftTree(torch.tensor(tokens), torch.tensor(parents))

    def _same(self, features, tokens):
        """What enters layer 0 is the token's embedding: so a feature is the one of its token."""
        self.told += len(tokens)
        embedded = self.target.model.model.embed_tokens(tokens)
        assert torch.equal(features[:, : embedded.shape[1]], embedded)


DRAFTERS["SCRIPTED"] = f"{__name__}:Scripted"


def options(algorithm: str, nodes: int, tree: bool) -> DraftOptions:
    most = 3 if algorithm == "MEDUSA" else nodes  # so many heads are bundled; what is left of the nodes is token 0
    chain = DraftOptions(algorithm, None, min(nodes - 1, most), 1, nodes)
    return replace(chain, topk=3, steps=2 if nodes > 3 else 1) if tree else chain
