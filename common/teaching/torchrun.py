"""A module under torchrun, from a notebook.

torchrun(2, "ch06_tp_vllm.record_messages", "messages.csv")
"""

import os
import subprocess
import sys


def torchrun(ranks: int, module: str, *arguments: str) -> None:
    """python -m MODULE ARGUMENTS on so many ranks of this machine; what they print is not shown.

    Raises RuntimeError with all that they have said, if one of them fails.
    """
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m", module]
    done = subprocess.run(
        [*start, *arguments], capture_output=True, text=True, encoding="utf-8", errors="replace", check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{module} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
