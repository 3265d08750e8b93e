"""Sequence parallelism: an all-reduce cut in two, and what lies between the halves is 1/R of the rows.

    python ch07_sglang_radix/parallelism/demo_6_sequence_parallel.py

Starts its second rank by itself. First on paper: two ranks, three rows. Then the same prompt with and without
enable_layernorm_sp: messages, bytes on the wire, and how much of the residual a rank holds, measured at every layer's end.
"""

import torch

from ch07_sglang_radix import Engine
from common.distributed.cost_model import wire_bytes
from common.distributed.launch import run_main
from common.teaching.show import check, heading, mistake, table

RANKS, PROMPT, NEW = 2, list(range(100, 401)), 2
ACTIVATIONS = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all")


def main() -> None:
    on_paper()
    plain, one = serve(enable_layernorm_sp=False)
    cut, two = serve(enable_layernorm_sp=True)
    in_messages(one, two)
    in_memory(one, two)
    check("the tokens are the same", plain == cut)


def on_paper() -> None:
    heading("On paper: partial sums of three rows on two ranks, one number each")
    partial, bias = torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]), 100.0
    padded = torch.nn.functional.pad(partial, (0, 1))  # 3 rows on 2 ranks: one of padding
    scattered = padded.sum(dim=0).view(RANKS, -1)
    words = lambda x: " ".join(f"{value:g}" for value in x.tolist())  # noqa: E731
    table(
        ("", "rank 0", "rank 1"),
        [
            ("partial sums", words(partial[0]), words(partial[1])),
            ("padded to a multiple of 2", words(padded[0]), words(padded[1])),
            ("reduce-scatter: my rows of the sum", words(scattered[0]), words(scattered[1])),
            ("all-gather: all rows", words(scattered.flatten()[:3]), words(scattered.flatten()[:3])),
        ],
    )
    check("reduce-scatter, then all-gather, is all-reduce", torch.equal(scattered.flatten()[:3], partial.sum(dim=0)))
    wrong = (partial + bias).sum(dim=0)
    mistake(
        "a bias of 100 added on every rank before the sum", wrong=words(wrong), right=words(partial.sum(dim=0) + bias)
    )


def serve(enable_layernorm_sp: bool) -> tuple[list[int], dict]:
    """(tokens, what rank 0 sent and held)"""
    held: list[int] = []
    with Engine(tp_size=RANKS, device="cpu", enable_layernorm_sp=enable_layernorm_sp) as engine:
        model = engine.wrapper.model

        def measure(layer, inputs, outputs) -> None:
            held.append(sum(x.numel() * x.element_size() for x in outputs))  # what the layer adds, and the residual

        hooks = [layer.register_forward_hook(measure) for layer in model.model.layers]
        with engine.scheduler.tp.ledger.recording() as ledger:
            answer = engine.generate(input_ids=PROMPT, sampling_params={"max_new_tokens": NEW, "ignore_eos": True})
            messages = {op: said for op, said in ledger.summary().items() if op in ACTIVATIONS}
        for hook in hooks:
            hook.remove()
        config = model.config
    return answer["output_ids"], {
        "messages": messages,
        "held": max(held),
        "layers": config.num_layers,
        "D": config.hidden_size,
    }


def in_messages(one: dict, two: dict) -> None:
    heading(f"A prompt of {len(PROMPT)} tokens and {NEW} new ones, on {RANKS} ranks: messages of rank 0")
    rows, total = [], {}
    for name, facts in (("plain", one), ("enable_layernorm_sp", two)):
        for op, said in sorted(facts["messages"].items()):
            wire = wire_bytes(op, said["bytes"], RANKS)
            rows.append((name, op, said["calls"], said["bytes"], wire))
            total[name] = total.get(name, 0) + wire
    table(("", "message", "calls", "bytes of its tensors", "bytes on the wire"), rows)
    plain, cut = total.values()
    print(f"  on the wire, together: {plain:,} and {cut:,}, {100 * (cut / plain - 1):+.1f} %")
    print(
        f"  more: {len(PROMPT)} rows are padded to {-(-len(PROMPT) // RANKS) * RANKS}, and single ones cannot be cut in two;"
    )
    print("  less: of the prompt's last layer only the row that emits is gathered, not all of them.")
    steps, layers = NEW, one["layers"]
    check("plain: 1 + 2L all-reduces a step", one["messages"]["all_reduce"]["calls"] == steps * (1 + 2 * layers))
    halves = [two["messages"][op]["calls"] for op in ("reduce_scatter", "all_gather")]
    check("cut: 1 + 2L reduce-scatters a step, 2L all-gathers, and one for a decode step's logits",
          halves == [steps * (1 + 2 * layers), steps * 2 * layers + steps - 1])  # fmt: skip


def in_memory(one: dict, two: dict) -> None:
    heading("What a rank holds between two layers in the prefill step, measured")
    rows = [
        (name, facts["held"] // (8 * facts["D"]), facts["held"])
        for name, facts in (("plain", one), ("enable_layernorm_sp", two))
    ]
    table(("", "rows", "bytes of the residual and of what is added to it, float32"), rows)
    want = -(-len(PROMPT) // RANKS)
    check(
        f"{want} rows of {len(PROMPT)}, and each norm works on as many",
        rows[1][1] == want and rows[0][1] == len(PROMPT),
    )


if __name__ == "__main__":
    run_main(main)
