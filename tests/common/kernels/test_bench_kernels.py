"""The benchmark of the kernels: each of its pairs computes the same."""

import pytest
import torch

from tests.common.kernels.where import gpu


@gpu
@pytest.mark.parametrize("name", ["Qwen2.5-0.5B", "Qwen3-0.6B"])
def test_a_kernel_and_what_stands_beside_it_agree(name):
    from common.kernels.bench_kernels import model_cases  # noqa: PLC0415

    cases = {}
    for case in model_cases(name):
        cases.setdefault(case.kernel, case)
    assert len(cases) > 6
    for kernel, case in cases.items():
        got, want = (call().float() for call in case.make())
        assert got.shape == want.shape
        if "sampling" in kernel:
            assert torch.equal(got, want)
        elif "of pages" not in kernel:  # of which one reads codes
            assert (got - want).norm() < 0.02 * want.norm(), kernel
