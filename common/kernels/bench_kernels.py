"""Every kernel at the shapes of real models: is it right, and how far is it from the time its bytes need?

    python -m common.kernels.bench_kernels                       # under two minutes; writes figures/bench_kernels.csv
    python -m common.kernels.bench_kernels --only "of pages"     # the kernels whose names say so, and no CSV

The floor is the bytes a kernel must move over the bandwidth of a large copy on this GPU, measured first. Each
kernel runs on rotating buffers too large for the L2 cache, captured into one graph; the median of ten
replays counts. `plain us` is PyTorch's own way to the same numbers, timed alike (it may be several kernels), and
`error` the relative distance to it in float32. Of `linear and silu_and_mul`, one launch, plain is these two by kernels of ours.

Who multiplies in `linear` is measured first, as at the start of an engine (linear_choice.py): between other kernels, where the
library loses what it does not lose here. So a kernel may be taken that is a little slower than plain in this table. Where the
library is taken the row says so: it is then the same call twice.
"""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from common.attention.contract import AttentionMetadata
from common.attention.kv_cache import PagedKVCache
from common.attention.kv_format import KV_DTYPES, row_bytes
from common.attention.torch_native import TorchNativeAttention
from common.distributed.launch import run_main
from common.kernels import fused, linear, linear_choice, sampling
from common.kernels.paged_attention import TritonAttention
from common.kernels.timing import ROTATE_BYTES, copy_bandwidth, timed
from common.layers.linear import multiply
from common.models.published_configs import published_config
from common.parallel_state import TPGroup
from common.sampling.batch import SamplingBatch, SamplingRow
from common.sampling.params import SamplingParams
from common.sampling.sampler import _sample
from common.teaching.report import FIGURES, write_csv

MODELS = ("Qwen2.5-0.5B", "Qwen3-0.6B", "Qwen2.5-7B")
BF16 = torch.bfloat16
BY_LIBRARY = "linear, by the library"
SAMPLINGS = {
    "greedy": {},
    "temperature": {"temperature": 0.6},
    "top-k 50, top-p 0.9": {"temperature": 0.6, "top_k": 50, "top_p": 0.9},
    "top-p 0.9": {"temperature": 0.6, "top_p": 0.9},
    "min-p 0.05": {"temperature": 0.6, "min_p": 0.05},
}
# of normal logits: with 1, top-p 0.9 keeps some 53,000 tokens of 152,000; with 6, four, as where a model is sure
SPREADS = {"": 1, ", peaked": 6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of a kernel's name")
    only = parser.parse_args().only
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    print(f"copy: {bandwidth / 1e12:.2f} TB/s")
    for name in MODELS if only in BY_LIBRARY else ():
        choose_linear(name)
    cases = [case for name in MODELS for case in model_cases(name) if only in case.kernel]
    rows = []
    for case in tqdm(cases, desc="kernels", disable=None):
        rows.append(measure(case, bandwidth))
    for row in rows:
        print(
            " ".join(
                f"{key} {value}" if key not in ("kernel", "model", "shape") else f"{value:24s}"
                for key, value in row.items()
            )
        )
    if not only:
        write_csv(rows, Path(FIGURES / "bench_kernels.csv"))


class Case:
    """One kernel at one shape. `make()` gives fresh inputs as (call, plain call), each returning its result."""

    def __init__(self, kernel: str, model: str, shape: str, size: int, make: Callable, footprint: int | None = None):
        self.kernel, self.model, self.shape, self.bytes, self.make = kernel, model, shape, size, make
        self.copies = max(1, min(64, ROTATE_BYTES // (footprint or size)))


def measure(case: Case, bandwidth: float) -> dict:
    made = [case.make() for _ in range(case.copies)]
    got, want = made[0][0]().float(), made[0][1]().float()
    error = ((got - want).norm() / want.norm()).item() if got.is_floating_point() else 0.0
    us, plain = (timed([pair[i] for pair in made]) for i in (0, 1))
    floor = case.bytes / bandwidth * 1e6
    return {
        "kernel": case.kernel, "model": case.model, "shape": case.shape, "MB": round(case.bytes / 1e6, 3),
        "floor us": round(floor, 2), "us": round(us, 2), "plain us": round(plain, 2), "error": f"{error:.1e}",
    }  # fmt: skip


def model_cases(name: str) -> list[Case]:
    """The kernels of decode steps (of one sequence, of a few, of many), and of a prefill."""
    config = published_config(name)
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    hq, hkv, width, mlp = (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.hidden_size,
        config.intermediate_size,
    )
    shapes, cases = linear_shapes(name), []
    for rows, (label, (n, k)) in itertools.product((1, 8, 64), shapes.items()):
        kernel = linear_choice.wanted(torch.empty(rows, k, dtype=BF16, device="meta"), torch.empty(n, k, device="meta"))
        size, make = 2 * n * k, lambda n=n, k=k, rows=rows: linear_inputs(n, k, rows)
        cases.append(Case("linear" if kernel else BY_LIBRARY, name, f"{label} {rows}x{k} -> {n}", size, make))
    n, k = shapes["gate_up"]
    for rows in (1, 16, 64):
        size, make = 2 * n * k, lambda rows=rows: gated_inputs(*shapes["gate_up"], rows)
        cases.append(Case("linear and silu_and_mul", name, f"gate_up {rows}x{k} -> {n // 2}", size, make))
    for label in ("qkv", "down"):
        n, k = shapes[label]
        for rows in (1, 64, 256, 2048):
            size, make = 2 * n * k, lambda n=n, k=k, rows=rows: linear_inputs(n, k, rows, linear.fixed_linear)
            cases.append(Case("linear in one order", name, f"{label} {rows}x{k} -> {n}", size, make))
    for batch in (1, 128):
        cases += [
            Case("add_rms_norm", name, f"{batch}x{width}", 8 * batch * width, lambda b=batch: norm_inputs(b, width)),
            Case("silu_and_mul", name, f"{batch}x{mlp}", 6 * batch * mlp, lambda b=batch: silu_inputs(b, mlp)),
            Case(
                "turn",
                name,
                f"{batch}x({hq}+{hkv})x{d}",
                4 * batch * (hq + hkv) * d,
                lambda b=batch: turn_inputs(b, hq, hkv, d),
            ),
        ]
    for label, contexts in (("1 x 400", [400]), ("128 x 100..1500", spread(128)), ("256 x 2200", [2200] * 256)):
        size = 4 * sum(contexts) * hkv * d
        cases.append(
            Case(
                "decode attention", name, label, size, lambda c=contexts: attention_inputs([1] * len(c), c, hq, hkv, d)
            )
        )
    for dtype in ("fp8_e4m3", "fp8_e5m2", "int8", "int4"):
        kept, contexts = KV_DTYPES[dtype], [2200] * 256
        cases.append(
            Case(
                f"decode attention of pages in {dtype}", name, "256 x 2200", 2 * sum(contexts) * hkv * row_bytes(kept, d),
                lambda c=contexts, kept=kept: attention_inputs([1] * len(c), c, hq, hkv, d, kept),
            )
        )  # fmt: skip
    for label, new, contexts in (
        ("8 x 1024 new", [1024] * 8, [1024] * 8),
        ("16 x 128 new of 2176", [128] * 16, [2176] * 16),
    ):
        size = 4 * sum(contexts) * hkv * d + 4 * sum(new) * hq * d
        cases.append(
            Case("extend attention", name, label, size, lambda n=new, c=contexts: attention_inputs(n, c, hq, hkv, d))
        )
    for label, params in SAMPLINGS.items():
        for (peaked, spread_of), batch in itertools.product(SPREADS.items(), (1, 16, 128)):
            if spread_of == 1 or label.startswith(("top-p", "min-p")):
                cases.append(
                    Case(
                        f"sampling, {label}{peaked}", name, f"{batch}x{config.vocab_size}", 2 * batch * config.vocab_size,
                        lambda b=batch, p=params, s=spread_of: sampling_inputs(b, config.vocab_size, p, s),
                    )
                )  # fmt: skip
    return cases


def spread(count: int) -> list[int]:
    return torch.linspace(100, 1500, count).int().tolist()


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=BF16)


def linear_shapes(name: str) -> dict[str, tuple[int, int]]:
    """W [out, in] of a layer, and of the head."""
    config = published_config(name)
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    hq, hkv, width, mlp = (
        config.num_attention_heads, config.num_key_value_heads, config.hidden_size, config.intermediate_size,
    )  # fmt: skip
    return {
        "qkv": ((hq + 2 * hkv) * d, width), "o": (width, hq * d), "gate_up": (2 * mlp, width), "down": (width, mlp),
        "lm_head": (config.vocab_size, width),
    }  # fmt: skip


def choose_linear(name: str) -> None:
    """Measure who multiplies by the matrices of this model."""
    met = {
        linear_choice.Matrix(n, k, str(BF16), False): {i: (randn(n, k), None)}
        for i, (n, k) in enumerate(linear_shapes(name).values())
    }
    for choice in linear_choice.choose(met, TPGroup()):
        print(f"{name} {choice}")


def linear_inputs(n: int, k: int, rows: int, multiply: Callable = multiply):
    x, weight = randn(rows, k), randn(n, k)
    return lambda: multiply(x, weight), lambda: F.linear(x, weight)


def gated_inputs(n: int, k: int, rows: int):
    """By one launch, and beside it, as plain, by two."""
    x, weight = randn(rows, k), randn(n, k)
    return lambda: linear.linear(x, weight, gated=True), lambda: fused.silu_and_mul(linear.linear(x, weight))


def norm_inputs(tokens: int, width: int):
    x, residual, weight = randn(tokens, width), randn(tokens, width), randn(width)
    return lambda: fused.add_rms_norm(x, residual, weight, 1e-6)[0], lambda: F.rms_norm(
        x + residual, (width,), weight, 1e-6
    )


def silu_inputs(tokens: int, width: int):
    x = randn(tokens, 2 * width)
    return lambda: fused.silu_and_mul(x), lambda: F.silu(x[:, :width]) * x[:, width:]


def turn_inputs(tokens: int, hq: int, hkv: int, d: int):
    q, k, cos, sin = randn(tokens, hq, d), randn(tokens, hkv, d), randn(tokens, 1, d), randn(tokens, 1, d)

    def plain():
        return torch.cat([x * cos + x.roll(d // 2, dims=-1) * sin for x in (q, k)], dim=1)

    def kernel():
        return torch.cat(fused.turn(q, k, cos, sin), dim=1)

    return kernel, plain


def attention_inputs(new: list[int], contexts: list[int], hq: int, hkv: int, d: int, kept: torch.dtype = BF16):
    pages = [-(-n // 16) for n in contexts]
    cache = PagedKVCache(1, sum(pages), 16, hkv, d, kept, "cuda")
    for slots in torch.arange(sum(pages) * 16, device="cuda").split(1 << 16):
        cache.write(0, slots, randn(len(slots), hkv, d), randn(len(slots), hkv, d))
    order, table = torch.randperm(sum(pages)), torch.zeros(len(pages), max(pages), dtype=torch.int64)
    for b, own in enumerate(order.split(pages)):
        table[b, : len(own)] = own
    slots = torch.cat([
        table[b, torch.arange(c - n, c) // 16] * 16 + torch.arange(c - n, c) % 16
        for b, (n, c) in enumerate(zip(new, contexts, strict=True))
    ])  # fmt: skip
    starts = torch.tensor([0, *new]).cumsum(0)
    meta = AttentionMetadata(slots.cuda(), table.cuda(), starts.cuda(), torch.tensor(contexts).cuda(), 16, max(new))
    q, k, v = (randn(sum(new), h, d) for h in (hq, hkv, hkv))
    attention = TritonAttention(cache, meta)
    plain = TorchNativeAttention(cache, meta)
    return lambda: attention(0, q, k, v), lambda: plain(0, q, k, v)


def sampling_inputs(batch: int, vocab: int, params: dict, spread: float):
    logits = randn(batch, vocab) * spread
    rows = SamplingBatch([SamplingRow(SamplingParams(**params), seed, [], []) for seed in range(batch)])
    rows.columns(logits.device)
    u = rows.uniforms(logits.device)
    rows.uniforms = lambda device: u  # on the device already: a graph cannot fetch it
    return lambda: sampling.sample(logits, rows)[0], lambda: _sample(logits.float(), rows)[0]


if __name__ == "__main__":
    run_main(main)
