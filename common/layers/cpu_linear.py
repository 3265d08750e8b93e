"""How a matrix lies in a CPU's memory: chosen by measuring, once its numbers are there.

    row-major     [out, in] as in the checkpoint
    column-major  its transpose: x W^T is then a product of two row-major matrices
    packed        oneDNN's blocks, in the order in which its kernels read them: an opaque tensor of the same shape and size
    apart         row-major, and a product for each of the matrices that were merged (q, k, v; gate, up): does merging pay?

Which one is fast depends on the processor, on the libraries in this build of torch, and on where the numbers come from. A toy
stays in the cache; a real model does not: every step reads all of it from memory, once. So each shape is timed as a step
meets it, after the rest of the model has gone through the cache, for a few numbers of rows of x. The form with the smallest
product of times is taken for all matrices of that shape, and replaces the plain one: nothing is held twice, except a
tied embedding, which has to give out rows as well.

MKL has a packed form too (torch.ops.mkl._mkl_linear). torch (aten/src/ATen/native/mkldnn/Linear.cpp, 2.13) uses it for the one
number of rows that it was packed for, and multiplies by the plain matrix otherwise: both would have to stay.

A row of y depends on the form in its last bits only. Ranks may take different forms: each multiplies by its own part. What
every rank computes alike (ReplicatedLinear) stays row-major, or ranks would differ in those bits.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from common.layers.linear import (
    Apart,
    ColumnParallelLinear,
    LinearBase,
    ReplicatedLinear,
    loadable,
    multiply,
    multiply_apart,
)
from common.layers.vocab import ParallelLMHead, VocabParallelEmbedding

ROWS = (1, 8, 32)  # of x: one request, several, many
ROUNDS = 3
SMALLEST = 512 << 10  # bytes; calling costs as much as multiplying by less, in any form
LARGEST_SAMPLE = 8 << 20  # of a larger matrix the first rows are timed: it costs the same by the row
CACHE = 64 << 20  # bytes that drive everything else out of a core's share of the cache
WORTH_IT = 1.1  # so much faster than row-major
ANY_ROWS = 32  # oneDNN asks for how many rows it packs; from 2 on the blocks are the same, for 1 they are slower

Form = Callable[[torch.Tensor], torch.Tensor]


def row_major(weight: torch.Tensor) -> torch.Tensor:
    return weight.to_dense() if weight.is_mkldnn else weight.contiguous()


def column_major(weight: torch.Tensor) -> torch.Tensor:
    return row_major(weight).t().contiguous().t()


def packed(weight: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(row_major(weight), ANY_ROWS)


FORMS: dict[str, Form] = {"row-major": row_major, "column-major": column_major, "packed": packed, "apart": row_major}


@dataclass(frozen=True)
class FormChoice:
    """What was measured for the matrices of one shape, and taken."""

    names: tuple[str, ...]  # of the layers
    shape: tuple[int, int]  # [out, in] on this rank
    form: str
    seconds: dict[str, tuple[float, ...]]  # by form: for 1, 8 and 32 rows; empty if nothing was measured

    def __str__(self) -> str:
        times = ", ".join(f"{form} {' '.join(f'{1e3 * s:.2f}' for s in times)}" for form, times in self.seconds.items())
        why = f"ms for {', '.join(map(str, ROWS))} rows: {times}" if times else "not measured"
        return f"{self.names[0]}{list(self.shape)} x {len(self.names)}: {self.form}; {why}"


@torch.no_grad()
def choose_forms(model: nn.Module, form: str | None = None) -> list[FormChoice]:
    """Give every matrix of a loaded model on a CPU its form: the one of that name, or what measures best.

    Measuring takes some ten milliseconds a shape; matrices of less than 512 KiB are not measured. On a GPU nothing happens.
    Raises ValueError for a form that there is not.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, LinearBase) and layer.weight.device.type == "cpu"]
    for dtype in {layer.dtype for layer in layers if layer.tp.world_rank == 0}:
        if not computes_in(dtype):
            warnings.warn(f"this CPU has no instructions for {dtype}; dtype=float32 is faster", stacklevel=2)
    everything = sum(layer.weight.nbytes for layer in layers)
    others = torch.ones(min(everything, CACHE) // 8, dtype=torch.int64)  # zeros may all be one page of memory
    choices = []
    for (shape, dtype, sizes), alike in _by_shape(layers).items():
        possible = [name for name in FORMS if _possible(name, dtype, sizes)]
        seconds = {}
        if form is not None and form not in (*possible, "apart"):
            raise ValueError(f"form={form!r} is not there for {dtype} on this CPU; use {', '.join(possible)}")
        if form is None and alike[0].weight.nbytes >= SMALLEST:
            seconds = measure(row_major(alike[0].weight).to(dtype), sizes, possible, others)
        taken = fastest(seconds) if form is None else form if form in possible else "row-major"
        for layer in alike:
            take_form(layer, taken)
        choices.append(FormChoice(tuple(layer.name for layer in alike), tuple(shape), taken, seconds))
    for embedding in model.modules():
        for head in layers:
            if isinstance(embedding, VocabParallelEmbedding) and head.weight is embedding.weight:
                share(embedding, head)
    return choices


def _by_shape(layers: Iterable[LinearBase]) -> dict[tuple, list[LinearBase]]:
    """{(shape, dtype, sizes of the merged matrices): layers}, without those that all ranks compute alike."""
    found: dict[tuple, list[LinearBase]] = {}
    for layer in layers:
        if not isinstance(layer, ReplicatedLinear):
            sizes = layer.sizes if isinstance(layer, ColumnParallelLinear) else ()
            found.setdefault((layer.weight.shape, layer.dtype, sizes), []).append(layer)
    return found


def fastest(seconds: dict[str, tuple[float, ...]]) -> str:
    """The form with the smallest product of times; row-major unless another one is WORTH_IT times faster in the mean."""
    mean = {form: math.prod(times) ** (1 / len(times)) for form, times in seconds.items()}
    best = min(mean, key=mean.get, default="row-major")
    return best if mean and mean[best] * WORTH_IT < mean["row-major"] else "row-major"


def measure(
    plain: torch.Tensor, sizes: Sequence[int], forms: Iterable[str], others: torch.Tensor
) -> dict[str, tuple[float, ...]]:
    """Seconds of x W^T for ROWS rows of x by form, each the best of a few rounds.

    plain: W, row-major. sizes: its rows of each merged matrix. A round is a step in small: `others` goes through the cache,
    then each form multiplies by two copies of W, as two layers do, and the second is timed: its numbers are cold, its code
    is not.
    """
    rows = min(len(plain), LARGEST_SAMPLE // plain[0].nbytes)
    sizes = [size * rows // len(plain) for size in sizes]
    pairs = {form: [FORMS[form](plain[: sum(sizes) or rows].clone()) for _ in range(2)] for form in forms}
    seconds = {form: [] for form in pairs}
    for count in ROWS:
        x = torch.ones(count, plain.shape[1], dtype=plain.dtype)
        best = dict.fromkeys(pairs, math.inf)
        for round_ in range(ROUNDS + 1):
            others.sum()
            for form, pair in pairs.items():
                for matrix in pair:
                    start = time.perf_counter()
                    if form == "apart":
                        multiply_apart(x, matrix, None, sizes)
                    else:
                        multiply(x, matrix)
                    spent = time.perf_counter() - start
                if round_:  # in the first one kernels are compiled
                    best[form] = min(best[form], spent)
        for form in pairs:
            seconds[form].append(best[form])
    return {form: tuple(times) for form, times in seconds.items()}


def take_form(layer: LinearBase, form: str) -> None:
    """Store a layer's matrix in that form, in place of the one it had. A tied head keeps its embedding's, and a copy."""
    if isinstance(layer, ParallelLMHead) and layer.tied:
        layer.copy = None if FORMS[form] is row_major else FORMS[form](layer.weight.to(layer.dtype))
        return
    layer.weight = loadable(FORMS[form](layer.weight), layer.load_weight, layer.weight.shard_shapes)
    layer.method = Apart() if form == "apart" and isinstance(layer, ColumnParallelLinear) else None


def share(embedding: VocabParallelEmbedding, head: ParallelLMHead) -> None:
    """An embedding whose head has a copy only gives out rows: bfloat16 is enough if it loses nothing, as with most files."""
    rows = embedding.weight
    exact = head.copy is not None and all(torch.equal(x.bfloat16().to(x.dtype), x) for x in rows.split(4096))
    dtype = torch.bfloat16 if exact else head.dtype
    if rows.dtype != dtype:
        embedding.weight = head.weight = loadable(rows.to(dtype), embedding.load_weight, rows.shard_shapes)


def computes_in(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products in that dtype; asked about bfloat16 only."""
    if dtype != torch.bfloat16:
        return True
    x86 = [getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile")]
    listed = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch has no such list
    return any(x86) or bool(listed.get("bf16"))  # Arm's name for it


def _possible(form: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> bool:
    if form == "packed":
        return packs(dtype)
    return form != "apart" or len(sizes) > 1


@cache
def packs(dtype: torch.dtype) -> bool:
    """Whether this build of torch packs matrices of that dtype for this CPU, and multiplies by them: tried on a small one."""
    weight = torch.arange(48 * 32).reshape(48, 32).remainder(3).to(dtype)  # exact in any dtype, sums too
    x = torch.arange(3 * 32).reshape(3, 32).remainder(2).to(dtype)
    try:
        matrix = packed(weight)
        return torch.equal(multiply(x, matrix), x @ weight.t()) and torch.equal(matrix.to_dense(), weight)
    except (
        AttributeError,
        NotImplementedError,
        RuntimeError,
    ):  # no such operator, none for this CPU, none for this dtype
        return False
