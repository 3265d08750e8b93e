"""What the experts of a rank give for some rows: one function in three forms.

    run(x [T, D], weights [T, k], experts [T, k], w13 [E', 2F', D], w2 [E', D, F'], added [T, D] or None) -> [T, D]

`experts` are this rank's own numbers 0 .. E'-1, and -1 is an expert that is not here and adds nothing; F' are this rank's
columns of each, gate above up in w13. What comes out are partial sums wherever other ranks have other experts or columns.
`added` comes to each sum last: what the expert gives that all tokens visit; to `triton` before it rounds. For a few tokens
`triton` takes that expert's matrices in place of it, and computes it in the launches of the others (`MoERunner.takes_along`).
`loop` and `grouped` take codes in place of w13 and w2, too, and make an expert's numbers when its turn comes.

    loop      an expert after the other: its tokens, its two products, its weights              to read
    grouped   all (token, expert) pairs sorted by expert, and two products with one matrix a group of rows
    triton    the same in a few launches, without copies of x (common/kernels/moe.py)           on a GPU

Sums. A token's k rows are weighted first and then added, each to the sum so far, in ascending number of the experts: by `loop`,
and on a CPU by `grouped`. It is the order of the loop in transformers 5.23 (Qwen3MoeExperts.forward), and in float32 on a CPU
`loop` gives its bits; `grouped` may differ in the last ones, since a product of matrices may compute a row otherwise where it
stands elsewhere. On a GPU `grouped` adds the k rows in float32, best first, and rounds once; `triton` does so in
ascending number. Neither adds atomically, which would be in another order each time.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common.layers.activation import SiluAndMul
from common.quantization.packed_codes import CodedMatrices

try:  # a CPU build of torch comes without Triton
    from common.kernels import moe as fused
    from common.kernels.launch import INTERPRETED
except ImportError:
    fused, INTERPRETED = None, False

Matrices = torch.Tensor | CodedMatrices
Run = Callable[..., torch.Tensor]
silu_and_mul = SiluAndMul()


def loop(
    x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, w13: Matrices, w2: Matrices,
    added: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    out = torch.zeros_like(x)
    for expert in experts.unique().tolist():  # ascending
        if expert < 0:
            continue
        places, tokens = (experts.t() == expert).nonzero(as_tuple=True)  # in the order of transformers, for its bits
        y = F.linear(silu_and_mul(F.linear(x[tokens], w13[expert])), w2[expert])  # [n, D]
        out.index_add_(0, tokens, y * weights[tokens, places, None])
    return out if added is None else out + added


# --- grouped


class Pairs(NamedTuple):
    """The T * k (token, expert) pairs, numbered token * k + place, sorted by expert; those of foreign experts last."""

    order: torch.Tensor  # [T * k], the pair at each place
    ends: torch.Tensor  # [E'] int32, where the pairs of each expert end; an expert without pairs ends where it begins


def sort_by_expert(experts: torch.Tensor, num_experts: int) -> Pairs:
    """experts [T, k]. Nothing here waits for the numbers, so that a CUDA graph can hold it."""
    by_pair = experts.flatten()
    by_pair = torch.where(by_pair < 0, num_experts, by_pair)
    in_order, order = by_pair.sort(stable=True)  # stable: tokens of an expert stay ascending
    ends = torch.searchsorted(in_order, torch.arange(num_experts, device=experts.device), right=True)
    return Pairs(order, ends.int())


def grouped(
    x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, w13: Matrices, w2: Matrices,
    added: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    top_k = experts.shape[1]
    order, ends = sort_by_expert(experts, len(w13))
    if not x.is_cuda:
        order = order[: int(ends[-1])]  # a CPU need not carry the foreign pairs along
    gate_up = multiply_groups(x[order // top_k], w13, ends)  # [pairs, 2F']
    y = multiply_groups(silu_and_mul(gate_up), w2, ends)  # [pairs, D]
    y *= weights.flatten()[order, None]
    if not x.is_cuda:
        out = torch.zeros_like(x).index_add_(0, order // top_k, y)
        return out if added is None else out + added
    foreign = torch.arange(len(order), device=x.device) >= ends[-1]
    by_pair = torch.empty_like(y)
    by_pair[order] = y.masked_fill_(foreign[:, None], 0.0)  # no product has written there: it may be NaN
    out = by_pair.unflatten(0, (-1, top_k)).sum(dim=1)
    return out if added is None else out + added


def multiply_groups(x: torch.Tensor, weight: Matrices, ends: torch.Tensor) -> torch.Tensor:
    """x [n, in] sorted by group, weight [E', out, in] -> [n, out]: each row times its group's matrix; rows behind the last one
    are left as they are."""
    if len(x) and grouped_mm_takes(weight):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    out, start = x.new_empty(len(x), weight.shape[1]), 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:  # codes become numbers as they are asked for, those of idle experts never
            torch.mm(x[start:end], weight[expert].t(), out=out[start:end])
        start = end
    return out


def grouped_mm_takes(weight: Matrices) -> bool:
    """Whether torch's grouped product takes weight [E', out, in]: rows of `in` numbers must begin at multiples of 16 bytes, those
    of x too, and on a GPU they must be bfloat16."""
    return (
        isinstance(weight, torch.Tensor)
        and weight.shape[2] * weight.itemsize % 16 == 0
        and (not weight.is_cuda or weight.dtype == torch.bfloat16)
    )


# --- which one


class SharedMatrices(NamedTuple):
    """The expert that all tokens visit: gate above up, as a linear layer keeps them, and what it gives counts `factor`."""

    w13: torch.Tensor  # [2S, D]
    w2: torch.Tensor  # [D, S]
    factor: torch.Tensor | None  # [T, 1]; None: 1


class MoERunner(NamedTuple):
    """capturable: a CUDA graph may hold it, because nothing in it depends on how many tokens an expert has."""

    name: str
    run: Run
    capturable: bool

    def takes_along(
        self, experts: torch.Tensor, w2: Matrices, shared_w13: torch.Tensor, shared_w2: torch.Tensor
    ) -> bool:
        """Whether `run` takes shared=SharedMatrices of these for tokens with these experts [T, k]."""
        return self.name == "triton" and fused.moe_gemv.goes_along(*experts.shape, w2, shared_w13, shared_w2)


def pick_runner(name: str, device: torch.device) -> MoERunner:
    """The form of that name; auto is triton on a GPU that has it, else grouped. Raises ValueError for what cannot run here."""
    known = {"loop": loop, "grouped": grouped, "triton": fused.run if fused else None}
    if name == "auto":
        name = "triton" if fused and device.type == "cuda" else "grouped"
    if name not in known:
        raise ValueError(f"moe_runner={name!r} is unknown; use auto, {', '.join(known)}")
    if name == "triton" and (fused is None or not (device.type == "cuda" or INTERPRETED)):
        why = f"this rank runs on {device}" if fused else "Triton is not installed"
        raise ValueError(f"moe_runner=triton needs an NVIDIA GPU with Triton, and {why}; use auto, loop, grouped")
    # from Hopper on torch's grouped product is one kernel; before, it asks the CPU how long the groups are
    one_kernel = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
    return MoERunner(name, known[name], name == "triton" or (name == "grouped" and one_kernel))
