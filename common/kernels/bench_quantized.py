"""Products by quantized weights at the shapes of Qwen2.5-7B: are they right, and how far from the time their bytes need?

    python -m common.kernels.bench_quantized [--out FOLDER]        # some three minutes; writes figures/bench_quantized_kernels.csv
    python -m common.kernels.bench_quantized --part tune [--rows 1] [--forms ...]  # other tilings of the weight-only kernels
    python -m common.kernels.bench_quantized --part tune-rounded   # the same where x is rounded, of 16, 32 and 64 rows

As bench_kernels.py: rotating buffers too large for the L2 cache, one graph, the median of ten replays. `bf16 us` is the product by
the same matrix in bfloat16, as a plain layer computes it; `error` the relative distance to the twin in plain PyTorch, in float32.
rounded: x is rounded to FP8 or INT8 rows first, and that is timed too. Many rows of weight-only forms dequantise W first.
"""

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from common.distributed.launch import run_main
from common.kernels import quantized_activations as rounded
from common.kernels import quantized_linear as weight_only
from common.kernels import quantized_row
from common.kernels.launch import compile_ahead, num_processors, shared_memory
from common.kernels.quantized_layout import PackedCodes, multiply_plain, pack, unpack
from common.kernels.timing import ROTATE_BYTES, copy_bandwidth, timed
from common.layers.linear import multiply
from common.quantization.codes import Codes
from common.quantization.rounding import round_to_nearest
from common.quantization.scheme import Scheme
from common.teaching.report import FIGURES, write_csv

BF16 = torch.bfloat16
SHAPES = {"qkv": (4608, 3584), "o": (3584, 3584), "gate_up": (37_888, 3584), "down": (3584, 18_944)}  # Qwen2.5-7B
ROWS = (1, 16, 64, 128, 256, 1024, 4096)
FORMS = {
    "int4 group 128": Scheme("gptq", 4, "int", "group", 128),
    "int4 group 128, zeros": Scheme("awq", 4, "int", "group", 128, symmetric=False),
    "int4 group 32": Scheme("gptq", 4, "int", "group", 32),
    "mxfp4": Scheme("mxfp4", 4, "float", "group", 32),
    "int8 channel": Scheme("w8a8_int8", 8, "int", "channel"),
    "fp8 channel": Scheme("fp8", 8, "float", "channel"),
    "fp8 block": Scheme("fp8", 8, "float", "block", block=(128, 128)),
}
# turns, beside, warps of one row's plans: for a W of many rows, and of few
MANY_ROWS = ((4, 4, 4), (8, 2, 4), (4, 2, 2), (2, 8, 4), (4, 4, 2), (8, 2, 2), (8, 4, 4))
FEW_ROWS = (*MANY_ROWS[:3], (16, 1, 4), (16, 2, 8), (32, 1, 8), (8, 2, 2), (16, 1, 2), (16, 2, 4), (32, 1, 4))
TUNED = ["int4 group 128", "int4 group 128, zeros", "int8 channel", "fp8 block", "fp8 channel"]
ROUNDED = ("int8 channel", "fp8 channel", "fp8 block")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("all", "tune", "tune-rounded"), default="all")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64], help="of x, for tune")
    parser.add_argument("--forms", choices=FORMS, nargs="+", default=TUNED, help="of W, for tune")
    parser.add_argument("--matrices", choices=SHAPES, nargs="+", default=list(SHAPES), help="for tune-rounded")
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder for the CSV")
    args = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, copy: {bandwidth / 1e12:.2f} TB/s", flush=True)
    if args.part == "tune":
        tune(bandwidth, args.rows, args.forms)
        return
    if args.part == "tune-rounded":
        tune_rounded(bandwidth, args.matrices)
        return
    rows = []
    for shape in SHAPES:
        rows += measure(shape, bandwidth)
    write_csv(rows, args.out / "bench_quantized_kernels.csv")


def packed_like(scheme: Scheme, shape: tuple[int, int]) -> PackedCodes:
    """Of random weights; 1024 rows of them, and these again."""
    out, width = shape
    some = min(out, 1024)
    codes = round_to_nearest(torch.randn(some, width), scheme)
    q, scale, zero = (
        None if x is None else x.cuda().repeat(-(-out // some), 1)[:out]
        for x in (codes.q.view(torch.uint8), codes.scale, codes.zero)
    )
    return pack(Codes(q.view(codes.q.dtype), scale, zero, codes.group.cuda()), scheme.bits)


def measure(shape: str, bandwidth: float) -> list[dict]:
    out, width = SHAPES[shape]
    plain = [
        torch.randn(out, width, device="cuda", dtype=BF16) for _ in range(max(1, ROTATE_BYTES // (2 * out * width)))
    ]
    xs = {count: torch.randn(count, width, device="cuda", dtype=BF16) for count in ROWS}
    bf16 = {count: timed([lambda w=w, x=x: multiply(x, w) for w in plain]) for count, x in xs.items()}
    found = []
    for form, scheme in tqdm(FORMS.items(), desc=shape, disable=None):
        one = packed_like(scheme, (out, width))
        copies = [one] + [copied(one) for _ in range(max(0, min(15, ROTATE_BYTES // one.nbytes - 1)))]
        ways: dict[str, Callable] = {"weight-only": weight_only.linear}
        if form in ROUNDED:
            ways["rounded"] = round_and_multiply
            if form == "fp8 channel":
                ways["rounded, library"] = round_and_scaled_mm
        with compile_ahead():
            for way, x in itertools.product(
                (weight_only.linear, weight_only.few_rows, *list(ways.values())[1:2]), xs.values()
            ):
                way(x, one)
        for (count, x), (name, way) in itertools.product(xs.items(), ways.items()):
            if count == 1 and name == "rounded, library":
                continue
            calls = [lambda way=way, x=x, packed=packed: way(x, packed) for packed in copies]
            floor = (one.nbytes + 2 * count * (out + width)) / bandwidth * 1e6
            us = timed(calls)
            row = {
                "matrix": shape, "form": form, "x": name, "rows": count, "MB": round(one.nbytes / 1e6, 2),
                "floor us": round(floor, 2), "us": round(us, 2), "bf16 us": round(bf16[count], 2),
                "of bf16": round(us / bf16[count], 3), "error": f"{error(way(x, one), x, one, name):.1e}",
            }  # fmt: skip
            if name == "weight-only" and 64 <= count <= 1024:  # where does dequantising begin to pay?
                row["few_rows us"] = round(timed([lambda x=x, p=p: weight_only.few_rows(x, p) for p in copies]), 2)
            found.append({"few_rows us": "", **row})
            print(" ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return found


def copied(packed: PackedCodes) -> PackedCodes:
    own = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in vars(packed).items()}
    return PackedCodes(**own)


def round_and_multiply(x: torch.Tensor, packed: PackedCodes, plan: rounded.Plan | None = None) -> torch.Tensor:
    q, scale = rounded.round_rows(x, packed.q.dtype, bool(packed.group))
    both = q, scale, packed.q, packed.scale, packed.share, x.dtype
    return rounded.multiply(*both) if plan is None else rounded.few_rows(*both, plan=plan)


def round_and_scaled_mm(x: torch.Tensor, packed: PackedCodes) -> torch.Tensor:
    q, scale = rounded.round_rows(x, packed.q.dtype)
    return torch._scaled_mm(q, packed.q.t(), scale, packed.scale, out_dtype=x.dtype, use_fast_accum=True)


def error(got: torch.Tensor, x: torch.Tensor, packed: PackedCodes, way: str) -> float:
    if way == "weight-only":
        want = multiply_plain(x.float(), packed)
    else:
        q, scale = rounded.round_rows(x, packed.q.dtype, bool(packed.group))
        scale = scale.repeat_interleave(rounded.GROUP, dim=1)[:, : x.shape[1]] if packed.group else scale
        want = (q.float() * scale) @ unpack(packed).dequantise().t()
    return ((got.float() - want).norm() / want.norm()).item()


def one_row_plans(packed: PackedCodes) -> list[quantized_row.Work]:
    """Those of 32 to 128 bytes of W a thread on their way."""
    return [
        quantized_row.Work(deep, *shape)
        for deep, shape in itertools.product((2, 4, 8), MANY_ROWS if packed.out >= quantized_row.WIDE else FEW_ROWS)
        if 64 <= deep * shape[0] * shape[1] * packed.bits // shape[2] <= 256
    ]


def tune(bandwidth: float, rows: list[int], forms: list[str]) -> None:
    """The fastest tilings of the weight-only kernels for each shape, and the one that they take."""
    plans = list(itertools.product((64, 128), (1, 2, 4, 8), (4, 8), (2, 3, 4)))
    for (shape, (out, width)), form in itertools.product(SHAPES.items(), forms):
        one = packed_like(FORMS[form], (out, width))
        copies = [one] + [copied(one) for _ in range(max(0, min(8, ROTATE_BYTES // one.nbytes - 1)))]
        for count in rows:
            x = torch.randn(count, width, device="cuda", dtype=BF16)
            block = min(max(count, 16), 64)
            if count == 1:
                way, taken = partial(quantized_row.one_row, gated=shape == "gate_up"), quantized_row.work(one)
                fitting = one_row_plans(one)
            else:
                way, taken = weight_only.few_rows, weight_only.tiling(count, one, num_processors(x.device))
                fitting = [
                    weight_only.Tiling(block, n, parts, warps, stages)
                    for n, parts, warps, stages in plans
                    if n * warps in (256, 1024)
                ]
            with compile_ahead():
                for plan in (taken, *fitting):
                    way(x, one, None, plan)
            times = {
                plan: timed([lambda x=x, p=p, plan=plan, way=way: way(x, p, None, plan) for p in copies])
                for plan in (taken, *fitting)
            }
            best = sorted(times, key=times.get)[:6]
            floor = (one.nbytes + 2 * count * (out + width)) / bandwidth * 1e6
            print(f"{shape} {form} rows {count}: floor {floor:.1f}, taken {times[taken]:.1f} {taken}", flush=True)
            print("   " + "; ".join(f"{times[plan]:.1f} {_short(plan)}" for plan in best), flush=True)


def _short(plan: tuple | weight_only.Tiling) -> str:
    return str(tuple(plan) if isinstance(plan, tuple) else plan)


def tune_rounded(bandwidth: float, matrices: list[str]) -> None:
    """The fastest plans of `few_rows` where x is rounded, and the one it takes, each behind a launch that rounds x, as in a step;
    beside it what the library takes for the same, and bfloat16."""
    for shape in matrices:
        out, width = SHAPES[shape]
        plain = [
            torch.randn(out, width, device="cuda", dtype=BF16) for _ in range(max(2, ROTATE_BYTES // (2 * out * width)))
        ]
        xs = {count: torch.randn(count, width, device="cuda", dtype=BF16) for count in (16, 32, 64)}
        bf16 = {count: timed([lambda w=w, x=x: multiply(x, w) for w in plain]) for count, x in xs.items()}
        for form in ("fp8 channel", "fp8 block"):
            one = packed_like(FORMS[form], (out, width))
            copies = [one] + [copied(one) for _ in range(max(1, min(8, ROTATE_BYTES // one.nbytes - 1)))]
            for count, x in xs.items():
                taken = rounded.plan_of(count, out, width, one.group > 0, x.device)
                plans = [taken, *fitting_plans(count, out, width, one.group > 0, num_processors(x.device))]
                with compile_ahead():
                    for plan in plans:
                        round_and_multiply(x, one, plan)
                times = {
                    plan: timed([lambda x=x, p=p, plan=plan: round_and_multiply(x, p, plan) for p in copies])
                    for plan in plans
                }
                library = ""
                if not one.group:
                    us = timed([lambda x=x, p=p: round_and_scaled_mm(x, p) for p in copies])
                    library = f", library {us:.1f}"
                floor = (one.nbytes + 2 * count * (out + width)) / bandwidth * 1e6
                print(
                    f"{shape} {form} rows {count}: floor {floor:.1f}, bf16 {bf16[count]:.1f}{library}, taken {times[taken]:.1f} "
                    f"{tuple(taken)}",
                    flush=True,
                )
                best = sorted(times, key=times.get)[:6]
                print("   " + "; ".join(f"{times[plan]:.1f} {tuple(plan)}" for plan in best), flush=True)


def fitting_plans(rows: int, out: int, width: int, grouped: bool, processors: int) -> list[rounded.Plan]:
    """Of all combinations those with work for half of the processors or more, for less than eight times as many programs as there
    are, with three turns each, and parts of y that are no more than W's own bytes."""
    found = []
    for (n, warps), turn, parts, stages in itertools.product(
        ((64, 4), (64, 8), (128, 4), (128, 8), (256, 8)), (128, 256), (1, 2, 3, 4, 6, 8), (3, 4, 6)
    ):
        programs, block_m = -(-out // n) * parts, min(rows, rounded.TILE)
        fits = (n + block_m) * turn * stages <= shared_memory(torch.device("cuda")) - rounded.BESIDE
        if grouped and (turn != rounded.GROUP or n * block_m // warps > 2048):  # two sums of each number
            continue
        small = parts == 1 or 4 * parts * rows <= width
        if fits and small and 2 * programs >= processors and programs < 8 * processors and width >= 3 * turn * parts:
            found.append(rounded.Plan(n, turn, parts, warps, stages))
    return found


if __name__ == "__main__":
    run_main(main)
