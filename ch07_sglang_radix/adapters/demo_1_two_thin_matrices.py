"""Two thin matrices: y = W x + s B (A x) by hand, merged and not, on one rank and on two; then a trained adapter.

    python ch07_sglang_radix/adapters/demo_1_two_thin_matrices.py

W has four rows, an adapter of rank 1 has one row A and one column B, all small integers, so that every product can be worked out
in the head. Added to y or merged into W it is the same, and two ranks cut A and B as they cut W. Then the adapter that lets the
bundled model talk like a pirate: what its two files say, what it weighs, and that merged into the weights it writes the same words.
"""

import json

import torch

from ch07_sglang_radix import Engine
from common.distributed.launch import run_main
from common.layers.adapter_rows import Segments
from common.layers.cpu_linear import choose_forms
from common.layers.linear import ColumnParallelLinear, LinearBase, RowParallelLinear
from common.layers.lora import Thin, cut, give_slots
from common.models.adapter_files import CONFIG, AdapterConfig, read_adapter
from common.models.decoder import CausalLM
from common.models.lora_manager import modules_of
from common.models.published_configs import published_shape
from common.models.weights import TensorSource
from common.parallel_state import TPGroup
from common.teaching.show import check, heading, matrix, mistake, table
from common.tiny_qwen import ADAPTERS_PATH, TINY_QWEN_PATH

W = torch.tensor([[1.0, 0, 2, 1], [0, 1, 1, 0], [2, 1, 0, 1], [1, 1, 1, 1]])
THIN = Thin(torch.tensor([[1.0, 0, 1, 2]]), torch.tensor([[1.0], [0], [2], [1]]), 2.0)  # A, B and s
X = torch.tensor([1.0, 2, 0, 1])
ONE_ROW = Segments(((1, 0, 1),), None)  # one row, and it uses slot 1
PIRATE = ADAPTERS_PATH / "pirate"
QUESTION = "What is a radix cache?"
NEW = 24  # tokens


def main() -> None:
    by_hand()
    on_two_ranks()
    how_thin()
    what_the_files_say()
    merged_into_a_model()


def by_hand() -> None:
    heading("y = W x + s B (A x), rank 1, s = 2")
    for name, values in (("W", W), ("A", THIN.a), ("B", THIN.b), ("x", X.view(1, -1))):
        matrix(name, values.numpy())
    h = THIN.a @ X
    y = W @ X + THIN.scale * THIN.b @ h
    print(
        f"  W x = {numbers(W @ X)}    A x = {numbers(h)}, one number    s B (A x) = {numbers(THIN.scale * THIN.b @ h)}"
    )
    print(f"  y = {numbers(y)}")
    merged = W + THIN.scale * THIN.b @ THIN.a
    matrix("W + s B A", merged.numpy())
    check("merged into W, it gives the same y", torch.equal(merged @ X, y))
    mistake("s forgotten", wrong=numbers(W @ X + THIN.b @ h), right=numbers(y))


def layer_with(kind: type[LinearBase], rank: int, ranks: int) -> LinearBase:
    """A rank's part of W, with its part of the adapter in slot 1. Nobody is there to talk to, and nobody talks."""
    tp = TPGroup(rank, ranks)
    layer = kind(4, 4, tp) if kind is ColumnParallelLinear else kind(4, 4, tp, reduce_results=False)
    layer.weight.weight_loader(TensorSource(W), None)
    give_slots({"W": (layer, 0)}, slots=1, max_rank=1)
    layer.lora.put(1, {0: cut(layer, 0, THIN)})
    return layer


@torch.inference_mode()
def on_two_ranks() -> None:
    heading("The same on two ranks: A and B are cut as W is")
    whole = W @ X + THIN.scale * THIN.b @ (THIN.a @ X)
    rows = []
    joined = {}
    for kind, name in ((ColumnParallelLinear, "column: rows of W"), (RowParallelLinear, "row: columns of W")):
        parts = []
        for rank in range(2):
            layer = layer_with(kind, rank, 2)
            x = X if kind is ColumnParallelLinear else X[2 * rank : 2 * rank + 2]
            y = layer(x.view(1, -1), ONE_ROW)[0]
            mine = cut(layer, 0, THIN)
            rows.append((name, rank, list(layer.weight.shape), numbers(mine.a), numbers(mine.b), numbers(y)))
            parts.append(y)
        joined[kind] = torch.cat(parts) if kind is ColumnParallelLinear else parts[0] + parts[1]
    table(("", "rank", "its W", "its A", "its B", "its y"), rows)
    check("columns side by side are y", torch.equal(joined[ColumnParallelLinear], whole))
    check("partial sums added up are y: the sum that the layer ends with brings the adapter's part, too",
          torch.equal(joined[RowParallelLinear], whole))  # fmt: skip
    late = W @ X + 2 * THIN.scale * THIN.b @ (THIN.a @ X)
    mistake("every rank adds all of s B (A x) to its partial sum", wrong=numbers(late), right=numbers(whole))


def how_thin() -> None:
    heading("How thin: Qwen2.5-7B, all seven matrices of each layer")
    config = published_shape("Qwen2.5-7B")
    hidden, kv, width = config.hidden_size, config.num_kv_heads * config.head_dim, config.intermediate_size
    shapes = {
        "q_proj, o_proj": [(hidden, hidden)] * 2, "k_proj, v_proj": [(kv, hidden)] * 2,
        "gate_proj, up_proj": [(width, hidden)] * 2, "down_proj": [(hidden, width)],
    }  # fmt: skip
    layers, total = config.num_layers, [0, 0, 0]
    rows = []
    for name, pairs in shapes.items():
        counts = [layers * sum(out * width_in for out, width_in in pairs)]
        counts += [layers * sum(r * (out + width_in) for out, width_in in pairs) for r in (16, 64)]
        total = [a + b for a, b in zip(total, counts, strict=True)]
        rows.append((name, " ".join(map(str, list(pairs[0]))), *counts))
    rows.append(("together", "", *total))
    table(("", "out in", "numbers of W", "rank 16", "rank 64"), rows)
    megabytes, gigabytes = total[1] * 2 / 1e6, total[0] * 2 / 1e9
    print(
        f"  rank 16: one number for {total[0] / total[1]:.0f} of W; {megabytes:.0f} MB in bfloat16, beside {gigabytes:.1f} GB"
    )


def what_the_files_say() -> None:
    heading(f"What an adapter's files say: {PIRATE.name}")
    raw, config = json.loads((PIRATE / CONFIG).read_text(encoding="utf-8")), AdapterConfig.from_folder(PIRATE)
    print(f"  {', '.join(f'{key}={json.dumps(raw[key])}' for key in ('r', 'lora_alpha', 'use_rslora'))}")
    with Engine(tp_size=1, device="cpu") as engine:
        shapes = shapes_of(engine.wrapper.model)
    adapted = [name for name in shapes if config.targets(name)]
    first = [name for name in adapted if ".0." in name]
    rows = []
    for name in first:
        (out, width), rank = shapes[name], config.rank(name)
        rows.append(
            (name.removeprefix("model."), [out, width], [rank, width], [out, rank], f"{config.scale(name):.4f}")
        )
    table(("module", "W", "A", "B", "s"), rows)
    print(f"  and so in each of {len(adapted) // len(first)} layers")
    mistake(
        "use_rslora not read: s is alpha / r, and not alpha / sqrt(r)", wrong=f"{raw['lora_alpha'] / raw['r']:.4f}",
        right=f"{config.scale(first[0]):.4f}",
    )  # fmt: skip


def merged_into_a_model() -> None:
    heading("Beside the weights, and merged into them")
    options = {"max_new_tokens": NEW, "temperature": 0.0}
    lora = {"enable_lora": True, "lora_paths": {"pirate": str(PIRATE)}}
    with Engine(tp_size=1, device="cpu", dtype="float32", **lora) as engine:
        ids = engine.wrapper.tokenizer.encode_chat([{"role": "user", "content": QUESTION}])
        plain, beside = engine.generate(input_ids=[ids, ids], sampling_params=options, lora_path=[None, "pirate"])
    with Engine(tp_size=1, device="cpu", dtype="float32") as engine:
        merge(engine.wrapper.model)
        inside = engine.generate(input_ids=ids, sampling_params=options)
    for name, answer in (("base", plain), ("beside", beside), ("merged", inside)):
        print(f"  {name:7s} {answer['text']}")
    check(f"{NEW} tokens are the same, beside and merged", beside["output_ids"] == inside["output_ids"])


@torch.inference_mode()
def merge(model: CausalLM) -> None:
    """W += s B A, in every matrix that the adapter has: from then on the model is another one, for every request."""
    choose_forms(model, "row-major")  # on a CPU some lie in memory in a form of their own
    modules = read_adapter(PIRATE, shapes_of(model), shapes_of(model), 8, TINY_QWEN_PATH).modules
    for name, layer, shard in modules_of(model):
        if name in modules:
            a, b, scale = modules[name]
            matrices = layer.weight.split(getattr(layer, "sizes", len(layer.weight)))  # q, k, v are one, and gate, up
            matrices[list(layer.weight.shard_shapes).index(shard)].add_(scale * b @ a)


def shapes_of(model: CausalLM) -> dict[str, tuple[int, int]]:
    return {name: layer.weight.shard_shapes[shard] for name, layer, shard in modules_of(model)}


def numbers(x: torch.Tensor) -> str:
    return " ".join(f"{value:g}" for value in x.flatten().tolist())


if __name__ == "__main__":
    run_main(main)
