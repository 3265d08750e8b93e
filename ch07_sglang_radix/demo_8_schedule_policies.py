"""Schedule policies side by side: who goes first decides how much of the cache is used.

    python ch07_sglang_radix/demo_8_schedule_policies.py

30 requests from 5 groups; a group shares its first 96 tokens. All of them wait from the beginning, in mixed order, and
a small pool forgets a group unless its members come close to each other. The real scheduler with the bundled model
takes them in by each policy, at most 128 prompt tokens a step. One request of each group is urgent, which only `priority`
looks at; its group is its routing key, which only `routing-key` looks at. Then 30 prompts that share nothing: nothing can
be gained there, and `dynamic` stops trying.
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

GROUPS, MEMBERS, SHARED = "abcde", 6, 96
OWN, NEW = (4, 40), (2, 8)  # tokens of its own, and of its answer: each request some number in between
POOL, RUNNING, CHUNK, PAGE_SIZE = 512, 8, 128, 16


class Request(NamedTuple):
    group: str
    ids: list[int]
    new_tokens: int
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
    heading(
        f"{len(requests)} requests of {len(GROUPS)} groups, {SHARED} + {OWN[0]} to {OWN[1]} tokens; a pool of {POOL}"
    )
    print(f"  the queue: {''.join(r.group for r in requests)}")
    runs = {name: run(wrapper, name, requests) for name in POLICIES}
    show(runs, [i for i, request in enumerate(requests) if request.priority])
    best = len(GROUPS) * (MEMBERS - 1) * SHARED / sum(len(request.ids) for request in requests)
    print(f"  any order at best: {100 * best:.0f}%, each group's beginning computed once and found {MEMBERS - 1} times")
    rate = {name: one.hit_rate for name, one in runs.items()}
    together = [rate[name] for name in ("lpm", "dfs-weight", "hrrn", "shortest-prefill-first", "routing-key")]
    check("the order changes no answer", len({str(one.answers) for one in runs.values()}) == 1)
    check("whoever brings a group together finds all there is to find", set(together) == {best})
    check("fcfs, lof and random compute what they have forgotten again",
          max(rate[name] for name in ("fcfs", "lof", "random")) < 0.6)  # fmt: skip
    wait = {name: statistics.median(one.first_token_at) for name, one in runs.items()}
    check("the median request has its first token sooner with lpm", wait["lpm"] < 0.75 * wait["fcfs"])
    check("the longest wait is shorter too: there is less to compute",
          max(runs["lpm"].first_token_at) < max(runs["fcfs"].first_token_at))  # fmt: skip
    check("dynamic gains most of what lpm gains", rate["fcfs"] + 0.1 < rate["dynamic"])

    requests = generate(shared=0)
    heading("30 prompts that share nothing")
    runs = {name: run(wrapper, name, requests) for name in ("fcfs", "lpm", "dynamic")}
    by = {name: (one.active.count("lpm"), one.active.count("fcfs")) for name, one in runs.items()}
    rows = [(name, f"{100 * one.hit_rate:.0f}%", one.matches, *by[name]) for name, one in runs.items()]
    table(("policy", "found", "walks through the tree", "steps ordered by lpm", "by fcfs"), rows)
    check("dynamic falls back to fcfs", by["dynamic"][1] > by["dynamic"][0])
    check("and walks through the tree less often than lpm", runs["dynamic"].matches < runs["lpm"].matches)


def generate(shared: int) -> list[Request]:
    rng = random.Random(1)
    prefix = {group: [rng.randrange(10, 3500) for _ in range(shared)] for group in GROUPS}
    requests = []
    for group in GROUPS:
        for member in range(MEMBERS):
            own = [rng.randrange(10, 3500) for _ in range(SHARED - shared + rng.randint(*OWN))]
            requests.append(Request(group, prefix[group] + own, rng.randint(*NEW), int(member == 0)))
    rng.shuffle(requests)
    return requests


def run(wrapper: TPRadixAttentionModelWrapper, policy: str, requests: list[Request]) -> Run:
    scheduler = TPScheduler(wrapper, schedule_policy=policy, chunked_prefill_size=CHUNK, check=True)
    matches = count_matches(scheduler)
    for request in requests:
        params = SamplingParams(max_new_tokens=request.new_tokens, ignore_eos=True)
        scheduler.enqueue(None, request.ids, params, priority=request.priority, routing_key=request.group)
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
    rows = []
    for name, one in runs.items():
        at = one.first_token_at
        median, of_urgent = round(statistics.median(at)), round(statistics.median(at[i] for i in urgent))
        rows.append((name, f"{100 * one.hit_rate:.0f}%", median, of_urgent, max(at), one.order))
    print(
        "  found: prompt tokens that were in the tree. Steps to the first token: of the median request, of the median urgent"
    )
    print(
        "  one (one of each group asks for priority 1), of the last. Order: the groups, as their requests were admitted"
    )
    table(("policy", "found", "median", "urgent", "last", "order"), rows)


if __name__ == "__main__":
    run_main(main)
