"""Between attention and MLP: which token rows lie on which rank, and the messages that bring them there.

In plain tensor parallelism every rank has all rows everywhere, and a row-parallel layer ends in an all-reduce. That is two
messages in one, all_reduce = reduce_scatter, then all_gather, and they may stand apart:

    o_proj  partial sums -> reduce-scatter -> residual, norm on this rank's rows -> all-gather -> gate_up

Same bytes on the wire; but the residual and the norms are T/R rows a rank: sequence parallelism (Korthikanti et al. 2022).
Where the two meet different groups, it is more than that. Attention may then be computed by few ranks each, every such *part*
for rows of its own, and the MLP by all of them together for the rows of all:

    tp = 4, attn_tp = 2     part 0: ranks 0 1   part 1: ranks 2 3
    embed_tokens            rows of the part, reduce-scatter over attn_tp
    norm, residual          every row lies on one rank: held[r] rows on tp rank r
    qkv .. o_proj           all-gather over attn_tp   ..  reduce-scatter over attn_tp      heads are cut over attn_tp
    gate_up .. down         gather over tp            ..  sums scattered over tp           columns are cut over tp
    LM head                 the wanted rows, gathered over tp                              the vocabulary is cut over tp

    sequence parallelism    one part: attn_tp is tp                             --enable-layernorm-sp
    DP attention            a part is a data rank: its own requests and pages   --attn-dp-size
    context parallelism     a part is a cp rank: its tokens of every request    --cp-size

Where rows are not spread, the sums may still be left to whoever reads them (`defers`): the residual and the norm come right
behind an all-reduce, and GPUs do all three in one kernel (--enable-all-reduce-fusion); or the other half of the batch is
computed while it travels (models/two_batch_overlap.py).

With attn_tp = 1 attention and embedding have no messages at all. SGLang 0.5.23: LayerCommunicator in srt/layers/communicator.py
(prepare_attn, prepare_mlp, postprocess_layer), with more choices: its data ranks keep their rows whole, here they cut them too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from common.distributed.transfer import upload
from common.layers.norm import RMSNorm
from common.parallel_state import TPGroup, all_gather_rows, all_reduce, all_reduce_add_norm, all_to_all, reduce_scatter


@dataclass(frozen=True)
class TokenRows:
    """Where the rows of a step lie: tokens [parts], how many each part has; held [R], how many each tp rank keeps between blocks.

    A part's rows lie on the ranks of `group` in order, the last of them padding: held is the same number for each of these.
    """

    tokens: tuple[int, ...]
    held: tuple[int, ...]
    part: int  # this rank's
    group: TPGroup  # among whose ranks the part's rows are cut: attention and embedding gather here
    everywhere: bool = False  # every rank has all rows: a decode step with context parallelism
    fixed: bool = False  # as many rows for each part as for the longest
    real: torch.Tensor | None = None  # [parts] in place of `tokens`, where a CUDA graph is told afterwards

    @property
    def mine(self) -> int:
        return self.tokens[self.part]

    def real_on(self, rank: int) -> int:
        """How many of a rank's rows are no padding."""
        first = rank % self.group.size * self.held[rank]
        return min(max(self.tokens[rank // self.group.size] - first, 0), self.held[rank])

    @cached_property
    def live(self) -> torch.Tensor | None:
        """[sum of held]: which rows are no padding, of all ranks in their order; None: all of them."""
        size, device = self.group.size, self.group.device
        if self.real is not None:
            rows = torch.arange(self.held[0] * size, device=device)
            return (rows < self.real.unsqueeze(1)).flatten()
        real = [self.real_on(rank) for rank in range(len(self.held))]
        if list(self.held) == real:
            return None
        return upload(np.concatenate([np.arange(n) < some for n, some in zip(self.held, real, strict=True)]), device)

    def live_on(self, rank: int) -> torch.Tensor | None:
        """[held]: of one rank."""
        first = sum(self.held[:rank])
        return None if self.live is None else self.live[first : first + self.held[rank]]


class LayerCommunicator:
    """tp: all ranks of a layer. attn_tp: those that cut the heads between them, adjacent; by default all.

    `spreads`: are rows cut over ranks at all? `defers`: do blocks end in partial sums, which `add` adds up? If neither, this
    class has nothing to do, and the layers all-reduce by themselves. Raises ValueError for both at once.
    """

    def __init__(
        self, tp: TPGroup, attn_tp: TPGroup | None = None, enable_layernorm_sp: bool = False,
        enable_all_reduce_fusion: bool = False, enable_two_batch_overlap: bool = False,
    ):  # fmt: skip
        self.tp, self.attn_tp = tp, attn_tp or tp
        self.parts = tp.size // self.attn_tp.size
        self.part = tp.rank // self.attn_tp.size
        self.enable_layernorm_sp = enable_layernorm_sp
        self.spreads = (enable_layernorm_sp and tp.size > 1) or self.parts > 1
        self.fuses = enable_all_reduce_fusion
        self.defers = (enable_all_reduce_fusion or enable_two_batch_overlap) and tp.size > 1
        if self.spreads and self.defers:
            raise ValueError(
                "enable_all_reduce_fusion and enable_two_batch_overlap are about all-reduces, and rows that are spread over "
                "ranks (enable_layernorm_sp, attn_dp_size, cp_size) have none; use one of the two"
            )

    def rows(self, tokens: Sequence[int], padded: bool = False, real: torch.Tensor | None = None) -> TokenRows | None:
        """tokens: of each part, known to every rank. None if every rank has all rows.

        padded: as many rows for each part as for the longest, which makes the messages all-gather and reduce-scatter, with
        fixed shapes for a CUDA graph: for decode steps, where parts differ by few rows. Else a part has its own number and
        the messages are all-to-alls, which carry and compute no row of padding: for prefill, where parts differ by thousands.
        One number for several parts: every rank has all rows, and sums are all-reduced (a decode step with context
        parallelism). real [parts]: how many of `tokens` are no padding, if that is known on the device alone.
        """
        if not self.spreads:
            return None
        if len(tokens) not in (1, self.parts):
            raise ValueError(f"{len(tokens)} numbers of tokens for {self.parts} parts; give each part its own")
        most = max(tokens)
        size = self.attn_tp.size
        held = [-(-(most if padded else n) // size) for n in tokens for _ in range(size)]
        everywhere = len(tokens) == 1 and self.parts > 1
        part = self.part if len(tokens) > 1 else 0
        return TokenRows(tuple(tokens), tuple(held), part, self.attn_tp, everywhere, padded, real)

    def add(
        self, norm: RMSNorm, x: torch.Tensor, residual: torch.Tensor, name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual), where x [T, D] may be a partial sum, of block `name`."""
        if self.fuses:
            both = x, residual, norm, self.tp, name
            return all_reduce_add_norm(*both)  # COMM all-reduce [T, D]: partial sums -> the full sum, normed
        return norm.add(self.whole(x, name), residual)

    def whole(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """x [T, D], where x may be a partial sum."""
        if not self.defers:
            return x
        return all_reduce(x, self.tp, name)  # COMM all-reduce [T, D]: partial sums -> full sum

    # --- attention: among the ranks of a part

    def gather_for_attention(self, x: torch.Tensor, rows: TokenRows | None, name: str) -> torch.Tensor:
        """x [held, D] -> the part's rows [tokens, D], without padding."""
        if rows is None or rows.everywhere:
            return x
        x = all_gather_rows(x, rows.group, name)  # COMM all-gather [held, D]: this rank's rows -> the part's
        return x[: rows.mine]

    def scatter_from_attention(self, y: torch.Tensor, rows: TokenRows | None, name: str) -> torch.Tensor:
        """y [tokens, D], partial sums -> this rank's rows of the sum [held, D]. Also of the embedding."""
        if rows is None:
            return y
        if rows.everywhere:
            return all_reduce(y, self.attn_tp, name)  # COMM all-reduce [T, D]: partial sums -> full sum
        padding = rows.held[self.tp.rank] * rows.group.size - len(y)
        y = F.pad(y, (0, 0, 0, padding)) if padding else y
        return reduce_scatter(y, rows.group, name)  # COMM reduce-scatter [held * attn_tp, D]: partial sums -> own rows

    # --- MLP: among all ranks

    def gather_for_mlp(self, x: torch.Tensor, rows: TokenRows | None, name: str) -> torch.Tensor:
        """x [held, D] -> the rows of all ranks [sum of held, D], in their order."""
        return x if rows is None or rows.everywhere else self._gather(x, rows.held, name)

    def scatter_from_mlp(self, y: torch.Tensor, rows: TokenRows | None, name: str) -> torch.Tensor:
        """y [sum of held, D], partial sums -> this rank's rows of the sum [held, D]."""
        if rows is None:
            return y
        if rows.everywhere:
            return all_reduce(y, self.tp, name)  # COMM all-reduce [T, D]: partial sums -> full sum
        if len(set(rows.held)) == 1:
            return reduce_scatter(y, self.tp, name)  # COMM reduce-scatter [sum of held, D]: partial sums -> own rows
        mine = rows.held[self.tp.rank]
        receive = [mine] * self.tp.size
        parts = all_to_all(y, self.tp, name, rows.held, receive)  # COMM all-to-all [sum of held, D]: the same, uneven
        return parts.unflatten(0, (self.tp.size, mine)).sum(dim=0)  # in rank order

    # --- the end

    def collect(self, hidden: torch.Tensor, rows: TokenRows, wanted: Sequence[np.ndarray]) -> torch.Tensor:
        """hidden [held, D]; wanted: of each part ascending numbers of its rows -> those rows, on every rank: [all wanted, D].

        What an LM head needs, which is cut over all ranks: few rows of a prefill step, all of a decode step.
        """
        if rows.everywhere:
            return hidden[upload(wanted[0], hidden.device)]
        counts, local = [], None
        for rank, held in enumerate(rows.held):
            first = rank % rows.group.size * held
            of_part = wanted[rank // rows.group.size]
            here = of_part[(of_part >= first) & (of_part < first + held)] - first
            counts.append(len(here))
            local = here if rank == self.tp.rank else local
        if len(set(rows.held)) > 1 or sum(counts) < sum(rows.tokens):
            hidden = hidden[upload(local, hidden.device)]
            return self._gather(hidden, counts, "hidden")
        x = self._gather(hidden, rows.held, "hidden").unflatten(0, (len(rows.tokens), -1))  # [parts, n, D]
        if len(set(rows.tokens)) == 1:
            return x[:, : rows.tokens[0]].flatten(0, 1)
        return torch.cat([of_part[:n] for of_part, n in zip(x, rows.tokens, strict=True)])

    def _gather(self, x: torch.Tensor, counts: Sequence[int], name: str) -> torch.Tensor:
        """counts[r] rows of tp rank r -> all of them, on every rank."""
        if len(set(counts)) == 1:
            return all_gather_rows(x, self.tp, name)  # COMM all-gather [held, D]: each rank's rows -> all rows
        copies, send = x.repeat(self.tp.size, 1), [len(x)] * self.tp.size
        return all_to_all(copies, self.tp, name, send, counts)  # COMM all-to-all [R * held, D]: the same, uneven
