"""Attention and the MLP, cut by heads: who holds what, and why one sum at the end is enough.

    python ch06_tp_vllm/demo_3_heads.py
    python ch06_tp_vllm/demo_3_heads.py --csv figures/heads.csv

Qwen2.5-0.5B has 14 query heads in 2 groups of 7, each with one KV head. A rank must hold whole groups, or copies of a KV
head. One formula covers split, copy and padding (common/layers/heads.py): vLLM and SGLang refuse 3, 4 and 8 ranks here. Then a
whole attention block and a whole MLP run on R ranks played in one process, and their partial sums are added up by hand.
"""

from collections.abc import Iterator

import torch

from common.attention.contract import AttentionMetadata
from common.attention.kv_cache import PagedKVCache
from common.attention.torch_native import TorchNativeAttention
from common.distributed.cost_model import wire_bytes
from common.distributed.launch import run_main
from common.layers.heads import HeadLayout
from common.layers.mlp import MLP
from common.layers.rotary import RotaryEmbedding
from common.models.config import ModelConfig
from common.models.decoder import SelfAttention
from common.models.weights import TensorSource
from common.parallel_state import TPGroup
from common.teaching.report import csv_option, write_csv
from common.teaching.show import WHY, check, heading, mistake, table

HQ, HKV, D, HIDDEN, MLP_WIDTH, TOKENS = 14, 2, 8, 112, 150, 5
CONFIG = ModelConfig.from_dict({
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 100, "hidden_size": HIDDEN,
    "intermediate_size": MLP_WIDTH, "num_hidden_layers": 1, "num_attention_heads": HQ, "num_key_value_heads": HKV,
    "head_dim": D, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "rope_theta": 10_000.0,
})  # fmt: skip


SIZES = (1, 2, 3, 4, 8)
LAYER = """\
  x -+-> RMSNorm -> qkv_proj -> rotary, attention -> o_proj -> all-reduce -> + -> x
     |   whole      columns     own heads            rows                    |
     `------------------------------------------------------------------------'
  x -+-> RMSNorm -> gate_up_proj -> silu(gate) * up -> down_proj -> all-reduce -> + -> x
     |   whole      columns         own columns        rows                       |
     `-----------------------------------------------------------------------------'"""


def main() -> None:
    csv = csv_option(__doc__)
    torch.manual_seed(0)
    who_holds_what()
    x = torch.randn(TOKENS, HIDDEN)
    weights = {
        "q": torch.randn(HQ * D, HIDDEN), "k": torch.randn(HKV * D, HIDDEN), "v": torch.randn(HKV * D, HIDDEN),
        "o": torch.randn(HIDDEN, HQ * D), "gate": torch.randn(MLP_WIDTH, HIDDEN), "up": torch.randn(MLP_WIDTH, HIDDEN),
        "down": torch.randn(HIDDEN, MLP_WIDTH),
    }  # fmt: skip
    weights = {name: 0.1 * w for name, w in weights.items()}
    heading("A layer, and where its ranks talk")
    print(LAYER)
    heading("One attention block and one MLP on R ranks: of the first token, the first number")
    with torch.inference_mode():
        whole_attention, whole_mlp = attention_on(TPGroup(), x, weights), mlp_on(TPGroup(), x, weights)
        rows, right = [], True
        for name, on, whole in (("attention", attention_on, whole_attention), ("MLP", mlp_on, whole_mlp)):
            for size in (2, 3, 4, 8):
                partial = [on(TPGroup(rank, size), x, weights) for rank in range(size)]
                right &= torch.allclose(sum(partial), whole, atol=1e-4)
                terms = " ".join(f"{part[0, 0].item():+.2f}" for part in partial)
                rows.append((name, size, f"{sum(partial)[0, 0].item():+.2f}", f"{whole[0, 0].item():+.2f}", terms))
    table(("block", "R", "sum", "whole", "the ranks' partial sums"), rows)
    check(f"so it is with all {whole_mlp.numel()} numbers, within 1e-4", right)
    print("  Among real ranks each sum is one message:")
    rows = [
        (
            "all_reduce",
            name,
            list(whole.shape),
            whole.nbytes,
            *(wire_bytes("all_reduce", whole.nbytes, R) for R in (2, 8)),
            WHY[name],
        )
        for name, whole in (("o_proj", whole_attention), ("down_proj", whole_mlp))
    ]
    table(("op", "layer", "shape", "bytes", "on the wire, R = 2", "R = 8", "why"), rows)
    why_norms_are_whole(x)
    rotary_knows_the_position()
    if csv:
        write_csv(list(places()), csv, measured=False)


def who_holds_what() -> None:
    heading(f"{HQ} query heads, {HKV} KV heads")
    print(f"  {HQ // HKV} query heads form a group: they look up the K and V of one KV head.")
    rows = []
    for size in SIZES:
        layouts = [HeadLayout.of(HQ, HKV, rank, size) for rank in range(size)]
        held = " | ".join(_held(layout) for layout in layouts)
        waste = sum(layout.num_q for layout in layouts) - HQ
        how = "split" if HKV % size == 0 else "copied" if size % HKV == 0 and not waste else "copied and padded"
        rows.append((size, layouts[0].num_q, layouts[0].num_kv, how, waste, held))
    table(("R", "q a rank", "kv a rank", "how", "padding", "query heads : KV heads, rank by rank (. is padding)"), rows)
    total = [sum(HeadLayout.of(HQ, HKV, rank, size).num_q for rank in range(size)) for size in (1, 2)]
    check("where KV heads split evenly, nothing is padded", total == [HQ, HQ])


def _held(layout: HeadLayout) -> str:
    names = ["." if head is None else str(head) for head in layout.q_heads]
    return f"{_ranges(names)} : {','.join(map(str, layout.kv_heads))}"


def places() -> Iterator[dict]:
    """Every place for a query head on every rank, and the KV head beside it."""
    for size in SIZES:
        for rank in range(size):
            layout = HeadLayout.of(HQ, HKV, rank, size)
            for place, head in enumerate(layout.q_heads):
                kv_place = place // layout.group_size
                yield {
                    "R": size, "rank": rank, "place": place, "query head": head,  # None: zeros
                    "KV place": kv_place, "KV head": layout.kv_heads[kv_place],
                }  # fmt: skip


def _ranges(names: list[str]) -> str:
    """0 1 2 . 7 8 -> 0-2 . 7-8"""
    out: list[list[str]] = []
    for name in names:
        if out and name != "." and out[-1][-1] != "." and int(name) == int(out[-1][-1]) + 1:
            out[-1].append(name)
        else:
            out.append([name])
    return " ".join(run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in out)


def attention_on(tp: TPGroup, x: torch.Tensor, weights: dict) -> torch.Tensor:
    """x [T, D] -> this rank's partial sum [T, D] of a whole attention block over a prompt of T tokens."""
    block = SelfAttention(CONFIG, tp, layer=0)
    block.o_proj.reduce_results = False  # add up by hand
    for name in "qkv":
        block.qkv_proj.weight.weight_loader(TensorSource(weights[name]), name)
    block.o_proj.weight.weight_loader(TensorSource(weights["o"]))
    cache = PagedKVCache(1, 1, TOKENS, block.qkv_proj.heads.num_kv, D)
    positions = torch.arange(TOKENS)
    meta = AttentionMetadata(
        positions, torch.zeros(1, 1, dtype=torch.int64), torch.tensor([0, TOKENS]), torch.tensor([TOKENS]), TOKENS
    )
    return block(x, RotaryEmbedding(**CONFIG.rotary)(positions, x.dtype), TorchNativeAttention(cache, meta))


def mlp_on(tp: TPGroup, x: torch.Tensor, weights: dict) -> torch.Tensor:
    """x [T, D] -> this rank's partial sum [T, D]: down(silu(gate x) * up x) over its F/R columns."""
    mlp = MLP(HIDDEN, MLP_WIDTH, tp)
    mlp.down_proj.reduce_results = False
    for i, name in enumerate(("gate", "up")):
        mlp.gate_up_proj.weight.weight_loader(TensorSource(weights[name]), i)
    mlp.down_proj.weight.weight_loader(TensorSource(weights["down"]))
    return mlp(x)


def why_norms_are_whole(x: torch.Tensor) -> None:
    heading("Why norms are not cut, and two kinds of them")
    print(
        "  A norm needs all features of a token, and behind an all-reduce every rank has them. Its weight is one number each."
    )

    def rms_norm(x):
        return x / x.pow(2).mean(dim=-1, keepdim=True).sqrt()

    def layer_norm(x):
        return (x - x.mean(dim=-1, keepdim=True)) / x.var(dim=-1, keepdim=True, correction=0).sqrt()

    x = x + 0.5  # a mean that is not 0
    rows = [
        ("RMSNorm", "root of the mean square", "weight", "Llama, Qwen: input_layernorm.weight (so it is called)"),
        ("LayerNorm", "standard deviation, less the mean", "weight, bias", "GPT-2: ln_1.weight, ln_1.bias"),
    ]
    table(("norm", "divides by", "parameters", "in a checkpoint"), rows)
    for name, norm in (("RMSNorm", rms_norm), ("LayerNorm", layer_norm)):
        halves = torch.cat([norm(half) for half in x.chunk(2, dim=-1)], dim=-1)
        mistake(
            f"{name}, each of two ranks over its half of the features: features 0, 1 and the last two of the first token",
            halves[0, [0, 1, -2, -1]], norm(x)[0, [0, 1, -2, -1]],
        )  # fmt: skip
    mistake("LayerNorm's weights taken for RMSNorm's: the same four features", rms_norm(x)[0, [0, 1, -2, -1]],
            layer_norm(x)[0, [0, 1, -2, -1]])  # fmt: skip
    centred = x - x.mean(dim=-1, keepdim=True)
    check(
        "without its mean a token has the same RMSNorm as LayerNorm", torch.allclose(rms_norm(centred), layer_norm(x))
    )


def rotary_knows_the_position() -> None:
    heading("Rotary embedding: the same on every rank, and the same in prefill and decode")
    rotary, dtype = RotaryEmbedding(**CONFIG.rotary), torch.float32
    print("  A token's angles depend on its position alone, so a step only has to say where each token stands.")
    prefill, decode, from_zero = (
        rotary(torch.tensor(at), dtype)[0][-1].flatten()[:4] for at in ([0, 1, 2, 3, 4], [4], [0])
    )
    rows = [
        (step, 4, " ".join(f"{x:.4f}" for x in cos.tolist()))
        for step, cos in (("prefill", prefill), ("decode", decode))
    ]
    table(("step", "position", "cosines of its last token's angles"), rows)
    check("the angles of position 4 are one and the same", torch.equal(prefill, decode))
    mistake("a decode step that counts its only token as position 0", from_zero, decode)


if __name__ == "__main__":
    run_main(main)
