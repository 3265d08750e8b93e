"""GPTQ: round a matrix column by column, and let the columns still to come make up for each error.

Rounding every number to its nearest code makes W's own error small; what counts is that of the outputs, W X over typical inputs X.
So GPTQ rounds column 0, looks at what it was off by, and moves all later columns by as much as best cancels it for those inputs;
then column 1, and so on. How far to move is in H = X X^T, which counts how the inputs of two columns go together: with U the upper
Cholesky factor of H^-1, an error e in column i is best met by e / U[i, i] * U[i, i+1:]. A column's own scale is taken from the
numbers as they have become when its group is reached. Frantar et al. 2022, algorithm 1; AutoGPTQ auto_gptq/quantization/gptq.py.
"""

import torch

from common.quantization.codes import Codes, one_group
from common.quantization.rounding import codes_of, scales
from common.quantization.scheme import Scheme

BLOCK = 128  # columns at a time if all are one group


class Inputs:
    """H = 2/N * sum of x x^T over the N rows that a linear layer was asked for."""

    def __init__(self, width: int):
        self.hessian, self.rows = torch.zeros(width, width, dtype=torch.float64), 0

    def add(self, x: torch.Tensor) -> None:
        """x [.., in]."""
        x = x.reshape(-1, x.shape[-1]).float()
        self.hessian *= self.rows / (self.rows + len(x))
        self.rows += len(x)
        self.hessian += x.T @ x * (2 / self.rows)


@torch.no_grad()
def gptq(
    weight: torch.Tensor, hessian: torch.Tensor, scheme: Scheme, stored: torch.dtype = torch.float32, damp: float = 0.01
) -> Codes:
    """weight [n, m], hessian [m, m] of its inputs -> codes whose outputs are nearer to W's than those of rounding alone.

    stored: the type in which a file will hold the scales. damp: share of H's mean diagonal that is added to it, so that directions
    which no input had can be inverted.
    scheme.act_order: columns with the largest inputs first, while there are many left to make up for them; a group is then no
    run of columns, and the codes say which one each column is in (GPTQ's g_idx).
    """
    w, h = weight.double().clone(), hessian.double().clone()
    m = w.shape[1]
    size = scheme.group_size or m
    silent = h.diagonal() == 0  # inputs that were always zero: nothing is lost whatever their column is
    h[silent, silent] = 1
    w[:, silent] = 0
    order = h.diagonal().argsort(descending=True, stable=True) if scheme.act_order else torch.arange(m)
    w, h = w[:, order], h[order][:, order]
    h.diagonal().add_(damp * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    q, grids = [], []
    step = (
        size if size < m else min(m, BLOCK)
    )  # within it columns move each other one by one, those behind it at its end
    for start in range(0, m, step):
        stop = min(start + step, m)
        if start % size == 0:
            span = w[:, start : start + size].float()
            low, high = span.amin(1, keepdim=True).clamp(max=0), span.amax(1, keepdim=True).clamp(min=0)
            grids.append(scales(low, high, scheme, stored))
        scale, zero = grids[-1]
        errors = torch.zeros(len(w), stop - start, dtype=w.dtype)
        for i in range(start, stop):
            q.append(codes_of(w[:, i : i + 1].float(), scale, zero, scheme))
            rounded = Codes(q[-1], scale, zero, one_group(1)).dequantise()[:, 0]
            error = (w[:, i] - rounded) / upper[i, i]
            w[:, i:stop] -= error[:, None] * upper[i, i:stop]
            errors[:, i - start] = error
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    back = order.argsort()
    scale = torch.cat([one for one, _ in grids], dim=1)
    zero = None if scheme.symmetric else torch.cat([one for _, one in grids], dim=1)
    return Codes(torch.cat(q, dim=1)[:, back].contiguous(), scale, zero, (torch.arange(m) // size)[back])
