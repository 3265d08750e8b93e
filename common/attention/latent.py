"""Attention over latent rows, the multi-head latent attention of DeepSeek-V2 and V3 (arXiv 2405.04434, section 2.1).

The step is told as ever (contract.py): same page ids, same tables. But a page holds one row a token, not K and V of heads:

    row [c + r]      the token's latent (c numbers, normed), and the part of its key that knows its position (r, turned)
    of head h        key = [ Wk_h latent | turned part ]   value = Wv_h latent        Wk_h [dn, c], Wv_h [dv, c]

c + r = 576 numbers in V2 and V3, where K and V of 128 heads would be 40,960. There are two ways to attend to such rows:

    expanded   make k and v of every head from the rows, then attend as to any k and v
    absorbed   score = q_nope . (Wk_h latent) + q_turned . turned part = [ q_nope Wk_h | q_turned ] . row
               so Wk_h moves to the query, all heads read the row itself, and Wv_h is applied once, to the mean of latents

A pair of query and row costs a head dn + r + dv = 320 multiplications expanded, 2c + r = 1,088 absorbed. But expanded, each row
costs c (dn + dv) = 131,072 first, whoever asks; absorbed, each query does. A prompt has as many queries as rows, a decode one for
all rows: so `multiplications` decides. One new token (decode) is absorbed, a tree of them, and a few behind a long cached prefix;
all else is expanded. Both forms read the same pages, and store alike.

What stands behind a sequence's end is never read: the sequence's first row stands in for it, and is masked. So nobody has to
blank a page that its last owner left NaN in.
"""

import torch
import torch.nn.functional as F

from common.attention.contract import AttentionMetadata
from common.attention.kv_cache import PagedKVCache
from common.attention.torch_native import QUERY_BLOCK, ROOM_BYTES, causal_blocks, similar_lengths

EXPANDED_BYTES = 256 << 20  # of k and v that are there at a time; more heads than fit take turns


class LatentNativeAttention:
    """attention(layer, q [T, H/R, dn + r], row [T, c + r], kv_b [H/R, dn + dv, c], scale) -> o [T, H/R, dv], in plain PyTorch.

    q: its last r numbers of each head are turned already, and so are those of row. kv_b: of each head Wk, then Wv. The row is
    stored and read back by every rank alike: heads are cut over ranks, the cache is not.

    A decode step waits for no device and has static shapes (a CUDA graph could hold it); a faster form does it in launches of its
    own, and turns q and row itself (kernels/latent_attention.py).
    """

    capturable = False
    windows = True
    reads_codes = True
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def __init__(self, cache: PagedKVCache, meta: AttentionMetadata):
        meta.refuse_other_pages(cache.page_size)
        self.cache, self.meta = cache, meta
        self._plan_store(meta.slot_mapping)
        self.extends: list[_Extend] = []
        told = meta.page_table, meta.context_lens
        if meta.page_table.is_cuda and (meta.max_query_len == 1 or meta.window is not None):
            self.decodes, self.rows = [_Decode(cache, *told, window=meta.window)], None
            return
        starts, lens = meta.query_start.tolist(), meta.context_lens.tolist()
        together = (
            1 if meta.window is None else len(meta.window) // len(lens)
        )  # new tokens of a sequence that is absorbed here
        own = [b for b in range(len(lens)) if starts[b + 1] - starts[b] == together]
        parts = _parts(own, lens, cache) if own else []
        self.decodes = [_Decode(cache, *told, part, max(lens[b] for b in part), meta.window) for part in parts]
        order, self.rows = [starts[b] + i for part in parts for b in part for i in range(together)], None
        if order != list(range(len(meta.slot_mapping))):
            self.rows = torch.tensor(order, dtype=torch.int64, device=meta.page_table.device)
        self.extends = [
            _Extend(cache, meta, b, starts[b], starts[b + 1], lens[b])
            for b in range(len(lens))
            if starts[b + 1] - starts[b] > together
        ]  # fmt: skip

    @staticmethod
    def tile_members(num_q: int, num_kv: int) -> int:
        """Sequences that begin alike and need a hint to be served together: none, each reads its own rows."""
        return 0

    def __call__(
        self, layer: int, q: torch.Tensor, row: torch.Tensor, kv_b: torch.Tensor, scale: float
    ) -> torch.Tensor:
        c = kv_b.shape[-1]
        dn = q.shape[-1] - (row.shape[-1] - c)
        self.store(layer, row)
        o = q.new_empty(*q.shape[:2], kv_b.shape[1] - dn)  # [T, H/R, dv]
        if self.decodes:
            own = q if self.rows is None else q[self.rows]
            means = self.decode(layer, absorb(own, kv_b, dn), c, scale)  # [B, H/R, c]
            values = values_of(means, kv_b, dn)
            if self.rows is None:
                return values
            o[self.rows] = values
        for part in self.extends:
            o[part.rows] = part.attend(layer, q[part.rows], kv_b, scale)
        return o

    def store(self, layer: int, row: torch.Tensor) -> None:
        """Put the new rows [T, c + r] where slot_mapping says; those of padding nowhere."""
        if self.picked is not None:
            row = row[self.picked]
            if self.nobody is not None:
                row = torch.where(self.nobody, self.cache.read(layer, self.slots)[0].squeeze(1), row)
        self.cache.write(layer, self.slots, row.unsqueeze(1))

    def decode(self, layer: int, q: torch.Tensor, c: int, scale: float) -> torch.Tensor:
        """Absorbed queries [B * n, H/R, c + r] of the sequences with n new tokens -> means of latents [B * n, H/R, c]."""
        if len(self.decodes) == 1:
            return self.decodes[0].attend(layer, q, c, scale)
        sizes = [part.queries for part in self.decodes]
        return torch.cat([p.attend(layer, own, c, scale) for p, own in zip(self.decodes, q.split(sizes), strict=True)])

    def _plan_store(self, slots: torch.Tensor) -> None:
        """Which rows are stored (None: all), and at which slots. On a GPU nobody may ask how many: there padding stores once
        more what the first row that is none stores, and if all are padding (nobody) what lies in the first slot already."""
        real = slots >= 0
        self.picked = self.nobody = None
        if slots.is_cuda:
            self.picked = torch.arange(len(slots), device=slots.device).where(real, real.int().argmax())
            self.nobody, slots = ~real.any(), slots[self.picked].clamp(min=0)
        elif not bool(real.all()):
            self.picked = real.nonzero().squeeze(-1)
            slots = slots[self.picked]
        self.slots = slots


def _parts(singles: list[int], lens: list[int], cache: PagedKVCache) -> list[list[int]]:
    """Decode rows that attend together: of similar length, and on a CPU no more than stay in its cache while they do."""
    parts = []
    for group in similar_lengths(singles, lens):
        rounds = 1 if cache.k.is_cuda else -(-len(group) * max(lens[b] for b in group) * cache.row_nbytes // ROOM_BYTES)
        size = -(-len(group) // rounds)
        parts += [group[i : i + size] for i in range(0, len(group), size)]
    return parts


class _Decode:
    """B sequences with n new tokens each, one or a tree, of similar length: all heads of all of them read the same rows."""

    def __init__(
        self, cache: PagedKVCache, table: torch.Tensor, context: torch.Tensor, some: list[int] | None = None, longest: int = 0,
        window: torch.Tensor | None = None,
    ):  # fmt: skip
        """table [max B, max_pages], context [max B], window [max B * n, W]; some: which sequences, of which none is longer; None:
        all of them."""
        if window is not None:
            window = window.unflatten(0, (len(context), -1))  # [max B, n, W]
        if some is not None:
            picked = torch.tensor(some, device=table.device)
            table, context = table[picked, : -(-longest // cache.page_size)], context[picked]
            window = window if window is None else window[picked]
        self.cache, self.size = cache, len(context)
        self.queries = self.size * (1 if window is None else window.shape[1])
        slots = (table.unsqueeze(-1) * cache.page_size + torch.arange(cache.page_size, device=table.device)).flatten(1)
        slots = slots[:, :longest] if longest else slots
        seen = torch.arange(slots.shape[1], device=table.device) < context.unsqueeze(1)  # [B, S]
        self.slots = torch.where(seen, slots, slots[:, :1]).clamp_(min=0).flatten()  # a row of padding may have no page
        seen = seen.unsqueeze(1)
        if window is not None:  # [B, n, S]
            at = (context - window.shape[2]).unsqueeze(1) + torch.arange(window.shape[2], device=table.device)  # [B, W]
            seen = seen.repeat(1, window.shape[1], 1).scatter_(2, at.unsqueeze(1).expand_as(window), window)
        self.mask = (
            torch.zeros(seen.shape, device=table.device).masked_fill_(~seen, -torch.inf).unsqueeze(2)
        )  # [B, n, 1, S]

    def attend(self, layer: int, q: torch.Tensor, c: int, scale: float) -> torch.Tensor:
        """q [B * n, H/R, c + r] -> [B * n, H/R, c]."""
        q = q.unflatten(0, (self.size, -1))  # [B, n, H/R, c + r]
        rows = self.cache.read(layer, self.slots)[0].view(self.size, 1, -1, q.shape[-1]).to(q.dtype)  # [B, 1, S, c + r]
        rows = rows.expand(-1, q.shape[1], -1, -1)
        # values are the first c columns; all of them cost r more, but torch has a faster form for k and v of one width
        o = F.scaled_dot_product_attention(q, rows, rows, attn_mask=self.mask.to(q.dtype), scale=scale)
        return o.flatten(0, 1)[..., :c]


class _Extend:
    """One sequence with n > 1 new tokens behind S - n cached ones, in the form that multiplies less."""

    def __init__(self, cache: PagedKVCache, meta: AttentionMetadata, b: int, start: int, stop: int, length: int):
        self.cache, self.rows, device = cache, slice(start, stop), meta.page_table.device
        at = torch.arange(length, device=device)
        self.slots = meta.page_table[b, at // meta.page_size] * meta.page_size + at % meta.page_size  # [S]
        self.blocks = None if skips_above(device) else causal_blocks(stop - start, length, QUERY_BLOCK, device)

    def attend(self, layer: int, q: torch.Tensor, kv_b: torch.Tensor, scale: float) -> torch.Tensor:
        """q [n, H/R, dn + r], kv_b [H/R, dn + dv, c] -> o [n, H/R, dv]."""
        rows = self.cache.read(layer, self.slots)[0].squeeze(1).to(q.dtype)  # [S, c + r]
        c, key_dim = kv_b.shape[-1], q.shape[-1]
        r, dn = rows.shape[1] - c, key_dim - (rows.shape[1] - c)
        expanded, absorbed = multiplications(len(q), len(rows), c, r, dn, kv_b.shape[1] - dn)
        if absorbed < expanded:
            shared = rows.expand(q.shape[1], -1, -1)  # all heads read them
            return values_of(self._attend(absorb(q, kv_b, dn), shared, shared, scale)[..., :c], kv_b, dn)
        a_head = len(rows) * (key_dim + kv_b.shape[1]) * q.itemsize
        some = max(1, EXPANDED_BYTES // a_head)
        pieces = zip(q.split(some, dim=1), kv_b.split(some), strict=True)
        o = [self._attend(own, *expand(rows, weight, key_dim), scale) for own, weight in pieces]
        return o[0] if len(o) == 1 else torch.cat(o, dim=1)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """q [n, H, x], k [H, S, x], v [H, S, y] -> [n, H, y]."""
        if self.blocks is None:
            return attend_in_one_call(q, k, v, scale)
        q, k, v = q.transpose(0, 1)[None], k[None], v[None]
        o = [
            F.scaled_dot_product_attention(
                q[:, :, first : first + len(mask)], k[:, :, : mask.shape[1]], v[:, :, : mask.shape[1]],
                attn_mask=mask.to(q.dtype).contiguous(), scale=scale,
            )[0]
            for first, mask in self.blocks
        ]  # fmt: skip
        return torch.cat(o, dim=1).transpose(0, 1)


def skips_above(device: torch.device) -> bool:
    """Whether torch has attention here that leaves out what lies above the diagonal, and is told so without a mask."""
    return device.type == "cuda"


def attend_in_one_call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """q [n, H, x] of the last n of S positions, k [H, S, x], v [H, S, y] -> [n, H, y].

    No mask of n times S is built or read: at 32,000 tokens it would be more bytes than all else. Values that
    are narrower than keys are filled up with zeros, because flash attention wants one width.
    """
    from torch.nn.attention.bias import CausalBias, CausalVariant  # noqa: PLC0415, it brings Dynamo, 2 s of a start

    width = v.shape[-1]
    causal = torch.empty(0).as_subclass(CausalBias)  # torch's own causal_lower_right makes one of [2, n, S] numbers
    causal.variant, causal.seq_len_q, causal.seq_len_kv = CausalVariant.LOWER_RIGHT, len(q), k.shape[1]
    v = F.pad(v, (0, max(0, k.shape[-1] - width)))
    o = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k[None], v[None], attn_mask=causal, scale=scale)
    return o[0, ..., :width].transpose(0, 1)


def multiplications(new: int, length: int, c: int, r: int, dn: int, dv: int) -> tuple[int, int]:
    """(expanded, absorbed): what a head multiplies for the last `new` of `length` tokens; each sees those up to itself."""
    pairs = new * length - new * (new - 1) // 2
    return length * c * (dn + dv) + pairs * (dn + r + dv), new * c * (dn + dv) + pairs * (2 * c + r)


def absorb(q: torch.Tensor, kv_b: torch.Tensor, dn: int) -> torch.Tensor:
    """q [T, H, dn + r] -> [T, H, c + r], whose product with a row is that of q with the key made of it."""
    return torch.cat((torch.einsum("thd,hdc->thc", q[..., :dn], kv_b[:, :dn]), q[..., dn:]), dim=-1)


def values_of(means: torch.Tensor, kv_b: torch.Tensor, dn: int) -> torch.Tensor:
    """Means of latents [T, H, c] -> of values [T, H, dv]."""
    return torch.einsum("thc,hdc->thd", means, kv_b[:, dn:])


def expand(rows: torch.Tensor, kv_b: torch.Tensor, key_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """rows [S, c + r], kv_b [H, dn + dv, c], key_dim = dn + r -> k [H, S, dn + r], v [H, S, dv] of every head."""
    heads, _, c = kv_b.shape
    r = rows.shape[1] - c
    both = F.linear(rows[:, :c], kv_b.flatten(0, 1)).unflatten(-1, (heads, -1)).transpose(0, 1)  # [H, S, dn + dv]
    turned = rows[:, c:].expand(heads, -1, -1)  # one part of the key for all heads
    return torch.cat((both[..., : key_dim - r], turned), dim=-1), both[..., key_dim - r :]
