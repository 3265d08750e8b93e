"""How the weight-only kernels (quantized_linear.py) find codes in memory. Plain PyTorch: packing, and the twin that unpacks.

    8 bits   [out, in], as the matrix itself; int8, or float8_e4m3fn
    4 bits   two codes a byte, in tiles of ROWS rows and `turn` columns, one tile behind the other, so that what a program
             reads in one turn is one run of bytes. In a byte column c is the low half, and c + turn/2 the high one: both halves
             are rows of x that lie side by side, and no code has to be moved to its neighbour's place

Codes of 2 and 3 bits take 4. A `turn` of columns has one scale: 128 columns, or as many as a group has (32, 64). Where the groups
of a matrix are not such runs (columns quantized in another order; a cut over ranks that begins inside a group), its columns are put
in the order of their groups, each filled up to whole turns, and x is brought into that order before: `order`.

Bytes a weight: 1, or 1/2; and a scale, of 2 bytes if it is a 16-bit float exactly, and a zero point for each group of a row.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from common.quantization.codes import Codes

ROWS = 64  # of a tile
TURN = 128  # columns, at most
ROWS_ALIGNED = 128  # a multiple of ROWS, and of all numbers of rows that share a scale
SMALLEST_TURN = 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the low three bits of a code; the fourth is the sign


@dataclass
class PackedCodes:
    """q: uint8 [tiles of rows, turns, ROWS, turn/2], or int8 or float8 [out, in]. scale [groups, ceil(out / share)], zero the same
    or None; a scale is that of `share` rows, and of `group` columns of `in`, 0 for all. offset: the zero point if all have one.

    width: columns in the order of the codes, those that fill up included. order [width]: which column of x each is, in_features for
    a column of zeros; None: they are x's.
    """

    q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    order: torch.Tensor | None
    out: int
    width: int
    in_features: int
    turn: int
    group: int
    share: int
    offset: int
    e2m1: bool

    @property
    def bits(self) -> int:
        return 4 if self.q.dtype == torch.uint8 else 8

    @property
    def nbytes(self) -> int:
        """Read in one product, x and y aside."""
        return sum(t.nbytes for t in (self.q, self.scale, self.zero, self.order) if t is not None)

    def ordered(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in] -> [T, width], its columns in the order of the codes."""
        return x if self.order is None else F.pad(x, (0, 1)).index_select(1, self.order)

    def rows(self, part: slice) -> "PackedCodes":
        """Of some rows, that begin at a multiple of ROWS_ALIGNED."""
        q, shared = part, slice(part.start // self.share, -(-part.stop // self.share))
        if self.bits == 4:
            q = slice(part.start // ROWS, -(-part.stop // ROWS))
        zero = None if self.zero is None else self.zero[:, part]
        return replace(self, q=self.q[q], scale=self.scale[:, shared], zero=zero, out=part.stop - part.start)


def pack(codes: Codes, bits: int) -> PackedCodes:
    """bits: of a code. Two of at most 4 bits are put in a byte."""
    out, in_features = codes.q.shape
    (q, scale, zero, _), order, group = _in_order(codes)
    e2m1 = bits <= 4 and q.is_floating_point()
    offset = 0
    if e2m1:
        q, scale = _numbers_of_e2m1(q), scale / 2  # the kernel makes twice the number, which is an integer
    elif bits <= 4 and q.dtype == torch.int8:
        q, offset = q + 8, 8
    elif not q.is_floating_point() and bits > 4 and q.dtype == torch.uint8:  # as int8, which widens in fewer steps
        q = (q.to(torch.int16) - 128).to(torch.int8)
        zero = torch.full_like(scale, -128.0) if zero is None else zero - 128
    if zero is not None:
        if offset:
            zero = zero + offset
        if (zero == zero[0, 0]).all():
            zero, offset = None, int(zero[0, 0])
        else:
            narrow = zero.amin() >= -128 and zero.amax() <= 127
            zero = zero.to(torch.int8 if narrow else torch.int16).t().contiguous()
    width = q.shape[1]
    turn = min(group or TURN, TURN)
    share = _rows_that_share(scale) if zero is None else 1
    scale = (
        scale[::share].t().clone(memory_format=torch.contiguous_format)
    )  # contiguous() lets a stride of 128 be, of one column
    scale = _narrowest(scale)
    if bits <= 4:
        q = _tiles(q.to(torch.uint8), turn)
    return PackedCodes(q.contiguous(), scale, zero, order, out, width, in_features, turn, group, share, offset, e2m1)


def unpack(packed: PackedCodes) -> Codes:
    """The codes again; those of columns in the order of `packed`, and E2M1 as twice the number."""
    q = packed.q
    if packed.bits == 4:
        low, high = q & 15, q >> 4
        q = torch.cat([low, high], dim=-1).transpose(1, 2).flatten(2).flatten(0, 1)[: packed.out, : packed.width]
        if packed.e2m1:
            table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=q.device) * 2
            octets = table.to(torch.float8_e4m3fn).view(torch.uint8)
            q = octets.index_select(0, q.flatten().int()).view(q.shape).view(torch.float8_e4m3fn)
    columns = torch.arange(packed.width, device=q.device)
    group = columns // packed.group if packed.group else torch.zeros_like(columns)
    scale = packed.scale.float().t().repeat_interleave(packed.share, dim=0)[: packed.out]
    zero = torch.full_like(scale, float(packed.offset)) if packed.zero is None else packed.zero.float().t()
    return Codes(q, scale, zero, group)


def numbers(packed: PackedCodes, dtype: torch.dtype) -> torch.Tensor:
    """[out, in]: what the codes stand for, the columns in x's order."""
    values = unpack(packed).dequantise(dtype)
    if packed.order is None:
        return values
    in_order = values.new_zeros(packed.out, packed.in_features + 1)
    in_order[:, packed.order] = values
    return in_order[:, :-1]


def multiply_plain(x: torch.Tensor, packed: PackedCodes) -> torch.Tensor:
    """What the kernels compute, in x's dtype: x [T, in] -> x W^T [T, out]."""
    return packed.ordered(x) @ unpack(packed).dequantise(x.dtype).t()


def packed_bytes(
    rows: torch.Tensor, group: torch.Tensor, used: torch.Tensor, bits: int, scale_bytes: int, symmetric: bool
) -> int:
    """What pack() makes of codes without looking at their numbers. rows [out]: equal where two rows have the same scales; group
    [in]; used: the groups that are no padding. Not symmetric: each group of a row has a zero point."""
    groups, columns, size = 1, None, 0
    if group.any():
        columns, size = _runs_of(group, used)
        groups = int(group.max()) + 1 if columns is None else len(columns)
    width = len(group) if columns is None else size * len(columns)
    turn = min(size or TURN, TURN)
    q = len(rows) * width if bits > 4 else -(-len(rows) // ROWS) * ROWS * -(-width // turn) * turn // 2
    scales = groups * -(-len(rows) // (_rows_that_share(rows.unsqueeze(1)) if symmetric else 1)) * scale_bytes
    zeros = 0 if symmetric else groups * len(rows)  # int8
    return q + scales + zeros + (0 if columns is None else width * torch.int64.itemsize)


def _in_order(codes: Codes) -> tuple[Codes, torch.Tensor | None, int]:
    """(codes with the columns of each group in one run, all of one length; the order or None; that length, 0 for one group).
    Groups whose scales are all 0, padding of a rank's slice, are left out."""
    q, scale, zero, group = codes
    if scale.shape[1] == 1:
        return codes, None, 0
    used = scale.any(dim=0).nonzero()[:, 0] if scale.any() else torch.zeros_like(group[:1])
    columns, size = _runs_of(group, used)
    if columns is None:
        return codes, None, size
    order = torch.cat([F.pad(of_group, (0, size - len(of_group)), value=q.shape[1]) for of_group in columns])
    octets = F.pad(q.view(torch.uint8), (0, 1)).index_select(1, order)  # float8 has no index_select
    zero = None if zero is None else zero[:, used]
    return Codes(octets.view(q.dtype), scale[:, used], zero, group), order, size


def _runs_of(group: torch.Tensor, used: torch.Tensor) -> tuple[list[torch.Tensor] | None, int]:
    """group [m] -> (columns of each group in `used`, or None if they lie in runs as a kernel reads them; the length of a run)."""
    size = int((group == 0).sum())
    runs = torch.arange(len(group), device=group.device) // max(size, 1)
    if size >= SMALLEST_TURN and size & (size - 1) == 0 and torch.equal(runs, group):
        return None, size
    columns = [(group == g).nonzero()[:, 0] for g in used]
    return columns, max(1 << (max(map(len, columns), default=1) - 1).bit_length(), SMALLEST_TURN)


def _tiles(q: torch.Tensor, turn: int) -> torch.Tensor:
    """[out, width] uint8 below 16 -> [tiles of rows, turns, ROWS, turn/2]."""
    out, width = q.shape
    q = F.pad(q, (0, -width % turn, 0, -out % ROWS))
    low, high = q.unflatten(0, (-1, ROWS)).unflatten(2, (-1, 2, turn // 2)).transpose(1, 2).unbind(3)
    return (low | high << 4).contiguous()


def _numbers_of_e2m1(q: torch.Tensor) -> torch.Tensor:
    """float8 [n, m] of the values -> uint8, the code that each has."""
    value = q.float()
    magnitude = torch.bucketize(value.abs(), torch.tensor(E2M1, device=q.device))
    return (magnitude + 8 * (value < 0)).to(torch.uint8)


def _rows_that_share(scale: torch.Tensor) -> int:
    """scale [n, G]: the largest power of two, 128 at most, of rows that have the same everywhere."""
    for share in (128, 64, 32, 16, 8):
        if torch.equal(scale[::share].repeat_interleave(share, dim=0)[: len(scale)], scale):
            return share
    return 1


def _narrowest(scale: torch.Tensor) -> torch.Tensor:
    """In 16 bits where nothing is lost. float32 is what the kernels compute in."""
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(scale.to(dtype).float(), scale):
            return scale.to(dtype)
    return scale
