"""DP attention: two ranks, each with requests, a tree and pages of its own; the MLP is computed by both for all.

    python ch07_sglang_radix/parallelism/demo_5_dp_attention.py

Starts its second rank by itself. First what a rank holds, beside plain tensor parallelism of the same size. Then three requests,
step by step: which data rank has work, how many rows come together before the MLP, and what goes over the wire. The last
steps have one request: a data rank without work takes part all the same, with no rows or with padding.
"""

import json
import os
import tempfile
from pathlib import Path

from ch07_sglang_radix import Engine
from common.distributed.cost_model import wire_bytes
from common.distributed.launch import run_main
from common.teaching.show import check, heading, table

PROMPTS = [list(range(100, 340)), list(range(10, 50)), list(range(60, 84))]
NEW = [4, 4, 9]  # tokens each wants: the third stays alone
RANKS, PAGE = 2, 16


def main() -> None:
    if "WORLD_SIZE" in os.environ:
        raise ValueError("this demo starts its second rank by itself; run it with python, without torchrun")
    with tempfile.TemporaryDirectory() as folder:
        plain, one = serve(Path(folder) / "plain.jsonl", attn_dp_size=1)
        spread, two = serve(Path(folder) / "spread.jsonl", attn_dp_size=RANKS)
    what_a_rank_holds(one, two)
    step_by_step(two["steps"])
    messages(one, two)
    check("the tokens are those of plain tensor parallelism", plain == spread)
    check("every page is free or in the tree of its data rank", two["held"] == 0)


def serve(trace: Path, attn_dp_size: int) -> tuple[list, dict]:
    """(tokens of each request, what is known of the engine and its steps)"""
    options = {"device": "cpu", "page_size": PAGE, "max_total_tokens": 2048, "trace": trace, "check": True}
    with (
        Engine(tp_size=RANKS, attn_dp_size=attn_dp_size, **options) as engine,
        engine.scheduler.tp.ledger.recording() as ledger,
    ):
        params = [{"max_new_tokens": n, "ignore_eos": True} for n in NEW]
        answers = engine.generate(input_ids=PROMPTS, sampling_params=params)
        wrapper, info = engine.wrapper, engine.get_server_info()
        heads = wrapper.model.heads
        attention = sum(p.numel() for n, p in wrapper.model.named_parameters() if "self_attn" in n)
        mlp = sum(p.numel() for n, p in wrapper.model.named_parameters() if ".mlp." in n)
        facts = {
            "heads": f"{heads.num_q} + {heads.num_kv}", "attention": attention, "mlp": mlp,
            "token": wrapper.kv_cache.kv.nbytes // (wrapper.num_pages * PAGE), "pool": info["max_total_num_tokens"],
            "held": info["held_tokens"], "messages": ledger.summary(),
            "layers": wrapper.config.num_layers, "row": wrapper.config.hidden_size * wrapper.dtype.itemsize,
        }  # fmt: skip
    facts["steps"] = [json.loads(line) for line in trace.read_text(encoding="utf-8").splitlines()]
    return [answer["output_ids"] for answer in answers], facts


def what_a_rank_holds(one: dict, two: dict) -> None:
    heading("What one of two ranks holds")
    names = ("heads", "attention", "mlp", "token", "pool")
    header = (
        "",
        "query + KV heads",
        "numbers in attention",
        "numbers in MLPs",
        "KV bytes a token",
        "tokens in all pools",
    )
    table(header, [("tp 2", *(one[name] for name in names)), ("tp 2, attn-dp 2", *(two[name] for name in names))])
    print(
        "  Attention is whole on every data rank, and so is a token's K and V: twice the bytes, for half of the tokens."
    )
    print("  With one KV head, or latent attention, tp 2 would hold every token twice: then it is the same bytes.")


def step_by_step(steps: list[dict]) -> None:
    heading("Three requests on two data ranks, step by step")
    rows = []
    for step in steps:
        if step["kind"] != "parallel":
            continue
        counts = [tokens_of(part) for part in step["parts"]]
        prefill = any(part and part["kind"] == "prefill" for part in step["parts"])
        fed = sum(counts) if prefill else max(counts) * len(counts)
        how = "all-to-all" if prefill else "all-gather, reduce-scatter"
        rows.append((step["step"], *map(shown, step["parts"]), fed, fed - sum(counts), how))
    table(("step", "data rank 0", "data rank 1", "rows into the MLP", "of padding", "messages"), rows)
    check("a data rank without work took part in a step", any(None in step.get("parts", ()) for step in steps))
    loads = [tokens_of(part) for part in steps[0]["parts"]]
    print(
        f"  uneven load: in step 0 one data rank attends for {max(loads)} tokens while the other is done after {min(loads)}"
    )


def tokens_of(part: dict | None) -> int:
    if part is None:
        return 0
    return len(part["scheduled"]) if part["kind"] == "decode" else sum(row[2] for row in part["scheduled"])


def shown(part: dict | None) -> str:
    if part is None:
        return "idle"
    who = [row if part["kind"] == "decode" else row[0] for row in part["scheduled"]]
    return f"{part['kind']} {' '.join(f'#{rid}' for rid in who)}: {tokens_of(part)}"


def messages(one: dict, two: dict) -> None:
    heading("Messages of rank 0, all steps together")
    ops = sorted({*one["messages"], *two["messages"]} - {"broadcast"})
    header = ("", "tp 2: calls", "bytes", "on the wire", "attn-dp 2: calls", "bytes", "on the wire")
    table(header, [(op, *counted(one, op), *counted(two, op)) for op in ops])
    print("  on the wire: between both ranks; in an all-to-all rank 1 has other numbers of rows to send than rank 0.")
    mine, _ = uneven(two)
    check("rank 0's all-to-alls carry the rows of its requests", mine == two["messages"]["all_to_all"]["bytes"])
    print(
        "  tp 2 sums after the embedding, after attention and after the MLP; here only the MLP has messages, two a layer."
    )


def counted(facts: dict, op: str) -> tuple[int, int, int]:
    """(calls, bytes of rank 0's tensors, bytes on the wire)"""
    said = facts["messages"].get(op, {"calls": 0, "bytes": 0})
    if op != "all_to_all" or not said["calls"]:
        return said["calls"], said["bytes"], wire_bytes(op, said["bytes"], RANKS)
    return said["calls"], said["bytes"], uneven(facts)[1]


def uneven(facts: dict) -> tuple[int, int]:
    """(bytes that rank 0 hands in, bytes on the wire) of a prefill step's all-to-alls: cost_model.py's are of equal tensors.

    In each layer a rank sends its rows to every other one, and gets its part of their sums for these; at the end it sends the
    row of each request, for the LM head. What it hands in has a place for itself as well.
    """
    mine = wire = 0
    for step in facts["steps"]:
        if not any(part and part["kind"] == "prefill" for part in step.get("parts", ())):
            continue
        rows, ends = [tokens_of(part) for part in step["parts"]], [requests_of(part) for part in step["parts"]]
        mine += facts["layers"] * (RANKS * rows[0] + sum(rows)) + RANKS * ends[0]
        wire += (RANKS - 1) * (facts["layers"] * 2 * sum(rows) + sum(ends))
    return facts["row"] * mine, facts["row"] * wire


def requests_of(part: dict | None) -> int:
    return len(part["scheduled"]) if part else 0


if __name__ == "__main__":
    run_main(main)
