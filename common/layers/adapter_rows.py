"""Which adapter each row of a step uses: the argument of the layers, and what it lets them add, in two forms.

    Segments        torch_native: for each adapter that is there, its rows, and two products          CPU, and to be read
    AdapterBlocks   triton: blocks of rows of one adapter, two launches for all (kernels/lora.py)     GPU, in CUDA graphs, too

Both are built once a step from the slots of its rows, and both have `add` for a linear layer and `add_embedding`.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from common.distributed.transfer import upload
from common.layers.lora import EmbeddingSlots, LoRASlots, Part

try:  # a CPU build of torch comes without Triton
    from common.kernels import lora as fused
    from common.kernels.launch import INTERPRETED
except ImportError:
    fused, INTERPRETED = None, False


@dataclass(frozen=True)
class Segments:
    """(slot, start, stop) of each adapter that is there: its rows, once the rows are in the order of `order`.

    The plain form: two products for each segment, in the order of the slots. order [n] numbers the rows that have an adapter, such
    that those of one are neighbours; None: they are as they stand, in a prefill of one adapter for example.
    """

    segments: tuple[tuple[int, int, int], ...]
    order: torch.Tensor | None

    capturable: ClassVar[bool] = False  # which products there are depends on who is in the step

    @classmethod
    def of(cls, slots: np.ndarray, device: torch.device) -> "Segments":
        """slots [T]: of each row, 0 for none."""
        starts = np.flatnonzero(np.diff(slots, prepend=-1))  # where neighbours differ
        present = slots[starts]
        if len(set(present[present > 0].tolist())) == np.count_nonzero(present):  # each adapter is in one place
            stops = [*starts[1:].tolist(), len(slots)]
            runs = zip(present.tolist(), starts.tolist(), stops, strict=True)
            return cls(tuple(run for run in runs if run[0]), None)
        order = np.argsort(slots, kind="stable")[np.count_nonzero(slots == 0) :]
        present, starts = np.unique(slots[order], return_index=True)
        stops = [*starts[1:].tolist(), len(order)]
        return cls(tuple(zip(present.tolist(), starts.tolist(), stops, strict=True)), upload(order, device))

    def add(self, y: torch.Tensor, x: torch.Tensor, lora: LoRASlots | None) -> torch.Tensor:
        """y [T, out/R] + s B (A x), x [T, in/R], each row with its own adapter; y itself is written. lora=None: no adapter here."""
        if lora is None:
            return y
        xs, ys = self._in_order(x), self._in_order(y)
        for slot, start, stop in self.segments:
            if held := lora.held[slot - 1]:
                _expand(ys[start:stop], xs[start:stop] @ held.a, held.parts)
        return self._put_back(y, ys)

    def add_embedding(self, y: torch.Tensor, ids: torch.Tensor, lora: EmbeddingSlots | None) -> torch.Tensor:
        """y [T, D], ids [T] -> y + s B A[:, ids], of the ids that this rank has, and of no others."""
        if lora is None:
            return y
        local, ys = self._in_order(ids) - lora.layer.first, self._in_order(y)
        mine = (local >= 0) & (local < lora.a.shape[1])
        for slot, start, stop in self.segments:
            if held := lora.held[slot - 1]:
                here = mine[start:stop]
                _expand(ys[start:stop], held.a[local[start:stop] * here] * here.unsqueeze(-1), held.parts)
        return self._put_back(y, ys)

    def _in_order(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.order is None else x[self.order]

    def _put_back(self, y: torch.Tensor, ys: torch.Tensor) -> torch.Tensor:
        return y if self.order is None else y.index_copy_(0, self.order, ys)


def _expand(y: torch.Tensor, h: torch.Tensor, parts: list[Part]) -> None:
    """y [n, out/R] += s B h of each part of one adapter, h = A x [n, r of all parts]."""
    for ranks, columns, b, scale in parts:
        y[:, columns].addmm_(h[:, ranks], b, alpha=scale)


@dataclass(frozen=True)
class AdapterBlocks:
    """The same for kernels: slots [n] of each block, and its rows [n, block], on the device."""

    slots: torch.Tensor
    rows: torch.Tensor

    capturable: ClassVar[bool] = True

    @classmethod
    def of(cls, slots: np.ndarray, device: torch.device) -> "AdapterBlocks":
        """slots [T]: of each row, 0 for none."""
        return cls.at(upload(fused.adapter_blocks(slots), device), len(slots))

    @classmethod
    def at(cls, numbers: torch.Tensor, tokens: int) -> "AdapterBlocks":
        """From what `adapter_blocks` gave for so many rows, wherever it lies."""
        block = fused.rows_per_block(tokens)
        n = len(numbers) // (1 + block)
        return cls(numbers[n * block :], numbers[: n * block].view(n, block))

    @staticmethod
    def numbers(slots: np.ndarray, max_loras: int) -> np.ndarray:
        """slots [T] -> for a CUDA graph of T rows, in which at most max_loras adapters are: as many numbers whatever they are."""
        return fused.adapter_blocks(slots, fused.most_blocks(len(slots), max_loras))

    @classmethod
    def captured(cls, numbers: torch.Tensor, tokens: int, max_loras: int) -> "AdapterBlocks":
        """Of that graph, from where such numbers stand at each replay, and perhaps more behind them."""
        blocks = fused.most_blocks(tokens, max_loras)
        return cls.at(numbers[: blocks * (1 + fused.rows_per_block(tokens))], tokens)

    def add(self, y: torch.Tensor, x: torch.Tensor, lora: LoRASlots | None) -> torch.Tensor:
        """As `Segments.add`."""
        if lora is not None:
            h = fused.shrink(x, lora.a, lora.starts, self.slots, self.rows)
            fused.expand(y, h, lora.b, lora.starts, lora.scales, lora.sizes, self.slots, self.rows)
        return y

    def add_embedding(self, y: torch.Tensor, ids: torch.Tensor, lora: EmbeddingSlots | None) -> torch.Tensor:
        """As `Segments.add_embedding`."""
        if lora is not None:
            owner = self.slots.unsqueeze(1)
            local = ids[self.rows.clamp(max=len(ids) - 1)] - lora.layer.first  # [n, block]
            mine = (local >= 0) & (local < lora.a.shape[1]) & (owner > 0)
            h = lora.a[(owner - 1).clamp(min=0), local * mine].float() * mine.unsqueeze(-1)  # [n, block, r_max]
            h = h.flatten(0, 1).unsqueeze(0)
            fused.expand(y, h, lora.b, lora.starts, lora.scales, lora.sizes, self.slots, self.rows)
        return y


BACKENDS = ("torch_native", "triton")


def pick_form(backend: str, device: torch.device) -> type[Segments | AdapterBlocks]:
    """The form of that name; auto is triton on a GPU that has it, else torch_native. Raises ValueError for what cannot run here."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"lora_backend={backend!r} is unknown; use auto, {', '.join(BACKENDS)}")
    if backend == "auto":
        backend = "triton" if fused and device.type == "cuda" else "torch_native"
    if backend == "torch_native":
        return Segments
    if fused is None or not (device.type == "cuda" or INTERPRETED):
        why = f"this rank runs on {device}" if fused else "Triton is not installed"
        raise ValueError(f"lora_backend=triton needs an NVIDIA GPU with Triton, and {why}; use auto, torch_native")
    return AdapterBlocks
