"""Rows that a product reads as codes, made so by the kernel that makes them: a norm, or the MLP's gate.

A linear layer says of how many rows it wants codes and which (`LinearBase.rounding`); a decoder layer lets its norms and its gate
ask (models/decoder.py); they hand on RoundedRows in place of x (kernels/rounded_rows.py).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch


class Rounding(NamedTuple):
    """dtype: of codes. grouped: a scale for each 128 columns, else one for the row. scale: of all of x, if it is known (static).
    keep: x itself is read, too."""

    dtype: torch.dtype
    grouped: bool = False
    scale: float | None = None
    keep: bool = False

    @property
    def static(self) -> bool:
        return self.scale is not None

    @property
    def given(self) -> float:
        return self.scale if self.scale is not None else 0.0


@dataclass(frozen=True)
class RoundedRows:
    """codes [T, in], scales [T, ceil(in/128)] or [T, 1] float32 of x [T, in], which was of `dtype`; x itself if it is kept."""

    codes: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype
    x: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.codes)


def itself(x: torch.Tensor | RoundedRows) -> torch.Tensor:
    """x for who cannot read codes; None where nobody said that it would."""
    return x.x if isinstance(x, RoundedRows) else x
