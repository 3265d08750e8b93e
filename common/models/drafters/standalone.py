"""A smaller model as a drafter: it writes on, greedily and for itself, and the target verifies.

It is a decoder like the target, cut over the same ranks, with pages of its own that have the target's ids: what it has to compute
of a prompt is what the target has to. A sequence whose last token stands at p:

    target verified     p-3  p-2  p-1 | p         tokens that are known; the last one nobody has fed to anybody
    draft has K, V of   p-3  p-2   ?  |           the last guess of a chain is drawn and not fed: if it was right, its K and V lack
    draft feeds                   p-1   p         so the first step takes two tokens, whether the first of them lacks or not
    then                                p+1 ...   its own guess, one a step (a chain), or `topk` nodes a level (growth.py)

The nodes of a tree lie where they ran, and not where an accepted path belongs; there its K and V are computed again, in one step
of as many tokens as it may have. In plain decode steps of the target the draft follows, in the same way.

Leviathan et al. 2023. SGLang 0.5.23: srt/speculative/standalone_worker_v2.py, which is its EAGLE worker without hidden states.
"""

from pathlib import Path

import numpy as np
import torch

from common.attention.kv_cache import PagedKVCache
from common.attention.sequence_table import SequenceTable, StepInputs
from common.distributed.transfer import upload_all
from common.draft_tree import Accepted, DraftTree
from common.layers.cpu_linear import choose_forms
from common.layers.rotary import RotaryEmbedding
from common.layers.vocab import all_logits, best_logprobs
from common.models.config import ModelConfig
from common.models.drafters.contract import Drafter, DraftOptions, Draws, Roots, Target
from common.models.drafters.growth import Growth
from common.models.hub import resolve_model
from common.models.weights import load_model


class StandaloneDrafter(Drafter):
    """`path`: a folder or Hub id of a model with the target's vocabulary."""

    def __init__(self, options: DraftOptions, target: Target):
        self.options, self.target, self.device = options, target, target.tp.device
        self.chains = self.draws = options.topk == 1
        need = 1 + options.topk * (options.steps - 1)
        if options.nodes < need:
            raise ValueError(
                f"speculative_num_draft_tokens={options.nodes} reserves no room for the {need - 1} nodes that "
                f"speculative_num_steps={options.steps} and speculative_eagle_topk={options.topk} make a draft model run; "
                f"use {need} or more"
            )
        folder = resolve_model(options.path)
        _refuse_another_vocabulary(folder, target.model.config)
        self.model, _ = load_model(folder, target.tp, target.dtype)
        self.module = self.model
        config = self.model.config
        if config.latent or config.mixture:
            raise ValueError(f"{folder} has latent attention or experts; a draft model is a plain decoder")
        positions = max(
            config.rotary["max_positions"], target.max_context + options.steps
        )  # guesses may lie behind the end
        with target.tp.device:
            self.model.model.rotary = RotaryEmbedding(**config.rotary | {"max_positions": positions})
        choose_forms(self.model)
        self._shape = (config.num_layers, target.page_size, self.model.heads.num_kv, config.head_dim)
        self.page_bytes = PagedKVCache.bytes_per_page(*self._shape, target.kv_dtype)
        self._before = torch.zeros(
            target.num_rows, dtype=torch.int64, device=self.device
        )  # each row's last token but one

    def allocate(self, num_pages: int) -> None:
        layers, size, heads, dim = self._shape
        self.cache = PagedKVCache(layers, num_pages, size, heads, dim, dtype=self.target.kv_dtype, device=self.device)

    def prefill(self, table, token_ids, rows, cached, new, features) -> None:
        step = table.prefill(token_ids, rows, cached, new)
        self._feed(step, step.input_ids)
        (last,) = upload_all(self.device, np.cumsum(new) - 1)
        self._before[step.rows] = step.input_ids[last]

    def accepted(self, table, rows, positions, tree: DraftTree, accepted: Accepted, features) -> None:
        roots = Roots.of(rows, positions, self.device)
        path = tree.tokens.gather(1, accepted.nodes.clamp(min=0))  # [B, N]; behind the path the root again
        if path.shape[1] == 1:  # a plain step
            self._catch_up(table, roots, path[:, 0])
        elif not self.chains:  # what stands behind the path is written again before anybody reads it
            rest = path[:, 1 : self.options.steps + 1]
            pages = -(-(roots.most + 1 + rest.shape[1]) // table.page_size)
            self._feed(_in_order(table, roots.rows, roots.positions + 1, rest, pages), rest)
        self._before[roots.rows] = path.gather(1, accepted.counts.unsqueeze(1) - 1).squeeze(1)

    def draft(
        self, table: SequenceTable, roots: Roots, last_tokens: torch.Tensor, nodes: int, draws: Draws | None = None
    ) -> DraftTree:
        steps = min(self.options.steps, nodes - 1)
        if not steps:
            return DraftTree.chain(last_tokens.unsqueeze(1))
        hidden = self._catch_up(table, roots, last_tokens)
        if self.chains:
            return self._chain(table, roots, last_tokens, nodes, hidden, steps, draws)
        growth, k = Growth(), self.options.topk
        growth.start(*self._best(hidden, k))
        pages = -(-(roots.most + 1 + k * (steps - 1)) // table.page_size)
        for depth in range(steps - 1):
            at = torch.full_like(growth.tokens, depth)
            step = table.tree_level(roots.rows, roots.positions + 1, growth.tokens, at, growth.window, pages)
            logprobs, tokens = self._best(self._feed(step, growth.tokens), k)
            growth.grow(logprobs.unflatten(0, (-1, k)), tokens.unflatten(0, (-1, k)))
        return growth.tree(last_tokens, nodes)

    def _chain(
        self, table, roots: Roots, last_tokens, nodes: int, hidden: torch.Tensor, steps: int, draws: Draws | None
    ) -> DraftTree:
        chain = [last_tokens, self._next(hidden, draws)]
        for depth in range(1, steps):
            hidden = self._feed(roots.decode(table, depth), chain[-1])
            chain.append(self._next(hidden, draws))
        chain += [torch.zeros_like(last_tokens)] * (nodes - len(chain))
        return DraftTree.chain(torch.stack(chain, dim=1), draws.q(nodes) if draws else None)

    def _next(self, hidden: torch.Tensor, draws: Draws | None) -> torch.Tensor:
        """The guesses [B] behind hidden [B, D]."""
        if draws:
            logits = self.model.compute_logits(hidden)
            return draws.guess(all_logits(logits, self.model.config.vocab_size, self.target.tp), None)
        return self._best(hidden, 1)[1].squeeze(1)

    def _catch_up(self, table, roots: Roots, tokens: torch.Tensor) -> torch.Tensor:
        """Feed the tokens [B] at the roots, and those before them, which may lack K and V -> hidden [B, D] at the roots."""
        known = torch.stack((self._before[roots.rows], tokens), dim=1)  # [B, 2]; of padding any row's
        pages = -(-(roots.most + 1) // table.page_size)
        return self._feed(_in_order(table, roots.rows, roots.positions - 1, known, pages), known)[1::2]

    def _feed(self, step: StepInputs, tokens: torch.Tensor) -> torch.Tensor:
        """tokens [T] in any shape, at the places of `step` -> hidden [T, D]; their K and V are in the pages afterwards."""
        return self.model(tokens.flatten(), step.positions, self.target.attention(self.cache, step.meta))

    def _best(self, hidden: torch.Tensor, best: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and ids of the best tokens behind hidden [n, D], both [n, best]."""
        return best_logprobs(self.model.compute_logits(hidden), best, self.model.config.vocab_size, self.target.tp)


def _in_order(
    table: SequenceTable, rows: torch.Tensor, first: torch.Tensor, tokens: torch.Tensor, pages: int
) -> StepInputs:
    """tokens [B, n] of sequences, to stand at first, first + 1, ..., each of which sees those before it: a tree that is a chain."""
    n = tokens.shape[1]
    order = torch.arange(n, device=tokens.device).expand(tokens.shape)
    window = torch.ones(n, n, dtype=torch.bool, device=tokens.device).tril().expand(len(tokens), n, n)
    return table.tree_level(rows, first, tokens, order, window, pages)


def _refuse_another_vocabulary(folder: Path, target: ModelConfig) -> None:
    draft = ModelConfig.from_folder(folder)
    if draft.vocab_size != target.vocab_size:
        raise ValueError(
            f"{folder}: vocab_size={draft.vocab_size}, but the target's is {target.vocab_size}; a draft model must have the "
            f"target's tokens, of the same tokenizer"
        )
