"""CUDA graphs for decode: a step's few hundred launches become one.

A decode step does the same launches for the same number of sequences, only with other numbers in its inputs.
So the inputs live at fixed addresses, the step is captured once a batch size, and a replay costs the CPU
one call. Batches between two captured sizes are padded: a padding row stores to slot -1 and attends to
its own token, and its logits are dropped. The collectives are captured with everything else; of a pipeline's stage, what goes
from one to the next is not: hidden states are one input more, and the output of all but the last stage.
Verify steps have their own (verify_graphs.py).

Any engine that keeps its sequences in a SequenceTable can use it.
"""

import bisect
import gc
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from common.attention.context_table import ContextTable
from common.attention.contract import SharedPrefixes
from common.attention.kv_cache import PagedKVCache
from common.attention.sequence_table import SequenceTable
from common.distributed.ledger import LedgerEntry
from common.distributed.transfer import copy_to
from common.kernels.recording import record
from common.layers.adapter_rows import AdapterBlocks
from common.models.decoder import CausalLM
from common.models.rehearsal import ALIGNMENT, one_of_each_kind, some_layers

SMALL_SIZES = (1, 2, 4)
# (up to, step): 8, 16, 24, ... have at most 7 padding rows; the larger a batch is, the less a few more of them weigh, and each size
# is one recording more at the start. Steps as SGLang's (server_args.py, _generate_decode_cuda_graph_batch_sizes).
SIZE_STEPS = ((256, 8), (512, 16), (1 << 30, 32))
ALIKE_STEP = 32  # steps with shared prefixes: 32, 64, ...


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    out: Any  # what `_step` returned: where every replay leaves it
    messages: list[LedgerEntry]  # what one replay sends


@contextmanager
def nothing_collected() -> Iterator[None]:
    """For recordings: an engine that was let go of before may still lie about, graphs and all, in a cycle of references. If the
    collector found it during a recording, what it frees would break the recording: so it goes now, and nothing is collected inside.
    """
    if not gc.isenabled():  # another one is around this
        yield
        return
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class StepGraphs(ABC):
    """Steps of some shapes, recorded and replayed. inputs, int64: what a step is told; a subclass says what it computes of them.

    shapes: (sequences, a second number), the largest first. rows: of each shape, how many the model computes. max_loras: LoRA
    adapters in a step at most; what its rows use stands at a fixed place too, for as many blocks as there can be; 0: none. With
    adapters each shape is recorded twice: the launches for them take time even if nobody has one.
    """

    kind = ""

    def __init__(
        self, model: CausalLM, attention: type, cache: PagedKVCache, table: SequenceTable, max_loras: int,
        shapes: Sequence[tuple[int, int]], rows: Sequence[int], inputs: int,
    ):  # fmt: skip
        self.model, self.attention, self.cache, self.table, self.tp = model, attention, cache, table, model.tp
        self.shapes, self.max_loras, self.adapters = shapes, max_loras, None
        self._rows = dict(zip(shapes, rows, strict=True))
        self.inputs = torch.zeros(inputs, dtype=torch.int64, device=cache.k.device)
        if max_loras:
            most = max(len(AdapterBlocks.numbers(np.zeros(n, dtype=np.int64), max_loras)) for n in rows)
            self.adapters = torch.zeros(most, dtype=torch.int64, device=cache.k.device)
        # by shape, and whether anybody has an adapter
        self._captured: dict[tuple[tuple[int, int], bool], _Captured] = {}
        self._pool = self._stream = None  # of all recordings

    @abstractmethod
    def _step(self, shape: tuple[int, int], adapters: AdapterBlocks | None = None) -> Any:
        """The launches of a step, on what `inputs` holds; adapters: None if nobody has one."""

    @abstractmethod
    def _pad(self, shape: tuple[int, int]) -> None:
        """Set `inputs` to a step of padding only."""

    @torch.inference_mode()
    def rehearse(self) -> None:
        """Run the steps of all shapes once, of padding only; under `compile_ahead` that finds all their kernels.

        The first shape's step has all layers: `linear_choice.noting` hears of a weight when something multiplies by it, and times
        products with as many different ones as it has heard of. With one layer's alone they would come out of the cache, and in a
        step they do not. The executor's warm-up runs all layers as well; what is heard here does not hang on that.
        """
        for number, shape in enumerate(self.shapes):
            self._pad(shape)
            with self._in_rehearsal() if number else nullcontext():
                for adapters in self._with_and_without(shape):
                    self._step(shape, adapters)

    def _in_rehearsal(self) -> AbstractContextManager[None]:
        """Inside, steps are run for their launches alone."""
        return some_layers(self.model, self._enough)

    @cached_property
    def _enough(self) -> frozenset[int] | None:
        """Layers that a rehearsal needs; None: all of them."""
        layers = [self.cache.layer(number) for number in range(len(self.cache.scales))]
        pages = {
            (one.k_scale, one.v_scale, *(x.data_ptr() % ALIGNMENT for x in one[:4] if x is not None)) for one in layers
        }
        return one_of_each_kind(self.model) if not self.max_loras and len(pages) == 1 else None

    @torch.inference_mode()
    def capture(self) -> None:
        """Record all shapes, the largest first: the smaller ones then fit into its memory."""
        with nothing_collected():
            self._capture()

    def _capture(self) -> None:
        quiet = None if self.tp.world_rank == 0 else True
        torch.cuda.empty_cache()  # what is kept for others is of no use in a recording, which asks the driver
        if self.adapters is not None:
            self.adapters.zero_()  # of the last step, in the layout of its own shape: slots that there are not, to another
        for shape in tqdm(self.shapes, desc=f"capturing {self.kind} graphs", disable=quiet, leave=False):
            self._pad(shape)
            for adapters in self._with_and_without(shape):
                self._captured[shape, adapters is not None] = self._record(shape, adapters)
        torch.cuda.empty_cache()

    def _record(self, shape: tuple[int, int], adapters: AdapterBlocks | None) -> _Captured:
        def rehearsed() -> None:
            with self._in_rehearsal():
                self._step(shape, adapters)
            if self._pool is None:  # the largest: the recordings' own memory will be about as much again
                torch.cuda.empty_cache()

        def recorded() -> tuple[Any, list[LedgerEntry]]:
            with self.tp.ledger.recording() as ledger:
                out = self._step(shape, adapters)
            messages = list(ledger.entries)
            ledger.entries.clear()
            return out, messages

        self._stream = self._stream or torch.cuda.Stream()
        graph, (out, messages) = record(recorded, rehearsed, self._stream, self._pool)
        self._pool = self._pool or graph.pool()
        return _Captured(graph, out, messages)

    def _with_and_without(self, shape: tuple[int, int]) -> list[AdapterBlocks | None]:
        """Both that a step of this shape may be told of its adapters; without slots only that there are none."""
        if not self.max_loras:
            return [None]
        return [AdapterBlocks.captured(self.adapters, self._rows[shape], self.max_loras), None]

    def forget(self) -> None:
        """What was recorded: the addresses in it are to be given back. `capture` records again."""
        self._captured.clear()
        self._pool = None

    def _replay(self, shape: tuple[int, int], slots: np.ndarray | None = None) -> Any:
        """slots: of the first rows of the step; the others are padding, and have none. None: nobody has one."""
        adapted = slots is not None and bool(slots.any())
        if adapted:
            self._put_adapters(slots, shape)
        captured = self._captured[shape, adapted]
        captured.graph.replay()
        self.tp.ledger.replay(captured.messages)
        return captured.out

    def _put_adapters(self, slots: np.ndarray, shape: tuple[int, int]) -> None:
        padded = np.zeros(self._rows[shape], dtype=np.int64)
        padded[: len(slots)] = slots
        numbers = AdapterBlocks.numbers(padded, self.max_loras)
        copy_to(numbers, self.adapters[: len(numbers)])


def batch_sizes(most: int) -> list[int]:
    """The batches that are captured, ascending: 35 up to 256, 67 up to 1,024."""
    sizes, last = {n for n in SMALL_SIZES if n <= most} | {most}, 0
    for end, step in SIZE_STEPS:
        sizes |= set(range(last + step, min(end, most) + 1, step))
        last = end
    return sorted(sizes)


class DecodeGraphs(StepGraphs):
    """`run` is model + compute_logits for one new token a sequence, with the same result as without graphs.

    Of a stage that is not the last one it is the model alone. hidden [max_batch, D]: what a stage begins with, if not the first.

    inputs, int64: rows [size], positions [size], and for steps with shared prefixes their tokens [size] and tiles,
    of the step that runs. The plan of the step (slots, page table, lengths) is worked out inside the graph.
    """

    kind = "decode"

    def __init__(
        self, model: CausalLM, attention: type, cache: PagedKVCache, table: SequenceTable, max_batch: int,
        max_loras: int = 0,
    ):  # fmt: skip
        self.sizes = batch_sizes(max_batch)
        self.alike_sizes = sorted({n for n in self.sizes if n % ALIKE_STEP == 0 and table.max_tiles(n)})
        shapes = [(n, False) for n in self.sizes] + [(n, True) for n in self.alike_sizes]
        shapes.sort(reverse=True)
        super().__init__(model, attention, cache, table, max_loras, shapes, [n for n, _ in shapes], 6 * max_batch)
        self.hidden = None
        if model.stage.start > 0:
            width, dtype = model.config.hidden_size, next(model.parameters()).dtype
            self.hidden = torch.zeros(max_batch, width, dtype=dtype, device=cache.k.device)
        # data ranks have rows of their own; ranks among which tokens are spread all have all rows
        self.parts = 1 if isinstance(table, ContextTable) else model.communicator.parts
        self.real = None  # tokens of each part, for experts, whose load padding must not count in
        if model.config.mixture and model.communicator.spreads:
            self.real = torch.zeros(self.parts, dtype=torch.int64, device=cache.k.device)

    def _pad(self, shape: tuple[int, int]) -> None:
        self.inputs.zero_()
        self.inputs[: shape[0]] = -1

    def padded(self, batch: int, alike: bool = False) -> int:
        """Rows that a step of `batch` sequences computes."""
        sizes = self.alike_sizes if self._shares(batch, alike) else self.sizes
        return sizes[bisect.bisect_left(sizes, batch)]

    @torch.inference_mode()
    def run(
        self, rows: np.ndarray, positions: np.ndarray, alike: Sequence[tuple[int, int, int]] = (),
        hidden: torch.Tensor | None = None, parts: Sequence[int] | None = None, adapters: np.ndarray | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """rows, positions [B] of a decode step -> logits of this rank [B, V/R], valid until the next run.

        alike: (first, count, pages), see SequenceTable.decode. hidden [B, D]: see the class. parts: rows of each data rank, these
        are this one's; the logits are those of all, one behind the other. adapters [B]: LoRA slots, None for none.
        """
        batch, shares = len(rows), self._shares(len(rows), bool(alike))
        size = self.padded(max(parts or [batch]), shares)
        numbers = np.full((2, size), -1, dtype=np.int64)
        numbers[:, :batch] = rows, positions
        if shares:
            tiles, tokens = self.table.tiles(alike, size)
            numbers = np.concatenate((numbers.reshape(-1), tokens, tiles))
        copy_to(numbers, self.inputs[: numbers.size])
        if self.real is not None:
            copy_to(np.array(parts or [batch]), self.real)
        if hidden is not None:
            self.hidden[:batch] = hidden
        out = self._replay((size, shares), adapters)
        if parts is None:
            return out[:batch]
        return torch.cat([own[:n] for own, n in zip(out.split(size), parts, strict=True)])

    def _shares(self, batch: int, alike: bool) -> bool:
        return alike and bool(self.alike_sizes) and batch <= self.alike_sizes[-1]

    def rows(self, batch: int) -> torch.Tensor:
        """The rows [B] of the step that runs, on the device."""
        return self.inputs[:batch]

    def _step(self, shape: tuple[int, bool], adapters: AdapterBlocks | None = None) -> torch.Tensor:
        size, alike = shape
        rows, positions, rest = self.inputs[:size], self.inputs[size : 2 * size], self.inputs[2 * size :]
        prefixes = None
        if alike:
            tiles = rest[size : size + 3 * self.table.max_tiles(size)]
            prefixes = SharedPrefixes(tiles.view(3, -1), rest[:size])
        pages = self.table.page_table.shape[1]
        step = self.table.decode_on_device(rows, positions, pages, prefixes)
        before = None if self.hidden is None else self.hidden[:size]
        between = self.model.communicator
        spread = between.rows([size] * self.parts, padded=True, real=self.real)
        attention = self.attention(self.cache, step.meta)
        live = rows >= 0 if self.model.config.mixture else None
        hidden = self.model(step.input_ids, step.positions, attention, before, spread, live, adapters=adapters)
        if spread and not spread.everywhere:
            hidden = between.collect(hidden, spread, [np.arange(size)] * self.parts)
        return hidden if self.model.lm_head is None else self.model.compute_logits(hidden, adapters)
