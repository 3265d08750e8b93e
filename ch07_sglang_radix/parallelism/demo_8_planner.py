"""Which layout? Three machines, three answers, all from the same few numbers.

    python ch07_sglang_radix/parallelism/demo_8_planner.py
    python ch07_sglang_radix/parallelism/demo_8_planner.py --machine FILE    # a laptop that measure_links.py has measured

1. A laptop with two cores, whose speed was measured (figures/machine.json): is it worth it to cut a small model in two?
2. Two GPUs, over NVLink or PCIe: for one request, and for many?
3. Sixteen GPUs on two hosts and a model that none of them can hold.

Nothing is run: a rank's bytes are counted, and times are bounds (common/planner/bounds.py). For other models and
machines: python -m common.distributed.plan.
"""

import argparse
import textwrap
from pathlib import Path

import torch

from common.distributed.launch import run_main
from common.distributed.machines import Machine
from common.models.published_configs import model_shape
from common.planner.bounds import Bound
from common.planner.choice import GB, all_bounds, refuse_if_none_fits, room_of, why
from common.planner.plan import Load
from common.teaching.report import FIGURES
from common.teaching.show import check, heading, table

FRACTION = 0.9  # of a rank's memory
BATCHES = (1, 16, 256, 2048)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", type=Path, default=FIGURES / "machine.json")
    laptop(Machine.from_file(parser.parse_args().machine))
    two_gpus()
    sixteen_gpus()


def laptop(machine: Machine) -> None:
    heading("1. SmolLM2-135M in float32 on two cores, 8 requests of 512 tokens")
    load = Load(512, 8, torch.float32, torch.float32)
    alone = plan("SmolLM2-135M", 1, load, machine)[0]
    two = plan("SmolLM2-135M", 2, load, machine)
    show([alone, *two])
    explain(two, load, 2)
    by = {str(b.way): b for b in two}
    check("two copies say nothing, two halves wait for each other 61 times a token",
          not by["dp2"].said and sum(m.times for m in by["tp2"].said if m.op == "all_reduce") == 61)  # fmt: skip
    one = Load(512, 1, torch.float32, torch.float32)
    stages = next(b for b in plan("SmolLM2-135M", 2, one, machine) if str(b.way) == "pp2")
    check("for one request two stages gain nothing: the second waits for the first",
          stages.seconds > 0.95 * plan("SmolLM2-135M", 1, one, machine)[0].seconds)  # fmt: skip


def two_gpus() -> None:
    heading("2. Qwen2.5-7B on two H100, requests of 512 tokens: the quickest layout, and what copies (dp2) would take")
    load, rows, best = Load(512, 1), [], {}
    for link in ("nvlink", "pcie"):
        for batch in BATCHES:
            load = Load(512, batch)
            found = plan("Qwen2.5-7B", 2, load, Machine.of_gpus("H100", link))
            copies = next(b for b in found if str(b.way) == "dp2")
            best[link, batch] = found[0]
            parts = [1e3 * found[0].parts[part] for part in ("weights", "kv", "compute", "messages")]
            rows.append((link, batch, str(found[0].way), 1e3 * found[0].seconds, *parts, 1e3 * copies.seconds))
    table(("link", "requests", "take", "ms a token", "weights", "KV", "compute", "messages", "dp2, ms"), rows)
    check("one request: two halves of the layers, over either link; each is read in half the time",
          all(best[link, 1].way.layout.tp == 2 for link in ("nvlink", "pcie")))  # fmt: skip
    check("2,048 requests: the sums of so many rows take longer than reading the other half of the weights",
          all(best[link, 2048].way.layout.dp == 2 for link in ("nvlink", "pcie")))  # fmt: skip
    turn = {
        link: max(batch for batch in BATCHES if best[link, batch].way.layout.tp == 2) for link in ("nvlink", "pcie")
    }
    check(f"over PCIe copies win earlier: halves are quicker up to {turn['pcie']} requests there, {turn['nvlink']} over NVLink",
          turn["pcie"] < turn["nvlink"])  # fmt: skip


def sixteen_gpus() -> None:
    heading("3. Qwen2.5-72B on 16 H100 of 80 GB, two hosts of 8, 64 requests of 8,192 tokens")
    load = Load(8192, 64)
    try:
        plan("Qwen2.5-72B", 1, load, Machine.of_gpus("H100"))
    except ValueError as error:
        print(f"  on one: {error}")
    for link, network in (("nvlink", "infiniband"), ("nvlink", "ethernet"), ("ethernet", "ethernet")):
        found = plan("Qwen2.5-72B", 16, load, Machine.of_gpus("H100", link, network))
        names = "16 hosts of one GPU, Ethernet" if link == "ethernet" else f"NVLink in a host, {network} between them"
        print(f"\n{names}:")
        show(one_of_each_shape(found)[:4])
        explain(found, load, 16)
        if link == "nvlink":
            first = found[0].way.layout
            check("no sum leaves its host: at most 8 ranks cut a layer", first.tp <= 8)


def plan(model: str, gpus: int, load: Load, machine: Machine) -> list[Bound]:
    """All layouts, the best first. Raises ValueError if none fits."""
    config = model_shape(model)
    found = all_bounds(config, gpus, load, machine, room_of(machine, gpus, None, FRACTION))
    refuse_if_none_fits(found, config, model, gpus, load, machine, FRACTION, None)
    return found


def one_of_each_shape(bounds: list[Bound]) -> list[Bound]:
    """The best of those with the same tp, pp and dp."""
    found: dict[tuple[int, int, int], Bound] = {}
    for b in bounds:
        found.setdefault((b.way.layout.tp, b.way.layout.pp, b.way.layout.dp), b)
    return list(found.values())


def explain(bounds: list[Bound], load: Load, gpus: int) -> None:
    print(f"\n{textwrap.fill(why(bounds, load, gpus), 118, initial_indent='  ', subsequent_indent='  ')}")


def show(bounds: list[Bound]) -> None:
    rows = [
        (
            str(b.way), b.held.weights / GB, b.held.kv / GB, sum(m.times for m in b.said), b.wire_bytes / 1e6,
            1e3 * b.seconds, *(1e3 * b.parts[part] for part in ("weights", "kv", "compute", "messages", "waiting")),
            round(b.tokens_per_s),
        )
        for b in bounds
    ]  # fmt: skip
    table(("layout", "weights, GB", "KV, GB", "messages", "MB on the wire", "ms a token", "weights", "KV", "compute",
           "messages", "waiting", "tokens/s"), rows)  # fmt: skip


if __name__ == "__main__":
    run_main(main)
