import copy
from types import ModuleType, SimpleNamespace

import torch
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

from common.parallel_state import TPGroup
from common.teaching.expect import ask, expect


def check(m: ModuleType) -> None:
    torch.manual_seed(0)
    for width, ranks, bias in ((12, 1, False), (12, 2, False), (12, 3, True), (10, 4, False)):
        config = LlamaConfig(hidden_size=8, intermediate_size=width, num_attention_heads=2, mlp_bias=bias)
        whole, x = LlamaMLP(config), torch.randn(3, 8)
        share, partial = -(-width // ranks), []
        for rank in range(ranks):
            layer = SimpleNamespace(mlp=copy.deepcopy(whole))
            ask(m.apply_tp_to_mlp, layer, TPGroup(rank, ranks))
            mlp, who = layer.mlp, f"on rank {rank} of {ranks}, F = {width}, D = 8"
            for name, shape in (("gate_proj", (share, 8)), ("up_proj", (share, 8)), ("down_proj", (8, share))):
                expect(f"shape of {name}.weight {who}", tuple(getattr(mlp, name).weight.shape), shape)
            sums = getattr(mlp.down_proj, "reduce_results", False)
            expect(f"does down_proj sum over the ranks, {who}", sums, True)
            mlp.down_proj.reduce_results = False  # the ranks are played here, and their sum is written by hand
            partial.append(mlp(x))
        off = float((sum(partial) - whole(x)).detach().abs().max())
        biases = ", with biases" if bias else ""
        expect(f"the sum over {ranks} ranks is the whole MLP's output{biases}; off by", off if off > 1e-5 else 0, 0)
