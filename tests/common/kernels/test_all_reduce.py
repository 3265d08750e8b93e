"""The kernels that add up between GPUs. The numbers need two of them; what is asked of x does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.distributed.symmetric_memory import SymmetricAllReduce
from common.layers.norm import RMSNorm
from common.parallel_state import TPGroup, all_reduce_add_norm

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
def test_two_gpus_under_torchrun_add_up_and_norm_in_one_kernel():
    module = ["-m", "tests.common.kernels.on_two_gpus"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *module]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.endswith("all right\n"), done.stderr


class OnAGpu:
    """As much of a tensor as is looked at."""

    is_cuda, dtype = True, torch.bfloat16

    def __init__(self, rows: int, width: int):
        self.shape = (rows, width)

    def dim(self):
        return 2

    def numel(self):
        return self.shape[0] * self.shape[1]

    def element_size(self):
        return 2


@pytest.mark.parametrize(
    ("rows", "width", "words", "fits"),
    [(4, 896, 0, True), (4, 896, 448, True), (4, 896, 449, False), (1024, 896, 0, False), (8, 895, 0, False)],
    ids=["first", "as before", "another length", "too large", "half a word"],
)
def test_rows_of_one_length_and_small_messages_fit(rows, width, words, fits):
    fast = SymmetricAllReduce.__new__(SymmetricAllReduce)
    fast._one_shot, fast._norm_words = 1 << 20, words
    assert fast.fits_norm(OnAGpu(rows, width)) is fits


def test_what_fits_nowhere_is_added_and_normed_one_after_the_other():
    norm, x, residual = RMSNorm(8, 1e-6), torch.randn(3, 8), torch.randn(3, 8)
    norm.load_weight(type("Source", (), {"shape": (8,), "read": lambda self, *_: torch.arange(8.0)})())
    got, want = all_reduce_add_norm(x, residual, norm, TPGroup(), "test"), norm.add(x, residual)
    assert all(map(torch.equal, got, want))
