"""Linear layers cut over tensor-parallel ranks.

    LinearBase
    |- ReplicatedLinear                 every rank holds all of it               no communication
    |- ColumnParallelLinear             cut out_features, y = my columns         no communication
    |  |- MergedColumnParallelLinear    gate and up as one GEMM
    |  `- QKVParallelLinear             q, k and v heads as one GEMM
    `- RowParallelLinear                cut in_features, y = sum over ranks      one all-reduce

A column-parallel layer followed by a row-parallel one needs a single all-reduce and nothing in between:
what the first leaves cut is what the second expects cut (Megatron-LM, Shoeybi et al. 2019, section 3).
"Column" and "row" speak of the matrix in y = x A; torch stores its transpose [out, in], so a column cut
takes rows of `weight`.

Each parameter carries `weight_loader(source, shard_id)`, which copies this rank's slice of a checkpoint
tensor and nothing else, and `shard_shapes`, the checkpoint tensors it is made of.

adapters: which LoRA adapter each row of x uses (lora.py), None if none has one; the cut layers add what it adds.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from common.kernels.linear_choice import wanted
from common.layers.heads import HeadLayout, Piece, split_evenly
from common.parallel_state import TPGroup, all_reduce
from common.quantization.codes import Codes
from common.quantization.method import LinearMethod
from common.quantization.rounded_rows import RoundedRows, Rounding, itself

try:  # a CPU build of torch comes without Triton
    from common.kernels import linear as fused
except ImportError:
    fused = None


def load_pieces(param: torch.Tensor, source, dim: int, pieces: Sequence[Piece]) -> None:
    """Copy `pieces` of a checkpoint tensor into `param` along `dim`; each byte is read once.

    `source` has `shape` and `read(dim, start, stop)` (common/models/weights.py). A piece that lies twice on this
    rank (a KV head held twice) is read once and copied.
    """
    read: dict[tuple[int, int], torch.Tensor] = {}
    for dst, src, n in pieces:
        if (src, n) not in read:
            read[src, n] = source.read(dim, src, src + n)
        param.narrow(dim, dst, n).copy_(read[src, n])


def loadable(values: torch.Tensor, loader: Callable, shard_shapes: dict) -> nn.Parameter:
    """A parameter that knows how to load its slice, and the full shape of each checkpoint tensor it is made of."""
    param = nn.Parameter(values, requires_grad=False)
    param.weight_loader, param.shard_shapes = loader, shard_shapes
    return param


def multiply(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """x [T, in], weight [out, in] in any form -> x W^T (+ bias) [T, out]; a few rows on a GPU have their own kernel where it is
    faster (common/kernels/linear_choice.py).

    dtype: in which it is computed and put out, a wider one than x's, of which products are exact in it; None: x's.
    """
    if weight.is_mkldnn:  # packed, see cpu_linear.py
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    if fused and x.is_cuda and wanted(x, weight, bias, dtype):
        return fused.linear(x, weight, bias, dtype)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
    return F.linear(x, weight, bias)


def multiply_apart(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, sizes: Sequence[int]
) -> torch.Tensor:
    """The same, a product for each `sizes` rows of weight."""
    biases = [None] * len(sizes) if bias is None else bias.split(sizes)
    return torch.cat([multiply(x, w, b) for w, b in zip(weight.split(sizes), biases, strict=True)], dim=-1)


class LinearBase(nn.Module):
    """y = x W^T + b with this rank's W [out_local, in_local]; zero where nothing is loaded (padding).

    `full` is the shape [out, in] of each checkpoint tensor by shard id, to refuse a wrong one early. A finished model on
    a CPU may store W in another form of the same shape (cpu_linear.py); `row_major` there gives its numbers back.
    method: who multiplies, if it is not `multiply` by the plain weight: with quantized weights it holds their codes, and `weight`
    has no memory (common/quantization/method.py).
    """

    def __init__(
        self, out_local: int, in_local: int, bias: bool, tp: TPGroup, name: str, full: dict,
        method: LinearMethod | None = None,
    ):  # fmt: skip
        super().__init__()
        self.tp, self.name, self.dtype, self.method = tp, name, torch.get_default_dtype(), method
        if method is None:
            self.weight = loadable(torch.zeros(out_local, in_local), self.load_weight, full)
        else:
            self.weight = loadable(torch.empty(out_local, in_local, device="meta"), self.load_codes, full)
        self.lora = None  # room for adapters, see lora.py
        self.bias = None
        if bias:
            self.bias = loadable(torch.zeros(out_local), self.load_bias, {k: shape[:1] for k, shape in full.items()})

    @property
    def asks(self) -> Callable[[int], Rounding | None] | None:
        """`rounding`, for the `rounding` of whoever makes x; None where it would never want codes."""
        return self.rounding if self.method is not None and self.method.rounds else None

    def rounding(self, rows: int) -> Rounding | None:
        """As which codes this layer wants so many rows of x, or None: as they are."""
        wanted = None if self.method is None else self.method.rounding(rows)
        return wanted if wanted is None or self.lora is None else wanted._replace(keep=True)

    def load_weight(self, source, shard_id=None) -> None:
        raise NotImplementedError

    def load_bias(self, source, shard_id=None) -> None:
        raise NotImplementedError

    def places(self, shard_id) -> tuple[int, Sequence[Piece]]:
        """(the dimension of W along which a checkpoint tensor is cut, the pieces of it that this rank holds)."""
        raise NotImplementedError

    def load_codes(self, source, shard_id=None) -> None:
        """The same as load_weight for a layer that keeps codes (common/quantization/reader.py); with the last ones it packs them.

        If what is merged here has no codes in common (GPTQ's act_order may group each matrix in its own way), it is dequantised,
        and so is what is too small for the method to pay.
        """
        dim, pieces = self.places(shard_id)
        parts = self.method.parts[shard_id] = []
        for dst, src, n in pieces:
            part = [slice(0, size) for size in source.shape]
            part[dim] = slice(src, src + n)
            parts.append((dst, source.codes(*part)))
        if source.input_scale is not None:
            self.method.input_scales.append(source.input_scale)
        if self.method.parts.keys() != self.weight.shard_shapes.keys():
            return
        codes, device = self.method.together(dim, self.weight.shape), self.tp.device
        if codes is None or codes.q.numel() < self.method.smallest:
            values = self.method.dequantised(dim, self.weight.shape).to(device, self.dtype)
            self.weight, self.method = loadable(values, self.load_weight, self.weight.shard_shapes), None
        else:
            self.method.pack(self, Codes(*(None if x is None else x.to(device) for x in codes)))
            self.method.parts.clear()


class ReplicatedLinear(LinearBase):
    """x [T, in] -> y [T, out], all of it on every rank."""

    def __init__(
        self, in_features: int, out_features: int, tp: TPGroup, bias: bool = False, name: str = "",
        method: LinearMethod | None = None,
    ):  # fmt: skip
        super().__init__(out_features, in_features, bias, tp, name, {None: (out_features, in_features)}, method)

    def places(self, shard_id) -> tuple[int, Sequence[Piece]]:
        return 0, [Piece(0, 0, len(self.weight))]

    def load_weight(self, source, shard_id=None) -> None:
        self.weight.copy_(source.read(0, 0, source.shape[0]))

    def load_bias(self, source, shard_id=None) -> None:
        self.bias.copy_(source.read(0, 0, source.shape[0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.method is not None:
            return self.method.apply(self, x, self.bias)
        return multiply(x, self.weight, self.bias)


def multiply_both(x: torch.Tensor, one: LinearBase, other: LinearBase) -> tuple[torch.Tensor, torch.Tensor]:
    """(one(x), other(x)) of layers that do not communicate; for one row on a GPU a launch less, and nothing is measured."""
    plain = all(layer.method is None and layer.bias is None for layer in (one, other))
    if fused and x.is_cuda and plain and len(x) == 1 and one.weight.numel() <= fused.LARGE:
        y = fused.one_row(x, one.weight, second=other.weight)
        return y.split((len(one.weight), len(other.weight)), dim=-1)
    return one(x), other(x)


class ColumnParallelLinear(LinearBase):
    """Column-parallel linear: cut the output.

    x [T, in], equal on every rank -> y [T, out/R], this rank's columns; no communication. Concatenating
    the ranks' y gives the unsplit layer's. `out_features` that R does not divide are padded with zeros.
    """

    def __init__(
        self, in_features: int, out_features: int, tp: TPGroup, bias: bool = False, name: str = "",
        method: LinearMethod | None = None,
    ):  # fmt: skip
        local, pieces = split_evenly(out_features, tp.rank, tp.size)
        self._init(in_features, (local,), {None: (out_features, pieces)}, tp, bias, name, method)

    def _init(
        self, in_features: int, sizes: tuple, shards: dict, tp: TPGroup, bias: bool, name: str,
        method: LinearMethod | None = None,
    ) -> None:  # fmt: skip
        """sizes: rows on this rank of each layer in it; shards: shard id -> (rows of the full checkpoint tensor,
        pieces of it that this rank holds)."""
        full = {key: (rows, in_features) for key, (rows, _) in shards.items()}
        super().__init__(sum(sizes), in_features, bias, tp, name, full, method)
        self.pieces = {key: pieces for key, (_, pieces) in shards.items()}
        self.sizes = sizes

    def places(self, shard_id) -> tuple[int, Sequence[Piece]]:
        return 0, self.pieces[shard_id]

    def load_weight(self, source, shard_id=None) -> None:
        load_pieces(self.weight, source, 0, self.pieces[shard_id])

    def load_bias(self, source, shard_id=None) -> None:
        load_pieces(self.bias, source, 0, self.pieces[shard_id])

    def forward(self, x: torch.Tensor | RoundedRows, adapters=None) -> torch.Tensor:
        y = self.product(x)  # [T, out/R]
        return y if adapters is None else adapters.add(y, itself(x), self.lora)

    def product(self, x: torch.Tensor | RoundedRows) -> torch.Tensor:
        if self.method is not None:
            return self.method.apply(self, x, self.bias)
        return multiply(x, self.weight, self.bias)


class Apart(LinearMethod):
    """Of a ColumnParallelLinear with a plain weight: a product for each of the matrices in it, see cpu_linear.py."""

    name = "apart"

    def apply(self, layer: ColumnParallelLinear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return multiply_apart(x, layer.weight, bias, layer.sizes)


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several column-parallel layers with the same input as one GEMM (the MLP's gate and up).

    x [T, in] -> y [T, sum(out)/R], the layers side by side. Each is cut on its own and the shards are
    then stacked: cutting the stacked matrix would give rank 0 all of gate and rank 1 all of up.
    """

    def __init__(
        self, in_features: int, out_sizes: Sequence[int], tp: TPGroup, bias: bool = False, name: str = "",
        method: LinearMethod | None = None,
    ):  # fmt: skip
        shards, sizes = {}, ()
        for i, size in enumerate(out_sizes):
            local, pieces = split_evenly(size, tp.rank, tp.size)
            shards[i] = (size, [Piece(sum(sizes) + dst, src, n) for dst, src, n in pieces])
            sizes += (local,)
        self._init(in_features, sizes, shards, tp, bias, name, method)

    def gated(self, x: torch.Tensor | RoundedRows) -> torch.Tensor | None:
        """Of gate and up: silu(gate) * up [T, F/R] by one launch, rounded once; None where no kernel of ours multiplies."""
        if self.method is not None:
            return self.method.gated(self, x, self.bias)
        if fused and x.is_cuda and wanted(x, self.weight, self.bias, gated=True):
            return fused.linear(x, self.weight, self.bias, gated=True)
        return None


class QKVParallelLinear(ColumnParallelLinear):
    """The q, k and v projections as one GEMM, cut by heads.

    x [T, D] -> y [T, (Hq + 2 Hkv)/R * d]: this rank's query heads, then its key heads, then its value
    heads. Heads are never cut through; see heads.py for replication and padding.
    """

    def __init__(
        self, hidden_size: int, head_dim: int, num_heads: int, num_kv_heads: int,
        tp: TPGroup, bias: bool = False, name: str = "", method: LinearMethod | None = None,
    ):  # fmt: skip
        heads = HeadLayout.of(num_heads, num_kv_heads, tp.rank, tp.size)
        q_local, kv_local = heads.num_q * head_dim, heads.num_kv * head_dim
        q, kv = heads.q_pieces(head_dim), heads.kv_pieces(head_dim)
        shards = {
            "q": (num_heads * head_dim, q),
            "k": (num_kv_heads * head_dim, [Piece(q_local + dst, src, n) for dst, src, n in kv]),
            "v": (num_kv_heads * head_dim, [Piece(q_local + kv_local + dst, src, n) for dst, src, n in kv]),
        }
        self._init(hidden_size, (q_local, kv_local, kv_local), shards, tp, bias, name, method)
        self.heads = heads

    def split(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """y [T, (Hq + 2 Hkv)/R * d] -> q [T, Hq/R * d], k and v [T, Hkv/R * d]."""
        return y.split(self.sizes, dim=-1)


class RowParallelLinear(LinearBase):
    """Row-parallel linear: cut the input, sum the outputs.

    x [T, in/R] -> y [T, out], equal on every rank; one all-reduce. The bias is added after the sum:
    added before, it would count R times. `pieces` says which input columns are this rank's (o_proj: those
    of its query heads), by default an even cut. With `reduce_results=False` y stays this rank's partial
    sum (rank 0's with the bias) and nobody talks.
    Megatron-LM, Shoeybi et al. 2019, section 3.
    """

    def __init__(
        self, in_features: int, out_features: int, tp: TPGroup, bias: bool = False, name: str = "",
        pieces: tuple[int, list[Piece]] | None = None, reduce_results: bool = True, method: LinearMethod | None = None,
    ):  # fmt: skip
        local, self.pieces = pieces or split_evenly(in_features, tp.rank, tp.size)
        super().__init__(out_features, local, bias, tp, name, {None: (out_features, in_features)}, method)
        self.reduce_results = reduce_results

    def places(self, shard_id) -> tuple[int, Sequence[Piece]]:
        return 1, self.pieces

    def load_weight(self, source, shard_id=None) -> None:
        load_pieces(self.weight, source, 1, self.pieces)

    def load_bias(self, source, shard_id=None) -> None:
        self.bias.copy_(source.read(0, 0, source.shape[0]))

    def forward(self, x: torch.Tensor | RoundedRows, adapters=None) -> torch.Tensor:
        method = self.method
        y = multiply(x, self.weight) if method is None else method.apply(self, x, None)  # [T, out], a partial sum
        if adapters is not None:
            y = adapters.add(y, itself(x), self.lora)  # partial sums, too: they need no sum of their own
        if self.reduce_results:
            y = all_reduce(y, self.tp, self.name)  # COMM all-reduce [T, D]: partial sums -> full sum
        once = self.reduce_results or self.tp.rank == 0
        return y + self.bias if self.bias is not None and once else y
