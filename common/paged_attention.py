"""The attention contract, and its plain-PyTorch form.

A step is T new tokens of B sequences, laid end to end (ragged). Attention is told this and only this:

    slot_mapping  [T]             where each new token's K and V go: page * P + offset; -1 is padding
    page_table    [B, max_pages]  the page ids of each sequence, in order; behind its end anything, -1 included
    query_start   [B+1]           sequence b's new tokens are query_start[b] .. query_start[b+1]-1
    context_lens  [B]             tokens of each sequence once the new ones are in, cached ones included
    page_size     P, and max_query_len, so that nobody has to ask the GPU for it
    prefixes      who begins alike, or None: a hint that saves reading the same pages twice, results are the same

Prefill, prefill behind a cached prefix, decode and any mix of them differ in these numbers alone. New
token i of sequence b stands at position context_lens[b] - query_len[b] + i and sees everything up to itself.
vLLM calls a page a block (Kwon et al. 2023); SGLang's backends take the same facts.

A backend is called once a layer: `attention(layer, q [T, Hq/R, d], k, v [T, Hkv/R, d]) -> o [T, Hq/R, d]`. One that says
`turns` takes q and k before their positions are in them, and a layer's Turning as one more argument.
No rank talks here: each attends with its own heads over its own part of the pages.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common.kv_cache import PagedKVCache

MAX_PADDING = 1024  # tokens of a group of decode rows
MIN_SHARED_TOKENS = 64  # a shared prefix shorter than this is not worth a second pass and a merge


@dataclass(frozen=True)
class SharedPrefixes:
    """Sequences of a decode step that begin with the same pages, a few neighbours at a time.

    tiles [3, n]: sequences first .. first+count-1 have their first `tokens` tokens in common; count 0 is no tile.
    tokens [B]: the same by sequence, 0 for those in no tile.
    """

    tiles: torch.Tensor
    tokens: torch.Tensor


@dataclass(frozen=True)
class AttentionMetadata:
    """What a step tells attention; see the top of this file. int64 tensors on the cache's device."""

    slot_mapping: torch.Tensor  # [T]
    page_table: torch.Tensor  # [B, max_pages]
    query_start: torch.Tensor  # [B+1]
    context_lens: torch.Tensor  # [B]
    page_size: int  # P
    max_query_len: int = 0  # longest of the step, known on the host: a GPU launch needs it; 0 is unknown
    prefixes: SharedPrefixes | None = None  # decode only


class TorchNativeAttention:
    """The contract in plain PyTorch: index_select the pages, then scaled_dot_product_attention.

    What does not depend on the layer (which pages, which mask) is worked out once a step, here in the
    constructor. Sequences with one new token (decode) run together, the longest split from the shortest so
    that padding stays small; sequences with several run one by one.
    """

    capturable = False
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def __init__(self, cache: PagedKVCache, meta: AttentionMetadata):
        if meta.page_size != cache.page_size:
            raise ValueError(f"page_size={meta.page_size} of the step is not the cache's page_size={cache.page_size}")
        self.cache = cache
        real = meta.slot_mapping >= 0
        self.real = None if bool(real.all()) else real.nonzero().squeeze(-1)
        self.slots = meta.slot_mapping if self.real is None else meta.slot_mapping[self.real]
        starts, lens = meta.query_start.tolist(), meta.context_lens.tolist()
        singles = [b for b in range(len(lens)) if starts[b + 1] - starts[b] == 1]
        self.decodes, self.rows = _decode_groups(meta, cache, _similar_lengths(singles, lens), starts, lens)
        self.extends = [
            _Extend(meta, b, starts[b], starts[b + 1], lens[b])
            for b in range(len(lens))
            if starts[b + 1] - starts[b] > 1
        ]

    @staticmethod
    def tile_members(num_q: int, num_kv: int) -> int:
        """Sequences that begin alike and need a hint to be served together: none, this form looks for itself."""
        return 0

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Store this step's k, v, then attend. q [T, Hq/R, d] -> o [T, Hq/R, d]."""
        new = (k, v) if self.real is None else (k[self.real], v[self.real])
        self.cache.write(layer, self.slots, *new)
        k_pages, v_pages = self.cache.k[layer], self.cache.v[layer]  # [N, P, Hkv/R, d]
        if self.decodes and self.rows is None:  # all rows, in order
            return self.decodes[0].attend(q, k_pages, v_pages)
        o = torch.zeros_like(q)
        if self.decodes:
            own = q[self.rows].split([len(group.mask) for group in self.decodes])
            pairs = zip(self.decodes, own, strict=True)
            o[self.rows] = torch.cat([group.attend(rows, k_pages, v_pages) for group, rows in pairs])
        for part in self.extends:
            o[part.rows] = part.attend(q[part.rows], k_pages, v_pages)
        return o


def _decode_groups(
    meta: AttentionMetadata, cache: PagedKVCache, groups: list[list[int]], starts: list[int], lens: list[int]
):
    """(what attends for each group of sequences, their rows of q group by group, or None: one group of all rows in order)."""
    order = [b for group in groups for b in group]
    table, context, rows = meta.page_table, meta.context_lens, None
    if len(groups) > 1 or order != list(range(len(meta.slot_mapping))):
        device = table.device
        picked = torch.tensor(order, dtype=torch.int64, device=device)
        rows = torch.tensor([starts[b] for b in order], dtype=torch.int64, device=device)
        table, context = table[picked], context[picked]
    table, parts, first = table.clamp(0, cache.num_pages - 1), [], 0  # behind a sequence's end stands anything
    for group in groups:
        some, first = slice(first, first + len(group)), first + len(group)
        parts.append(_DecodeGroup(cache, table[some], context[some], [lens[b] for b in group]))
    return parts, rows


class _DecodeGroup:
    """B sequences with one new token each, of similar length.

    Pages that all of them begin with (a shared prompt) are not copied B times: all queries attend to them
    at once, each attends to its own rest, and the two results are merged by their log-sum-exp. vLLM calls
    it cascade attention; the arithmetic is Hydragen's (Juravsky et al. 2024).
    """

    def __init__(self, cache: PagedKVCache, table: torch.Tensor, context: torch.Tensor, lens: list[int]):
        """table [B, max_pages], context [B] and the same as numbers, lens."""
        device, page_size = table.device, cache.page_size
        pages = -(-max(lens) // page_size)
        table = table[:, :pages]
        shared = _shared_pages(table, (min(lens) - 1) // page_size, page_size)
        self.shared = table[0, :shared] if shared else None
        self.pages = table[:, shared:].reshape(-1)  # [B * (pages - shared)]
        self.room = cache.room(len(self.pages))
        slots = torch.arange(shared * page_size, pages * page_size, device=device)
        behind = slots >= context.unsqueeze(1)  # [B, S]: slots that hold nothing, or another's leftovers
        self.behind = behind.flatten().nonzero().squeeze(-1)
        self.mask = torch.zeros(behind.shape, device=device).masked_fill_(behind, -torch.inf)[:, None, None]

    def attend(self, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor) -> torch.Tensor:
        """q [B, Hq/R, d] -> o [B, Hq/R, d]."""
        b, (_, _, hkv, d) = len(q), k_pages.shape
        k = self._gather(k_pages, self.room[0]).view(b, -1, hkv, d).transpose(1, 2).to(q.dtype)  # [B, Hkv/R, S, d]
        v = self._gather(v_pages, self.room[1]).view(b, -1, hkv, d).transpose(1, 2).to(q.dtype)
        # the query heads of a group become rows of one query: K and V are read once for all of them
        q = q.view(b, hkv, -1, d)  # [B, Hkv/R, g, d]
        mask = self.mask.to(q.dtype)
        if self.shared is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(b, -1, d)
        own, own_lse = _attention_with_lse(q, k, v, mask)  # [B, Hkv/R, g, d], [B, Hkv/R, g]
        k, v = (
            x.index_select(0, self.shared).flatten(0, 1).transpose(0, 1)[None].to(q.dtype) for x in (k_pages, v_pages)
        )
        together = q.transpose(0, 1).reshape(1, hkv, -1, d)  # [1, Hkv/R, B * g, d]
        o, lse = _attention_with_lse(together, k, v)
        o, lse = o.view(hkv, b, -1, d).transpose(0, 1), lse.view(hkv, b, -1).transpose(0, 1)
        # softmax over both parts: each weighs as much as the exponentials it summed up
        weight = torch.sigmoid(lse - own_lse).unsqueeze(-1).to(q.dtype)
        return torch.lerp(own, o, weight).reshape(b, -1, d)

    def _gather(self, pages: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
        """pages [N, P, Hkv/R, d] -> the slots of this group [B * S, Hkv/R, d], in `room`.

        What lies behind a sequence's end is blanked: masking it is not enough, 0 * NaN is NaN.
        """
        return torch.index_select(pages, 0, self.pages, out=room).flatten(0, 1).index_fill_(0, self.behind, 0)


class _Extend:
    """One sequence with n > 1 new tokens behind S - n cached ones."""

    def __init__(self, meta: AttentionMetadata, b: int, start: int, stop: int, length: int):
        n, device = stop - start, meta.page_table.device
        self.rows, self.length = slice(start, stop), length
        self.pages = meta.page_table[b, : -(-length // meta.page_size)]
        self.mask = None  # nothing cached: SDPA's own causal mask
        if length > n:
            # SDPA aligns its causal mask at the top left; ours must end at the bottom right
            self.mask = torch.full((n, length), -torch.inf, device=device).triu_(length - n + 1)

    def attend(self, q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor) -> torch.Tensor:
        """q [n, Hq/R, d] -> o [n, Hq/R, d]."""
        k = k_pages.index_select(0, self.pages).flatten(0, 1)[: self.length]  # [S, Hkv/R, d]
        v = v_pages.index_select(0, self.pages).flatten(0, 1)[: self.length]
        q, k, v = (x.transpose(0, 1)[None].to(q.dtype) for x in (q, k, v))  # [1, Hq/R, n, d], [1, Hkv/R, S, d]
        mask = None if self.mask is None else self.mask.to(q.dtype)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return o[0].transpose(0, 1)


def _attention_with_lse(q, k, v, mask=None) -> tuple[torch.Tensor, torch.Tensor]:
    """q [B, H, n, d], k and v [B, H, S, d] -> o [B, H, n, d] and the log-sum-exp of the scores [B, H, n].

    The operator behind scaled_dot_product_attention on CPU, called by name because it also returns the sum.
    """
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)


def _shared_pages(table: torch.Tensor, limit: int, page_size: int) -> int:
    """How many of the first `limit` columns of table [B, pages] are the same page in all rows; 0 if not worth it."""
    if len(table) == 1 or limit * page_size < MIN_SHARED_TOKENS or table.device.type != "cpu":
        return 0
    if not bool((table[:, 0] == table[0, 0]).all()):
        return 0
    same = (table[:, :limit] == table[0, :limit]).all(dim=0)
    shared = int(same.long().cumprod(0).sum())
    return shared if shared * page_size >= MIN_SHARED_TOKENS else 0


def _similar_lengths(rows: list[int], lens: list[int]) -> list[list[int]]:
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
