"""Which layout for a model, some GPUs and a load: every legal one, what it holds, says and needs at least, and which to take.

    python -m common.distributed.plan --model Qwen2.5-72B --gpus 16 --gpu-memory 80GB --context 8192 --batch 64
    python -m common.distributed.plan --model Qwen2.5-72B --gpus 2 --context 8192 --batch 64 --quantization awq --kv-dtype int8
    python -m common.distributed.plan --model SmolLM2-135M --gpus 2 --machine figures/machine.json --context 512 --batch 8

Weights and pages are what a rank of this repository holds, to the byte (tests compare them with the real model). Times are
bounds: bytes over bandwidth, arithmetic over peak, and messages by the cost model (common/planner/bounds.py); of experts what is
to be expected. `python -m common.distributed.check_plan` puts them beside what is measured here. GPUs and links, and whose
messages these are: machines.py.
"""

import argparse
import re
import textwrap
from dataclasses import replace
from pathlib import Path

import torch

from common.attention.kv_format import KV_DTYPES, kv_dtype, kv_format, kv_name
from common.distributed.launch import run_main
from common.distributed.machines import GPUS, GPUS_A_HOST, NETWORKS, Machine
from common.models.config import ModelConfig
from common.models.published_configs import model_shape
from common.planner.bounds import Bound
from common.planner.choice import GB, MOST_GPUS, all_bounds, refuse_if_none_fits, room_of, why
from common.planner.plan import Load
from common.quantization.config import AT_LOAD, KEYS, QuantizationConfig
from common.quantization.make import CONFIGS, config_of
from common.quantization.method import Hardware
from common.teaching.report import write_json
from common.teaching.show import table
from common.values import new_file

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
QUANTIZATIONS = tuple(dict.fromkeys((*AT_LOAD, *CONFIGS)))
WIDTH = 120  # of a line of words
UNITS = {"": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def main() -> None:
    args = arguments()
    machine = the_machine(args)
    dtype = DTYPES[args.dtype or ("float32" if "bfloat16" not in machine.flops else "bfloat16")]
    config = quantized(model_shape(args.model), args.quantization, args.model)
    if args.context > config.max_position_embeddings:
        raise ValueError(
            f"--context {args.context}: {args.model} has positions for {config.max_position_embeddings} tokens"
        )
    hardware = Hardware("cuda", machine.capability) if machine.capability else Hardware("cpu")
    pages = kv_dtype(args.kv_cache_dtype) or dtype
    load = Load(args.context, args.batch, dtype, pages, args.page_size, args.chunk, hardware)
    memory = bytes_of(args.gpu_memory)
    room = room_of(machine, args.gpus, memory, args.mem_fraction)
    bounds = all_bounds(config, args.gpus, load, machine, room)
    refuse_if_none_fits(bounds, config, args.model, args.gpus, load, machine, args.mem_fraction, memory)
    hosts = -(-args.gpus // machine.ranks_a_host)
    print(
        f"{args.model}, {str(dtype).removeprefix('torch.')}, {said_of_codes(config, pages)}{args.gpus} x {machine.name}"
        f"{f' on {hosts} hosts' * (hosts > 1)}, {args.batch} requests of {args.context:,} tokens; "
        f"{room / GB:.1f} GB a rank to plan with"
    )
    show(bounds)
    reason = why(bounds, load, args.gpus)
    print(f"\n{textwrap.fill(reason, WIDTH)}")
    if args.json:
        write_json({"machine": machine.name, "why": reason, "layouts": [as_json(b) for b in bounds]}, args.json)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", required=True, help="a published one (published_configs.py), or a folder with a config.json"
    )
    parser.add_argument("--gpus", type=int, required=True, help="how many; all are used")
    parser.add_argument("--context", type=int, required=True, help="tokens of a request at its longest")
    parser.add_argument("--batch", type=int, required=True, help="requests at once, over all replicas")
    parser.add_argument("--gpu", default="H100", help=f"{', '.join(GPUS)}; default: H100")
    parser.add_argument("--gpu-memory", metavar="80GB", help="default: what that GPU has")
    parser.add_argument(
        "--interconnect", choices=("nvlink", "pcie", "ethernet"), help="inside a host; default: the GPU's best"
    )
    parser.add_argument("--network", choices=NETWORKS, default="infiniband", help="between hosts")
    parser.add_argument("--gpus-per-host", type=int, help=f"default: {GPUS_A_HOST}")
    parser.add_argument(
        "--machine", type=Path, metavar="FILE", help="instead of a GPU: what measure_links.py has written"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16, float32 on a CPU")
    parser.add_argument(
        "--kv-cache-dtype",
        "--kv-dtype",
        choices=("auto", *KV_DTYPES),
        default="auto",
        help="of the pages; auto: as --dtype",
    )
    parser.add_argument(
        "--quantization", choices=QUANTIZATIONS,
        help="of the weights, as at load or as make.py writes it; default: the checkpoint's own",
    )  # fmt: skip
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=8192, help="prompt tokens of a step at most")
    parser.add_argument(
        "--mem-fraction", type=float, default=0.9, help="of a rank's memory; the rest is for what is not planned"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    args = parser.parse_args()
    for name in ("gpus", "context", "batch", "page_size", "chunk", "gpus_per_host"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if args.gpus > MOST_GPUS:
        raise ValueError(f"--gpus {args.gpus}: at most {MOST_GPUS} are planned")
    new_file("--json", args.json and str(args.json))  # before anything is computed
    if not 0 < args.mem_fraction <= 1:
        raise ValueError(f"--mem-fraction {args.mem_fraction} must be in (0, 1]")
    return args


def quantized(config: ModelConfig, asked: str | None, where: str) -> ModelConfig:
    """Weights rounded at load, or in a checkpoint of that format. Raises ValueError for one that is quantized otherwise."""
    if asked in AT_LOAD or asked is None or config.quantization:
        return replace(config, quantization=QuantizationConfig.settled(config.quantization, asked, where))
    return replace(config, quantization=QuantizationConfig.from_checkpoint({KEYS[0]: config_of(asked)}, asked))


def said_of_codes(config: ModelConfig, pages: torch.dtype) -> str:
    """Of weights and pages that hold codes, for the headline."""
    weights = f"weights {config.quantization.method}, " if config.quantization else ""
    return weights + (f"pages {kv_name(pages)}, " if kv_format(pages).coded else "")


def the_machine(args: argparse.Namespace) -> Machine:
    machine = (
        Machine.from_file(args.machine) if args.machine else Machine.of_gpus(args.gpu, args.interconnect, args.network)
    )
    return machine.with_hosts_of(args.gpus_per_host) if args.gpus_per_host else machine


def bytes_of(text: str | None) -> int | None:
    """80GB (10^9), 80GiB (2^30) or plain bytes."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text)
    if not found or found[2].upper() not in UNITS or not float(found[1]):
        raise ValueError(
            f"--gpu-memory {text!r}: use a number of bytes, or one with MB, GB, TB, MiB, GiB or TiB behind it"
        )
    return int(float(found[1]) * UNITS[found[2].upper()])


def show(bounds: list[Bound]) -> None:
    """A line a layout. Bytes are those of a rank's tensors in a step that gives every request a token, and on the wire
    those between all ranks of its groups."""
    rows = [
        (
            str(b.way), b.held.weights / GB, b.held.kv / GB, b.held.activations / GB, b.held.total / GB,
            sum(m.times for m in b.said), sum(m.times * m.nbytes for m in b.said) / 1e6, b.wire_bytes / 1e6,
            1e3 * b.seconds, round(b.tokens_per_s), 1e3 * b.first_token_s, "" if b.fits else "does not fit",
        )
        for b in bounds
    ]  # fmt: skip
    table(
        ("layout", "weights", "KV", "activ.", "GB a rank", "messages", "MB", "MB on the wire", "ms a token >=", "tokens/s <=",
         "first token ms >=", ""), rows,
    )  # fmt: skip


def as_json(b: Bound) -> dict:
    return {
        "layout": str(b.way), "fits": b.fits, "weights_bytes": b.held.weights, "kv_bytes": b.held.kv,
        "activation_bytes": b.held.activations, "room_bytes": b.room, "messages": [m._asdict() for m in b.said],
        "wire_bytes": b.wire_bytes, "seconds_a_token": b.seconds, "seconds_by_part": b.parts, "tokens_per_s": b.tokens_per_s,
        "first_token_s": b.first_token_s,
    }  # fmt: skip


if __name__ == "__main__":
    run_main(main)
