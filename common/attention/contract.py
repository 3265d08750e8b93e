"""The attention contract: what a step tells attention, whoever computes it.

A step is T new tokens of B sequences, laid end to end (ragged). Attention is told this and only this:

    slot_mapping  [T]             where each new token's K and V go: page * P + offset; -1 is padding
    page_table    [B, max_pages]  the page ids of each sequence, in order; behind its end anything, -1 included
    query_start   [B+1]           sequence b's new tokens are query_start[b] .. query_start[b+1]-1
    context_lens  [B]             tokens of each sequence once the new ones are in, cached ones included
    page_size     P, and max_query_len, so that nobody has to ask the GPU for it
    prefixes      who begins alike, or None: a hint that saves reading the same pages twice, results are the same
    window        [T, W], or None: which of the last W tokens of its sequence a new token sees, where that is not all up to itself
    padded        there may be tokens behind query_start[B]: of no sequence, to slot -1, and what they get is 0

Prefill, prefill behind a cached prefix, decode and any mix of them differ in these numbers alone. In each layer the K and V
of the whole step are written before anybody attends: a sequence may begin with pages that another one fills in this very
step (not in one of max_query_len 1, where all decode). New
token i of sequence b stands at position context_lens[b] - query_len[b] + i and sees everything up to itself.
A step with a window is one of a tree (common/draft_tree.py): siblings stand side by side in the slots and must not see each
other. All its sequences have the same number of new tokens, at least W tokens each, and what stands before the last W is seen by
every new token. A backend that can do it says `windows`. One that reads pages of codes (kv_format.py) says `reads_codes`.
A page is filled from its first slot on, and what its last owner left in the others, NaN included, counts for nothing.
vLLM calls a page a block (Kwon et al. 2023); SGLang's backends take the same facts.

A backend is called once a layer: `attention(layer, q [T, Hq/R, d], k, v [T, Hkv/R, d]) -> o [T, Hq/R, d]`. One that says
`turns` takes q and k before their positions are in them, and a layer's Turning as one more argument. Where pages hold latent
rows in place of K and V, it is called in another way (latent.py; `turns` then asks for a LatentTurning of layers/mla.py); all that
is said here holds for rows as for K and V.
No rank talks here: each attends with its own heads over its own part of the pages.
"""

from dataclasses import dataclass

import torch


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
    max_query_len: int = 0  # no query is longer, known on the host: a GPU launch needs it; 1: a decode step; 0: unknown
    prefixes: SharedPrefixes | None = None  # decode only
    window: torch.Tensor | None = None  # [T, W] bool; each row has a True: its own token's
    padded: bool = False  # tokens of no sequence may follow, and a sequence may have none: a recorded prefill

    def refuse_other_pages(self, page_size: int) -> None:
        """page_size: the cache's. Raises ValueError for another one: the step's page ids would mean other tokens."""
        if self.page_size != page_size:
            raise ValueError(f"page_size={self.page_size} of the step is not the cache's page_size={page_size}")
