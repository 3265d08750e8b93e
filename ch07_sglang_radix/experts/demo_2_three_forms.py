"""One layer of experts in three forms: the same numbers, other products, other launches.

    python ch07_sglang_radix/experts/demo_2_three_forms.py

Layer 0 of the tiny mixture, and the rows of a sentence. Eight tokens are sorted by expert and cut into blocks before your
eyes. Then a loop over experts, torch's grouped product and the Triton kernel compute the layer (the last one only on an
NVIDIA GPU, or in Triton's interpreter): what each calls, what it reads, and that all give the same. Last, what the size of a
block costs in padding, at decode and at prefill sizes.
"""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ch07_sglang_radix.experts.one_layer import input_of_layer
from common.distributed.launch import run_main
from common.kernels.expert_blocks import expert_blocks
from common.layers.moe import MoE
from common.layers.moe_runner import pick_runner
from common.models.weights import load_model
from common.parallel_state import TPGroup
from common.teaching.show import check, heading, mistake, table
from common.tiny_qwen.upcycle import MIXTURE_PATH

SENTENCE = "What is an all-reduce, and why does each layer need two?"
FIRST = 8  # tokens that are looked at one by one
BLOCK = 4
KERNEL_LAUNCHES = ("_sort", "_gate_up", "_down", "_sum")
ONE_TOKEN = ("_gate_up", "_down")  # of moe_gemv.py
PRODUCTS = ("mm", "addmm", "linear", "_grouped_mm", "_scaled_grouped_mm", "bmm")


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, _ = load_model(MIXTURE_PATH, TPGroup())
    moe: MoE = model.model.layers[0].mlp.to(device)
    x = input_of_layer(MIXTURE_PATH, SENTENCE).to(device)
    with torch.inference_mode():
        eight_tokens(moe, x[:FIRST])
        three_forms(moe, x)
        decode_and_prefill()


def eight_tokens(moe: MoE, x: torch.Tensor) -> None:
    heading(f"{len(x)} tokens, sorted by expert, in blocks of {BLOCK}")
    weights, experts = (each.cpu() for each in moe.gate.route(x))
    top_k, num_experts = experts.shape[1], len(moe.experts.w13)
    rows = [
        (t, " and ".join(f"{e} ({w:.2f})" for e, w in zip(chosen, factors, strict=True)))
        for t, (chosen, factors) in enumerate(zip(experts.tolist(), weights.tolist(), strict=True))
    ]
    table(("token", "experts (weights)"), rows)
    print(f"  A pair is token * {top_k} + choice: pair 5 is token {5 // top_k}'s choice {5 % top_k}.")
    blocks, sentinel = expert_blocks(experts, num_experts, BLOCK), experts.numel()
    rows = []
    for i, (expert, pairs) in enumerate(
        zip(blocks.experts.tolist(), blocks.pairs.view(-1, BLOCK).tolist(), strict=True)
    ):
        tokens = " ".join("-" if pair == sentinel else str(pair // top_k) for pair in pairs)
        rows.append((i, expert, " ".join(f"{pair:2d}" for pair in pairs), tokens))
    table(("block", "expert", "pairs", "rows of x"), rows)
    idle = [e for e in range(num_experts) if e not in blocks.experts]
    padding = int((blocks.pairs == sentinel).sum())
    print(
        f"  {sentinel} is the sentinel T * k: {padding} of {len(blocks.pairs)} places are padding, which loads and stores nothing."
    )
    print(f"  Experts without a block, whose weights nobody reads: {', '.join(map(str, idle)) or 'none'}.")
    check("every pair stands in one block, of its own expert", in_place(blocks, experts.flatten(), sentinel))
    by_weight = weights.flatten().argsort(descending=True).split(BLOCK)
    mixed = [len(experts.flatten()[block].unique()) for block in by_weight]
    mistake(
        "experts whose weights a block needs, if pairs are sorted by weight and not by expert", mixed, [1] * len(rows)
    )


def in_place(blocks, experts: torch.Tensor, sentinel: int) -> bool:
    real = blocks.pairs != sentinel
    owners = blocks.experts.repeat_interleave(BLOCK)[real]
    pairs = blocks.pairs[real]
    return torch.equal(pairs.sort().values, torch.arange(sentinel)) and torch.equal(experts[pairs], owners)


class Calls(TorchDispatchMode):
    """Counts what torch is asked to compute: each would be a kernel on a GPU, or several. Views are none."""

    VIEWS = ("view", "select", "slice", "split", "transpose", "t", "unsqueeze", "expand", "detach", "unbind", "_unsafe_view",
             "empty", "new_empty", "alias", "permute")  # fmt: skip

    def __init__(self):
        super().__init__()
        self.made = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in self.VIEWS:
            self.made[name] += 1
        return func(*args, **(kwargs or {}))


def three_forms(moe: MoE, x: torch.Tensor) -> None:
    heading("The layer in three forms")
    experts = moe.experts
    of_an_expert = (experts.w13[0].numel() + experts.w2[0].numel()) * experts.w13.element_size()
    for tokens in (1, len(x)):
        rows = x[:tokens]
        routing = moe.gate.route(rows)
        touched = len(routing.experts.unique())
        given = (rows, *routing, experts.w13, experts.w2)
        print(
            f"  {tokens} token(s): {routing.experts.numel()} pairs, {touched} of {len(experts.w13)} experts touched, "
            f"{touched * of_an_expert:,} bytes of weights to read"
        )
        want, shown = pick_runner("loop", x.device).run(*given), []
        for name in ("loop", "grouped"):
            with Calls() as calls:
                y = pick_runner(name, x.device).run(*given)
            products = sum(calls.made[one] for one in PRODUCTS)
            shown.append((name, products, calls.made.total(), relative(y, want)))
        launches = ONE_TOKEN if tokens == 1 else KERNEL_LAUNCHES
        shown.append(("triton", 2, len(launches), fused_difference(given, want)))
        table(("form", "products", "calls", "differs from the loop by"), shown)
        differences = [float(row[3]) for row in shown if row[3] != "not run here"]
        check("all that ran here give the same", max(differences) < 1e-6)
    print(f"  The kernels of triton: {', '.join(KERNEL_LAUNCHES)}; of one token: {', '.join(ONE_TOKEN)}.")


def fused_difference(given: tuple, want: torch.Tensor) -> str:
    try:
        run = pick_runner("triton", want.device).run
    except ValueError:  # no GPU and no interpreter
        return "not run here"
    return relative(run(*given), want)


def relative(y: torch.Tensor, want: torch.Tensor) -> str:
    """The distance, in parts of the length."""
    return f"{((y - want).norm() / want.norm()).item():.0e}"


def decode_and_prefill() -> None:
    heading("What a block costs: 128 experts, 8 a token, all alike (Qwen3-30B-A3B's numbers)")
    torch.manual_seed(0)
    rows = []
    for tokens in (1, 16, 128, 2048):
        experts = torch.rand(tokens, 128).argsort(1)[:, :8]
        places = {block: expert_blocks(experts, 128, block) for block in (16, 64)}
        padded = [f"{1 - experts.numel() / len(found.pairs):.0%}" for found in places.values()]
        rows.append(
            (tokens, experts.numel(), len(experts.unique()), *padded, len(places[16].experts), len(places[64].experts))
        )
    table(("tokens", "pairs", "experts read", "padding, 16", "64", "blocks, 16", "64"), rows)
    print(
        "  One token reads 8 experts, 128 tokens read all: further ones are free until products cost more than bytes."
    )
    few, many = rows[0], rows[-1]
    check("few rows leave most of a block empty, many fill it", float(few[3][:-1]) > 90 and float(many[3][:-1]) < 10)


if __name__ == "__main__":
    run_main(main)
