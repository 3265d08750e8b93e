"""Every message of one prefill step and one decode step, as rank 0's ledger saw them.

    torchrun --nproc_per_node=2 -m ch06_tp_vllm.record_messages messages.json

Writes {"prefill": [...], "decode": [...]}: op, label, shape, dtype, bytes. The notebook on communication draws it.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from ch06_tp_vllm import LLMEngine, SamplingParams
from common.launch import run_main

PROMPTS = [[100 + i] * n for i, n in enumerate((30, 12, 6))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    engine = LLMEngine(device="cpu", num_gpu_blocks_override=16)
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(str(i), prompt, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    steps = {}
    for name in ("prefill", "decode"):
        with engine.tp.ledger.recording() as ledger:
            engine.step()
            entries = [asdict(entry) for entry in ledger.entries]
        # what follows the tokens is step()'s own convenience: "no more for now", and the outputs for every rank
        labels = [entry["label"] for entry in entries]
        steps[name] = entries[: labels.index("tokens") + 1]
    while engine.has_unfinished_requests():
        engine.step()
    if engine.tp.rank == 0:
        args.out.write_text(json.dumps(steps, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
