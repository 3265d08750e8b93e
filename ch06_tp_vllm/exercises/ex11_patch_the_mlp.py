"""Exercise 11: Patch the MLP (25 minutes).

Read  "Two ways to get there" in the chapter; Shoeybi et al. 2019 (Megatron-LM), section 3, figure 3a
Edit  this file
Test  python -m ch06_tp_vllm.exercises.check 11

The patch of the chapter leaves the MLP whole on every rank. Put a parallel layer in the place of each of its three
projections (fusing gate and up is not asked for), so that this rank computes its part and one all-reduce ends it.

    layer.mlp    has gate_proj, up_proj [F, D] and down_proj [D, F], nn.Linear with or without bias;
                 forward(x) = down_proj(silu(gate_proj(x)) * up_proj(x))
    tp           rank and size; R need not divide F

Two layers of common.layers.linear stand ready, made of (in_features, out_features, tp, bias: bool, name):
ColumnParallelLinear cuts its output, RowParallelLinear cuts its input and sums over the ranks. Their parameters `weight`
and `bias` (None without one) fill themselves with this rank's part of a whole tensor w:
`parameter.weight_loader(TensorSource(w))`, TensorSource of common.models.weights.

    F = 12 on 3 ranks: afterwards gate_proj.weight and up_proj.weight are [4, D], down_proj.weight is [D, 4]
"""

from torch import nn

from common.parallel_state import TPGroup


def apply_tp_to_mlp(layer: nn.Module, tp: TPGroup) -> None:
    raise NotImplementedError  # your turn
