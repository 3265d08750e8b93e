"""Two ways to the same logits: patch a Hugging Face model, or build only what a rank holds.

    torchrun --nproc_per_node=2 ch06_tp_vllm/demo_4_two_ways.py
    python ch06_tp_vllm/demo_4_two_ways.py                         # one rank: everything is "whole" anyway
    torchrun --nproc_per_node=2 ch06_tp_vllm/demo_4_two_ways.py --csv figures/two_ways.csv

Shows, for the bundled model, how many parameters each rank holds in either way, and what the ranks send each other. Every
parameter held is computed with for every token, only of the embedding a token needs one row; the LM head is the same matrix here
(tied), and multiplies with all of it.
"""

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from ch06_tp_vllm.model_runner import ModelRunner
from ch06_tp_vllm.patch_hf_attention import patch_attention
from common.distributed.launch import run_main
from common.layers.vocab import gather_logits
from common.parallel_state import initialize_tensor_parallel
from common.teaching.report import csv_option, write_csv
from common.teaching.show import check, heading, messages, table
from common.tiny_qwen import TINY_QWEN_PATH

PROMPT = [11, 42, 7, 300, 5, 5, 901]
PARTS = ("self_attn", "mlp", "embed_tokens")  # the last is the LM head as well


def main() -> None:
    csv = csv_option(__doc__)
    tp = initialize_tensor_parallel(device="cpu")
    with torch.inference_mode():
        whole = AutoModelForCausalLM.from_pretrained(TINY_QWEN_PATH, dtype=torch.float32).eval()
        want = whole(torch.tensor([PROMPT])).logits[0, -1]
        size_whole = sizes(whole)
        patched = patch_attention(whole, tp)
        with tp.ledger.recording() as ledger:
            by_patch = patched(torch.tensor([PROMPT])).logits[0, -1]
            sent_by_patch = list(ledger.entries)
        size_patched = sizes(patched)
        executor = ModelRunner(device="cpu", page_size=16, max_total_tokens=64, tp=tp)
        with tp.ledger.recording() as ledger:
            by_executor = last_logits(executor)
            sent_by_executor = list(ledger.entries)
        size_executor = sizes(executor.model)
    if tp.rank > 0:
        return
    heading(f"Parameters that rank 0 of {tp.size} holds (embed_tokens is the LM head as well)")
    rows = [
        {"part": part, "one whole model": size_whole[part], "patched attention": size_patched[part],
         "executor": size_executor[part]}
        for part in PARTS
    ]  # fmt: skip
    table(list(rows[0]), [list(row.values()) for row in rows])
    if tp.size > 1:
        for way, sent in (("patched model", sent_by_patch), ("executor", sent_by_executor)):
            heading(f"What the {way} sends for a prompt of {len(PROMPT)} tokens")
            messages(sent, tp.size)
    check("the patched model's logits are the whole model's", torch.allclose(by_patch, want, atol=1e-3))
    check("so are the executor's", torch.allclose(by_executor, want, atol=1e-3))
    share = max(size_executor[part] * tp.size / size_whole[part] for part in ("embed_tokens", "mlp"))
    check("the executor cuts MLP, embedding and LM head into R parts (up to padding)", share < 1.05)
    check("the patched model still computes MLP and LM head in full", size_patched["mlp"] == size_whole["mlp"])
    if csv:
        write_csv(rows, csv, measured=False)


def sizes(model: torch.nn.Module) -> dict[str, int]:
    """Parameters by part."""
    count = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        for part in PARTS:
            if part in name:
                count[part] += parameter.numel()
    return count


def last_logits(executor: ModelRunner) -> torch.Tensor | None:
    """One prompt through the executor: its pages, one ragged step, the logits on rank 0."""
    executor.table.set_pages([(0, 0, [3])])  # row 0, from its first page on: page 3
    first, all_new, yes = np.array([0]), np.array([len(PROMPT)]), np.array([1])
    logits = executor.ragged(np.array(PROMPT), rows=first, cached=first, new=all_new, emits=yes)
    full = gather_logits(logits, executor.config.vocab_size, executor.tp)
    return None if full is None else full[0]


if __name__ == "__main__":
    run_main(main)
