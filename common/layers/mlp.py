"""The feed-forward half of a decoder layer; an expert that all tokens share is one, too."""

import torch
from torch import nn

from common.layers.activation import SiluAndMul
from common.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from common.parallel_state import TPGroup
from common.quantization.method import PLAIN, LayerMethods


class MLP(nn.Module):
    """x [T, D] -> [T, D]: down(silu(gate(x)) * up(x)); column, then row, one all-reduce unless reduce_results=False.

    Few rows on a GPU: gate, up and what is made of them are one launch, unless an adapter adds to gate and up before.
    """

    def __init__(
        self, hidden_size: int, width: int, tp: TPGroup, name: str = "", reduce_results: bool = True,
        methods: LayerMethods = PLAIN,
    ):  # fmt: skip
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden_size, [width] * 2, tp, name=f"{name}.gate_up_proj", method=methods("gate_up_proj")
        )
        self.act = SiluAndMul()
        self.down_proj = RowParallelLinear(
            width, hidden_size, tp, name=f"{name}.down_proj", reduce_results=reduce_results, method=methods("down_proj")
        )

    def forward(self, x: torch.Tensor, adapters=None) -> torch.Tensor:
        h = None
        if adapters is None and not self.act.compiled:
            h = self.gate_up_proj.gated(x)  # [T, F/R]
        if h is None:
            h = self.act(self.gate_up_proj(x, adapters))  # [T, 2F/R] -> [T, F/R]
        return self.down_proj(h, adapters)  # [T, D]
