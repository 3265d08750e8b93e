"""The pages: K and V of this rank's heads, or the latent rows that stand for all heads (latent.py)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from common.attention.kv_format import kv_format, kv_name, row_bytes


class LayerPages(NamedTuple):
    """One layer of a cache, as kernels take it."""

    k: torch.Tensor  # [N, P, Hkv/R, d], or codes of it: [N, P, Hkv/R, d / 2] for int4
    v: torch.Tensor
    k_scales: torch.Tensor | None  # [N, P, Hkv/R] float16, where each row has its own
    v_scales: torch.Tensor | None
    k_scale: float  # of the layer; 1 but for fp8
    v_scale: float


class PagedKVCache:
    """N pages of P token slots; slot = page * P + offset.

    k, v [L, N, P, Hkv/R, d], two views of kv [L, 2, N, P, Hkv/R, d]. A page id means the same page on every rank;
    each rank's page holds that rank's heads. One id serves all layers too: every layer has the same numbering.
    The dtype may be a smaller one than the model's: values are rounded when they are written. With float8, int8 and int4 the pages
    hold codes (kv_format.py), which are encoded when they are written and decoded when they are read, to float32.
    mapped_by: another process that reads this memory, which must then stay where it is (disaggregation); "": none does.
    planes: 1 where one row is what K and V are made of: k and v are then the same view of kv [L, 1, N, P, 1, c + r].
    scales: each layer's (k_scale, v_scale) for float8; of one plane, the first counts.

    tensors: all that a page holds. Each is [L, planes, N, P, Hkv/R, ...], of a dtype that torch can index, so what moves pages (to
    other slots, ranks, hosts, disks) asks for axis 2, and for heads axis 4: kv as it is, or float8 as bytes, or codes and their
    row_scales [L, planes, N, P, Hkv/R].
    """

    def __init__(self, num_layers: int, num_pages: int, page_size: int, num_kv_heads: int, head_dim: int,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", planes: int = 2,
                 scales: Sequence[tuple[float, float]] | None = None):  # fmt: skip
        self.num_pages, self.page_size, self.head_dim = num_pages, page_size, head_dim
        self.format = kv_format(dtype)
        rows = (num_layers, planes, num_pages, page_size, num_kv_heads)
        self.kv = torch.zeros(*rows, self.format.width(head_dim), dtype=self.format.stored, device=device)
        self.k, self.v = self.kv[:, 0], self.kv[:, -1]
        self.row_scales = torch.zeros(rows, dtype=torch.float16, device=device) if self.format.row_scales else None
        static = self.format.coded and not self.format.row_scales  # float8
        codes = self.kv.view(torch.uint8) if static else self.kv
        self.tensors = (codes,) if self.row_scales is None else (codes, self.row_scales)
        self.scales = [tuple(one) for one in scales] if scales and static else [(1.0, 1.0)] * num_layers
        # by layer, of each tensor: the K of all pages, then their V [2N, P, Hkv/R, ...]; and K and V [N * P, Hkv/R, ...]
        self._halves = list(zip(*(x.flatten(1, 2).unbind(0) for x in self.tensors), strict=True))
        slots = (x.flatten(2, 3) for x in self.tensors)
        self._slots = [
            list(zip(*(x.unbind(0) for x in layer), strict=True))
            for layer in zip(*(x.unbind(0) for x in slots), strict=True)
        ]
        self._scales = [torch.tensor(one[:planes], device=device).view(-1, 1, 1, 1, 1) for one in self.scales]
        self._scale_of = [x.flatten(1, 2).unbind(0) for x in self._scales]  # of K and V, for rows
        self._room = self.k.new_empty(0)
        self.mapped_by = ""

    @staticmethod
    def bytes_per_page(
        num_layers: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, planes: int = 2
    ) -> int:
        """What one page costs on this rank, K and V of all layers and the scales of their rows."""
        return planes * num_layers * page_size * num_kv_heads * row_bytes(dtype, head_dim)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in self.tensors)

    @property
    def row_nbytes(self) -> int:
        """Of a token's K in one layer, once it is read."""
        return self.kv.shape[4] * self.head_dim * self.format.values.itemsize

    def fingerprint(self) -> str:
        """What must be equal where pages are exchanged as bytes: the format and the layers' scales."""
        told = [kv_name(self.format.dtype)]
        if any(one != (1.0, 1.0) for one in self.scales):
            told += [f"{k!r}/{v!r}" for k, v in self.scales]
        return " ".join(told)

    def layer(self, layer: int) -> LayerPages:
        own = (None, None) if self.row_scales is None else (self.row_scales[layer, 0], self.row_scales[layer, -1])
        return LayerPages(self.k[layer], self.v[layer], *own, *self.scales[layer])

    def release(self) -> None:
        """Give the memory back, and with it all that was cached; everything else stays as it is (memory_occupation.py)."""
        self._nbytes = [x.untyped_storage().nbytes() for x in self.tensors]
        self._room = self.k.new_empty(0)
        for x in self.tensors:
            x.untyped_storage().resize_(0)

    def resume(self) -> None:
        for x, nbytes in zip(self.tensors, self._nbytes, strict=True):
            x.untyped_storage().resize_(nbytes)
            x.zero_()

    def write(self, layer: int, slots: torch.Tensor, *new: torch.Tensor) -> None:
        """Put k, v (of one plane: the rows) [T, Hkv/R, d] at `slots` [T]."""
        if not self.format.coded:  # the short way, for the steps of small models
            for (plane,), values in zip(self._slots[layer], new, strict=True):
                plane.index_copy_(0, slots, values.to(plane.dtype))
            return
        for plane, values, scale in zip(self._slots[layer], new, self._scale_of[layer], strict=True):
            for there, part in zip(plane, self.format.encode(values, scale), strict=True):
                there.index_copy_(0, slots, part)

    def begin(self, slots: torch.Tensor) -> None:
        """Blank the pages whose first slot is among `slots` [T]: a last owner may have left NaN in them."""
        self.blank(slots[slots % self.page_size == 0] // self.page_size)

    def blank(self, pages: torch.Tensor) -> None:
        if len(pages):
            for x in self.tensors:
                x.index_fill_(2, pages, 0)

    def move(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """In all layers, what lies at slots `sources` [n] goes to `targets` [n], no two alike; all is read first, then written."""
        for x in self.tensors:
            slots = x.flatten(2, 3)  # [L, planes, N * P, Hkv/R, ...]
            slots.index_copy_(2, targets, slots.index_select(2, sources))

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """k, v (of one plane: the rows) [T, Hkv/R, d] at `slots` [T]."""
        return tuple(
            self.format.decode([x[slots] for x in plane], scale)
            for plane, scale in zip(self._slots[layer], self._scale_of[layer], strict=True)
        )

    def rounded(self, layer: int, *new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """k, v [T, Hkv/R, d] as the pages would give them back, in the dtype that they have."""
        return tuple(
            self.format.decode(self.format.encode(x, scale), scale).to(x.dtype)
            for x, scale in zip(new, self._scale_of[layer], strict=True)
        )

    def halves_of(self, pages: torch.Tensor) -> torch.Tensor:
        """pages [n] -> their places in a layer's halves, all of K before all of V [2n]."""
        return torch.cat((pages, pages + self.num_pages))

    def gather(self, layer: int, halves: torch.Tensor) -> torch.Tensor:
        """Copies of `halves` [2n], end to end: K and V [2, n * P, Hkv/R, d]."""
        parts = [x.index_select(0, halves).unflatten(0, (2, -1)) for x in self._halves[layer]]
        return self.format.decode(parts, self._scales[layer]).flatten(1, 2)

    def gather_into(self, room: torch.Tensor, layer: int, halves: torch.Tensor) -> None:
        """The same into memory that `room` gave, [2n, P, Hkv/R, d]."""
        if not self.format.coded:
            torch.index_select(self._halves[layer][0], 0, halves, out=room)
            return
        parts = [x.index_select(0, halves).unflatten(0, (2, -1)) for x in self._halves[layer]]
        self.format.decode(parts, self._scales[layer], out=room.unflatten(0, (2, -1)))

    def room(self, halves: int) -> torch.Tensor:
        """Memory to copy so many into, always the same: so it stays in the processor's cache."""
        if halves > len(self._room):
            shape = (halves, *self.kv.shape[3:5], self.head_dim)
            self._room = torch.empty(shape, dtype=self.format.values, device=self.kv.device)
        return self._room[:halves]
