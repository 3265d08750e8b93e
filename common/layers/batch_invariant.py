"""Layers whose rows do not see each other: the same row gives the same bits in any company.

A sum of floats depends on its order, and a library chooses the order by the shape of the product: MKL adds up one row of x in
another order than it adds up each of sixteen. So the bits of a request's hidden states, and then now and then a token, depend on
how many requests run beside it, on how its prompt was cut into chunks, on what was found in the tree. That is no random
noise: the same batch gives the same bits. Nobody who asks can know the batch (He et al., "Defeating Nondeterminism in LLM
Inference", Thinking Machines Lab 2025).

The way out is to leave the library no choice:

    RowBlocks     on a CPU every product is one of the same shape: the rows go by blocks of 16, the last filled up with zeros, in
                  memory that begins at a multiple of 64 bytes. On a GPU one kernel that never cuts a sum up
                  (common/kernels/linear.py, fixed_linear)
    SiluByExp     torch's float32 silu computes what is left over behind a vector's width by another exp than the vectors: which
                  numbers those are depends on the shape, and on the number of threads. exp by itself is one function for both

What remains is the place in a block. Whether a library adds up the third row of sixteen as it does the ninth is not promised
anywhere, so it is tried for each shape when a model is loaded (`agreeing_rows`): where it fails in blocks of 16, those of 32 are
tried, then of 8, and single rows are left. Nor is it promised that a tensor core adds up alike in tiles of all sizes, as an
H100's does: where one differs (`tiles_agree`), all products are computed in one size. Norms, rotary embedding and the sampler work
row by row as they are (tests/common/layers/test_batch_invariant.py), and log_softmax on rows of whole quads
(common/sampling/logprobs.py).

SGLang (--enable-deterministic-inference) and vLLM (VLLM_BATCH_INVARIANT=1) have it for GPUs; as their sources stood in 2026:
SGLang's srt/batch_invariant_ops/batch_invariant_ops.py puts kernels with fixed tiles in the place of torch's mm, addmm, bmm,
log_softmax and mean, DeepGEMM's for bfloat16's mm and addmm where that is on, Triton's else. vLLM's
vllm/model_executor/layers/batch_invariant.py puts Triton kernels in the place of mm, addmm, matmul and linear on compute
capability 8.x; on Hopper these stay cuBLASLt's, which CUBLAS_WORKSPACE_CONFIG=:16:8 and CUBLASLT_WORKSPACE_SIZE=1 leave no room to
cut a sum up (split-K). bmm, softmax, log_softmax and mean are its own on both.
"""

from collections.abc import Callable

import torch
from torch import nn

from common.layers.activation import SiluAndMul
from common.layers.linear import LinearBase, RowParallelLinear, multiply
from common.layers.mlp import MLP
from common.quantization.method import LinearMethod

try:  # a CPU build of torch comes without Triton
    from common.kernels.launch import compile_ahead, num_processors
    from common.kernels.linear import Tile, fixed_linear, fixed_tile
except ImportError:
    fixed_linear = None

BLOCKS = (16, 32, 8, 1)  # rows of a product, the first that agrees
TILE_ROWS = (1, 20, *(40 << i for i in range(10)))  # of x, whose number chooses a tile; up to 20,480


def make_batch_invariant(model: nn.Module) -> None:
    """Of a loaded model, in place. Raises ValueError for a layer that has no such form."""
    kinds: dict[tuple, tuple[torch.Tensor, torch.Tensor | None]] = {}
    layers: list[tuple[LinearBase, tuple]] = []
    for layer in model.modules():
        if isinstance(layer, LinearBase):
            if layer.method is not None:
                raise ValueError(
                    f"{layer.name} multiplies by {layer.method.name} weights, whose sums depend on the batch; "
                    f"use quantized_compute=dequantise, or leave enable_deterministic_inference out"
                )
            bias = None if isinstance(layer, RowParallelLinear) else layer.bias  # which adds it behind the ranks' sum
            kind = tuple(layer.weight.shape), layer.dtype, bias is not None
            if kind not in kinds:
                kinds[kind] = layer.weight.to(layer.dtype), bias
            layers.append((layer, kind))
        elif isinstance(layer, MLP):
            layer.act = SiluByExp()
    if any(weight.is_cuda for weight, _ in kinds.values()):
        with compile_ahead():  # in which nothing is computed
            for one in kinds.values():
                tiles_agree(*one)
    methods = {kind: RowBlocks.agreeing(*one) for kind, one in kinds.items()}
    for layer, kind in layers:
        layer.method = methods[kind]


class RowBlocks(LinearMethod):
    """Of layers with a plain weight: products of one shape, `rows` rows of x at a time; on a GPU sums in one order, in tiles of
    several sizes or of one."""

    name = "row blocks"

    def __init__(self, rows: int = BLOCKS[0], one_tile: bool = False):
        super().__init__()
        self.rows, self.one_tile = rows, one_tile

    @classmethod
    def agreeing(cls, weight: torch.Tensor, bias: torch.Tensor | None) -> "RowBlocks":
        """For weight [out, in] and its like: what gives a row the same bits everywhere."""
        return cls(one_tile=not tiles_agree(weight, bias)) if weight.is_cuda else cls(agreeing_rows(weight, bias))

    def apply(self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if x.is_cuda:
            return fixed_linear(x, layer.weight, bias, self.one_tile)
        return in_blocks(lambda block: multiply(block, layer.weight, bias), x, self.rows)


def in_blocks(f: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, rows: int) -> torch.Tensor:
    """f of x [T, in], `rows` rows at a time -> [T, out]; f sees tensors of one shape and one alignment."""
    parts = []
    for some in x.split(rows):
        block = x.new_zeros(rows, x.shape[1])
        block[: len(some)] = some
        parts.append(f(block)[: len(some)])
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else f(x)


def agreeing_rows(weight: torch.Tensor, bias: torch.Tensor | None = None) -> int:
    """The first number of BLOCKS for which a row's product with weight [out, in] does not depend on its place among so many.

    bias [out]: added in the product, whose beginning a library may take from it. One row always agrees with itself.
    """
    row = torch.randn(1, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    for rows in BLOCKS:
        y = multiply(row.repeat(rows, 1), weight, bias)
        if torch.equal(y, y[:1].expand_as(y)):
            return rows
    return 1


def tiles_agree(weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Has a row's product with weight [out, in], on a GPU, the same bits in each tile that `fixed_linear` chooses for TILE_ROWS?"""
    processors = num_processors(weight.device)
    smallest: dict[Tile, int] = {}
    for rows in TILE_ROWS:
        smallest.setdefault(fixed_tile(rows, len(weight), processors), rows)
    rng = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(max(smallest.values()), weight.shape[1], generator=rng, device=weight.device).to(weight.dtype)
    pairs = [[fixed_linear(x[:rows], weight, bias, one) for one in (False, True)] for rows in smallest.values()]
    return all(torch.equal(*pair) for pair in pairs)


class SiluByExp(SiluAndMul):
    """SwiGLU's gate, x / (1 + exp(-x)) in float32 by operators that are the same for every number of a tensor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda:  # a program a row there
            return super().forward(x)
        gate, up = x.chunk(2, dim=-1)
        wide = gate.float()
        return (wide / wide.neg().exp_().add_(1)).to(x.dtype).mul_(up)
