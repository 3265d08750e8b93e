"""The attention contract (contract.py) in plain PyTorch: what a CPU runs, and what every other form is compared with."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from common.attention.contract import AttentionMetadata
from common.attention.kv_cache import PagedKVCache
from common.attention.merge import attention_with_lse, merge_two

MAX_PADDING = 1024  # tokens of a group of decode rows
ROOM_BYTES = 3 << 20  # of K and V that are copied before they are attended to: what a core's caches still hold by then
QUERY_BLOCK = 96  # new tokens of a sequence that attend together; short enough to skip much, long enough for a GEMM
MIN_SHARED_TOKENS = 64  # a shared prefix shorter than this is not worth a second pass and a merge


class TorchNativeAttention:
    """The contract in plain PyTorch: index_select the pages, then scaled_dot_product_attention.

    What does not depend on the layer (which pages, which mask) is worked out once a step, here in the
    constructor. Sequences with one new token (decode), or with a tree of them, run together, the longest split from the
    shortest so that padding stays small; other sequences with several run one by one.
    """

    capturable = False
    windows = True
    reads_codes = True
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def __init__(self, cache: PagedKVCache, meta: AttentionMetadata):
        meta.refuse_other_pages(cache.page_size)
        self.cache = cache
        real = meta.slot_mapping >= 0
        self.real = None if bool(real.all()) else real.nonzero().squeeze(-1)
        self.slots = meta.slot_mapping if self.real is None else meta.slot_mapping[self.real]
        cache.begin(self.slots)
        starts, lens = meta.query_start.tolist(), meta.context_lens.tolist()
        self.nodes = (
            1 if meta.window is None else len(meta.window) // len(lens)
        )  # new tokens of a sequence that runs in a group
        singles = [b for b in range(len(lens)) if starts[b + 1] - starts[b] == self.nodes]
        self.decodes, self.rows = _decode_groups(meta, cache, similar_lengths(singles, lens), lens)
        self.back = None if self.rows is None else self.rows.argsort()  # which of the groups' rows is the i-th of them
        self.extends = [
            _Extend(cache, meta, b, starts[b], starts[b + 1], lens[b])
            for b in range(len(lens))
            if starts[b + 1] - starts[b] > self.nodes
        ]

    @staticmethod
    def tile_members(num_q: int, num_kv: int) -> int:
        """Sequences that begin alike and need a hint to be served together: none, this form looks for itself."""
        return 0

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Store this step's k, v, then attend. q [T, Hq/R, d] -> o [T, Hq/R, d]."""
        new = (k, v) if self.real is None else (k[self.real], v[self.real])
        self.cache.write(layer, self.slots, *new)
        if self.decodes:
            # the query heads of a group become rows of one query: K and V are read once for all of them
            own = q.view(len(q), k.shape[1], -1, q.shape[2])  # [T, Hkv/R, g, d]
            if self.nodes > 1:  # and so do the nodes of a tree
                own = own.unflatten(0, (-1, self.nodes)).transpose(1, 2).flatten(2, 3)  # [B, Hkv/R, n * g, d]
            if self.rows is not None:
                own = own.index_select(0, self.rows)
            own = own.split([group.size for group in self.decodes])
            own = [group.attend(layer, rows) for group, rows in zip(self.decodes, own, strict=True)]
            own = _joined(own)
            if self.nodes > 1:
                own = own if self.rows is None else own.index_select(0, self.back)
                return own.unflatten(2, (self.nodes, -1)).transpose(1, 2).reshape(q.shape)
            own = own.flatten(1, 2)  # [n, Hq/R, d]
            if not self.extends and len(own) == len(q):
                return own if self.rows is None else own.index_select(0, self.back)
        o = torch.zeros_like(q)
        if self.decodes:
            o.index_copy_(0, self.rows, own)
        for part in self.extends:
            o[part.rows] = part.attend(layer, q[part.rows], k[part.rows], v[part.rows])
        return o


def _decode_groups(meta: AttentionMetadata, cache: PagedKVCache, groups: list[list[int]], lens: list[int]):
    """(what attends for each group of sequences, their rows of q group by group, or None: one group of all rows in order).

    With a window rows are sequences: the new tokens of one stay together.
    """
    if not groups:
        return [], None
    order = [b for group in groups for b in group]
    table, context, window, rows = meta.page_table, meta.context_lens, meta.window, None
    if window is not None:
        window = window.unflatten(0, (len(context), -1))  # [B, n, W]
    if len(groups) > 1 or order != list(range(len(meta.slot_mapping if window is None else window))):
        picked = torch.tensor(order, device=table.device)
        rows = meta.query_start[picked] if window is None else picked
        table, context = table[picked], context[picked]
        window = window if window is None else window[picked]
    # behind a sequence's last page stands anything; its first one stands in, and never another's, which may have gone bad
    first_slots = torch.arange(0, table.shape[1] * meta.page_size, meta.page_size, device=table.device)  # of the pages
    table = torch.where(first_slots < context.unsqueeze(1), table, table[:, :1])
    table = table.clamp_(0, cache.num_pages - 1)  # a row that pads the batch has no page at all
    # S zeros, then S times -inf: a sequence's mask is a window on them
    size = table.shape[1] * meta.page_size
    line = torch.zeros(2 * size, device=table.device)
    line[size:] = -torch.inf
    masks = line.unfold(0, size, 1).index_select(0, size - context).unsqueeze(1)  # [B, 1, S]
    seen_by_all = [length - 1 for length in lens]
    if window is not None:
        width = window.shape[2]
        hidden = torch.zeros(window.shape, device=table.device).masked_fill_(~window, -torch.inf)
        at = (context - width).unsqueeze(1) + torch.arange(width, device=table.device)  # [B, W]
        masks = masks.repeat(1, window.shape[1], 1).scatter_(2, at.unsqueeze(1).expand_as(hidden), hidden)  # [B, n, S]
        seen_by_all = [length - width for length in lens]
    parts, first = [], 0
    for group in groups:
        some, first = slice(first, first + len(group)), first + len(group)
        longest, common = max(lens[b] for b in group), min(seen_by_all[b] for b in group)
        parts.append(_DecodeGroup(cache, table[some], masks[some], longest, common))
    return parts, rows


class _DecodeGroup:
    """B sequences with n new tokens each, of similar length: one, or a tree of them.

    Pages that all of them begin with (a shared prompt) are not copied B times: all queries attend to them
    at once, each attends to its own rest, and the two results are merged by their log-sum-exp. vLLM calls
    it cascade attention; the arithmetic is Hydragen's (Juravsky et al. 2024).
    """

    def __init__(self, cache: PagedKVCache, table: torch.Tensor, masks: torch.Tensor, longest: int, common: int):
        """table [B, max_pages], masks [B, n, max_pages * P]: -inf where a new token does not look, as behind its sequence's end.

        longest: tokens of the longest; common: the first so many are seen by every new token, whatever the sequence.
        """
        self.cache, self.size, page_size = cache, len(table), cache.page_size
        pages = -(-longest // page_size)
        shared = _shared_pages(table, common // page_size, page_size)
        self.shared = cache.halves_of(table[0, :shared]) if shared else None
        table, masks = table[:, shared:pages], masks[:, None, :, shared * page_size : pages * page_size]
        rounds = -(-2 * table.numel() * page_size * cache.row_nbytes // ROOM_BYTES)
        size = -(-self.size // rounds)  # sequences a round
        self.rounds = [_Round(cache, t, m) for t, m in zip(table.split(size), masks.split(size), strict=True)]

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """q [B, Hkv/R, n * g, d] -> o [B, Hkv/R, n * g, d]."""
        rounds = list(zip(self.rounds, q.split([r.size for r in self.rounds]), strict=True))
        if self.shared is None:
            return _joined([F.scaled_dot_product_attention(*r.operands(layer, part)) for r, part in rounds])
        own, own_lse = map(
            _joined, zip(*(attention_with_lse(*r.operands(layer, part)) for r, part in rounds), strict=True)
        )
        b, hkv, _, d = q.shape  # own [B, Hkv/R, n * g, d], own_lse [B, Hkv/R, n * g]
        k, v = self.cache.gather(layer, self.shared).transpose(1, 2)[:, None].to(q.dtype)  # [1, Hkv/R, S, d]
        together = q.transpose(0, 1).reshape(1, hkv, -1, d)  # [1, Hkv/R, B * n * g, d]
        o, lse = attention_with_lse(together, k, v)
        o, lse = o.view(hkv, b, -1, d).transpose(0, 1), lse.view(hkv, b, -1).transpose(0, 1)
        return merge_two((own, own_lse), (o, lse))


class _Round:
    """Some sequences of a group: their pages are copied together, and attended to while they are in the cache."""

    def __init__(self, cache: PagedKVCache, table: torch.Tensor, mask: torch.Tensor):
        """table [B, S / P], mask [B, 1, n, S]."""
        self.cache, self.mask, self.size = cache, mask, len(table)
        # masked or not, no slot may hold NaN (0 * NaN is NaN): a page is blank where its sequence has written nothing
        self.pages = cache.halves_of(table.flatten())  # [2 * B * S / P]
        self.room = cache.room(len(self.pages))  # [2 * B * S / P, P, Hkv/R, d]
        kv = self.room.view(2, self.size, -1, *self.room.shape[2:])
        self.k, self.v = kv.transpose(2, 3).unbind(0)  # [B, Hkv/R, S, d]

    def operands(self, layer: int, q: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q, and k, v and the mask in q's dtype; the next round overwrites k and v."""
        self.cache.gather_into(self.room, layer, self.pages)
        if self.mask.dtype != q.dtype:
            self.mask = self.mask.to(q.dtype)
        if 1 < self.mask.shape[2] < q.shape[2]:  # the query heads of a group, which are rows here, see the same
            self.mask = self.mask.repeat_interleave(q.shape[2] // self.mask.shape[2], dim=2)
        k, v = self.k, self.v
        if k.dtype != q.dtype:
            k, v = k.to(q.dtype), v.to(q.dtype)
        return q, k, v, self.mask


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Extend:
    """One sequence with n > 1 new tokens behind S - n cached ones.

    A block of queries at a time, and only the keys that the block's last one sees: less is computed and masked away.
    """

    def __init__(self, cache: PagedKVCache, meta: AttentionMetadata, b: int, start: int, stop: int, length: int):
        self.cache, self.rows, self.length = cache, slice(start, stop), length
        n, device = stop - start, meta.page_table.device
        self.pages = cache.halves_of(meta.page_table[b, : -(-length // meta.page_size)]) if length > n else None
        self.blocks = causal_blocks(n, length, QUERY_BLOCK, device)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [n, Hq/R, d], the new tokens' k and v [n, Hkv/R, d] -> o [n, Hq/R, d]."""
        if self.pages is not None:
            k, v = self.cache.gather(layer, self.pages)[:, : self.length].to(q.dtype)  # [S, Hkv/R, d]
        else:
            k, v = self.cache.rounded(layer, k, v)  # as the pages hold them
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, Hq/R, n, d], [1, Hkv/R, S, d]
        o = [
            F.scaled_dot_product_attention(
                q[:, :, first : first + len(mask)], k[:, :, : mask.shape[1]], v[:, :, : mask.shape[1]],
                attn_mask=mask.to(q.dtype), enable_gqa=True,
            )[0]
            for first, mask in self.blocks
        ]  # fmt: skip
        return torch.cat(o, dim=1).transpose(0, 1)


def causal_blocks(new: int, length: int, size: int, device: torch.device) -> list[tuple[int, torch.Tensor]]:
    """The last `new` of `length` tokens, `size` at a time: (first of them, mask [rows, keys that the last of them sees])."""
    # zeros and a triangle behind them: each block's mask is a window on it that ends in the triangle
    rows = min(new, size)
    hidden = torch.full((rows, rows), -torch.inf, device=device).triu_(1)
    mask = torch.cat((hidden.new_zeros(rows, length), hidden), dim=1)  # [rows, S + rows]
    starts = range(0, new, size)
    return [(at, mask[: min(new - at, size), new - at : length + min(new - at, size)]) for at in starts]


def _shared_pages(table: torch.Tensor, limit: int, page_size: int) -> int:
    """How many of the first `limit` columns of table [B, pages] are the same page in all rows; 0 if not worth it."""
    if len(table) == 1 or limit * page_size < MIN_SHARED_TOKENS or table.device.type != "cpu":
        return 0
    ids = table[:, :limit].numpy()
    if ids[0, 0] != ids[-1, 0]:  # as mostly
        return 0
    differ = (ids != ids[0]).any(axis=0)
    shared = int(differ.argmax()) if differ.any() else limit
    return shared if shared * page_size >= MIN_SHARED_TOKENS else 0


def similar_lengths(rows: list[int], lens: list[int]) -> list[list[int]]:
    """Split decode rows so that little is padded: a group ends where it would pad more than MAX_PADDING tokens.

    Padding is copied and attended to like any token, a group costs a handful of calls; about so many tokens are worth them.
    """
    groups: list[list[int]] = []
    padding = 0
    for b in sorted(rows, key=lambda b: -lens[b]):
        if groups and padding + lens[groups[-1][0]] - lens[b] <= MAX_PADDING:
            padding += lens[groups[-1][0]] - lens[b]
            groups[-1].append(b)
        else:
            groups.append([b])
            padding = 0
    return [list(rows)] if len(groups) == 1 else groups  # in order: then nothing need be picked out
