"""What it brings to compute the shared expert while rows are on their way to the others (`MoE._send_rows` in common/layers/moe.py).

    torchrun --nproc_per_node=2 -m ch07_sglang_radix.benchmarks.bench_shared_expert      CPU, gloo; a minute or two

A layer with experts on two ranks, rows sent by all-to-all, in two forms that take turns: *meanwhile*, as the layer does it, and
*afterwards*, which first waits for the rows. The layer has DeepSeek-V2-Lite's shape (64 experts of 1408, 6 a token, a shared one
of 2816, hidden size 2048) with a quarter of the widths, in float32; weights, rows and so the router's choices are random.

Beside it what bounds the gain: the time of the way alone and of the shared expert alone, of which no more than the lesser
can be hidden; and the CPU time of the way, since over gloo it is the CPU that carries the rows.
Writes figures/experts_shared.csv.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from common.distributed.launch import run_main
from common.layers import moe
from common.layers.communicator import TokenRows
from common.layers.dispatch import Travelling, set_out
from common.layers.router import RouterRule
from common.models.weights import TensorSource
from common.parallel_state import TPGroup, all_gather_rows, initialize_tensor_parallel
from common.teaching.report import FIGURES, write_csv
from common.teaching.show import table

EXPERTS, CHOSEN, HIDDEN, WIDTH, SHARED = 64, 6, 2048, 1408, 2816
TOKENS = (64, 256, 1024)  # a rank
FORMS = ("meanwhile", "afterwards")


def arrived(*args) -> Travelling:
    """set_out, and wait for the rows of the others."""
    there = set_out(*args)
    came = there.received()
    return Travelling(lambda: came, there.home)


class Layer:
    """A layer with this rank's experts, and a step's rows: `tokens` of them on every rank."""

    def __init__(self, tp: TPGroup, tokens: int, shrink: int):
        torch.manual_seed(0)
        hidden, alone = HIDDEN // shrink, TPGroup(device=tp.device)
        rule = RouterRule(CHOSEN, float32_gate=True)
        mixture = moe.Mixture(EXPERTS, rule, WIDTH // shrink, (True,), SHARED // shrink)
        self.tp, self.options = tp, moe.MoEOptions(ep=tp, moe_tp=alone, dispatch="all_to_all")
        self.moe = moe.MoE(hidden, mixture, tp, "layers.0", options=self.options)
        for param in self.moe.parameters():
            for shard, shape in param.shard_shapes.items():
                param.weight_loader(TensorSource(torch.randn(shape) * shape[-1] ** -0.5), shard)
        torch.manual_seed(1 + tp.rank)  # rows of its own
        self.x = torch.randn(tokens, hidden)
        self.rows = TokenRows((tokens,) * tp.size, (tokens,) * tp.size, tp.rank, alone)

    def forward(self, send: Callable[..., Travelling]) -> torch.Tensor:
        """The layer, its rows sent by `send`: set_out or arrived."""
        moe.set_out = send
        try:
            return self.moe(self.x, self.rows)
        finally:
            moe.set_out = set_out

    def way(self) -> torch.Tensor:
        """Rows there, and nothing else: what the shared expert could hide."""
        _, experts = self.moe.gate.route(self.x)
        places = self.moe.placement.locate(0, experts, self.tp.rank)
        return set_out(self.x, places, self.moe.placement, self.tp, "layers.0").received()[0]

    def parts(self) -> dict[str, Callable[[], torch.Tensor]]:
        return {
            "meanwhile": partial(self.forward, set_out),
            "afterwards": partial(self.forward, arrived),
            "way": self.way,
            "shared": partial(self.moe.shared, self.x),
        }


@torch.inference_mode()
def measure(tp: TPGroup, tokens: int, rounds: int, shrink: int) -> dict[str, float]:
    """Milliseconds of every part, the ranks starting together in each round: of the slower rank, the median of the rounds."""
    layer = Layer(tp, tokens, shrink)
    parts = layer.parts()
    if not torch.equal(parts["meanwhile"](), parts["afterwards"]()):
        raise RuntimeError("the two forms differ: the shared expert must not depend on when it is computed")
    wall, cpu = ({name: [] for name in parts} for _ in range(2))
    ready = torch.zeros(1, 1)
    for turn in range(rounds + 1):
        for name in sorted(parts, reverse=bool(turn % 2)):  # no form is always the first
            all_gather_rows(ready, tp, "ready")  # COMM all-gather [1, 1]: nobody starts before all are there
            began, used = time.perf_counter(), time.process_time()
            parts[name]()
            took = torch.tensor([[time.perf_counter() - began, time.process_time() - used]])
            each = all_gather_rows(took, tp, "took")  # COMM all-gather [1, 2]: seconds of each rank
            if turn:  # the first one warms up
                wall[name].append(1e3 * each[:, 0].max().item())
                cpu[name].append(1e3 * each[:, 1].max().item())
    gains = [1 - a / b for a, b in zip(wall["meanwhile"], wall["afterwards"], strict=True)]
    low, middle, high = statistics.quantiles(gains, n=4)
    ms = {name: statistics.median(values) for name, values in wall.items()}
    return {
        "ranks": tp.size, "tokens": tokens, **{f"{name} ms": round(value, 2) for name, value in ms.items()},
        **{f"{name}, fastest": round(min(wall[name]), 2) for name in FORMS},
        "way CPU ms": round(statistics.median(cpu["way"]), 2), "gain": round(middle, 3), "gain, 1st quartile": round(low, 3),
        "gain, 3rd quartile": round(high, 3), "rounds": rounds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, metavar="T", help="rows of each rank")
    parser.add_argument("--rounds", type=int, default=40, help="of all parts in turn, at least 2")
    parser.add_argument("--shrink", type=int, default=4, help="the widths are divided by this")
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder for the CSV")
    args = parser.parse_args()
    if args.rounds < 2:
        raise ValueError(f"--rounds {args.rounds} has no quartiles; use 2 or more")
    tp = initialize_tensor_parallel(device="cpu")
    if tp.size < 2:
        raise ValueError("on one rank no row travels; start with torchrun --nproc_per_node=2")
    torch.set_num_threads(1)  # a core is what a rank has; two threads of one rank would be in the other's way
    tokens = tqdm(args.tokens, desc="tokens", disable=None if tp.rank == 0 else True)
    rows = [measure(tp, count, args.rounds, args.shrink) for count in tokens]
    if tp.rank == 0:
        table(tuple(rows[0]), [tuple(row.values()) for row in rows])
        write_csv([row | {"cores": os.cpu_count()} for row in rows], args.out / "experts_shared.csv")


if __name__ == "__main__":
    run_main(main)
