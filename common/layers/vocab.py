"""The two ends of the model, cut over the vocabulary: rank r holds rows r*V/R .. (r+1)*V/R - 1."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from common.layers.heads import split_evenly
from common.layers.linear import ColumnParallelLinear, load_pieces, loadable, multiply
from common.parallel_state import TPGroup, all_gather, all_reduce, gather
from common.quantization.method import LinearMethod

try:  # a CPU build of torch comes without Triton
    from common.kernels import fused
except ImportError:
    fused = None


class VocabParallelEmbedding(nn.Module):
    """input_ids [T] -> hidden [T, D], equal on every rank; one all-reduce.

    Exactly one rank holds a token's row. The others look up a row that they do hold, blank it out, and
    the sum over ranks is the embedding. With `reduce_results=False` it stays to be summed. Megatron-LM, section 3.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, tp: TPGroup, name: str = "embed_tokens", reduce_results: bool = True
    ):
        super().__init__()
        self.tp, self.name, self.reduce_results = tp, name, reduce_results
        local, self.pieces = split_evenly(vocab_size, tp.rank, tp.size)
        self.first, self.last = tp.rank * local, (tp.rank + 1) * local - 1
        self.weight = loadable(torch.zeros(local, hidden_size), self.load_weight, {None: (vocab_size, hidden_size)})
        self.dtype = self.weight.dtype  # of hidden
        self.lora = None  # room for adapters, see lora.py

    def load_weight(self, source, shard_id=None) -> None:
        load_pieces(self.weight, source, 0, self.pieces)

    def forward(self, input_ids: torch.Tensor, adapters=None) -> torch.Tensor:
        if fused and input_ids.is_cuda:
            x = fused.embed(input_ids, self.weight, self.first)
        elif self.tp.size == 1:
            x = F.embedding(input_ids, self.weight).to(self.dtype)
        else:
            mine = (input_ids >= self.first) & (input_ids <= self.last)  # [T]
            x = F.embedding((input_ids - self.first) * mine, self.weight).to(self.dtype) * mine.unsqueeze(-1)  # [T, D]
        if adapters is not None:
            x = adapters.add_embedding(x, input_ids, self.lora)
        if self.reduce_results:
            x = all_reduce(x, self.tp, self.name)  # COMM all-reduce [T, D]: one rank's row + zeros -> the row
        return x


class ParallelLMHead(ColumnParallelLinear):
    """hidden [B, D] -> logits of this rank's slice of the vocabulary [B, V/R]; no communication.

    Tied models hand in the embedding's weight: the same cut, the same memory, read once. If another form of the matrix
    is faster to multiply by (cpu_linear.py), `copy` is that one: rows cannot be looked up in it.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, tp: TPGroup, tied_to: VocabParallelEmbedding | None = None,
        method: LinearMethod | None = None,
    ):  # fmt: skip
        super().__init__(hidden_size, vocab_size, tp, name="lm_head", method=method if tied_to is None else None)
        self.vocab_size, self.tied = vocab_size, tied_to is not None
        self.register_buffer("copy", None, persistent=False)
        if tied_to is not None:
            self.weight = tied_to.weight

    def product(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().product(hidden) if self.copy is None else multiply(hidden, self.copy)


def gather_logits(logits_local: torch.Tensor, vocab_size: int, tp: TPGroup) -> torch.Tensor | None:
    """logits_local [B, V/R] -> [B, V] on rank 0, None elsewhere; the padding columns are cut off.

    Only rank 0 samples, so only rank 0 gets them: an all-gather would send R times as much.
    """
    parts = gather(logits_local, tp, "logits")  # COMM gather [B, V/R]: rank 0 alone samples
    return None if parts is None else join_logits(parts, vocab_size)


def all_logits(logits_local: torch.Tensor, vocab_size: int, tp: TPGroup) -> torch.Tensor:
    """logits_local [n, V/R] of a draft -> [n, V] on every rank, without the padding: all draw the same guess from them."""
    if tp.size == 1:
        return logits_local[:, :vocab_size]
    parts = all_gather(logits_local, tp, "draft logits")  # COMM all-gather [n, V/R]: every rank draws the same guess
    return join_logits(parts, vocab_size)


def gather_best_logits(logits_local: torch.Tensor, best: int, vocab_size: int, tp: TPGroup) -> torch.Tensor | None:
    """logits_local [B, V/R] -> [B, V] on rank 0 with all but each rank's `best` best at -inf; None elsewhere.

    Exact for whoever looks at no more than the `best` best of all: greedy at 1, top-k at k. A rank sends
    [B, best] pairs (logit, token id) instead of V/R logits. Of equal logits the lower ids go first.
    """
    if tp.size == 1:
        return logits_local[:, :vocab_size]
    pairs = best_pairs(logits_local, best, vocab_size, tp)
    parts = gather(pairs, tp, "logits")  # COMM gather [B, best, 2]: what rank 0 may choose from
    return None if parts is None else join_best_logits(parts, vocab_size)


def join_logits(parts: Sequence[torch.Tensor], vocab_size: int) -> torch.Tensor:
    """[B, V/R] of each rank -> [B, V]"""
    logits = parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim=-1)
    return logits[:, :vocab_size] if logits.shape[1] > vocab_size else logits


def best_pairs(logits_local: torch.Tensor, best: int, vocab_size: int, tp: TPGroup) -> torch.Tensor:
    """logits_local [B, V/R] -> its `best` best, as pairs (logit, bits of the token id) [B, best, 2] float32."""
    local = logits_local.shape[1]
    own = logits_local.float()
    if vocab_size < local * tp.size:  # the last rank's padding columns are no tokens
        ids = torch.arange(local, device=own.device) + tp.rank * local
        own = own.masked_fill(ids >= vocab_size, -torch.inf)
    values, ids = first_best(own, min(best, local))
    return torch.stack((values, (ids + tp.rank * local).to(torch.int32).view(torch.float32)), dim=-1)


def best_logprobs(
    logits_local: torch.Tensor, best: int, vocab_size: int, tp: TPGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits_local [n, V/R] -> the log-probabilities of the `best` best tokens and their ids, both [n, best], equal on all ranks.

    A rank sends its `best` best, and the log of the sum of exponentials of all that it has. What comes out is made of
    what was sent alone, so that all ranks get the same bits whatever they have computed. Of equal ones the lower ids go first.
    """
    if tp.size == 1:
        logits = logits_local[:, :vocab_size].float()
        values, ids = first_best(logits, best)
        return values - logits.logsumexp(-1, keepdim=True), ids
    pairs = best_pairs(logits_local, best, vocab_size, tp)  # [n, best, 2]
    real = max(0, min(vocab_size - tp.rank * logits_local.shape[1], logits_local.shape[1]))
    mass = logits_local[:, :real].float().logsumexp(-1)  # [n], -inf for a rank that has only padding
    sent = torch.cat((pairs.flatten(1), mass.unsqueeze(1)), dim=1)
    parts = all_gather(sent, tp, "draft logits")  # COMM all-gather [n, 2 best + 1]: the best of each rank's tokens
    parts = torch.stack(parts)
    masses = parts[..., -1].logsumexp(0).unsqueeze(1)  # [n, 1]
    values, ids = parts[..., :-1].unflatten(-1, (-1, 2)).transpose(0, 1).flatten(1, 2).unbind(-1)  # [n, R * best]
    top, at = first_best(values.contiguous(), best)  # rank by rank, so that equals stand in the order of their ids
    return top - masses, ids.contiguous().view(torch.int32).long().gather(1, at)


def join_best_logits(parts: Sequence[torch.Tensor], vocab_size: int) -> torch.Tensor:
    """`best_pairs` of each rank -> logits [B, V], -inf for all that none of them named."""
    values, ids = torch.cat(tuple(parts), dim=1).unbind(-1)  # [B, R * best]
    padded = -(-vocab_size // len(parts)) * len(parts)
    logits = torch.full((len(values), padded), -torch.inf, device=values.device)
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
