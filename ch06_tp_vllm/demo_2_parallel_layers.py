"""The same cuts as layers, with real messages between real ranks.

    torchrun --nproc_per_node=2 ch06_tp_vllm/demo_2_parallel_layers.py     # two processes; any number works
    python ch06_tp_vllm/demo_2_parallel_layers.py                          # all ranks in one: rank is an argument
    python ch06_tp_vllm/demo_2_parallel_layers.py --csv figures/parallel_layers.csv

Each layer is compared with the unsplit one. The table shows what was sent: under torchrun by the ledger, which
records every collective. Played in one process the ranks are objects, and their sum is written out by hand. Last, what
merging q, k, v and gate, up is good for: fewer products to launch, counted, and timed on the shapes of Qwen2.5-0.5B.
"""

import time
from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common.distributed.cost_model import wire_bytes
from common.distributed.launch import run_main
from common.layers.heads import HeadLayout
from common.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from common.models.weights import TensorSource
from common.parallel_state import TPGroup, all_gather, initialize_tensor_parallel
from common.teaching.report import csv_option, write_csv
from common.teaching.show import check, heading, table

IN, OUT, HEADS, KV_HEADS, D = 16, 24, 4, 2, 4
TOKENS = 3
QWEN_HIDDEN, QWEN_PARTS = 896, {"q, k, v": (896, 128, 128), "gate, up": (4864, 4864)}  # of Qwen2.5-0.5B


def main() -> None:
    csv = csv_option(__doc__)
    torch.manual_seed(0)
    x, weights = torch.randn(TOKENS, IN), {name: torch.randn(*shape) for name, shape in SHAPES.items()}
    tp = initialize_tensor_parallel(device="cpu")
    if tp.size > 1:
        with torch.inference_mode():
            real_ranks(tp, x, weights)
    else:
        with torch.inference_mode():
            played_ranks(2, x, weights)
            played_ranks(3, x, weights)
            merged_and_timed()
    if csv and tp.rank == 0:
        write_csv(list(shards(2)), csv, measured=False)


SHAPES = {
    "column": (OUT, IN), "column bias": (OUT,), "row": (OUT, IN), "row bias": (OUT,), "gate": (OUT, IN), "up": (OUT, IN),
    "q": (HEADS * D, IN), "k": (KV_HEADS * D, IN), "v": (KV_HEADS * D, IN),
}  # fmt: skip


def build(tp: TPGroup, weights: dict, reduce_results: bool = True) -> dict:
    """This rank's part of five layers; each parameter takes its slice of the full tensors."""
    layers = {
        "replicated": ReplicatedLinear(IN, OUT, tp, bias=True, name="replicated"),
        "column": ColumnParallelLinear(IN, OUT, tp, bias=True, name="column"),
        "row": RowParallelLinear(IN, OUT, tp, bias=True, name="row", reduce_results=reduce_results),
        "gate_up": MergedColumnParallelLinear(IN, [OUT, OUT], tp, name="gate_up"),
        "qkv": QKVParallelLinear(IN, D, HEADS, KV_HEADS, tp, name="qkv"),
    }
    for name, source in (("replicated", "column"), ("column", "column"), ("row", "row")):
        layers[name].weight.weight_loader(TensorSource(weights[source]))
        layers[name].bias.weight_loader(TensorSource(weights[f"{source} bias"]))
    for i, name in enumerate(("gate", "up")):
        layers["gate_up"].weight.weight_loader(TensorSource(weights[name]), i)
    for name in "qkv":
        layers["qkv"].weight.weight_loader(TensorSource(weights[name]), name)
    return layers


def unsplit(x: torch.Tensor, weights: dict) -> dict:
    return {
        "column": x @ weights["column"].T + weights["column bias"],
        "row": x @ weights["row"].T + weights["row bias"],
        "gate_up": [x @ weights[name].T for name in ("gate", "up")],
        "qkv": [x @ weights[name].T for name in "qkv"],
    }


def my_columns(x: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """What a column-parallel layer before this one would have left here."""
    share = -(-x.shape[1] // size)
    mine = x[:, rank * share : (rank + 1) * share]
    return torch.nn.functional.pad(mine, (0, share - mine.shape[1]))


def real_ranks(tp: TPGroup, x: torch.Tensor, weights: dict) -> None:
    layers, want = build(tp, weights), unsplit(x, weights)
    with tp.ledger.recording() as ledger:
        y = {name: layer(my_columns(x, tp.rank, tp.size) if name == "row" else x) for name, layer in layers.items()}
        entries = list(ledger.entries)
    everybodys = {
        name: all_gather(y[name], tp, "to compare")  # COMM all-gather [T, out/R]: to compare, no engine does
        for name in ("column", "gate_up", "qkv")
    }
    shapes = [(name, str(list(layer.weight.shape)), str(list(y[name].shape))) for name, layer in layers.items()]
    if tp.rank > 0:
        return
    heading(f"{tp.size} processes, rank 0's part")
    table(("layer", "weight here", "output here"), shapes)
    why_qkv_is_larger(tp.size)
    heading("What was sent: bytes of the tensor on one rank, and on the wire between all")
    table(("op", "layer", "shape", "bytes", "on the wire", "why"),
          [(e.op, e.label, str(list(e.shape)), e.bytes, wire_bytes(e.op, e.bytes, tp.size), "partial sums -> the sum")
           for e in entries])  # fmt: skip
    unsplit_is(y["replicated"], want["column"], "replicated: every rank has all of it")
    together(layers, everybodys, want)
    check("row: every rank has the whole sum, bias counted once", torch.allclose(y["row"], want["row"], atol=1e-5))
    check("only the row-parallel layer sent anything", [e.label for e in entries] == ["row"])
    fewer_products(tp, x, weights)


def unsplit_is(got: torch.Tensor, want: torch.Tensor, said: str) -> None:
    check(said, torch.allclose(got[:, : want.shape[1]], want, atol=1e-5))


def together(layers: dict, outputs: dict, want: dict) -> None:
    """The ranks' columns, put side by side, against the unsplit layers."""
    unsplit_is(torch.cat(outputs["column"], dim=-1), want["column"], "column: concat of the ranks = unsplit")
    halves = [y.chunk(2, dim=-1) for y in outputs["gate_up"]]
    for i, name in enumerate(("gate", "up")):
        got = torch.cat([half[i] for half in halves], dim=-1)
        unsplit_is(got, want["gate_up"][i], f"gate_up: every rank holds its part of {name}")
    right = True
    for rank, y in enumerate(outputs["qkv"]):
        layout = HeadLayout.of(HEADS, KV_HEADS, rank, len(outputs["qkv"]))
        parts = zip(layers["qkv"].split(y), want["qkv"], (layout.q_heads, *[layout.kv_heads] * 2), strict=True)
        for got, whole, held in parts:
            padded = torch.cat((whole.view(TOKENS, -1, D), torch.zeros(TOKENS, 1, D)), dim=1)  # the last one: no head
            right &= torch.allclose(
                got.view(TOKENS, -1, D), padded[:, [-1 if h is None else h for h in held]], atol=1e-5
            )
    check("qkv: every rank holds whole heads of q, k and v", right)


def why_qkv_is_larger(size: int) -> None:
    if KV_HEADS % size:
        print(
            f"  qkv is not 1/{size} of the whole: {KV_HEADS} KV heads cannot be cut into {size}, so they are held more than"
            f"\n  once, and heads of zeros fill up (step 3)"
        )


class CountProducts(TorchDispatchMode):
    """`with CountProducts() as products:` counts the matrix products, each a GEMM to launch."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.linear)
        return func(*args, **kwargs or {})


def fewer_products(tp: TPGroup, x: torch.Tensor, weights: dict) -> None:
    layers = build(tp, weights)
    heading("Why q, k, v and gate, up are merged: fewer products to launch")
    with CountProducts() as merged:
        layers["qkv"](x), layers["gate_up"](x)
    with CountProducts() as one_by_one:
        for name in ("q", "k", "v", "gate", "up"):
            torch.nn.functional.linear(x, weights[name])
    print(f"  one by one {one_by_one.count}, merged {merged.count}")
    check("merged layers need two products instead of five", (one_by_one.count, merged.count) == (5, 2))


def merged_and_timed() -> None:
    """One product of stacked weights against one product each, in turn; the fastest of both counts."""
    gpu = torch.cuda.is_available()
    device, dtype, where = (
        ("cuda", torch.bfloat16, torch.cuda.get_device_name()) if gpu else ("cpu", torch.float32, "CPU")
    )
    heading(f"What merging saves: Qwen2.5-0.5B's shapes, {where}, {str(dtype).removeprefix('torch.')}, microseconds")
    rows = []
    for name, widths in QWEN_PARTS.items():
        parts = [torch.randn(width, QWEN_HIDDEN, device=device, dtype=dtype) for width in widths]
        stacked = torch.cat(parts)
        for tokens in (1, 64):
            x, best = torch.randn(tokens, QWEN_HIDDEN, device=device, dtype=dtype), [float("inf")] * 2
            for _ in range(15):
                for way, weights in enumerate((parts, [stacked])):
                    began = time.perf_counter()
                    for weight in weights:
                        torch.nn.functional.linear(x, weight)
                    if gpu:
                        torch.cuda.synchronize()
                    best[way] = min(best[way], time.perf_counter() - began)
            rows.append((name, tokens, *(round(1e6 * seconds) for seconds in best)))
    table(("product", "tokens", "one by one", "merged"), rows)
    print(
        "  On a CPU the bytes of the weights take the time, and they are the same; a GPU waits for each launch as well."
    )


def played_ranks(size: int, x: torch.Tensor, weights: dict) -> None:
    want = unsplit(x, weights)
    ranks = [TPGroup(rank, size) for rank in range(size)]
    layers = [build(tp, weights, reduce_results=False) for tp in ranks]
    heading(f"{size} ranks in one process")
    table(
        ("layer", *(f"weight of rank {rank}" for rank in range(size))),
        [(name, *(str(list(layer[name].weight.shape)) for layer in layers)) for name in layers[0]],
    )
    why_qkv_is_larger(size)
    partial = [layer["row"](my_columns(x, rank, size)) for rank, layer in enumerate(layers)]
    unsplit_is(sum(partial), want["row"], "row: sum of the ranks = unsplit, and rank 0 alone added the bias")
    together(layers[0], {name: [layer[name](x) for layer in layers] for name in ("column", "gate_up", "qkv")}, want)


def shards(size: int) -> Iterator[dict]:
    """Which rows and columns of which matrix lie where in each rank's weight.

    Asked of the layers themselves: they load matrices whose numbers are their own coordinates.
    """
    parts = {"column": ["column"], "row": ["row"], "gate_up": ["gate", "up"], "qkv": ["q", "k", "v"]}

    def coordinates(axis: int) -> dict:
        grids = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        for names in parts.values():
            for i, name in enumerate(names):
                rows, columns = grids[name].shape
                grid = torch.arange(rows)[:, None] if axis == 0 else torch.arange(columns)[None, :]
                grids[name] = (1000 * i + grid).expand(rows, columns).float()  # the thousands say which part
        return grids

    for rank in range(size):
        by_row, by_column = (build(TPGroup(rank, size), coordinates(axis)) for axis in (0, 1))
        for name, names in parts.items():
            rows = by_row[name].weight[:, 0].int().tolist()
            columns = (by_column[name].weight[0] % 1000).int().tolist()
            for i, part in enumerate(names):
                mine = [row % 1000 for row in rows if row // 1000 == i]
                yield {
                    "layer": name, "part": part, "rank": rank, "at": rows.index(1000 * i + mine[0]), "first row": mine[0],
                    "rows": len(mine), "first column": columns[0], "columns": len(columns), "of rows": SHAPES[part][0],
                    "of columns": SHAPES[part][1],
                }  # fmt: skip


if __name__ == "__main__":
    run_main(main)
