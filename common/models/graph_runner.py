"""CUDA graphs for decode: a step's few hundred launches become one.

A decode step does the same launches for the same number of sequences, only with other numbers in its inputs.
So the inputs live at fixed addresses, the step is captured once a batch size, and a replay costs the CPU
one call. Batches between two captured sizes are padded: a padding row stores to slot -1 and attends to
its own token, and its logits are dropped. The collectives are captured with everything else.

Any engine that keeps its sequences in a SequenceTable can use it.
"""

import bisect
import gc
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from common.attention.contract import SharedPrefixes
from common.attention.kv_cache import PagedKVCache
from common.attention.sequence_table import SequenceTable
from common.distributed.ledger import LedgerEntry
from common.distributed.transfer import copy_to
from common.models.decoder import CausalLM

SMALL_SIZES = (1, 2, 4)
SIZE_STEP = 8  # then 8, 16, 24, ...: at most 7 padding rows
ALIKE_STEP = 32  # steps with shared prefixes: 32, 64, ...


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor  # [size, V/R], where every replay leaves them
    messages: list[LedgerEntry]  # what one replay sends


class DecodeGraphs:
    """`run` is model + compute_logits for one new token a sequence, with the same result as without graphs.

    inputs, int64: rows [size], positions [size], and for steps with shared prefixes their tokens [size] and tiles,
    of the step that runs. The plan of the step (slots, page table, lengths) is worked out inside the graph.
    """

    def __init__(self, model: CausalLM, attention: type, cache: PagedKVCache, table: SequenceTable, max_batch: int):
        self.model, self.attention, self.cache, self.table, self.tp = model, attention, cache, table, model.tp
        sizes = [n for n in (*SMALL_SIZES, *range(SIZE_STEP, max_batch + SIZE_STEP, SIZE_STEP)) if n <= max_batch]
        self.sizes = sorted({*sizes, max_batch})
        self.alike_sizes = sorted({n for n in self.sizes if n % ALIKE_STEP == 0 and table.max_tiles(n)})
        shapes = [(n, False) for n in self.sizes] + [(n, True) for n in self.alike_sizes]
        self._shapes = sorted(shapes, reverse=True)
        self.inputs = torch.zeros(6 * max_batch, dtype=torch.int64, device=cache.k.device)
        self._captured: dict[tuple[int, bool], _Captured] = {}
        self._pool = None

    @torch.inference_mode()
    def rehearse(self) -> None:
        """Run the steps of all sizes once, of padding only; under `compile_ahead` that finds all their kernels."""
        self.inputs.fill_(-1)
        for size, alike in self._shapes:
            self._step(size, alike)

    @torch.inference_mode()
    def capture(self) -> None:
        """Record all sizes, the largest first: the smaller ones then fit into its memory.

        An engine that was let go of before may still lie about, graphs and all, in a cycle of references. If the collector found
        it during a recording, what it frees would break the recording: so it goes now, and nothing is collected meanwhile.
        """
        gc.collect()
        gc.disable()
        try:
            self._capture()
        finally:
            gc.enable()

    def _capture(self) -> None:
        quiet = None if self.tp.rank == 0 else True
        for size, alike in tqdm(self._shapes, desc="capturing decode graphs", disable=quiet, leave=False):
            self.inputs.zero_()
            self.inputs[:size] = -1  # padding only
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._step(size, alike)  # compiles kernels, lets libraries allocate what they keep
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with self.tp.ledger.recording() as ledger, torch.cuda.graph(graph, pool=self._pool):
                logits = self._step(size, alike)
            self._pool = self._pool or graph.pool()
            self._captured[size, alike] = _Captured(graph, logits, list(ledger.entries))
            ledger.entries.clear()

    def padded(self, batch: int, alike: bool = False) -> int:
        """Rows that a step of `batch` sequences computes."""
        sizes = self.alike_sizes if self._shares(batch, alike) else self.sizes
        return sizes[bisect.bisect_left(sizes, batch)]

    @torch.inference_mode()
    def run(self, rows: np.ndarray, positions: np.ndarray, alike: Sequence[tuple[int, int, int]] = ()) -> torch.Tensor:
        """rows, positions [B] of a decode step -> logits of this rank [B, V/R], valid until the next run.

        alike: (first, count, pages), see SequenceTable.decode.
        """
        batch, shares = len(rows), self._shares(len(rows), bool(alike))
        size = self.padded(batch, shares)
        numbers = np.full((2, size), -1, dtype=np.int64)
        numbers[:, :batch] = rows, positions
        if shares:
            tiles, tokens = self.table.tiles(alike, size)
            numbers = np.concatenate((numbers.reshape(-1), tokens, tiles))
        copy_to(numbers, self.inputs[: numbers.size])
        captured = self._captured[size, shares]
        captured.graph.replay()
        self.tp.ledger.replay(captured.messages)
        return captured.logits[:batch]

    def _shares(self, batch: int, alike: bool) -> bool:
        return alike and bool(self.alike_sizes) and batch <= self.alike_sizes[-1]

    def rows(self, batch: int) -> torch.Tensor:
        """The rows [B] of the step that runs, on the device."""
        return self.inputs[:batch]

    def _step(self, size: int, alike: bool) -> torch.Tensor:
        rows, positions, rest = self.inputs[:size], self.inputs[size : 2 * size], self.inputs[2 * size :]
        prefixes = None
        if alike:
            tiles = rest[size : size + 3 * self.table.max_tiles(size)]
            prefixes = SharedPrefixes(tiles.view(3, -1), rest[:size])
        pages = self.table.page_table.shape[1]
        step = self.table.decode_on_device(rows, positions, pages, prefixes)
        hidden = self.model(step.input_ids, step.positions, self.attention(self.cache, step.meta))
        return self.model.compute_logits(hidden)
