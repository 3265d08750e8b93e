"""What each policy finds and how evenly it spreads, on workloads that share prefixes.

    python -m ch07_sglang_radix.benchmarks.bench_load_balance            # bundled model, CPU, some 3 minutes

Four replicas, real schedulers with trees and pools of their own, step in turn in one process (replicas.py). Writes
figures/load_balance.csv:

    hit %          prompt tokens that were found in the tree of the replica that got the request
    one tree %     the same if one replica had got everything, in a pool as large as all four: what spreading costs
    imbalance      tokens that the fullest replica computed, in shares of a quarter: 1.00 is even, 4.00 is all on one
    computed       tokens that the fullest replica computed: whose end is the end of all
    rounds         steps until the last answer
    us a choice    of the policy, in main's event loop, median
"""

import argparse
import statistics
import time
from pathlib import Path

from tqdm import tqdm

from ch07_sglang_radix.benchmarks.replicas import make_replicas, serve
from ch07_sglang_radix.benchmarks.workloads import WORKLOADS, Source
from ch07_sglang_radix.parallelism.load_balancing import POLICIES, LoadBalancer
from common.distributed.launch import run_main
from common.teaching.report import FIGURES, write_csv
from common.teaching.show import table

REPLICAS = 4
SHOWN = ("multi-turn chat", "few-shot", "agent loop", "document QA", "unrelated")


class Timed(LoadBalancer):
    """A balancer that notes how long each choice took, with what it remembers of it."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.seconds: list[float] = []

    def choose(self, prompt, among=None):
        began = time.perf_counter()
        worker = super().choose(prompt, among)
        self._took = time.perf_counter() - began
        return worker

    def sent(self, worker, prompt):
        began = time.perf_counter()
        sent = super().sent(worker, prompt)
        self.seconds.append(self._took + time.perf_counter() - began)
        return sent


def main() -> None:
    args = parse_args()
    replicas = make_replicas(REPLICAS, args.pool)
    (one,) = make_replicas(1, REPLICAS * args.pool)
    rows = []
    with tqdm(total=len(args.workloads) * (len(POLICIES) + 1), unit="run", disable=None) as bar:
        for name in args.workloads:
            make = lambda name=name: WORKLOADS[name](Source(one.wrapper.config.vocab_size), args.scale)  # noqa: E731
            best = serve([one], make(), LoadBalancer("round_robin", [0])).hit_rate
            one.tree.flush()
            bar.update()
            for policy in POLICIES:
                balancer = Timed(policy, range(REPLICAS))
                outcome = serve(replicas, make(), balancer)
                for replica in replicas:
                    replica.tree.flush()
                rows.append(
                    {
                        "workload": name, "policy": policy, "replicas": REPLICAS, "pool": args.pool,
                        "requests": len(outcome.answered), "hit %": round(100 * outcome.hit_rate, 1),
                        "one tree %": round(100 * best, 1), "imbalance": round(outcome.imbalance, 2),
                        "computed": max(outcome.computed), "rounds": outcome.rounds,
                        "us a choice": round(1e6 * statistics.median(balancer.seconds), 1),
                    }
                )  # fmt: skip
                bar.update()
    columns = ("workload", "policy", "hit %", "one tree %", "imbalance", "computed", "rounds", "us a choice")
    table(columns, [[row[column] for column in columns] for row in rows])
    write_csv(rows, args.out)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="so many times the programs of each workload")
    parser.add_argument("--pool", type=int, default=4096, help="tokens a replica")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(SHOWN))
    parser.add_argument("--out", type=Path, default=FIGURES / "load_balance.csv")
    args = parser.parse_args()
    if not 0 < args.scale <= 10:
        raise ValueError(f"scale={args.scale} must be in (0, 10]")
    if args.pool < 4096:
        raise ValueError(f"pool={args.pool} must be at least 4096: a document and its question must fit")
    return args


if __name__ == "__main__":
    run_main(main)
