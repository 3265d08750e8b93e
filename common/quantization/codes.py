"""Codes: what every quantized matrix is, whatever its file looks like.

One small number for each element, and a scale (and a zero point) for each row and group of columns:

    value[o, i] = (q[o, i] - zero[o, group[i]]) * scale[o, group[i]]

A format is a way to write these in a file. One scale for a tensor, a channel, or a block of rows is a scale that many rows or
columns share: here it is repeated for each row, so that any part of a matrix is again such a matrix. That is why a cut over ranks
needs no rule of its own for each format: whoever reads rows 100 .. 163 and columns 50 .. 99 gets their codes, and the scales and
zeros that belong to them, whichever words, groups and blocks of the file they lie in.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Codes(NamedTuple):
    """q [n, m]: float8_e4m3fn (FP8, and the 16 values of E2M1, which it holds exactly), int8 or uint8. scale [n, G] float32; zero
    [n, G] float32, or None where it is 0 everywhere; group [m] int64, of each column, indices into G."""

    q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    group: torch.Tensor

    def dequantise(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[n, m]: float32 arithmetic, rounded to dtype once."""
        value = _floats(self.q)
        if self.zero is not None:
            value = value - self._of_columns(self.zero)
        return (value * self._of_columns(self.scale)).to(dtype)

    def _of_columns(self, of_groups: torch.Tensor) -> torch.Tensor:
        """[n, G] -> [n, m], or [n, 1] if one group has all columns."""
        return of_groups if of_groups.shape[1] == 1 else of_groups.index_select(1, self.group)

    def cut(self, rows: slice = slice(None), columns: slice = slice(None)) -> "Codes":
        """Of a part of the matrix; groups that it has no column of stay away."""
        group = self.group[columns]
        there, renumbered = group.unique(return_inverse=True)
        zero = None if self.zero is None else self.zero[rows][:, there]
        return Codes(self.q[rows, columns], self.scale[rows][:, there], zero, renumbered)


def _floats(q: torch.Tensor) -> torch.Tensor:
    """q as float32. On a CPU float8 is looked up: torch's own conversion (2.13) takes five times as long."""
    if q.device.type != "cpu" or q.dtype != torch.float8_e4m3fn:
        return q.float()
    table = torch.arange(256, dtype=torch.uint8).view(q.dtype).float()
    return table.index_select(0, q.contiguous().view(torch.uint8).flatten().int()).view(q.shape)


def one_group(columns: int) -> torch.Tensor:
    """`group` where a row has one scale."""
    return torch.zeros(columns, dtype=torch.int64)


def groups_of(columns: slice, size: int) -> tuple[slice, torch.Tensor]:
    """(which groups of `size` columns the columns start .. stop - 1 lie in, `group` of each counted from the first of them)."""
    first, last = columns.start // size, -(-columns.stop // size)
    return slice(first, last), torch.arange(columns.start, columns.stop) // size - first


def stack_rows(parts: Sequence[Codes]) -> Codes | None:
    """Matrices one below the other, with the same columns; None if they are grouped in different ways or of different types."""
    first = parts[0]
    if any(part.q.dtype != first.q.dtype or not torch.equal(part.group, first.group) for part in parts[1:]):
        return None
    zero = None
    if any(part.zero is not None for part in parts):
        zero = torch.cat([torch.zeros_like(part.scale) if part.zero is None else part.zero for part in parts])
    return Codes(torch.cat([part.q for part in parts]), torch.cat([part.scale for part in parts]), zero, first.group)


def stack_columns(parts: Sequence[Codes]) -> Codes:
    """Matrices side by side, with the same rows and type; each keeps its groups."""
    zero, groups, count = None, [], 0
    if any(part.zero is not None for part in parts):
        zero = torch.cat([torch.zeros_like(part.scale) if part.zero is None else part.zero for part in parts], dim=1)
    for part in parts:
        groups.append(part.group + count)
        count += part.scale.shape[1]
    q, scale = (torch.cat([getattr(part, name) for part in parts], dim=1) for name in ("q", "scale"))
    return Codes(q, scale, zero, torch.cat(groups))


def unsigned(codes: Codes, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of integer codes: (q [n, m] uint8, zero [n, G]) counted from 0, as words hold them; symmetric ones have 0.0 in the middle."""
    middle = 2 ** (bits - 1)
    zero = torch.zeros_like(codes.scale) if codes.zero is None else codes.zero
    if codes.q.dtype == torch.uint8:
        return codes.q, zero
    return (codes.q.to(torch.int16) + middle).to(torch.uint8), zero + middle


def nothing(rows: int, group: torch.Tensor, dtype: torch.dtype) -> Codes:
    """Codes of zeros with columns grouped so, for the padding of heads and columns that a number of ranks does not divide."""
    q = torch.zeros(rows, len(group), dtype=torch.uint8).to(dtype)
    return Codes(q, torch.zeros(rows, int(group.max()) + 1), None, group)
