"""Who multiplies by a matrix on a GPU, a kernel of linear.py or the library: measured when a model is loaded.

For a few rows of x both read all of W and little else. Which one does it faster depends on the GPU, on the library's version and
on the shape, so no rule is right everywhere: `guess` is one, made on an H200. `choose` times both for each matrix of the model
and some numbers of rows, as a step meets them:

    between other kernels   The product stands behind a gate (fused.py), and the next gate behind it. A kernel of ours starts while
                            the one before it still runs, and lets the next one do so (launch.py); one of the library does neither,
                            which costs it 2 to 3 us in a step and nothing back to back (NOTES.md).
    from memory             Each product of a recording takes another part of the model's weights, so many of them that the cache
                            does not hold what the next replay begins with.
    in turn                 A replay of the one, a replay of the other: a clock that changes meanwhile changes for both.
    awake                   A GPU that had nothing to do runs at a fraction of its clock (an H200 at 345 MHz); there instructions
                            weigh more against bytes than in a step, and so do the kernels here. It works a while first.

The guess stays unless the other one is MARGIN times as fast, twice in two measurements. Where both are near that, two starts may
decide otherwise, and then the last bits of a row differ, and now and then a token. With enable_deterministic_inference neither of
the two multiplies, and nothing is measured (common/layers/batch_invariant.py).

What was measured holds for the process: a second engine measures what is new in its model only.
"""

import bisect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common.distributed.collectives import TPGroup
from common.distributed.messages import share_all
from common.kernels.timing import timed_in_turn

FEW = 64  # rows of x of which every matrix is measured; of more of them the library is the better by far, but for small matrices
MOST_PRODUCTS = 1 << 29  # rows * out * width up to which it is not
# a number in between is treated as the next of these; 2 to 16 rows are one tile of `few_rows`: on an H100 the kernel's times for
# 2, 4, 8 and 16 were within 6 %, the library's within 10 %
ROWS = (1, 16, 32, 64, 128, 256, 512)
SMALLEST = 512 << 10  # bytes of a matrix; of a smaller one launching is all the cost
COLD = 128 << 20  # bytes, more than twice the L2 cache of an H100
COPIES = (2, 48)  # products of a recording, at least and at most
REPLAYS = 5
MARGIN = 1.03
AWAKE_S = 0.2
HALVES = ("torch.bfloat16", "torch.float16")


class Matrix(NamedTuple):
    """Of a product x W^T (+ bias) with W [out, width] on this rank, everything but the rows of x."""

    out: int
    width: int
    dtype: str  # of x and W, as torch writes it
    bias: bool


class Choice(NamedTuple):
    """What was measured for up to `rows` rows of x, a gate and a product together, and what was taken."""

    rows: int
    matrix: Matrix
    kernel_us: float
    library_us: float
    kernel: bool
    seconds: float  # that measuring took

    @property
    def as_guessed(self) -> bool:
        return self.kernel == guess(self.rows, self.matrix)

    def __str__(self) -> str:
        taken = "kernel" if self.kernel else "library"
        return (
            f"{self.rows:3d} x {self.matrix.width} -> {self.matrix.out}: {taken}{'' if self.as_guessed else ', not as guessed'}; "
            f"us with a gate: kernel {self.kernel_us:.2f}, library {self.library_us:.2f}"
        )


Met = dict[Matrix, dict[int, tuple[torch.Tensor, torch.Tensor | None]]]  # weights and biases, by where they lie
TimeBoth = Callable[[int, Matrix, Met], tuple[float, float]]

_measured: dict[tuple[int, Matrix], bool] = {}  # is it the kernel?
_answers: dict[
    tuple, bool
] = {}  # of `wanted`, until more is measured: a prefill asks a hundred times, and an answer takes 6 us
_met: Met | None = None  # inside `noting`
_gates: set[Matrix] = set()  # rows of gate, then rows of up: a kernel puts out silu(gate) * up


def wanted(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, dtype: torch.dtype | None = None,
    gated: bool = False,
) -> bool:  # fmt: skip
    """Does a kernel of ours multiply x [T, in/R] by weight [out, in/R]? As measured, or else as guessed.

    gated: and put out silu(gate) * up, if it does. dtype: put out, if not x's: the library would have to widen x and W first, which
    nobody needs to measure.
    """
    asked = len(x), weight.shape, x.dtype, bias is None, dtype
    if (kernel := _answers.get(asked)) is not None and _met is None:
        return kernel
    matrix = Matrix(*weight.shape, str(x.dtype), bias is not None)
    kernel = _measured.get((rounded_up(len(x)), matrix)) if dtype is None else None
    if _met is not None and dtype is None:
        _met.setdefault(matrix, {})[weight.data_ptr()] = weight, bias
        _gates.update({matrix} if gated else ())
    kernel = guess(len(x), matrix) if kernel is None else kernel
    if len(x) <= ROWS[-1]:  # more rows keep the GPU busy meanwhile, and there are many such numbers
        _answers[asked] = kernel
    return kernel


def guess(rows: int, matrix: Matrix) -> bool:
    """The same by a rule, measured on an H200."""
    if rows <= 1:
        return rows == 1
    if matrix.dtype not in HALVES:
        return False
    if rows <= FEW // 2:
        return True
    if rows <= FEW:
        return matrix.out > 3000 or matrix.width < 3000  # few and long rows of W: the library cuts them up better
    return rows * matrix.out * matrix.width <= MOST_PRODUCTS


def rounded_up(rows: int) -> int:
    """The number that stands for so many rows: the next of ROWS, or if there is none, itself."""
    at = bisect.bisect_left(ROWS, rows)
    return ROWS[at] if rows and at < len(ROWS) else rows


def taken_of(guessed: bool, kernel_us: float, library_us: float) -> bool:
    """Is it the kernel? What was guessed stays unless the other one is clearly faster: else noise would decide."""
    return kernel_us <= MARGIN * library_us if guessed else MARGIN * kernel_us < library_us


@contextmanager
def noting() -> Iterator[Met]:
    """Inside, the matrices that `wanted` is asked about are noted."""
    global _met
    _met = {}
    try:
        yield _met
    finally:
        _met = None


@contextmanager
def forgotten() -> Iterator[None]:
    """Inside, nothing has been measured."""
    kept = dict(_measured)
    _measured.clear()
    _answers.clear()
    try:
        yield
    finally:
        _measured.clear()
        _measured.update(kept)
        _answers.clear()


def open_questions(met: Met) -> list[tuple[int, Matrix]]:
    """Of these matrices, what is worth measuring and was not yet: (rows, matrix)."""
    return [
        (rows, matrix)
        for matrix in met
        if matrix.dtype in HALVES and 2 * matrix.out * matrix.width >= SMALLEST
        for rows in ROWS
        if (rows <= FEW or guess(rows, matrix)) and (rows, matrix) not in _measured
    ]


@torch.inference_mode()
def rehearse(met: Met) -> None:
    """Under `compile_ahead`: compile the kernels that `choose` runs, and those that it may take."""
    for rows, matrix in open_questions(met):
        kernel, _ = contenders(rows, matrix, met)
        kernel[0]()
        if matrix in _gates:
            _gate_alone(rows, matrix, met)


def _gate_alone(rows: int, matrix: Matrix, met: Met) -> None:
    from common.kernels import linear  # noqa: PLC0415, a CPU build of torch comes without Triton

    weight, bias = next(iter(met[matrix].values()))
    linear.linear(weight.new_zeros(rows, matrix.width), weight, bias, gated=True)


def choose(met: Met, tp: TPGroup, time_both: TimeBoth | None = None) -> list[Choice]:
    """Measure these matrices; from now on `wanted` says who was faster. Returns what was measured, equal on all ranks.

    All ranks of a stage call it, and rank 0 measures for all: what ranks compute alike, a router's logits for one, must have the
    same bits on each, and a rank that decides for itself may decide otherwise. time_both: us of the kernel and of the library, by
    default on this GPU.
    """
    told = ([], [])
    if tp.rank == 0:
        mine = _measure(met, time_both or _time_both)
        _measured.update({(one.rows, one.matrix): one.kernel for one in mine})
        # what was measured for an engine before, too: a rank may be of a younger process
        told = mine, [(rows, each, kernel) for (rows, each), kernel in _measured.items() if each in met]
    choices, known = share_all(told, tp)[0]
    _measured.update({(rows, Matrix(*each)): kernel for rows, each, kernel in known})
    _answers.clear()
    return [Choice(rows, Matrix(*each), *rest) for rows, each, *rest in choices]


@torch.inference_mode()
def _measure(met: Met, time_both: TimeBoth) -> list[Choice]:
    choices, questions = [], open_questions(met)
    if questions and time_both is _time_both:
        _wake()
    for rows, matrix in questions:
        began, guessed = time.perf_counter(), guess(rows, matrix)
        kernel, library = time_both(rows, matrix, met)
        taken = taken_of(guessed, kernel, library)
        if taken != guessed:  # seldom, and it holds for as long as the process
            kernel, library = time_both(rows, matrix, met)
            taken = taken_of(guessed, kernel, library)
        choices.append(Choice(rows, matrix, kernel, library, taken, time.perf_counter() - began))
    return choices


def _wake() -> None:
    x = torch.zeros(4096, 4096, dtype=torch.bfloat16, device="cuda")
    until = time.perf_counter() + AWAKE_S
    while time.perf_counter() < until:
        for _ in range(20):
            x @ x
        torch.cuda.synchronize()


def _time_both(rows: int, matrix: Matrix, met: Met) -> tuple[float, float]:
    kernel, library = timed_in_turn(contenders(rows, matrix, met), REPLAYS, alike=True)
    return kernel, library


def contenders(rows: int, matrix: Matrix, met: Met) -> list[list[Callable[[], torch.Tensor]]]:
    """Calls of the kernel and of the library, each with a gate in front and with a matrix of its own."""
    from common.kernels import fused, linear  # noqa: PLC0415, a CPU build of torch comes without Triton

    weight, bias = next(iter(met[matrix].values()))
    gate_up = torch.linspace(-1, 1, rows * 2 * matrix.width, dtype=weight.dtype, device=weight.device).view(rows, -1)
    matrices = cold_matrices(matrix, met)
    return [
        [lambda w=w, multiply=multiply: multiply(fused.silu_and_mul(gate_up), w, bias) for w in matrices]
        for multiply in (linear.linear, F.linear)
    ]


def cold_matrices(matrix: Matrix, met: Met) -> list[torch.Tensor]:
    """So many of that shape, apart in memory, that the cache does not hold them, or all that there are: the model's own, then
    pieces of its other weights. Their numbers do not matter."""
    size, (least, most) = matrix.out * matrix.width, COPIES
    count = min(max(-(-COLD // (2 * size)), least), most)
    apart = -(-size // 64) * 64  # numbers: every one begins at a multiple of 128 bytes, as a weight does
    own = {at: weight for at, (weight, _) in met[matrix].items()}
    others = {
        at: weight for each in met.values() for at, (weight, _) in each.items() if str(weight.dtype) == matrix.dtype
    }
    found: list[torch.Tensor] = []
    for weight in (own | others).values():
        numbers = weight.detach().view(-1)
        for first in range(0, len(numbers) - size + 1, apart):
            if len(found) == count:
                return found
            found.append(numbers[first : first + size].view(matrix.out, matrix.width))
    return found
