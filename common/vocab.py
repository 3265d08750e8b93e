"""The two ends of the model, cut over the vocabulary: rank r holds rows r*V/R .. (r+1)*V/R - 1."""

import torch
import torch.nn.functional as F
from torch import nn

from common.heads import split_evenly
from common.linear import ColumnParallelLinear, load_pieces, loadable, zero_matrix
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
        self.weight = loadable(zero_matrix(local, hidden_size), self.load_weight, {None: (vocab_size, hidden_size)})

    def load_weight(self, source, shard_id=None) -> None:
        load_pieces(self.weight, source, 0, self.pieces)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.tp.size == 1:
            return F.embedding(input_ids, self.weight)
        if fused and input_ids.is_cuda:
            x = fused.embed(input_ids, self.weight, self.first)
        else:
            mine = (input_ids >= self.first) & (input_ids <= self.last)  # [T]
            x = F.embedding((input_ids - self.first) * mine, self.weight) * mine.unsqueeze(-1)  # [T, D]
        x = all_reduce(x, self.tp, self.name)  # COMM all-reduce [T, D]: one rank's row + zeros -> the row
        return x


class ParallelLMHead(ColumnParallelLinear):
    """hidden [B, D] -> logits of this rank's slice of the vocabulary [B, V/R]; no communication.

    Tied models hand in the embedding's weight: the same cut, the same memory, read once.
    """

    def __init__(self, vocab_size: int, hidden_size: int, tp: TPGroup, tied_to: VocabParallelEmbedding | None = None):
        super().__init__(hidden_size, vocab_size, tp, name="lm_head")
        self.vocab_size = vocab_size
        if tied_to is not None:
            self.weight = tied_to.weight


def gather_logits(logits_local: torch.Tensor, vocab_size: int, tp: TPGroup) -> torch.Tensor | None:
    """logits_local [B, V/R] -> [B, V] on rank 0, None elsewhere; the padding columns are cut off.

    Only rank 0 samples, so only rank 0 gets them: an all-gather would send R times as much.
    """
    parts = gather(logits_local, tp, "logits")  # COMM gather [B, V/R]: rank 0 alone samples
    return None if parts is None else torch.cat(parts, dim=-1)[:, :vocab_size]
