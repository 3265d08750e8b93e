"""CUDA graphs for decode: a step's few hundred launches become one.

A decode step does the same launches for the same number of sequences, only with other numbers in its inputs.
So the inputs live at fixed addresses, the step is captured once a batch size, and a replay costs the CPU
one call. Batches between two captured sizes are padded: a padding row stores to slot -1 and attends to
one token of page 0, and its logits are dropped. The collectives are captured with everything else.

Any engine that builds the attention contract can use it.
"""

import bisect
from dataclasses import dataclass

import torch
from tqdm import tqdm

from common.decoder import CausalLM
from common.kv_cache import PagedKVCache
from common.ledger import LedgerEntry
from common.paged_attention import AttentionMetadata

SMALL_SIZES = (1, 2, 4)
SIZE_STEP = 8  # then 8, 16, 24, ...: at most 7 padding rows


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor  # [size, V/R], where every replay leaves them
    messages: list[LedgerEntry]  # what one replay sends


class DecodeGraphs:
    """`run` is `model` + `compute_logits` for one new token a sequence, with other numbers and the same result."""

    def __init__(self, model: CausalLM, attention: type, cache: PagedKVCache, max_batch: int, max_pages: int):
        self.model, self.attention, self.cache, self.tp = model, attention, cache, model.tp
        sizes = [n for n in (*SMALL_SIZES, *range(SIZE_STEP, max_batch + SIZE_STEP, SIZE_STEP)) if n <= max_batch]
        self.sizes = sorted({*sizes, max_batch})

        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=cache.k.device)

        self.input_ids, self.positions = ints(max_batch), ints(max_batch)
        self.slot_mapping, self.context_lens = ints(max_batch).fill_(-1), ints(max_batch).fill_(1)
        self.page_table = ints(max_batch, max_pages)
        self.query_start = torch.arange(max_batch + 1, device=cache.k.device)
        self._captured: dict[int, _Captured] = {}
        self._pool = None

    @torch.inference_mode()
    def capture(self) -> None:
        """Record all sizes, the largest first: the smaller ones then fit into its memory."""
        bar = tqdm(
            self.sizes[::-1], desc="capturing decode graphs", disable=None if self.tp.rank == 0 else True, leave=False
        )
        for size in bar:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._step(size)  # compiles kernels, lets libraries allocate what they keep
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with self.tp.ledger.recording() as ledger, torch.cuda.graph(graph, pool=self._pool):
                logits = self._step(size)
            self._pool = self._pool or graph.pool()
            self._captured[size] = _Captured(graph, logits, list(ledger.entries))
            ledger.entries.clear()

    def padded(self, batch: int) -> int:
        """Rows that a step of `batch` sequences computes."""
        return self.sizes[bisect.bisect_left(self.sizes, batch)]

    @torch.inference_mode()
    def run(self, input_ids: torch.Tensor, positions: torch.Tensor, meta: AttentionMetadata) -> torch.Tensor:
        """input_ids, positions [B] and the contract of a pure decode step -> logits of this rank [B, V/R]."""
        batch = len(input_ids)
        size = self.padded(batch)
        self.input_ids[:batch] = input_ids
        self.positions[:batch] = positions
        self.slot_mapping[:batch] = meta.slot_mapping
        self.context_lens[:batch] = meta.context_lens
        self.page_table[:batch, : meta.page_table.shape[1]] = meta.page_table
        if size > batch:
            self.slot_mapping[batch:size] = -1
            self.context_lens[batch:size] = 1
        captured = self._captured[size]
        captured.graph.replay()
        self.tp.ledger.replay(captured.messages)
        return captured.logits[:batch]

    def _step(self, size: int) -> torch.Tensor:
        meta = AttentionMetadata(
            self.slot_mapping[:size], self.page_table[:size], self.query_start[: size + 1], self.context_lens[:size],
            self.cache.page_size, max_query_len=1,
        )  # fmt: skip
        hidden = self.model(self.input_ids[:size], self.positions[:size], self.attention(self.cache, meta))
        return self.model.compute_logits(hidden)
