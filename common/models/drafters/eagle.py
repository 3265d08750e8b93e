"""EAGLE as a drafter: a head of one layer (eagle_head.py) with pages of its own, and the trees that it grows.

The head's index i needs feature i and token i+1, so its K and V at index i belong to a bigram, and a page of the target is right
for the head, too, only if the token behind it is the same: that is why the radix tree is keyed by bigrams with EAGLE. Index i lies
in slot i of the same pages. A sequence whose last token stands at p has indices up to p-1; guesses go on from there:

                      feature          token                 gives
    index p-1         p-1, true        p, the last one       the children of the root
    index p, p+1 ...  the head's own   a node's              the node's children

After a verify step the true features of the accepted nodes are known and take the place of the head's own. The layer's K and V
depend on its inputs alone, so this "draft extend" is a row of fc and of k and v for each token, without attention; and so is
prefill. What waits for its token is one feature a row.
"""

from pathlib import Path

import numpy as np
import torch

from common.attention.kv_cache import PagedKVCache
from common.attention.sequence_table import SequenceTable
from common.attention.torch_native import TorchNativeAttention
from common.distributed.transfer import upload_all
from common.draft_tree import Accepted, DraftTree
from common.layers.vocab import all_logits, best_logprobs
from common.models.drafters.contract import Drafter, DraftOptions, Draws, Roots, Target
from common.models.drafters.eagle_head import load_head
from common.models.drafters.growth import Growth
from common.models.drafters.levels import CopiedLevels, PagedLevels
from common.models.hub import resolve_model


class EagleDrafter(Drafter):
    def __init__(self, options: DraftOptions, target: Target):
        self.options, self.target, self.device = options, target, target.tp.device
        if target.model.config.latent:
            raise ValueError(
                f"{options.algorithm} for {target.model.config.architecture}: its pages hold latent rows, and a head here "
                f"has keys and values; use NGRAM"
            )
        folder = resolve_model(options.path)
        version = 3 if options.algorithm == "EAGLE3" else 1
        self.head, config, self.ids = load_head(Path(folder), version, target, options.steps)
        self.module, self.features = self.head, config.features
        self.chains = self.draws = options.topk == 1
        self.draft_vocab = config.draft_vocab
        heads, base, size = self.head.layer.self_attn.heads, config.base, target.page_size
        self._shape = (1, size, heads.num_kv, base.head_dim)
        self.page_bytes = PagedKVCache.bytes_per_page(*self._shape, target.kv_dtype)
        width = base.hidden_size * max(1, len(self.features))
        # the newest feature of each row, and for rows in prefill the position behind it, else -1
        self._waiting = torch.zeros(target.num_rows, width, dtype=target.dtype, device=self.device)
        self._stands = np.full(target.num_rows, -1)
        # a tree runs topk * (steps - 1) nodes, of which the sequence has room for N: the others have pages of the drafter's own
        most = options.topk * (options.steps - 1)
        self.room = -(-most // size) if most > options.nodes and target.attention is not TorchNativeAttention else 0

    def allocate(self, num_pages: int) -> None:
        self.num_pages = num_pages
        _, size, heads, dim = self._shape
        pages = num_pages + self.target.num_rows * self.room
        self.cache = PagedKVCache(1, pages, size, heads, dim, dtype=self.target.kv_dtype, device=self.device)

    # --- what the target has computed

    def prefill(self, table, token_ids, rows, cached, new, features) -> None:
        ends = np.cumsum(new)
        first = ends - new
        positions = np.arange(ends[-1]) + np.repeat(cached - first, new)  # [T]
        # each token joins the feature before it: the first of a part the one that waits, if this part goes on where that one stands
        goes_on = self._stands[rows] == cached  # [B]
        joins = np.ones(len(positions), dtype=bool)
        joins[first] = goes_on
        there, begin, end, at, of, kept, ids = upload_all(
            self.device, rows, first, ends - 1, positions - 1, np.repeat(rows, new), np.flatnonzero(joins), token_ids
        )
        if token_ids.min() < 0:
            ids = ids.where(ids >= 0, table.last_token[of])
        before = features.roll(1, 0)
        before[begin] = self._waiting[there]
        self._waiting[there] = features[end]
        self._stands[rows] = cached + new
        if joins.any():
            self._store(table, of[kept], at[kept], ids[kept], before[kept])

    def accepted(self, table, rows, positions, tree: DraftTree, accepted: Accepted, features) -> None:
        """Index p-1 joins the root, which no `draft` has done if this was a plain decode step; then all that were accepted.

        Fixed shapes: behind the path stands rubbish, in slots that are written again before anybody reads them.
        """
        batch, nodes = accepted.nodes.shape
        there, root = upload_all(self.device, rows, positions)
        path = features.gather(1, accepted.nodes.clamp(min=0).unsqueeze(-1).expand(-1, -1, features.shape[2]))
        known = torch.cat((self._waiting[there].unsqueeze(1), path), dim=1)  # [B, N+1, F]
        tokens = torch.cat((tree.tokens[:, :1], accepted.tokens.clamp(min=0)), dim=1)  # [B, N+1]
        at = root.unsqueeze(1) + torch.arange(-1, nodes, device=self.device)  # [B, N+1]
        of = there.unsqueeze(1).expand(-1, nodes + 1)
        self._store(table, of.flatten(), at.flatten(), tokens.flatten(), known.flatten(0, 1))
        self._waiting[there] = path[torch.arange(batch, device=self.device), accepted.counts - 1]
        self._stands[rows] = -1

    def _store(self, table: SequenceTable, rows, at, tokens, features) -> None:
        """K and V of indices at [n] of rows [n], made of features [n, F] and the tokens [n] behind them."""
        pages = table.page_table[rows, at // table.page_size]
        slots = pages * table.page_size + at % table.page_size
        _, x = self.head.inputs(self._embed(tokens), self.head.begin(features))
        if not slots.is_cuda:  # a kernel does not look at what was not written; plain PyTorch multiplies it by zero
            self.cache.begin(slots)
        self.cache.write(0, slots, *self.head.keys_and_values(x, self.head.rotary(at, x.dtype)))

    # --- guesses

    def draft(self, table, roots: Roots, last_tokens, nodes, draws: Draws | None = None) -> DraftTree:
        if nodes == 1:
            return DraftTree.chain(last_tokens.unsqueeze(1))
        steps, k = min(self.options.steps, nodes - 1), self.options.topk
        levels = self._levels(table, roots, k * (steps - 1), nodes)
        # all nodes of a level stand in one place: cos and sin [steps, B, 1, d]
        at = roots.positions + torch.arange(-1, steps - 1, device=self.device).unsqueeze(1)  # [steps, B]
        if roots.padded:
            at = at.clamp(min=0)
        cos, sin = (x.unflatten(0, at.shape) for x in self.head.rotary(at.flatten(), self.target.dtype))
        hidden = self.head.begin(self._waiting[roots.rows])  # [B, D]; of padding any row's
        if self.chains:
            chain = [last_tokens]
            for turn in zip(cos, sin, strict=True):
                hidden, logits = self._run(chain[-1], hidden, turn, levels.level(None))
                if draws:
                    chain.append(draws.guess(all_logits(logits, self._vocab, self.target.tp), self.ids))
                else:
                    chain.append(self._best(logits, 1)[1].squeeze(1))
            chain += [torch.zeros_like(last_tokens)] * (nodes - len(chain))
            return DraftTree.chain(torch.stack(chain, dim=1), draws.q(nodes) if draws else None)
        growth = Growth()
        hidden, logprobs, tokens = self._guess(last_tokens, hidden, (cos[0], sin[0]), levels.level(None), k)
        growth.start(logprobs, tokens)
        hidden = hidden.unsqueeze(1)
        for depth in range(1, steps):
            above = growth.parents.unsqueeze(-1).expand(-1, -1, hidden.shape[2])
            turn = tuple(x[depth].repeat_interleave(k, dim=0) for x in (cos, sin))
            hidden, logprobs, tokens = self._guess(
                growth.tokens.flatten(), hidden.gather(1, above).flatten(0, 1), turn, levels.level(growth.window), k
            )
            hidden, logprobs, tokens = (x.unflatten(0, (-1, k)) for x in (hidden, logprobs, tokens))
            growth.grow(logprobs, tokens)
        return growth.tree(last_tokens, nodes)

    def _levels(self, table: SequenceTable, roots: Roots, most: int, nodes: int):
        if self.target.attention is TorchNativeAttention and not roots.padded:
            return CopiedLevels(self.cache, table, roots, most)
        return PagedLevels(self.target, self.cache, table, roots, most, nodes, self.num_pages, self.room)

    def _guess(self, tokens, hidden, rotary, attention, best: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """tokens [n], hidden [n, D] -> the head's guesses [n, D], log-probabilities and ids of the best next tokens [n, best]."""
        out, logits = self._run(tokens, hidden, rotary, attention)
        return out, *self._best(logits, best)

    def _run(self, tokens, hidden, rotary, attention) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens [n], hidden [n, D] -> the head's guesses [n, D], and this rank's logits behind them, of its own vocabulary."""
        residual, x = self.head.inputs(self._embed(tokens), hidden)
        out = self.head(residual, x, rotary, attention)
        model = self.target.model
        read = self.head.norm(out) if self.head.version == 3 else out
        return out, model.compute_logits(read) if self.draft_vocab is None else self.head.lm_head(read)

    def _best(self, logits: torch.Tensor, best: int) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs, ids = best_logprobs(logits, best, self._vocab, self.target.tp)
        return logprobs, ids if self.ids is None else self.ids[ids]

    @property
    def _vocab(self) -> int:
        return self.draft_vocab or self.target.model.config.vocab_size

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.target.model.model.embed_tokens(tokens)
