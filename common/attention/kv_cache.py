"""The pages: K and V of this rank's heads, or the latent rows that stand for all heads (latent.py)."""

import torch


class PagedKVCache:
    """N pages of P token slots; slot = page * P + offset.

    k, v [L, N, P, Hkv/R, d], two views of kv [L, 2, N, P, Hkv/R, d]. A page id means the same page on every rank;
    each rank's page holds that rank's heads. One id serves all layers too: every layer has the same numbering.
    The dtype may be a smaller one than the model's: values are rounded when they are written.
    mapped_by: another process that reads this memory, which must then stay where it is (disaggregation); "": none does.
    planes: 1 where one row is what K and V are made of: k and v are then the same view of kv [L, 1, N, P, 1, c + r].
    """

    def __init__(self, num_layers: int, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", planes: int = 2):  # fmt: skip
        self.num_pages, self.page_size = num_pages, page_size
        shape = (num_layers, planes, num_pages, page_size, num_kv_heads, head_dim)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.k, self.v = self.kv[:, 0], self.kv[:, -1]
        self.halves = self.kv.flatten(1, 2).unbind(0)  # by layer: the K of all pages, then their V [2N, P, Hkv/R, d]
        self._slots = [layer.unbind(0) for layer in self.kv.flatten(2, 3).unbind(0)]  # K and V [N * P, Hkv/R, d]
        self._room = self.k[0, :0]
        self.mapped_by = ""

    @staticmethod
    def bytes_per_page(
        num_layers: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, planes: int = 2
    ) -> int:
        """What one page costs on this rank, K and V of all layers."""
        return planes * num_layers * page_size * num_kv_heads * head_dim * dtype.itemsize

    def release(self) -> None:
        """Give the memory back, and with it all that was cached; everything else stays as it is (memory_occupation.py)."""
        self._nbytes = self.kv.untyped_storage().nbytes()
        self._room = self.k[0, :0]
        self.kv.untyped_storage().resize_(0)

    def resume(self) -> None:
        self.kv.untyped_storage().resize_(self._nbytes)
        self.kv.zero_()

    def write(self, layer: int, slots: torch.Tensor, *new: torch.Tensor) -> None:
        """Put k, v (of one plane: the rows) [T, Hkv/R, d] at `slots` [T]."""
        for plane, values in zip(self._slots[layer], new, strict=True):
            plane.index_copy_(0, slots, values.to(plane.dtype))

    def begin(self, slots: torch.Tensor) -> None:
        """Blank the pages whose first slot is among `slots` [T]: a last owner may have left NaN in them."""
        self.blank(slots[slots % self.page_size == 0] // self.page_size)

    def blank(self, pages: torch.Tensor) -> None:
        if len(pages):
            self.kv.index_fill_(2, pages, 0)

    def move(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """In all layers, what lies at slots `sources` [n] goes to `targets` [n], no two alike; all is read first, then written."""
        slots = self.kv.flatten(2, 3)  # [L, planes, N * P, Hkv/R, d]
        slots.index_copy_(2, targets, slots.index_select(2, sources))

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """k, v (of one plane: the rows) [T, Hkv/R, d] at `slots` [T]."""
        return tuple(plane[slots] for plane in self._slots[layer])

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
