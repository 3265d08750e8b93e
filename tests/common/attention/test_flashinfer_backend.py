"""What the FlashInfer backend hands over, against a stand-in that follows FlashInfer's documentation.

With FlashInfer itself and a GPU: test_kernels.py.
"""

import sys
from types import SimpleNamespace

import pytest
import torch

from common.attention.backends import pick_attention
from common.attention.flashinfer_backend import FlashInferAttention
from common.attention.torch_native import TorchNativeAttention
from tests.common.attention.test_torch_native import LAYER, D, Step


class Wrapper:
    """BatchPrefillWithPagedKVCacheWrapper in plain PyTorch: sequence b has the pages indices[indptr[b] : indptr[b + 1]],
    the last of them last_page_len[b] full, and its queries are its last positions."""

    def __init__(self, workspace, layout, backend):
        assert workspace.dtype == torch.uint8
        assert layout == "NHD"

    def plan(
        self, qo_indptr, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, *,
        causal, q_data_type,
    ):  # fmt: skip
        assert causal
        assert all(x.dtype == torch.int32 for x in (qo_indptr, indptr, indices, last_page_len))
        assert len(qo_indptr) == len(indptr) == len(last_page_len) + 1
        assert len(indices) == indptr[-1]
        assert 1 <= int(last_page_len.min()) <= int(last_page_len.max()) <= page_size
        self.plan_ = (*(x.tolist() for x in (qo_indptr, indptr)), indices.long(), last_page_len.tolist(), page_size)
        self.heads, self.dtype = (num_qo_heads, num_kv_heads, head_dim), q_data_type

    def run(self, q, paged_kv_cache):
        starts, indptr, indices, last, size = self.plan_
        assert (q.shape[1], paged_kv_cache[0].shape[2], q.shape[2]) == self.heads
        assert q.dtype == self.dtype
        o = torch.empty_like(q)
        for b, length in enumerate(last):
            pages = indices[indptr[b] : indptr[b + 1]]
            n, total = starts[b + 1] - starts[b], (len(pages) - 1) * size + length
            k, v = (
                x[pages].flatten(0, 1)[:total].repeat_interleave(q.shape[1] // x.shape[2], 1) for x in paged_kv_cache
            )
            scores = torch.einsum("qhd,khd->hqk", q[starts[b] : starts[b + 1]], k) * q.shape[2] ** -0.5
            scores.masked_fill_(torch.ones(n, total).triu(total - n + 1).bool(), -torch.inf)
            o[starts[b] : starts[b + 1]] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
        return o


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr("common.attention.flashinfer_backend.HEAD_DIMS", (D,))
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=Wrapper))


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("lengths", [[(0, 1), (8, 1), (15, 1)], [(0, 16), (0, 5)], [(16, 3), (7, 1), (0, 9), (31, 33)]])
def test_plan_and_result_are_the_plain_form_s(stand_in, page_size, lengths):
    step = Step(lengths, page_size=page_size, group=3)
    meta = step.meta()
    k, v = (torch.cat([x[b][lengths[b][0] :] for b in step.rows]) for x in (step.k, step.v))
    got = FlashInferAttention(step.cache, meta)(LAYER, step.q, k, v)
    expected = TorchNativeAttention(step.cache, meta)(LAYER, step.q, k, v)
    torch.testing.assert_close(got, expected)


def test_it_is_refused_where_it_cannot_run(stand_in, monkeypatch):
    with pytest.raises(ValueError, match="attention_backend=flashinfer needs an NVIDIA GPU, this rank runs on cpu"):
        pick_attention(torch.device("cpu"), "flashinfer")
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(ValueError, match="attention_backend=flashinfer, but it is not installed"):
        pick_attention(torch.device("cpu"), "flashinfer")


def test_a_head_it_has_no_kernel_for_is_refused(stand_in, monkeypatch):
    monkeypatch.setattr("common.attention.flashinfer_backend.HEAD_DIMS", (64, 128))
    step = Step([(0, 2)])
    with pytest.raises(ValueError, match=r"knows head_dim \(64, 128\), this model has 4; use triton"):
        FlashInferAttention(step.cache, step.meta())(LAYER, step.q, step.k[0], step.v[0])
