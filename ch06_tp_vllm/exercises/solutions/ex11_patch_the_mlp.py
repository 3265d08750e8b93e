"""Solution of exercise 11: Patch the MLP."""

from torch import nn

from common.layers.linear import ColumnParallelLinear, RowParallelLinear
from common.models.weights import TensorSource
from common.parallel_state import TPGroup


def apply_tp_to_mlp(layer: nn.Module, tp: TPGroup) -> None:
    mlp = layer.mlp
    for name, kind in (
        ("gate_proj", ColumnParallelLinear),
        ("up_proj", ColumnParallelLinear),  # the same columns as gate: they meet element by element
        ("down_proj", RowParallelLinear),  # needs the columns that were made here, and sums
    ):
        old = getattr(mlp, name)
        new = kind(old.in_features, old.out_features, tp, old.bias is not None, name)
        new.weight.weight_loader(TensorSource(old.weight))
        if old.bias is not None:
            new.bias.weight_loader(TensorSource(old.bias))
        setattr(mlp, name, new)
