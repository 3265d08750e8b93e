"""How the levels of a drafter of one layer attend: each to all of its sequence so far, and the nodes of a tree to their own path.

    level 0      one node a sequence, at index p - 1: behind it the sequence's own keys and values lie in the drafter's pages
    level 1 ..   k nodes a sequence, all at index p - 1 + level; window [B, k, W]: which of the W nodes of levels 1 .. each sees

`PagedLevels` asks any backend of the attention contract, which stores what a level writes in the pages. `CopiedLevels` is what
plain PyTorch does better: the backend there copies the pages of a sequence before it attends to them, and a drafter asks for the
same ones at every level. So they are copied once a tree, with room behind them for its nodes, and the pages are left alone.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

from common.attention.kv_cache import PagedKVCache
from common.attention.sequence_table import SequenceTable
from common.models.drafters.contract import Roots, Target


class CopiedLevels:
    """roots: at p; nodes: of levels 1 .. together."""

    def __init__(self, cache: PagedKVCache, table: SequenceTable, roots: Roots, nodes: int):
        # indices up to p - 2 have their keys in the pages
        self.batch, self.length, self.filled, self.mask = len(roots.rows), roots.most - 1, 0, None
        size, pages, device = table.page_size, -(-self.length // table.page_size), roots.rows.device
        ids = table.page_table[roots.rows, :pages]
        room = self.length + 1 + nodes
        if roots.least < roots.most:
            ends = (roots.positions - 1).unsqueeze(1)
            # behind a sequence's end its first page stands in, never another's, which may have gone bad
            ids = ids.where(torch.arange(0, pages * size, size, device=device) < ends, ids[:, :1])
            behind = torch.arange(room, device=device) >= ends  # [B, room]
            behind[:, self.length :] = False
            self.mask = torch.zeros(behind.shape, device=device).masked_fill_(behind, -torch.inf)[:, None, None]
        kv = cache.gather(0, cache.halves_of(ids.flatten())).unflatten(1, (self.batch, -1))  # [2, B, S, Hkv/R, d]
        self.kv = kv.new_empty(2, self.batch, kv.shape[3], room, kv.shape[4])
        self.kv[:, :, :, : self.length] = kv[:, :, : self.length].transpose(2, 3)

    def level(self, window: torch.Tensor | None):
        """The attention of the next level; window None: a node a sequence, which sees all before it."""
        self.window = window
        return self

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """As a backend's: q [B * n, Hq/R, d], k, v [B * n, Hkv/R, d] -> o [B * n, Hq/R, d]."""
        heads, n = k.shape[1], len(q) // self.batch
        start = self.length + self.filled
        stop, self.filled = start + n, self.filled + n
        for plane, new in zip(self.kv, (k, v), strict=True):
            plane[:, :, start:stop] = new.unflatten(0, (self.batch, n)).transpose(1, 2)
        k, v = self.kv[:, :, :, :stop].to(q.dtype).unbind(0)  # [B, Hkv/R, S, d]
        group = q.shape[1] // heads
        q = q.view(self.batch, n, heads, group, -1).transpose(1, 2).flatten(2, 3)  # [B, Hkv/R, n * g, d]
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask(stop, group, q.dtype))
        return o.unflatten(2, (n, group)).transpose(1, 2).flatten(0, 1).flatten(1, 2)

    def _mask(self, stop: int, group: int, dtype: torch.dtype) -> torch.Tensor | None:
        """[B, 1, 1 or n * g, stop]"""
        mask = None if self.mask is None else self.mask[..., :stop].to(dtype)
        if self.window is None:
            return mask
        own = torch.zeros(self.window.shape, dtype=dtype, device=self.window.device)
        own.masked_fill_(~self.window, -torch.inf)
        seen = own.new_zeros(*own.shape[:2], self.length + 1)  # and level 0
        if mask is not None:
            seen = seen + mask[:, 0, :, : self.length + 1]
        return torch.cat((seen, own), dim=2).repeat_interleave(group, dim=1).unsqueeze(1)


class PagedLevels:
    """A sequence has room for `nodes` nodes behind its last token; where a tree runs more, the others have pages of the drafter's
    own: those from `first_own` on, `own` a row."""

    def __init__(
        self, target: Target, cache: PagedKVCache, table: SequenceTable, roots: Roots, most: int, nodes: int, first_own: int,
        own: int,
    ):  # fmt: skip
        self.target, self.cache, self.table, self.roots, self.depth = target, cache, table, roots, -1
        self.pages = -(-(roots.most + most) // table.page_size)
        if most > nodes:
            self._make_room(nodes, first_own, own)

    def level(self, window: torch.Tensor | None):
        rows, root = self.roots.rows, self.roots.positions
        if window is None:
            step = self.roots.decode(self.table, self.depth)
        else:
            k = window.shape[1]
            none = root.unsqueeze(1).expand(-1, k)  # tokens and positions of a step are not attention's
            step = self.table.tree_level(rows, root, none, torch.zeros_like(none), window, self.pages)
        self.depth += 1
        return self.target.attention(self.cache, step.meta)

    def _make_room(self, nodes: int, first_own: int, own: int) -> None:
        """From now on the table is one of these sequences alone, in their order, with pages behind their own."""
        table, rows, device = self.table, self.roots.rows, self.table.device
        size, width = table.page_size, table.page_table.shape[1]
        have = (self.roots.positions + nodes + size - 1) // size
        behind = torch.arange(width + own, device=device) - have.unsqueeze(1)  # [B, pages]
        theirs = F.pad(table.page_table[rows], (0, own))
        mine = first_own + rows.unsqueeze(1) * own + behind.clamp(0, own - 1)
        self.table = SequenceTable(len(rows), width + own, size, device)
        self.table.page_table.copy_(torch.where(behind < 0, theirs, mine))
        numbers = torch.arange(len(rows), device=device)
        self.roots = replace(self.roots, rows=numbers.where(rows >= 0, -1) if self.roots.padded else numbers)
        self.pages += 1
