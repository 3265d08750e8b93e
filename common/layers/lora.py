"""LoRA: two thin matrices beside a linear layer, of several adapters in one batch.

    y = W x + s B (A x)        A [r, in], B [out, r], r far below both, s a number (Hu et al. 2021)

W is what all adapters share: it is read once for the rows of all of them, and what an adapter adds to a row goes through r
numbers. Each linear layer that adapters may change has room for a few of them, its *slots*; a step says which slot each row uses
(adapter_rows.py, an argument from the model down to the layer), and slot 0 is no adapter. Slots are written in place: a CUDA graph
that was captured before reads what is in them then.

Over ranks both are cut as W is, and nobody talks more than before:

    column-parallel   A whole, B cut along out as W's rows: y is cut already
    row-parallel      A cut along in as W's columns, B whole: B (A x) is a partial sum as W x is, and joins it before the sum
    embedding         A cut along V, B whole: a token's column of A lies on one rank, and the sum brings the rest
    LM head           A whole, B cut along V

A layer of several matrices (q, k, v; gate, up) has an A and a B for each: its *parts*. Their As stand one below the other, so
that x is read once; a part that an adapter leaves alone takes no rows of A. S-LoRA (Sheng et al. 2023) cuts A of a column-parallel
layer along r, and gathers; SGLang 0.5.23 cuts as here (srt/lora/layers.py).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from common.layers.heads import Piece
from common.layers.linear import ColumnParallelLinear, LinearBase, RowParallelLinear, load_pieces
from common.layers.vocab import VocabParallelEmbedding

# names of modules in a checkpoint; the embedding and the LM head take much memory a slot, and few adapters have them
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALL_TARGETS = (*TARGETS, "embed_tokens", "lm_head")


class Thin(NamedTuple):
    """What an adapter has for one matrix, or this rank's part of it: A [r, in], B [out, r] and the factor of B (A x).

    Of an embedding A is [r, V], and a token's column takes the place of A x.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def rank(self) -> int:
        return len(self.a)


def cut(layer: LinearBase | VocabParallelEmbedding, part: int, thin: Thin) -> Thin:
    """This rank's part of an adapter's matrices for one matrix of a layer: what is not there of W is not there of them."""
    a, b = (_Whole(x) for x in (thin.a, thin.b))
    dtype = layer.dtype
    if isinstance(layer, ColumnParallelLinear):
        first = sum(layer.sizes[:part])
        pieces = [Piece(dst - first, src, n) for dst, src, n in list(layer.pieces.values())[part]]
        mine = torch.zeros(layer.sizes[part], thin.rank, dtype=dtype)
        load_pieces(mine, b, 0, pieces)
        return Thin(thin.a.to(dtype), mine, thin.scale)
    along = layer.weight.shape[
        1 if isinstance(layer, RowParallelLinear) else 0
    ]  # rows of an embedding are columns of its A
    mine = torch.zeros(thin.rank, along, dtype=dtype)
    load_pieces(mine, a, 1, layer.pieces)
    return Thin(mine, thin.b.to(dtype), thin.scale)


class _Whole:
    """What `load_pieces` reads from."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor

    def read(self, dim: int, start: int, stop: int) -> torch.Tensor:
        return self.tensor.narrow(dim, start, stop - start)


class Part(NamedTuple):
    """y[:, columns] += scale * h[:, ranks] @ b, with b [r, out/R of the part] a view into the stacked B."""

    ranks: slice
    columns: slice
    b: torch.Tensor
    scale: float


class Held(NamedTuple):
    """What lies in a slot, as views into the stacked matrices: h = x @ a, a [in/R, r of all parts] (an embedding: h = a[ids])."""

    a: torch.Tensor
    parts: list[Part]


class LoRASlots:
    """The adapters that a linear layer has room for: a [slots, parts * r_max, in/R], b [slots, out/R, r_max].

    Slot n is row n - 1: slot 0, no adapter, takes no memory. An adapter's true ranks count: rows starts[p] .. starts[p + 1] - 1 of
    its a belong to part p, and as many columns of b. starts [slots, parts + 1] int32 and scales [slots, parts] say the same to
    kernels, `held` to Python.
    """

    def __init__(self, layer: LinearBase, slots: int, max_rank: int):
        out, width = layer.weight.shape
        self.sizes = layer.sizes if isinstance(layer, ColumnParallelLinear) else (out,)
        self.layer, parts, device = layer, len(self.sizes), layer.tp.device
        self.a = torch.zeros(slots, parts * max_rank, width, dtype=layer.dtype, device=device)
        self.b = torch.zeros(slots, out, max_rank, dtype=layer.dtype, device=device)
        self._describe(slots, parts, device)

    def _describe(self, slots: int, parts: int, device: torch.device) -> None:
        self.starts = torch.zeros(slots, parts + 1, dtype=torch.int32, device=device)
        self.scales = torch.zeros(slots, parts, device=device)
        self.held: list[Held | None] = [None] * slots

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes

    def put(self, slot: int, thins: dict[int, Thin]) -> None:
        """Write an adapter's parts, as `cut` gave them, into a slot; parts that are not there add nothing."""
        parts, at, first, starts = [], 0, 0, [0]
        for part, size in enumerate(self.sizes):
            if part in thins:
                thin = thins[part]
                self._write(slot - 1, at, first, thin)
                columns = slice(first, first + size)
                b = self.b[slot - 1, columns, : thin.rank].t()
                parts.append(Part(slice(at, at + thin.rank), columns, b, thin.scale))
                at += thin.rank
            first += size
            starts.append(at)
        scales = [thins[part].scale if part in thins else 0.0 for part in range(len(self.sizes))]
        self.starts[slot - 1].copy_(torch.tensor(starts, dtype=torch.int32))
        self.scales[slot - 1].copy_(torch.tensor(scales))
        self.held[slot - 1] = Held(self._a(slot - 1, at), parts) if parts else None

    def _a(self, row: int, ranks: int) -> torch.Tensor:
        return self.a[row, :ranks].t()

    def _write(self, row: int, at: int, first: int, thin: Thin) -> None:
        self.a[row, at : at + thin.rank].copy_(thin.a, non_blocking=True)
        self.b[row, first : first + len(thin.b), : thin.rank].copy_(thin.b, non_blocking=True)

    def clear(self, slot: int) -> None:
        """Nothing is added from it any more; the numbers stay where they are until others come."""
        self.put(slot, {})


class EmbeddingSlots(LoRASlots):
    """The same for an embedding: a [slots, V/R, r_max], a token's row in place of A x; b [slots, D, r_max]."""

    def __init__(self, layer: VocabParallelEmbedding, slots: int, max_rank: int):
        vocab, hidden = layer.weight.shape
        self.layer, self.sizes, device = layer, (hidden,), layer.tp.device
        self.a = torch.zeros(slots, vocab, max_rank, dtype=layer.dtype, device=device)
        self.b = torch.zeros(slots, hidden, max_rank, dtype=layer.dtype, device=device)
        self._describe(slots, 1, device)

    def _a(self, row: int, ranks: int) -> torch.Tensor:
        return self.a[row, :, :ranks]

    def _write(self, row: int, at: int, first: int, thin: Thin) -> None:
        self.a[row, :, : thin.rank].copy_(thin.a.t(), non_blocking=True)
        self.b[row, :, : thin.rank].copy_(thin.b, non_blocking=True)


def give_slots(
    targets: dict[str, tuple[LinearBase | VocabParallelEmbedding, int]], slots: int, max_rank: int
) -> Sequence[LoRASlots]:
    """Room for `slots` adapters in each layer of which `targets` names a part: {module: (layer, part)}."""
    made = []
    for layer, _ in targets.values():
        if layer.lora is None:
            kind = EmbeddingSlots if isinstance(layer, VocabParallelEmbedding) else LoRASlots
            layer.lora = kind(layer, slots, max_rank)
            made.append(layer.lora)
    return made
