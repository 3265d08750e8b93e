"""The two ends of the model, cut over the vocabulary: rank r holds rows r*V/R .. (r+1)*V/R - 1."""

import torch
import torch.nn.functional as F
from torch import nn

from common.layers.heads import split_evenly
from common.layers.linear import ColumnParallelLinear, load_pieces, loadable, multiply
from common.parallel_state import TPGroup, all_reduce, gather

try:  # a CPU build of torch comes without Triton
    from common.kernels import fused
except ImportError:
    fused = None


class VocabParallelEmbedding(nn.Module):
    """input_ids [T] -> hidden [T, D], equal on every rank; one all-reduce.

    Exactly one rank holds a token's row. The others look up a row that they do hold, blank it out, and
    the sum over ranks is the embedding. Megatron-LM, section 3.
    """

    def __init__(self, vocab_size: int, hidden_size: int, tp: TPGroup, name: str = "embed_tokens"):
        super().__init__()
        self.tp, self.name = tp, name
        local, self.pieces = split_evenly(vocab_size, tp.rank, tp.size)
        self.first, self.last = tp.rank * local, (tp.rank + 1) * local - 1
        self.weight = loadable(torch.zeros(local, hidden_size), self.load_weight, {None: (vocab_size, hidden_size)})
        self.dtype = self.weight.dtype  # of hidden

    def load_weight(self, source, shard_id=None) -> None:
        load_pieces(self.weight, source, 0, self.pieces)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if fused and input_ids.is_cuda:
            x = fused.embed(input_ids, self.weight, self.first)
        elif self.tp.size == 1:
            x = F.embedding(input_ids, self.weight).to(self.dtype)
        else:
            mine = (input_ids >= self.first) & (input_ids <= self.last)  # [T]
            x = F.embedding((input_ids - self.first) * mine, self.weight).to(self.dtype) * mine.unsqueeze(-1)  # [T, D]
        x = all_reduce(x, self.tp, self.name)  # COMM all-reduce [T, D]: one rank's row + zeros -> the row
        return x


class ParallelLMHead(ColumnParallelLinear):
    """hidden [B, D] -> logits of this rank's slice of the vocabulary [B, V/R]; no communication.

    Tied models hand in the embedding's weight: the same cut, the same memory, read once. If another form of the matrix
    is faster to multiply by (cpu_linear.py), `copy` is that one: rows cannot be looked up in it.
    """

    def __init__(self, vocab_size: int, hidden_size: int, tp: TPGroup, tied_to: VocabParallelEmbedding | None = None):
        super().__init__(hidden_size, vocab_size, tp, name="lm_head")
        self.vocab_size, self.tied = vocab_size, tied_to is not None
        self.register_buffer("copy", None, persistent=False)
        if tied_to is not None:
            self.weight = tied_to.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden) if self.copy is None else multiply(hidden, self.copy)


def gather_logits(logits_local: torch.Tensor, vocab_size: int, tp: TPGroup) -> torch.Tensor | None:
    """logits_local [B, V/R] -> [B, V] on rank 0, None elsewhere; the padding columns are cut off.

    Only rank 0 samples, so only rank 0 gets them: an all-gather would send R times as much.
    """
    parts = gather(logits_local, tp, "logits")  # COMM gather [B, V/R]: rank 0 alone samples
    if parts is None:
        return None
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1))[:, :vocab_size]


def gather_best_logits(logits_local: torch.Tensor, best: int, vocab_size: int, tp: TPGroup) -> torch.Tensor | None:
    """logits_local [B, V/R] -> [B, V] on rank 0 with all but each rank's `best` best at -inf; None elsewhere.

    Exact for whoever looks at no more than the `best` best of all: greedy at 1, top-k at k. A rank sends
    [B, best] pairs (logit, token id) instead of V/R logits. Of equal logits the lower ids go first.
    """
    if tp.size == 1:
        return logits_local[:, :vocab_size]
    local = logits_local.shape[1]
    best = min(best, local)
    own = logits_local.float()
    if vocab_size < local * tp.size:  # the last rank's padding columns are no tokens
        ids = torch.arange(local, device=own.device) + tp.rank * local
        own = own.masked_fill(ids >= vocab_size, -torch.inf)
    values, ids = first_best(own, best)
    pairs = torch.stack((values, (ids + tp.rank * local).to(torch.int32).view(torch.float32)), dim=-1)  # [B, best, 2]
    parts = gather(pairs, tp, "logits")  # COMM gather [B, best, 2]: what rank 0 may choose from
    if parts is None:
        return None
    values, ids = torch.cat(parts, dim=1).unbind(-1)  # [B, R * best]
    logits = torch.full((len(own), local * tp.size), -torch.inf, device=own.device)
    logits.scatter_(1, ids.contiguous().view(torch.int32).long(), values)
    return logits[:, :vocab_size]


def first_best(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row of x [B, n] and where they are, the first of equals; a NaN is larger than all."""
    if k == 1:
        at = x.argmax(dim=-1, keepdim=True)
        return x.gather(1, at), at
    # one sortable number from value and place: the bits of a float in the order of its values, then the place
    bits = torch.where(x.isnan(), torch.nan, x + 0.0).view(torch.int32).long()  # a NaN has a sign too
    place = torch.arange(x.shape[1] - 1, -1, -1, device=x.device)
    at = ((torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 32) + place).topk(k, dim=-1).indices
    return x.gather(1, at), at
