"""Schedule policies side by side: who goes first decides how much of the cache is used.

    python ch07_sglang_radix/demo_8_schedule_policies.py

30 requests from 5 groups; a group shares its first 96 tokens. All of them wait from the beginning, in mixed order, and
a small pool forgets a group unless its members come close to each other. The real scheduler with the bundled model
takes them in by each policy, at most 128 prompt tokens a step. One of each group is urgent, which only `priority` looks
at. Then 30 prompts that share nothing: nothing can be gained there, and `dynamic` stops trying.
"""

import random
import statistics
from typing import NamedTuple

from ch07_sglang_radix.schedule_policy import POLICIES
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.distributed.launch import run_main
from common.sampling.params import SamplingParams
from common.teaching.show import check, heading, table

GROUPS, MEMBERS, SHARED, OWN, NEW = "abcde", 6, 96, 16, 4
POOL, RUNNING, CHUNK, PAGE_SIZE = 512, 8, 128, 16


class Request(NamedTuple):
    group: str
    ids: list[int]
    priority: int


class Run(NamedTuple):
    hit_rate: float
    first_token_at: list[int]  # step, by request
    order: str  # groups as they were admitted
    answers: list[list[int]]
    matches: int  # walks through the tree
    active: list[str]  # what the policy did, step by step


def main() -> None:
    wrapper = TPRadixAttentionModelWrapper(
        device="cpu", page_size=PAGE_SIZE, max_total_tokens=POOL, max_running_requests=RUNNING
    )
    requests = generate(shared=SHARED)
    heading(f"{len(requests)} requests of {len(GROUPS)} groups, {SHARED} + {OWN} tokens; a pool of {POOL}")
    print(f"  the queue: {''.join(r.group for r in requests)}")
    runs = {name: run(wrapper, name, requests) for name in POLICIES}
    show(runs, [i for i, request in enumerate(requests) if request.priority])
    rate = {name: one.hit_rate for name, one in runs.items()}
    check("the order changes no answer", len({str(one.answers) for one in runs.values()}) == 1)
    check("lpm and dfs-weight bring a group together and hit most", min(rate["lpm"], rate["dfs-weight"]) > 0.6)
    check("fcfs and random compute what they have forgotten again", max(rate["fcfs"], rate["random"]) < 0.6)
    wait = {name: statistics.median(one.first_token_at) for name, one in runs.items()}
    check("the median request has its first token sooner with lpm", wait["lpm"] < 0.75 * wait["fcfs"])
    check("the longest wait is shorter too: there is less to compute",
          max(runs["lpm"].first_token_at) < max(runs["fcfs"].first_token_at))  # fmt: skip
    check("dynamic gains most of what lpm gains", rate["fcfs"] + 0.1 < rate["dynamic"])

    requests = generate(shared=0)
    heading("30 prompts that share nothing")
    runs = {name: run(wrapper, name, requests) for name in ("fcfs", "lpm", "dynamic")}
    by = {name: (one.active.count("lpm"), one.active.count("fcfs")) for name, one in runs.items()}
    rows = [(name, one.hit_rate, one.matches, *by[name]) for name, one in runs.items()]
    table(("policy", "hit rate", "walks through the tree", "steps ordered by lpm", "by fcfs"), rows)
    check("dynamic falls back to fcfs", by["dynamic"][1] > by["dynamic"][0])
    check("and walks through the tree less often than lpm", runs["dynamic"].matches < runs["lpm"].matches)


def generate(shared: int) -> list[Request]:
    rng = random.Random(1)
    prefix = {group: [rng.randrange(10, 3500) for _ in range(shared)] for group in GROUPS}
    length = SHARED + OWN - shared
    requests = [
        Request(group, prefix[group] + [rng.randrange(10, 3500) for _ in range(length)], int(member == 0))
        for group in GROUPS for member in range(MEMBERS)
    ]  # fmt: skip
    rng.shuffle(requests)
    return requests


def run(wrapper: TPRadixAttentionModelWrapper, policy: str, requests: list[Request]) -> Run:
    scheduler = TPScheduler(wrapper, schedule_policy=policy, chunked_prefill_size=CHUNK, check=True)
    matches = count_matches(scheduler)
    params = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
    for request in requests:
        scheduler.enqueue(None, request.ids, params, priority=request.priority)
    first: dict[int, int] = {}  # request -> step of its first token
    admitted: dict[int, str] = {}  # request -> group, in order
    active = []
    while scheduler.waiting or scheduler.running:
        prefills = scheduler.steps["prefill"]
        scheduler.step()
        if scheduler.steps["prefill"] > prefills:
            admitted |= {req.rid: requests[req.rid].group for req, _ in scheduler.last_prefill}
            active.append(scheduler.policy.active)
        for rid in scheduler.grown:
            first.setdefault(rid, scheduler.step_number)
    answers = [scheduler.results[rid].output_ids for rid in range(len(requests))]
    hit_rate = scheduler.served["cached"] / scheduler.served["prompt"]
    first_at, order = [first[rid] for rid in range(len(requests))], "".join(admitted.values())
    return Run(hit_rate, first_at, order, answers, len(matches), active)


def count_matches(scheduler: TPScheduler) -> list[int]:
    """One entry for each walk through the tree from now on."""
    walks, match_prefix = [], scheduler.tree.match_prefix

    def counted(*args):
        walks.append(1)
        return match_prefix(*args)

    scheduler.tree.match_prefix = counted
    return walks


def show(runs: dict[str, Run], urgent: list[int]) -> None:
    print("                        steps to first token")
    rows = []
    for name, one in runs.items():
        at = one.first_token_at
        median, of_urgent = round(statistics.median(at)), round(statistics.median(at[i] for i in urgent))
        rows.append((name, one.hit_rate, median, max(at), of_urgent, one.order))
    table(("policy", "hit rate", "median", "longest", "urgent", "order of admission"), rows)


if __name__ == "__main__":
    run_main(main)
