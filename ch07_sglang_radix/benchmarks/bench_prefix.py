"""What the radix cache brings: on workloads that share prefixes, and on recorded traces without a model.

    python -m ch07_sglang_radix.benchmarks.bench_prefix                            # bundled model, CPU, under 3 minutes
    python -m ch07_sglang_radix.benchmarks.bench_prefix --published Qwen2.5-0.5B --scale 2          # a GPU, random weights
    python -m ch07_sglang_radix.benchmarks.bench_prefix --simulate --trace FILE --capacity-blocks 20000 --eviction lru --json OUT

All programs of a workload (workloads.py) begin at once; a program's next calls come when its last ones are answered.
Each workload runs in a large pool and in one of 40% of the pages that its distinct tokens need, there also with no more
than 4 requests running at once; without the cache, and with it under fcfs and lpm. Writes figures/bench_prefix.csv:

    hit %                  prompt tokens found in the cache
    (of) best %            what a plain trie of all tokens would find, and the share of it that was found
    (of) reachable %       the same in whole pages, with the last token of each prompt computed
    tokens/s, times off    answers' tokens over the whole time, and against the same pool and batch without the cache
    first token s          from the moment a request is sent to its first token, median
    ms outside the model   of a step: rank 0 decides and accounts; on a CPU in processor time
    overhead %             unrelated prompts: what the cache adds to that, as a share of the whole step without it

For the last one all ways take turns, round by round, and of each step the fastest round counts: the steps are the same, and
the model's own time, which the cache does not touch there, varies by more than the cache costs.

--simulate serves a trace in Mooncake's form (traces.py) and prints, and writes as JSON, how many blocks were hit.
"""

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ch07_sglang_radix.benchmarks.clients import Clients
from ch07_sglang_radix.benchmarks.simulate import simulate
from ch07_sglang_radix.benchmarks.traces import read_trace
from ch07_sglang_radix.benchmarks.workloads import WORKLOADS, Source, best_cached, distinct_pages
from ch07_sglang_radix.request import RequestOutput
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.distributed.launch import run_main
from common.models.published_configs import CONFIGS, shared_random_weights
from common.parallel_state import initialize_tensor_parallel
from common.teaching.report import FIGURES, write_csv, write_json
from common.tiny_qwen import TINY_QWEN_PATH

LIMITED = 0.4  # of the pages that all distinct tokens need
SMALL_BATCH = 4
FEWER = 0.4  # of the unrelated prompts in the step-by-step comparison: more rounds tell more than longer ones
Outputs = list[RequestOutput]
OFF, FCFS, LPM = ("off", "fcfs"), ("on", "fcfs"), ("on", "lpm")  # cache, schedule policy


def main() -> None:
    args = parse_args()
    if args.simulate:
        simulate_trace(args)
        return
    tp = initialize_tensor_parallel(device=args.device)
    folder = shared_random_weights(args.published, tp) if args.published else args.model or TINY_QWEN_PATH
    if tp.device.type == "cpu":
        torch.set_num_threads(1)
    wrapper = TPRadixAttentionModelWrapper(str(folder), args.device, tp=tp)
    with tqdm(total=len(args.workloads) * 8 + args.rounds * 3 + 2, unit="run", disable=None) as bar:
        bench = Bench(wrapper, args.scale, bar)
        rows = [row for name in args.workloads for row in bench.measure(name)]
        rows += bench.overhead(args.rounds)
    if tp.rank == 0:
        facts = {"model": args.published or Path(folder).name, "ranks": tp.size, "scale": args.scale}
        show(rows)
        write_csv([facts | row for row in rows], args.out)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a local folder or a Hub id; default: the bundled model")
    parser.add_argument("--published", choices=CONFIGS, help="a published shape with random weights")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--scale", type=float, default=1.0, help="so many times the programs of each workload")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=6, help="of the step-by-step comparison")
    parser.add_argument("--out", type=Path, default=FIGURES / "bench_prefix.csv")
    parser.add_argument("--simulate", action="store_true", help="serve a trace without a model")
    parser.add_argument("--trace", type=Path, help="JSON lines with timestamp, input_length, output_length, hash_ids")
    parser.add_argument("--capacity-blocks", type=int, default=0, help="0: no limit")
    parser.add_argument("--eviction", default="lru", help="lru, lfu, fifo, mru, slru or priority")
    parser.add_argument("--json", type=Path, help="where to write the counts of --simulate")
    args = parser.parse_args()
    if not 0 < args.scale <= 100:
        raise ValueError(f"scale={args.scale} must be in (0, 100]")
    if args.rounds < 0:
        raise ValueError(f"rounds={args.rounds} must be at least 0; 0 leaves the comparison out")
    if args.simulate != (args.trace is not None):
        raise ValueError("--simulate and --trace FILE belong together; give both or neither")
    return args


def simulate_trace(args: argparse.Namespace) -> None:
    requests = [request.hash_ids for request in read_trace(args.trace)]
    began = time.perf_counter()
    counts = simulate(requests, args.capacity_blocks, args.eviction).as_dict()
    seconds = time.perf_counter() - began
    print("  ".join(f"{key} {value}" for key, value in counts.items()))
    print(f"{len(requests) / seconds * 60:,.0f} requests a minute")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(counts, args.json)


def show(rows: list[dict]) -> None:
    """The columns that say most."""
    widths = dict.fromkeys(("workload", "pool", "running at most", "cache", "policy", "hit %"), 0)
    widths |= dict.fromkeys(("of reachable %", "tokens/s", "times off", "first token s", "overhead %"), 0)
    for name in widths:
        widths[name] = max(len(name), *(len(str(row[name])) for row in rows))
    for row in [dict(zip(widths, widths, strict=True)), *rows]:
        print("  ".join(str(row[name]).ljust(width) for name, width in widths.items()).rstrip())


class Bench:
    """One model, many runs: each with a queue, a tree and pools of its own."""

    def __init__(self, wrapper: TPRadixAttentionModelWrapper, scale: float, bar: tqdm):
        self.wrapper, self.scale, self.bar = wrapper, scale, bar
        self.large = Setting("large", wrapper.num_pages, wrapper.max_running_requests)
        self.run("few-shot", self.large, *OFF)  # warm up

    def run(
        self, workload: str, setting: "Setting", cache: str, policy: str, share: float = 1.0
    ) -> tuple[Clients, Outputs]:
        """share: of the workload's programs."""
        self.bar.set_description(f"{workload}, {setting.name}, cache {cache}, {policy}")
        scheduler = TPScheduler(self.wrapper, schedule_policy=policy, disable_radix_cache=cache == "off")
        if scheduler.tp.rank == 0:  # what is more than the setting's is taken by nobody
            scheduler.pool.alloc(self.large.pages - setting.pages)
            for _ in range(self.large.batch - setting.batch):
                scheduler.req_to_token.alloc()
        programs = WORKLOADS[workload](Source(self.wrapper.config.vocab_size), self.scale * share)
        clock = time.process_time if self.wrapper.tp.device.type == "cpu" else time.perf_counter
        clients = Clients(scheduler, programs, clock)
        outputs = list(clients.run().values())
        self.bar.update()
        return clients, outputs

    def measure(self, workload: str) -> list[dict]:
        """A row for each pool and batch, without the cache and with it, under each policy."""
        rows: list[dict] = []
        setting, outputs = self.large, []
        for name, batch in (("large", self.large.batch), ("limited", self.large.batch), ("limited", SMALL_BATCH)):
            if name == "limited":
                setting = Setting(name, self.limited(outputs), batch)
            mine = []
            for cache, policy in (OFF, FCFS, LPM) if batch > SMALL_BATCH else (OFF, LPM):
                clients, outputs = self.run(workload, setting, cache, policy)
                if self.wrapper.tp.rank == 0:
                    mine.append(self.row(workload, setting, cache, policy, clients, outputs))
                    mine[-1]["times off"] = round(mine[-1]["tokens/s"] / mine[0]["tokens/s"], 2)
            rows += mine
        return rows

    def limited(self, outputs: Outputs) -> int:
        """Pages of the limited pool: the longest request must fit."""
        size = self.wrapper.page_size
        longest = max(len(out.prompt_ids) + len(out.output_ids) for out in outputs)
        return max(round(LIMITED * distinct_pages(_served(outputs), size)), -(-longest // size))

    def row(
        self, workload: str, setting: "Setting", cache: str, policy: str, clients: Clients, outputs: Outputs
    ) -> dict:
        size, tree = self.wrapper.page_size, clients.scheduler.tree
        prompt, cached = sum(out.prompt_tokens for out in outputs), sum(out.cached_tokens for out in outputs)
        best, reachable = best_cached(_served(outputs)), best_cached(_served(outputs), size)
        return {
            "workload": workload, "pool": setting.name, "pages": setting.pages, "running at most": setting.batch,
            "cache": cache, "policy": policy, "requests": len(outputs), "prompt tokens": prompt,
            "hit %": _percent(cached, prompt),
            "best %": _percent(best, prompt), "of best %": _percent(cached, best),
            "reachable %": _percent(reachable, prompt), "of reachable %": _percent(cached, reachable),
            "tokens/s": round(sum(out.completion_tokens for out in outputs) / clients.seconds, 1), "times off": "",
            "first token s": round(statistics.median(clients.first_token_s.values()), 3),
            "evicted pages": tree.evicted // size, "ms per step": round(1e3 * statistics.mean(clients.step_s), 3),
            "ms outside the model": round(1e3 * statistics.mean(clients.host_s), 3), "overhead %": "",
        }  # fmt: skip

    def overhead(self, rounds: int) -> list[dict]:
        """Unrelated prompts in a limited pool, so that the tree has to evict: the same steps with the cache and without."""
        _, outputs = self.run("unrelated", self.large, *OFF, FEWER)
        setting = Setting("limited", self.limited(outputs), self.large.batch)
        hows = [OFF, FCFS, LPM]
        rows, steps = {}, {how: [] for how in hows}
        for i in range(rounds):
            for how in hows[i % 3 :] + hows[: i % 3]:
                clients, outputs = self.run("unrelated", setting, *how, FEWER)
                steps[how].append((clients.step_s, clients.host_s))
                if self.wrapper.tp.rank == 0:
                    rows[how] = self.row("unrelated, step by step", setting, *how, clients, outputs)
        for how, row in rows.items():
            row["ms per step"], row["ms outside the model"] = (
                round(1e3 * statistics.mean(min(step) for step in zip(*times, strict=True)), 4)
                for times in zip(*steps[how], strict=True)
            )
        for row in rows.values():
            more = row["ms outside the model"] - rows[OFF]["ms outside the model"]
            row["overhead %"] = round(100 * more / rows[OFF]["ms per step"], 2)
        return [rows[how] for how in hows if how in rows]


@dataclass(frozen=True)
class Setting:
    """A pool of so many pages, and how many requests run at once."""

    name: str
    pages: int
    batch: int


def _served(outputs: Outputs) -> list[tuple[list[int], list[int]]]:
    return [(out.prompt_ids, out.output_ids) for out in outputs]


def _percent(part: int, whole: int) -> float | str:
    """Empty where there is nothing to have a part of."""
    return round(100 * part / whole, 2) if whole else ""


if __name__ == "__main__":
    run_main(main)
