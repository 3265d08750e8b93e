"""What last owners may have left in pages."""

import torch

from common.attention.kv_cache import PagedKVCache


def garbage(cache: PagedKVCache) -> PagedKVCache:
    """NaN in all numbers, or in codes and scales."""
    for x in cache.tensors:
        x.fill_(torch.nan if x.dtype.is_floating_point else -1 if x.dtype == torch.int8 else 255)
    return cache
