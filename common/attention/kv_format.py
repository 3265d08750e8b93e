"""How a page holds the d numbers of a token's head: as they are, or as codes of 8 or 4 bits with a scale.

    kv_cache_dtype                bytes a head   a number is
    float32, bfloat16, float16    4 d, 2 d       itself, rounded
    fp8_e4m3, fp8_e5m2            d              code * scale of the layer's K or V: k_scale, v_scale of the checkpoint, or 1
    int8                          d + 2          code * scale of this token and head; codes -127 .. 127, scales float16 beside them
    int4                          d / 2 + 2      (nibble - 8) * such a scale; nibbles 1 .. 15, number 2i in the low one of byte i

fp8 is a floating-point number: its error is a share of each number (1/16 at most for e4m3 with 3 bits behind the leading one,
1/8 for e5m2 with 2), so one scale for all will do, and is known before a token comes. What lies beyond its largest number (448 and
57,344) is cut off. An integer code's error is a share of the largest number of its head (1/254 or 1/14), so each head of each token
has a scale of its own: the largest number, divided by the largest code. float16 ends at 65,504, so int4 cuts off beyond 458,528.

vLLM 0.30 and SGLang 0.5.23 have the fp8 forms, with the same names and scales (srt/layers/quantization/kv_cache.py). int8 and int4
are this project's: SGLang's 4-bit pages are of other kinds. KIVI (Liu et al. 2024) and KVQuant (Hooper et al. 2024) scale K by
channel over many tokens, which keeps more, but then a token cannot be stored until its group is full.
"""

from dataclasses import dataclass

import torch

KV_DTYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2, "int8": torch.int8, "int4": torch.int4,
}  # fmt: skip
OTHER_NAMES = {"float": "float32", "half": "float16", "bf16": "bfloat16", "fp8": "fp8_e4m3"}  # of vLLM and SGLang
LARGEST_SCALE = torch.finfo(torch.float16).max


def kv_dtype(name: str | None) -> torch.dtype | None:
    """None for auto, which is the model's. Raises ValueError for an unknown name."""
    if name is None or name == "auto":
        return None
    found = KV_DTYPES.get(OTHER_NAMES.get(name, name))
    if found is None:
        raise ValueError(f"kv_cache_dtype={name!r} is unknown; use auto, {', '.join(KV_DTYPES)}")
    return found


def kv_name(dtype: torch.dtype) -> str:
    """The name by which it is asked for."""
    return next((name for name, one in KV_DTYPES.items() if one == dtype), str(dtype).removeprefix("torch."))


# A format's `encode` gives a page's tensors of some rows, codes first; `decode` takes them back, in the dtype `values`. `scales` is
# that of the layer, which broadcasts over the codes. `stored` is the dtype of the codes, `row_scales` whether a row has a scale of
# its own; `most` the largest code, 0 where nothing is cut off.


@dataclass(frozen=True)
class PlainRows:
    """The numbers themselves."""

    dtype: torch.dtype
    most: float = 0.0
    row_scales: bool = False
    coded: bool = False

    @property
    def stored(self) -> torch.dtype:
        return self.dtype

    values = stored

    def width(self, head_dim: int) -> int:
        return head_dim

    def encode(self, x: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x.to(self.dtype),)

    def decode(self, parts: tuple[torch.Tensor, ...], scales: torch.Tensor) -> torch.Tensor:
        return parts[0]


@dataclass(frozen=True)
class Fp8Rows:
    """Codes of 8-bit floating point, seen as bytes: torch cannot index their own dtype everywhere."""

    dtype: torch.dtype
    row_scales: bool = False
    coded: bool = True
    values: torch.dtype = torch.float32

    @property
    def stored(self) -> torch.dtype:
        return self.dtype

    @property
    def most(self) -> float:
        return torch.finfo(self.dtype).max

    def width(self, head_dim: int) -> int:
        return head_dim

    def encode(self, x: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ((x.float() / scales).clamp(-self.most, self.most).to(self.dtype).view(torch.uint8),)

    def decode(
        self, parts: tuple[torch.Tensor, ...], scales: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return torch.mul(parts[0].view(self.dtype).float(), scales, out=out)


@dataclass(frozen=True)
class IntegerRows:
    """Codes of 8 or 4 bits around zero, and each row's scale."""

    dtype: torch.dtype
    row_scales: bool = True
    coded: bool = True
    values: torch.dtype = torch.float32

    @property
    def packed(self) -> bool:
        return self.dtype == torch.int4

    @property
    def stored(self) -> torch.dtype:
        return torch.uint8 if self.packed else torch.int8

    @property
    def most(self) -> float:
        return 7.0 if self.packed else 127.0

    def width(self, head_dim: int) -> int:
        if self.packed and head_dim % 2:
            raise ValueError(
                f"kv_cache_dtype=int4 packs two numbers in a byte, and a row has {head_dim} here; use int8 or fp8_e4m3"
            )
        return head_dim // 2 if self.packed else head_dim

    def encode(self, x: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x [..., d] -> codes [..., d or d / 2], scales [...]. NaN in a row makes its scale NaN, and so all of it."""
        x = x.float()
        own = (x.abs().amax(-1) / self.most).clamp(max=LARGEST_SCALE).half()
        codes = x / own.float().unsqueeze(-1)
        # 0 / 0 where a row is zero or its scale too small for float16
        codes = codes.nan_to_num_(0.0).round_().clamp_(-self.most, self.most)
        if not self.packed:
            return codes.to(torch.int8), own
        low, high = (codes + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
        return low | (high << 4), own

    def decode(
        self, parts: tuple[torch.Tensor, ...], scales: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        codes, own = parts
        if self.packed:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).to(torch.int8) - 8
        return torch.mul(codes, own.float().unsqueeze(-1), out=out)


KVFormat = PlainRows | Fp8Rows | IntegerRows


def kv_format(dtype: torch.dtype) -> KVFormat:
    """Raises ValueError for a dtype in which no page is kept."""
    if dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return Fp8Rows(dtype)
    if dtype in (torch.int8, torch.int4):
        return IntegerRows(dtype)
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"pages of {dtype} are not known here; use {', '.join(KV_DTYPES)}")
    return PlainRows(dtype)


def row_bytes(dtype: torch.dtype, head_dim: int) -> int:
    """What the `head_dim` numbers of one token's head cost in a page, their scale included."""
    form = kv_format(dtype)
    return form.width(head_dim) * form.stored.itemsize + 2 * form.row_scales


def wire_dtype(dtype: torch.dtype, computed: torch.dtype) -> torch.dtype:
    """In which K and V travel before they are in a page: as it will hold them, or where it holds codes as they were computed."""
    return computed if kv_format(dtype).coded else dtype
