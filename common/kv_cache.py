"""The pages: K and V of this rank's heads."""

import torch

from common.heads import HeadLayout
from common.model_config import ModelConfig
from common.parallel_state import TPGroup


class PagedKVCache:
    """N pages of P token slots; slot = page * P + offset.

    k, v [L, N, P, Hkv/R, d]. A page id means the same page on every rank; each rank's page holds that
    rank's heads. One id serves all layers too, since every layer has its own plane with the same numbering.
    The dtype may be a smaller one than the model's: values are rounded when they are written.
    """

    def __init__(self, num_layers: int, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):  # fmt: skip
        shape = (num_layers, num_pages, page_size, num_kv_heads, head_dim)
        self.num_pages, self.page_size = num_pages, page_size
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self._room = self.k[0, :0], self.v[0, :0]

    @staticmethod
    def bytes_per_page(config: ModelConfig, tp: TPGroup, page_size: int, dtype: torch.dtype) -> int:
        """What one page costs on this rank, K and V of all layers."""
        heads = HeadLayout.of(config.num_heads, config.num_kv_heads, tp.rank, tp.size)
        return 2 * config.num_layers * page_size * heads.num_kv * config.head_dim * dtype.itemsize

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Put k, v [T, Hkv/R, d] at `slots` [T]."""
        self.k[layer].flatten(0, 1).index_copy_(0, slots, k.to(self.k.dtype))
        self.v[layer].flatten(0, 1).index_copy_(0, slots, v.to(self.v.dtype))

    def room(self, pages: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for copies of so many pages of K and of V, always the same: so it stays in the processor's cache."""
        if pages > len(self._room[0]):
            self._room = self.k.new_empty(pages, *self.k.shape[2:]), self.v.new_empty(pages, *self.v.shape[2:])
        return self._room[0][:pages], self._room[1][:pages]

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k, v [T, Hkv/R, d] at `slots` [T]."""
        return self.k[layer].flatten(0, 1)[slots], self.v[layer].flatten(0, 1)[slots]
