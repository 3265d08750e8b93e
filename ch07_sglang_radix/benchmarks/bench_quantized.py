"""A model in full precision and in the formats of quantized checkpoints: what bytes saved are worth in tokens.

    python -m ch07_sglang_radix.benchmarks.bench_quantized --part gpu [--forms "bf16;awq"]  Qwen2.5-7B: D and A64, one GPU
    python -m ch07_sglang_radix.benchmarks.bench_quantized --part cpu                       the bundled model, Qwen2.5-0.5B's shape

D and A64 are those of bench_gpu.py. Random weights, rounded to nearest; embedding and LM head stay bfloat16. The floor of D is the
time in which the weights that a token needs can be read (all but the embedding), at the speed of a large copy on this GPU.

On a CPU: one rank, one thread, greedy, one request of 16 new tokens after 32, and 8 of them together, best of 3.
float32 and bfloat16 are full precision; a form in codes is what `--quantized-compute` makes of it.

Writes figures/bench_quantized_gpu.csv (several calls, and kinds of GPU, add up), figures/bench_quantized_cpu.csv.
"""

import argparse
import csv
import gc
import shutil
import time
from pathlib import Path

import torch

from ch07_sglang_radix.benchmarks.gpu_workloads import Workloads
from ch07_sglang_radix.engine import Engine
from common.distributed.launch import run_main
from common.models.published_configs import save_random_weights, weights_folder
from common.models.quantized_tensors import held_tensors, weight_bytes
from common.quantization.make import CONFIG, config_of, make
from common.teaching.report import FIGURES, this_device, write_csv
from common.tiny_qwen import TINY_QWEN_PATH

NEW = 16  # tokens of a request on a CPU
FORMS = {  # name: (a format of make.py, quantized_compute)
    "bf16": (None, "auto"),
    "fp8 channel": ("w8a8_fp8", "auto"),
    "fp8 channel, weight-only": ("w8a8_fp8", "weight_only"),
    "fp8 block": ("fp8-block", "auto"),
    "int8": ("w8a8_int8", "auto"),
    "awq": ("awq", "auto"),
    "gptq": ("gptq", "auto"),
}
CPU_FORMS = {  # name: (format, quantized_compute, dtype)
    "float32": (None, "auto", "float32"),
    "bfloat16": (None, "auto", "bfloat16"),
    "int8, auto": ("w8a8_int8", "auto", "float32"),
    "int8, dequantised": ("w8a8_int8", "dequantise", "float32"),
    "int8, x rounded": ("w8a8_int8", "activations", "float32"),
    "fp8, auto": ("w8a8_fp8", "auto", "float32"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", required=True, choices=("gpu", "cpu"))
    parser.add_argument("--forms", help="some of them, separated by semicolons; default: all")
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder for the CSV")
    args = parser.parse_args()
    forms = FORMS if args.part == "gpu" else CPU_FORMS
    chosen = [name.strip() for name in args.forms.split(";")] if args.forms else list(forms)
    if unknown := [name for name in chosen if name not in forms]:
        raise ValueError(f"--forms: {', '.join(unknown)} is unknown; use {'; '.join(forms)}")
    path = args.out / f"bench_quantized_{args.part}.csv"
    earlier = list(csv.DictReader(path.open(encoding="utf-8"))) if args.part == "gpu" and path.exists() else []
    rows = [row for row in earlier if row["form"] not in chosen or row["device"] != this_device()]
    for row in on_a_gpu(chosen) if args.part == "gpu" else on_a_cpu(chosen):
        print(" ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        rows.append(row)
        write_csv(rows, path)  # of each as it comes: a form that fails takes no other's figures with it


def quantized_copy(source: Path, name: str | None, device: str) -> Path:
    """The checkpoint in that format, beside it; rounded on `device`, which is faster."""
    if name is None:
        return source
    out = source.with_name(f"{source.name}-{name}")
    if not (out / CONFIG).exists():  # it is written last
        shutil.rmtree(out, ignore_errors=True)
        make(source, out, config_of(name), device=device)
    return out


def on_a_gpu(chosen: list[str]):
    from common.kernels.timing import copy_bandwidth  # noqa: PLC0415, needs a GPU

    if not torch.cuda.is_available():
        raise ValueError("--part gpu needs an NVIDIA GPU, and there is none; --part cpu measures a CPU")
    bandwidth, device = copy_bandwidth(), this_device()
    source = save_random_weights("Qwen2.5-7B", weights_folder("Qwen2.5-7B"), "cuda")
    for form in chosen:
        torch.cuda.empty_cache()
        name, compute = FORMS[form]
        folder = quantized_copy(source, name, "cuda")
        torch.cuda.empty_cache()
        began = time.perf_counter()
        engine = Engine(str(folder), device="cuda", dtype="bfloat16", quantized_compute=compute)
        ready = time.perf_counter() - began
        work = Workloads(engine)
        work.d(32)
        d = min(work.d() for _ in range(2))
        a64 = max(work.a(64) for _ in range(2))
        size = read_a_token(engine)
        yield {
            "device": device, "form": form, "MB a token": round(size / 1e6, 1), "floor ms": round(size / bandwidth * 1e3, 3),
            "D ms a token": round(d, 3), "A64 tokens/s": round(a64, 1), "s to ready": round(ready, 1),
        }  # fmt: skip
        engine.shutdown()
        engine = work = None  # the next one needs the room, and its checkpoint room on the disk
        gc.collect()
        following = [FORMS[other][0] for other in chosen[chosen.index(form) + 1 :]]
        if name is not None and name not in following:
            shutil.rmtree(folder)


def read_a_token(engine: Engine) -> int:
    """Bytes of all weights but the embedding's."""
    return sum(
        x.nbytes for name, x in held_tensors(engine.scheduler.wrapper.model).items() if "embed_tokens" not in name
    )


def on_a_cpu(chosen: list[str]):
    torch.set_num_threads(1)
    models = {"bundled": TINY_QWEN_PATH, "Qwen2.5-0.5B": weights_folder("Qwen2.5-0.5B")}
    save_random_weights("Qwen2.5-0.5B", models["Qwen2.5-0.5B"])
    copies = weights_folder("bundled")
    if not copies.exists():
        shutil.copytree(TINY_QWEN_PATH, copies)
    models["bundled"] = copies
    for model, source in models.items():
        for form in chosen:
            name, compute, dtype = CPU_FORMS[form]
            folder = quantized_copy(source, name, "cpu")
            engine = Engine(str(folder), device="cpu", dtype=dtype, quantized_compute=compute, skip_tokenizer_init=True)
            speeds = {}
            for count in (1, 8):
                prompts = [[3 + (7 * i + j) % 200 for j in range(32)] for i in range(count)]
                params = {"max_new_tokens": NEW, "temperature": 0.0, "ignore_eos": True}
                best = 0.0
                for _ in range(3):
                    engine.flush_cache()
                    began = time.perf_counter()
                    engine.generate(input_ids=prompts, sampling_params=params)
                    best = max(best, count * NEW / (time.perf_counter() - began))
                speeds[f"tokens/s of {count}"] = round(best, 2)
            size = weight_bytes(engine.scheduler.wrapper.model)
            yield {"model": model, "form": form, "MB": round(size / 1e6, 2), **speeds}
            engine.shutdown()


if __name__ == "__main__":
    run_main(main)
