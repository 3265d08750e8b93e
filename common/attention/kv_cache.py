"""The pages: K and V of this rank's heads."""

import torch


class PagedKVCache:
    """N pages of P token slots; slot = page * P + offset.

    k, v [L, N, P, Hkv/R, d], two views of kv [L, 2, N, P, Hkv/R, d]. A page id means the same page on every rank;
    each rank's page holds that rank's heads. One id serves all layers too: every layer has the same numbering.
    The dtype may be a smaller one than the model's: values are rounded when they are written.
    """

    def __init__(self, num_layers: int, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):  # fmt: skip
        self.num_pages, self.page_size = num_pages, page_size
        shape = (num_layers, 2, num_pages, page_size, num_kv_heads, head_dim)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.k, self.v = self.kv.unbind(1)
        self.halves = self.kv.flatten(1, 2).unbind(0)  # by layer: the K of all pages, then their V [2N, P, Hkv/R, d]
        self._slots = [layer.unbind(0) for layer in self.kv.flatten(2, 3).unbind(0)]  # K and V [N * P, Hkv/R, d]
        self._room = self.k[0, :0]

    @staticmethod
    def bytes_per_page(num_layers: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """What one page costs on this rank, K and V of all layers."""
        return 2 * num_layers * page_size * num_kv_heads * head_dim * dtype.itemsize

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Put k, v [T, Hkv/R, d] at `slots` [T]."""
        for plane, new in zip(self._slots[layer], (k, v), strict=True):
            plane.index_copy_(0, slots, new.to(plane.dtype))

    def begin(self, slots: torch.Tensor) -> None:
        """Blank the pages whose first slot is among `slots` [T]: a last owner may have left NaN in them."""
        first = slots[slots % self.page_size == 0]
        if len(first):
            self.kv.index_fill_(2, first // self.page_size, 0)

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k, v [T, Hkv/R, d] at `slots` [T]."""
        k, v = self._slots[layer]
        return k[slots], v[slots]

    def halves_of(self, pages: torch.Tensor) -> torch.Tensor:
        """pages [n] -> their places in a layer's `halves`, all of K before all of V [2n]."""
        return torch.cat((pages, pages + self.num_pages))

    def gather(self, layer: int, halves: torch.Tensor) -> torch.Tensor:
        """Copies of `halves` [2n], end to end: K and V [2, n * P, Hkv/R, d]."""
        return self.halves[layer].index_select(0, halves).unflatten(0, (2, -1)).flatten(1, 2)

    def room(self, halves: int) -> torch.Tensor:
        """Memory to copy so many into, always the same: so it stays in the processor's cache."""
        if halves > len(self._room):
            self._room = self.kv.new_empty(halves, *self.kv.shape[3:])
        return self._room[:halves]
