"""Every message of one prefill step and one decode step, as rank 0's ledger saw them.

    torchrun --nproc_per_node=2 -m ch06_tp_vllm.record_messages figures/messages.csv

One line a message, in order: step, op, layer, shape, dtype, bytes, why. The notebook on communication draws it too.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ch06_tp_vllm import LLMEngine, SamplingParams
from common.distributed.launch import run_main
from common.distributed.ledger import LedgerEntry
from common.teaching.report import write_csv
from common.teaching.show import WHY

PROMPTS = [[100 + i] * n for i, n in enumerate((30, 12, 6))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    engine = LLMEngine(device="cpu", num_gpu_blocks_override=64)
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(str(i), prompt, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    rows = []
    for name in ("prefill", "decode"):
        with engine.tp.ledger.recording() as ledger:
            engine.step()
            rows += [row(name, entry) for entry in of_the_step(ledger.entries)]
    while engine.has_unfinished_requests():
        engine.step()
    if engine.tp.rank == 0:
        write_csv(rows, args.out, measured=False)


def of_the_step(entries: Sequence[LedgerEntry]) -> Sequence[LedgerEntry]:
    """Up to the tokens. What follows is step()'s own convenience: "no more for now", and the outputs for every rank."""
    return entries[: [entry.label for entry in entries].index("tokens") + 1]


def row(step: str, entry: LedgerEntry) -> dict:
    return {
        "step": step, "op": entry.op, "layer": entry.label, "shape": list(entry.shape), "dtype": entry.dtype,
        "bytes": entry.bytes, "why": WHY[entry.label.split(".")[-1]],
    }  # fmt: skip


if __name__ == "__main__":
    run_main(main)
