"""A layer of experts in its three forms, against the bytes it has to move; whole models: bench_expert_models.py.

    python -m ch07_sglang_radix.benchmarks.bench_experts --part forms      CPU: loop and grouped; 2 minutes
    python -m ch07_sglang_radix.benchmarks.bench_experts --part kernels    GPU: loop, grouped and triton; a minute
    python -m ch07_sglang_radix.benchmarks.bench_experts --part tune       GPU: other tiles than the kernels choose; minutes
    python -m ch07_sglang_radix.benchmarks.bench_experts --part latent     GPU: decode over latent pages, kernel and plain form

Layers have the shapes of Qwen3-30B-A3B (128 experts of 768, 8 a token) and DeepSeek-V2-Lite (64 of 1408, 6 a token), hidden
size 2048, in bfloat16; on a CPU a quarter of the widths, float32. Every token's experts are drawn at random, all alike. The
floor is what must be read: 3 F D numbers of each expert that was touched, once, at the bandwidth of a large copy; behind
some hundred tokens an expert, the products need longer. Where vLLM is installed its Triton kernel is timed as a peer.

Writes figures/experts_<part>.csv; on a GPU calls are captured into graphs (bench_kernels.py), the loop asks the CPU and is not.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch

from common.distributed.launch import run_main
from common.kernels.timing import copy_bandwidth, timed
from common.layers.moe_runner import pick_runner
from common.teaching.report import FIGURES, write_csv

TOKENS = (1, 16, 128, 2048, 8192)
ROUTINGS = 8  # draws of a router that take turns: a step's experts are not the last one's, and not in the cache


@dataclass(frozen=True)
class LayerShape:
    """E experts, k a token, D hidden, F of one expert; dtype."""

    name: str
    experts: int
    top: int
    hidden: int
    width: int
    dtype: torch.dtype = torch.bfloat16

    def expert_bytes(self) -> int:
        return 3 * self.width * self.hidden * self.dtype.itemsize

    def smaller(self, factor: int) -> "LayerShape":
        name = f"{self.name}, widths / {factor}"
        return LayerShape(name, self.experts, self.top, self.hidden // factor, self.width // factor, torch.float32)


LAYERS = (LayerShape("Qwen3-30B-A3B", 128, 8, 2048, 768), LayerShape("DeepSeek-V2-Lite", 64, 6, 2048, 1408))


class Layer:
    """Random weights of one layer, and rows for it."""

    def __init__(self, shape: LayerShape, device: torch.device):
        torch.manual_seed(0)
        self.shape, self.device = shape, device
        self.w13 = self._random(shape.experts, 2 * shape.width, shape.hidden) * shape.hidden**-0.5
        self.w2 = self._random(shape.experts, shape.hidden, shape.width) * shape.width**-0.5

    def _random(self, *size: int) -> torch.Tensor:
        return torch.randn(size, dtype=self.shape.dtype, device=self.device)

    def inputs(self, tokens: int) -> list[tuple[torch.Tensor, ...]]:
        """ROUTINGS times (x, weights, experts, w13, w2)."""
        every = []
        for _ in range(ROUTINGS):
            chances = torch.rand(tokens, self.shape.experts, device=self.device)
            weights, experts = chances.topk(self.shape.top, dim=-1)
            weights = (weights / weights.sum(-1, keepdim=True)).to(self.shape.dtype)
            every.append((self._random(tokens, self.shape.hidden), weights, experts, self.w13, self.w2))
        return every


def touched(inputs: list[tuple[torch.Tensor, ...]]) -> float:
    """Experts that a call reads, on average."""
    return statistics.mean(len(experts.unique()) for _, _, experts, _, _ in inputs)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


# --- one layer


def forms(shape: LayerShape, tokens: tuple[int, ...], rounds: int, threads: int) -> list[dict]:
    """loop and grouped on a CPU, in turn. One thread is timed by what it computes, and not while others have its core."""
    device, clock = torch.device("cpu"), time.process_time if threads == 1 else time.perf_counter
    torch.set_num_threads(threads)
    layer, rows = Layer(shape, device), []
    runners = {name: pick_runner(name, device).run for name in ("loop", "grouped")}
    for count in tokens:
        inputs = layer.inputs(count)
        times: dict[str, list[float]] = {name: [] for name in runners}
        error = relative_error(*(run(*inputs[0]) for run in runners.values()))
        for turn in range(rounds):
            for name, run in runners.items():
                began = clock()
                for each in inputs:
                    run(*each)
                if turn:  # the first one warms up
                    times[name].append((clock() - began) / len(inputs) * 1e3)
        reads = touched(inputs)
        for name, values in times.items():
            ms = statistics.median(values)
            rows.append({
                "layer": shape.name, "tokens": count, "form": name, "ms": round(ms, 3), "fastest": round(min(values), 3),
                "slowest": round(max(values), 3), "experts read": round(reads, 1),
                "MB": round(reads * shape.expert_bytes() / 1e6, 1),
                "of loop": round(statistics.median(times["loop"]) / ms, 2), "error": f"{error:.1e}", "threads": threads,
            })  # fmt: skip
            print(
                f"{shape.name}  {count:5d} tokens  {name:8s} {ms:9.3f} ms  {rows[-1]['of loop']:5.2f} x the loop",
                flush=True,
            )
    return rows


def published_kernel() -> Callable | None:
    """vLLM's fused experts with the face of a runner, where vLLM is installed."""
    try:
        from vllm.model_executor.layers.fused_moe import fused_experts  # noqa: PLC0415
    except ImportError:
        return None
    return lambda x, weights, experts, w13, w2: fused_experts(x, w13, w2, weights.float(), experts.int())


def kernels(shape: LayerShape, tokens: tuple[int, ...], bandwidth: float) -> list[dict]:
    """The three forms on a GPU, and vLLM's kernel if it is there."""

    device = torch.device("cuda")
    layer, rows = Layer(shape, device), []
    runners = {name: pick_runner(name, device).run for name in ("triton", "grouped")}
    if peer := published_kernel():
        runners["vLLM"] = peer
    loop = pick_runner("loop", device).run
    for count in tokens:
        inputs = layer.inputs(count)
        want, reads = loop(*inputs[0]), touched(inputs)
        row = {
            "layer": shape.name, "tokens": count, "experts read": round(reads, 1),
            "MB": round(reads * shape.expert_bytes() / 1e6, 1),
            "floor us": round(reads * shape.expert_bytes() / bandwidth * 1e6, 1),
        }  # fmt: skip
        for name, run in runners.items():
            row[f"{name} us"] = round(timed([lambda i=i, run=run: run(*i) for i in inputs]), 1)
            row[f"{name} error"] = f"{relative_error(run(*inputs[0]), want):.1e}"
        row["loop us"] = round(one_after_the_other([lambda i=i: loop(*i) for i in inputs]), 1)
        row["triton TFLOP/s"] = round(6e-6 * count * shape.top * shape.width * shape.hidden / row["triton us"], 1)
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return rows


def one_after_the_other(calls: list[Callable[[], object]]) -> float:
    """Microseconds a call that waits for the GPU itself: no graph can hold it. The median of five rounds."""
    times = []
    for _ in range(6):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for call in calls:
            call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / len(calls) * 1e6)
    return statistics.median(times[1:])


def tune(shape: LayerShape, tokens: tuple[int, ...]) -> list[dict]:
    """Each product in other ways than the kernels' own choice, the other one as it is chosen; best first."""
    from common.kernels import moe, moe_gemv  # noqa: PLC0415, needs Triton

    layer, rows = Layer(shape, torch.device("cuda")), []
    for count in tokens:
        inputs = layer.inputs(count)
        if count <= moe_gemv.TOKENS:
            given, tried = some_gemvs(shape)
            calls = {ways: [lambda i=i, w=ways: moe_gemv.run(*i, gemvs=w) for i in inputs] for ways in tried}
        else:
            given, tried = some_tiles(shape, count)
            calls = {ways: [lambda i=i, w=ways: moe.run(*i, tiles=w) for i in inputs] for ways in tried}
        us = {ways: timed(each) for ways, each in calls.items()}
        print(f"{shape.name}  {count} tokens: {us[given]:.1f} us as given {given}", flush=True)
        for ways in sorted(us, key=us.get)[:5]:
            print(f"    {us[ways]:8.1f} us  {ways}", flush=True)
            found = {"us": round(us[ways], 1), "given us": round(us[given], 1), "ways": str(ways)}
            rows.append({"layer": shape.name, "tokens": count, **found})
    return rows


def some_gemvs(shape: LayerShape):
    """What is given for one token, and with it what to try."""
    from common.kernels.moe_gemv import Gemv, gemvs_for  # noqa: PLC0415, needs Triton

    given, tried = gemvs_for(shape.hidden, shape.width, shape.top), []
    for rows, columns, warps in product((1, 2, 4), (256, 512, 1024, 2048), (2, 4, 8)):
        gemv, of_a_thread = Gemv(rows, columns, warps), rows * columns // (32 * warps)
        if 8 <= of_a_thread <= 64:
            tried.append(given._replace(gate_up=gemv))
        if of_a_thread <= 16 and columns < 2 * shape.width:
            tried.append(given._replace(down=gemv))
    return given, {given, *tried}


def some_tiles(shape: LayerShape, tokens: int):
    """What is given for so many tokens, and with it what to try, if the GPU has room for it."""
    from common.kernels.launch import num_processors, shared_memory  # noqa: PLC0415, needs Triton
    from common.kernels.moe import Gemm, tiles_for  # noqa: PLC0415

    device = torch.device("cuda")
    room, pairs = shared_memory(device), tokens * shape.top
    given = tiles_for(pairs, shape.experts, shape.width, shape.hidden, shape.dtype, num_processors(device), room)
    gemms = [
        Gemm(rows, columns, warps, stages)
        for rows, columns, warps, stages in product((16, 32, 64, 128), (64, 128), (4, 8), (3, 4))
        if rows * columns >= 2048
    ]
    tried = set()
    for block, gemm in product({16, given.block // 2, given.block, given.block * 2} - {8, 256}, gemms):
        tried.add(replace(given, block=block, gate_up=gemm))
        tried.add(replace(given, block=block, down=gemm))
    return given, {given, *(tiles for tiles in tried if needs(tiles) <= room)}


def needs(tiles) -> int:
    """Bytes of shared memory."""
    return max(2 * g.stages * g.columns * (n * g.rows + tiles.block) for n, g in ((2, tiles.gate_up), (1, tiles.down)))


def latent(bandwidth: float) -> list[dict]:
    """Decode over latent pages: DeepSeek-V2-Lite's 16 heads and DeepSeek-V3's 128, rows of 512 + 64."""
    from common.attention.contract import AttentionMetadata  # noqa: PLC0415
    from common.attention.kv_cache import PagedKVCache  # noqa: PLC0415
    from common.kernels import latent_attention  # noqa: PLC0415, needs Triton

    rows, page, width, rank = [], 16, 576, 512
    for heads, (batch, context) in product((16, 128), ((1, 400), (1, 32_000), (64, 1000), (128, 4000))):
        count = -(-context // page)
        table = torch.randperm(batch * count).view(batch, count)
        cache = PagedKVCache(1, batch * count, page, 1, width, torch.bfloat16, "cuda", planes=1)
        cache.kv.normal_()
        slots = table[:, (context - 1) // page] * page + (context - 1) % page
        lens = torch.full((batch,), context)
        meta = AttentionMetadata(
            *(t.cuda() for t in (slots, table, torch.arange(batch + 1), lens)), page, max_query_len=1
        )
        q = torch.randn(batch, heads, width, dtype=torch.bfloat16, device="cuda")
        space = latent_attention.LatentWorkspace(q, rank)

        def kernel(q=q, cache=cache, meta=meta, space=space):
            means = latent_attention.decode(q, cache.layer(0), cache.format, meta, width**-0.5, space)
            latent_attention.merge(means, meta, space)
            return means

        def plain(q=q, cache=cache, meta=meta, context=context):
            seen = cache.k[0, meta.page_table].flatten(1, 3)[:, None, :context]  # [B, 1, S, c + r]
            return torch.nn.functional.scaled_dot_product_attention(
                q[:, None], seen, seen[..., :rank], scale=width**-0.5
            )[:, 0]

        us = timed([kernel] * 4)
        size = 2 * batch * context * width
        rows.append({
            "heads": heads, "batch": batch, "context": context, "MB": round(size / 1e6, 1),
            "floor us": round(size / bandwidth * 1e6, 1), "us": round(us, 1), "plain us": round(timed([plain] * 4), 1),
            "error": f"{relative_error(kernel(), plain()):.1e}",
        })  # fmt: skip
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", required=True, choices=("forms", "kernels", "tune", "latent"))
    parser.add_argument(
        "--tokens", type=int, nargs="+", metavar="T", help="rows of a step (default: 1 16 128 2048 8192)"
    )
    parser.add_argument("--rounds", type=int, default=8, help="forms: rounds, of which the first does not count")
    parser.add_argument("--threads", type=int, default=1, help="forms: threads of torch")
    parser.add_argument("--shrink", type=int, default=4, help="forms: the widths are divided by this")
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder for the CSV")
    args = parser.parse_args()
    if not torch.cuda.is_available() and args.part != "forms":
        raise ValueError(f"--part {args.part} needs an NVIDIA GPU, and there is none; --part forms measures a CPU")
    if args.part == "forms":
        tokens = tuple(args.tokens or (1, 4, 16, 128, 512))
        rows = forms(LAYERS[0].smaller(args.shrink), tokens, args.rounds, args.threads)
    else:
        tokens = tuple(args.tokens or TOKENS)
        if args.part == "tune":
            rows = [row for shape in LAYERS for row in tune(shape, tokens)]
        else:
            bandwidth = copy_bandwidth()
            print(f"copy: {bandwidth / 1e12:.2f} TB/s")
            rows = (
                latent(bandwidth)
                if args.part == "latent"
                else [r for s in LAYERS for r in kernels(s, tokens, bandwidth)]
            )
    write_csv(rows, args.out / f"experts_{args.part}.csv")


if __name__ == "__main__":
    run_main(main)
