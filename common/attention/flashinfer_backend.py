"""The attention contract of paged_attention.py by FlashInfer (Ye et al. 2025), where somebody has installed it.

One of its wrappers serves prefill, decode and any mix of them. It lays out its work on the CPU, once a step, and so
waits for the GPU there and cannot be captured into a CUDA graph: this backend is for comparing, not for speed.
16-bit floats on an NVIDIA GPU.
"""

from functools import cache as once

import torch

from common.attention.contract import AttentionMetadata
from common.attention.kv_cache import PagedKVCache

WORKSPACE_BYTES = 128 << 20
HEAD_DIMS = (64, 128, 256)


@once
def _workspace(device: torch.device) -> torch.Tensor:
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


class FlashInferAttention:
    """attention(layer, q [T, Hq/R, d], k, v [T, Hkv/R, d]) -> o [T, Hq/R, d]; same answers as TorchNativeAttention."""

    capturable = False
    windows = False
    reads_codes = False
    dtypes = (torch.bfloat16, torch.float16)

    def __init__(self, cache: PagedKVCache, meta: AttentionMetadata):
        meta.refuse_other_pages(cache.page_size)
        self.cache, self.meta = cache, meta
        self.wrapper = None  # planned in the first layer, which knows the number of query heads

    @staticmethod
    def tile_members(num_q: int, num_kv: int) -> int:
        return 0

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        real = self.meta.slot_mapping >= 0
        self.cache.write(layer, self.meta.slot_mapping[real], k[real], v[real])
        self.wrapper = self.wrapper or self._plan(q)
        return self.wrapper.run(q.contiguous(), (self.cache.k[layer], self.cache.v[layer]))

    def _plan(self, q: torch.Tensor):
        import flashinfer  # noqa: PLC0415, optional

        lens, size = self.meta.context_lens, self.meta.page_size
        pages = (lens + size - 1) // size  # [B]
        used = torch.arange(self.meta.page_table.shape[1], device=lens.device) < pages[:, None]
        (_, heads, d), (_, _, kv_heads, _) = q.shape, self.cache.k[0].shape
        if d not in HEAD_DIMS:
            raise ValueError(f"attention_backend=flashinfer knows head_dim {HEAD_DIMS}, this model has {d}; use triton")
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(q.device), "NHD", backend="fa2")
        wrapper.plan(
            self.meta.query_start.int(), torch.cat((pages.new_zeros(1), pages.cumsum(0))).int(),
            self.meta.page_table[used].int(), ((lens - 1) % size + 1).int(), heads, kv_heads, d, size, causal=True,
            q_data_type=q.dtype,
        )  # fmt: skip
        return wrapper
