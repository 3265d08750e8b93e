"""The result for a token depends on the tokens before it alone, bit for bit; and it is attention."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.attention.backends import pick_attention
from common.attention.batch_invariant import BatchInvariantAttention
from common.attention.kv_cache import PagedKVCache
from common.attention.sequence_table import SequenceTable
from common.attention.torch_native import TorchNativeAttention

HQ, HKV, D, LONGEST = 6, 2, 8, 75
CPU = torch.device("cpu")


def attend(attention, dtype, page_size, numbers, steps):
    """numbers: (q, k, v) of each sequence, [n, H, d]; steps: {sequence: new tokens} each -> o of each sequence."""
    pages = -(-LONGEST // page_size)
    cache = PagedKVCache(1, pages * len(numbers), page_size, HKV, D, dtype=dtype)
    cache.kv.fill_(torch.nan)
    table = SequenceTable(len(numbers), pages, page_size, CPU)
    order = torch.randperm(pages * len(numbers), generator=torch.Generator().manual_seed(3)).view(len(numbers), -1)
    table.set_pages([(row, 0, own) for row, own in enumerate(order.tolist())])
    done, out = [0] * len(numbers), [[] for _ in numbers]
    for step in steps:
        rows = np.array(list(step))
        new, cached = np.array([step[b] for b in step]), np.array([done[b] for b in step])
        inputs = table.prefill(np.zeros(new.sum(), dtype=np.int64), rows, cached, new)
        q, k, v = (torch.cat([numbers[b][i][done[b] : done[b] + step[b]] for b in step]) for i in range(3))
        o = attention(cache, inputs.meta)(0, q, k, v)
        for b, part in zip(step, o.split(new.tolist()), strict=True):
            out[b].append(part)
            done[b] += step[b]
    return [torch.cat(parts) for parts in out]


def some_numbers(lengths, dtype):
    rng = torch.Generator().manual_seed(len(lengths))
    return [[torch.randn(n, heads, D, generator=rng).to(dtype) for heads in (HQ, HKV, HKV)] for n in lengths]


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_steps_do_not_matter(data):
    lengths = data.draw(st.lists(st.integers(1, LONGEST), min_size=1, max_size=4), "lengths")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]), "dtype")
    page_size = data.draw(st.sampled_from([1, 4, 16]), "page_size")
    numbers = some_numbers(lengths, dtype)
    left, steps = dict(enumerate(lengths)), []
    while left:
        who = data.draw(st.lists(st.sampled_from(sorted(left)), min_size=1, unique=True), "who")
        steps.append({b: data.draw(st.integers(1, left[b]), "new") for b in who})
        left = {b: n - steps[-1].get(b, 0) for b, n in left.items() if n > steps[-1].get(b, 0)}
    got = attend(BatchInvariantAttention, dtype, page_size, numbers, steps)
    for b, (own, n) in enumerate(zip(numbers, lengths, strict=True)):
        assert torch.equal(got[b], attend(BatchInvariantAttention, dtype, 1, [own], [{0: n}])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_at_a_time(dtype):
    numbers = some_numbers([LONGEST], dtype)
    whole = attend(BatchInvariantAttention, dtype, 4, numbers, [{0: LONGEST}])[0]
    assert torch.equal(attend(BatchInvariantAttention, dtype, 1, numbers, [{0: 1}] * LONGEST)[0], whole)
    want = attend(TorchNativeAttention, dtype, 4, numbers, [{0: LONGEST}])[0]
    torch.testing.assert_close(whole, want, atol=2e-6 if dtype == torch.float32 else 2e-2, rtol=1e-2)


def test_the_usual_form_is_caught():
    """Decode and prefill cut the keys otherwise there."""
    numbers = some_numbers([LONGEST], torch.float32)
    whole = attend(TorchNativeAttention, torch.float32, 4, numbers, [{0: LONGEST}])[0]
    assert not torch.equal(attend(TorchNativeAttention, torch.float32, 4, numbers, [{0: 1}] * LONGEST)[0], whole)


def test_what_has_no_fixed_order_is_refused():
    assert pick_attention(CPU, "auto", batch_invariant=True) is BatchInvariantAttention
    for said, args in (
        ("latent rows", ("auto", 1, True)), ("cp_size=2", ("auto", 2, False)), ("flashinfer", ("flashinfer", 1, False)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"enable_deterministic_inference with .*{said}"):
            pick_attention(CPU, *args, batch_invariant=True)


@pytest.mark.parametrize("name", ["torch_native", "auto"])
def test_the_form_of_cpus_is_refused_on_a_gpu_with_the_way_out(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "common.kernels.paged_attention", None)  # as where Triton is not installed
    with pytest.raises(ValueError, match=r"plain PyTorch on cuda:1.*attention_backend=triton, or device=cpu"):
        pick_attention(torch.device("cuda:1"), name, batch_invariant=True)
    if name == "torch_native":
        assert pick_attention(torch.device("cuda:1"), name) is TorchNativeAttention
