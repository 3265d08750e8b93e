"""A scale under a row cut: whose scales a rank needs when it holds some columns of a matrix, and groups do not end where ranks do.

    python ch07_sglang_radix/quantization/demo_3_scale_under_a_cut.py

W has two rows and twelve columns in groups of four, small integers, so that every product can be worked out in the head. Three
ranks get a group each; two ranks get one and a half. Then the bundled model on one to four ranks: what each reads of the files.
"""

import tempfile
import warnings
from pathlib import Path

import torch

from common.distributed.launch import run_main
from common.layers.heads import split_evenly
from common.layers.linear import RowParallelLinear
from common.models.weights import load_model
from common.parallel_state import TPGroup
from common.quantization.codes import Codes
from common.quantization.make import config_of, make
from common.quantization.methods import METHODS
from common.quantization.reader import QuantizedTensor
from common.quantization.scheme import Scheme
from common.teaching.show import check, heading, matrix, mistake, table
from common.tiny_qwen import TINY_QWEN_PATH

OUT, IN, GROUP = 2, 12, 4
Q = torch.tensor([[1, 2, 0, 1, 3, 1, 1, 0, 2, 0, 1, 1], [0, 1, 1, 2, 1, 0, 2, 1, 1, 1, 0, 3]], dtype=torch.int8)
SCALES = torch.tensor([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]])
X = torch.tensor([1.0, 1, 2, 0, 1, 2, 0, 1, 1, 0, 2, 1])
GROUPS = Scheme("compressed-tensors", 4, "int", "group", GROUP, format="pack-quantized")
CHANNEL = Scheme("compressed-tensors", 4, "int", "channel", format="pack-quantized")


def main() -> None:
    whole = by_hand()
    on_ranks(whole)
    straddled(whole)
    in_another_order(whole)
    of_a_row()
    what_is_read()


def written(codes: Codes, scheme: Scheme) -> QuantizedTensor:
    """In the layout of a file, with the face that a layer's loader knows."""
    return QuantizedTensor(scheme, METHODS[scheme.method].encode(scheme, codes), "W", (OUT, IN))


def by_hand() -> torch.Tensor:
    heading("W x, groups of four columns")
    codes = Codes(Q, SCALES, None, torch.arange(IN) // GROUP)
    matrix("codes", Q.numpy(), cut=(4, 8))
    matrix("scales", SCALES.numpy())
    matrix("W", codes.dequantise().numpy(), cut=(4, 8))
    whole = codes.dequantise() @ X
    print(f"  x = {numbers(X)}    W x = {numbers(whole)}")
    return whole


@torch.inference_mode()
def on_ranks(whole: torch.Tensor) -> None:
    heading("Cut along the columns: each rank reads its columns' words, and the scales of the groups that they lie in")
    weight = written(Codes(Q, SCALES, None, torch.arange(IN) // GROUP), GROUPS)
    rows = []
    for ranks in (3, 2):
        total = torch.zeros(OUT)
        for rank in range(ranks):
            layer = RowParallelLinear(IN, OUT, TPGroup(rank, ranks), reduce_results=False)
            layer.weight.weight_loader(weight, None)
            _, [(_, start, n)] = split_evenly(IN, rank, ranks)
            mine = weight.codes(slice(0, OUT), slice(start, start + n))
            y = layer(X[None, start : start + n])[0]
            rows.append(
                (ranks, rank, f"{start} .. {start + n - 1}", numbers(mine.scale[0]), numbers(mine.group), numbers(y))
            )
            total += y
        check(f"{ranks} ranks: partial sums added up are W x", torch.equal(total, whole))
    table(("ranks", "rank", "columns", "scales of row 0", "group of each column", "partial sum"), rows)


def straddled(whole: torch.Tensor) -> None:
    heading("What goes wrong where a group lies on two ranks")
    total = torch.zeros(OUT)
    for rank in range(2):
        columns = slice(6 * rank, 6 * rank + 6)
        cut = SCALES[:, rank * 3 // 2 : rank * 3 // 2 + 2]  # its share of three: from 0 on, or from 1 on
        group = torch.arange(6) // GROUP  # counted from its own first column
        total += Codes(Q[:, columns], cut, None, group).dequantise() @ X[columns]
    mistake(
        "rank 1 counts groups from its own first column, which is in the middle of one",
        wrong=numbers(total),
        right=numbers(whole),
    )
    print("  here a rank's codes say of each column which group it is in, so a cut may lie anywhere")


def in_another_order(whole: torch.Tensor) -> None:
    heading("desc_act: a group's columns lie anywhere")
    group = torch.tensor([0, 1, 2, 1, 0, 2, 0, 1, 2, 2, 1, 0])
    codes = Codes(Q, SCALES, None, group)
    print(f"  g_idx {numbers(group)}")
    weight = written(
        codes, Scheme("compressed-tensors", 4, "int", "group", GROUP, act_order=True, format="pack-quantized")
    )
    parts, total = [weight.codes(slice(0, OUT), slice(6 * rank, 6 * rank + 6)) for rank in range(2)], torch.zeros(OUT)
    for rank, mine in enumerate(parts):
        where = f"columns {6 * rank} .. {6 * rank + 5} are in groups {numbers(mine.group)}"
        print(f"  rank {rank}: {where}; scales of row 0: {numbers(mine.scale[0])}")
        total += mine.dequantise() @ X[6 * rank : 6 * rank + 6]
    check("both ranks need all scales, and the sum is right", torch.equal(total, codes.dequantise() @ X))
    runs = Codes(Q, SCALES, None, torch.arange(IN) // GROUP).dequantise() @ X
    mistake("g_idx not looked at: column i in group i // 4", wrong=numbers(runs), right=numbers(total))


def of_a_row() -> None:
    heading("One scale a row: copied where columns are cut, cut where rows are")
    codes = Codes(Q, SCALES[:, :1].clone(), None, torch.zeros(IN, dtype=torch.int64))
    weight = written(codes, CHANNEL)
    halves = [weight.codes(slice(0, OUT), slice(6 * rank, 6 * rank + 6)) for rank in range(2)]
    table(
        ("rank", "columns", "scales"),
        [(rank, f"{6 * rank} .. {6 * rank + 5}", numbers(half.scale)) for rank, half in enumerate(halves)],
    )
    rows = [weight.codes(slice(rank, rank + 1), slice(0, IN)) for rank in range(2)]
    table(("rank", "rows", "scales"), [(rank, rank, numbers(one.scale)) for rank, one in enumerate(rows)])
    total = sum(half.dequantise() @ X[6 * r : 6 * r + 6] for r, half in enumerate(halves))
    said = "each rank multiplies its partial sum by all scales, and the sum of products is the product of the sum"
    check(said, torch.equal(total, codes.dequantise() @ X))


def what_is_read() -> None:
    heading("The bundled model in groups of 32, on one to four ranks: bytes that a rank reads, of all tensors")
    rows = []
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is dequantised, which is what is meant
        for name, kind in (("bfloat16", None), ("w4a16", "w4a16"), ("GPTQ", "gptq"), ("AWQ", "awq")):
            folder = Path(place) / name
            if kind:
                make(TINY_QWEN_PATH, folder, config_of(kind, group_size=32))
            source = folder if kind else TINY_QWEN_PATH
            read = [
                max(load_model(source, TPGroup(r, ranks))[1].bytes_read for r in range(ranks)) for ranks in (1, 2, 3, 4)
            ]
            rows.append((name, *read))
    table(("", "1 rank", "2 ranks", "3 ranks", "4 ranks"), rows)
    print("  columns 112 .. 223 of o_proj begin in the middle of group 3 (96 .. 127): both ranks read its scale")
    check("each of two ranks reads little more than half", all(two < 0.56 * one for _, one, two, *_ in rows))


def numbers(x: torch.Tensor) -> str:
    return " ".join(f"{value:g}" for value in x.flatten().tolist())


if __name__ == "__main__":
    run_main(main)
