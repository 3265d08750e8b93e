"""Data-parallel replicas under torchrun, four ranks of them, for tests of what a replica may be made of."""

import json
import os
from pathlib import Path

from tests import warm
from tests.anatomy import ROOT

REPLICAS = """
import json, os, sys
from ch07_sglang_radix import Engine
from common.distributed.launch import run_main

def main():
    prompts, layouts = map(json.loads, sys.argv[1:])
    for flags in layouts:
        with Engine(device="cpu", check=True, **flags) as engine:
            told = engine.generate(input_ids=prompts, sampling_params={"max_new_tokens": 8})
        if os.environ["RANK"] == "0":
            print("ANSWERS", json.dumps([[one["output_ids"], one["meta_info"]["dp_rank"]] for one in told]), flush=True)

if __name__ == "__main__":
    run_main(main)
"""


def answers_of_replicas(folder: Path, prompts: list[list[int]], layouts: list[dict]) -> list[list]:
    """One engine after the other, its script written to `folder`: for each, [(8 greedy tokens, replica), ...] of the prompts.

    Raises AssertionError with the last of what the ranks wrote when one of them failed.
    """
    script = folder / "replicas.py"
    script.write_text(REPLICAS, encoding="utf-8")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    argv = [str(script), json.dumps(prompts), json.dumps(layouts)]
    code, out, err = warm.Torchrun(argv, 4, folder, env, folder).finish(300)
    assert code == 0, err[-3000:]
    lines = [line for line in out.splitlines() if line.startswith("ANSWERS")]
    assert len(lines) == len(layouts), out[-3000:]
    return [json.loads(line.removeprefix("ANSWERS")) for line in lines]
