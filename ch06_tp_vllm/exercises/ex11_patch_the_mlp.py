"""Exercise 11: Patch the MLP (30 minutes).

Read  ch06_tp_vllm/patch_hf_attention.py; common/layers/linear.py
Edit  this file
Test  python -m ch06_tp_vllm.exercises.check 11

The patch of the chapter leaves the MLP whole on every rank. Put a layer of common/layers/linear.py in the place of each of its
three projections (fusing gate and up is not asked for), so that this rank computes its part and one all-reduce ends it.

    layer.mlp    has gate_proj, up_proj [F, D] and down_proj [D, F], nn.Linear with or without bias;
                 forward(x) = down_proj(silu(gate_proj(x)) * up_proj(x))
    tp           rank and size; R need not divide F

A layer of common/layers/linear.py is made of sizes, tp, bias and name; `TensorSource(w)` makes of a tensor what its parameters'
weight_loader reads from.
"""

from torch import nn

from common.parallel_state import TPGroup


def apply_tp_to_mlp(layer: nn.Module, tp: TPGroup) -> None:
    raise NotImplementedError  # your turn
