"""CUDA graphs for decode: a step's few hundred launches become one.

A decode step does the same launches for the same number of sequences, only with other numbers in its inputs.
So the inputs live at fixed addresses, the step is captured once a batch size, and a replay costs the CPU
one call. Batches between two captured sizes are padded: a padding row stores to slot -1 and attends to
its own token, and its logits are dropped. The collectives are captured with everything else.

Any engine that keeps its sequences in a SequenceTable can use it.
"""

import bisect
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from common.decoder import CausalLM
from common.kv_cache import PagedKVCache
from common.ledger import LedgerEntry
from common.sequence_table import SequenceTable
from common.transfer import copy_to

SMALL_SIZES = (1, 2, 4)
SIZE_STEP = 8  # then 8, 16, 24, ...: at most 7 padding rows


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor  # [size, V/R], where every replay leaves them
    messages: list[LedgerEntry]  # what one replay sends


class DecodeGraphs:
    """`run` is model + compute_logits for one new token a sequence, with the same result as without graphs.

    inputs [2 * size] int64: rows, then positions, of the step that runs. The plan of the step (slots, page
    table, lengths) is worked out from them inside the graph.
    """

    def __init__(self, model: CausalLM, attention: type, cache: PagedKVCache, table: SequenceTable, max_batch: int):
        self.model, self.attention, self.cache, self.table, self.tp = model, attention, cache, table, model.tp
        sizes = [n for n in (*SMALL_SIZES, *range(SIZE_STEP, max_batch + SIZE_STEP, SIZE_STEP)) if n <= max_batch]
        self.sizes = sorted({*sizes, max_batch})
        self.inputs = torch.full((2 * max_batch,), -1, dtype=torch.int64, device=cache.k.device)
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
    def run(self, rows: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """rows, positions [B] of a decode step -> logits of this rank [B, V/R], valid until the next run."""
        batch, size = len(rows), self.padded(len(rows))
        numbers = np.full((2, size), -1, dtype=np.int64)
        numbers[:, :batch] = rows, positions
        copy_to(numbers, self.inputs[: 2 * size])
        captured = self._captured[size]
        captured.graph.replay()
        self.tp.ledger.replay(captured.messages)
        return captured.logits[:batch]

    def rows(self, batch: int) -> torch.Tensor:
        """The rows [B] of the step that runs, on the device."""
        return self.inputs[:batch]

    def _step(self, size: int) -> torch.Tensor:
        rows, positions = self.inputs[:size], self.inputs[size : 2 * size]
        step = self.table.decode_on_device(rows, positions.clamp(min=0), self.table.page_table.shape[1])
        hidden = self.model(step.input_ids, step.positions, self.attention(self.cache, step.meta))
        return self.model.compute_logits(hidden)
