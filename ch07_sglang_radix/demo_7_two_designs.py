"""One scheduler that tells the others, or the same scheduler on every rank: bytes, time, and what can go wrong.

    torchrun --nproc_per_node=2 ch07_sglang_radix/demo_7_two_designs.py
    torchrun --nproc_per_node=2 ch07_sglang_radix/demo_7_two_designs.py --control-plane replicated    # or rank0

24 requests with a common beginning arrive over several steps, half of them sampled at temperature 1. They are served by
the book's design (control_plane.py) and by SGLang's (replicated.py), in turn in one process; the milliseconds differ from
run to run. Then the last rank of the second design is made to differ in one small thing, four times, and the comparison
before each step says when it is found. At the end the same without the comparison, at temperature 3, under what the model
answers at temperature 0.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from ch07_sglang_radix.replicated import Divergence, ReplicatedScheduler
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.distributed.cost_model import wire_bytes
from common.distributed.launch import run_main
from common.distributed.ledger import LedgerEntry
from common.parallel_state import all_gather, initialize_tensor_parallel
from common.sampling.params import SamplingParams
from common.teaching.show import check, heading, table
from common.tiny_qwen.phrasings import SYSTEM_PROMPT

REQUESTS, EVERY, SHARED, OWN, NEW = 24, 2, 96, 16, 24  # a request every second step
POOL, PAGE_SIZE, ROUNDS = 512, 16, 5
WILD = 3.0  # temperature at which two seeds part within a few tokens: the bundled model is nearly certain of each
DESIGNS = {"rank0": "rank 0 decides", "replicated": "every rank decides"}
KINDS = {
    "requests": "new requests", "task": "tasks", "tokens": "tokens", "logits": "logits",
    "compare": "comparison (ours)", "layers": "all-reduces of the layers",
}  # fmt: skip


class Run(NamedTuple):
    answers: list[list[int]]
    steps: int
    sent: list[LedgerEntry]
    step_ms: float  # median


def main() -> None:
    args = parse_args()
    tp = initialize_tensor_parallel(device="cpu")
    if tp.size < 2:
        raise ValueError("one rank has nobody to agree with; start with torchrun --nproc_per_node=2")
    wrapper = TPRadixAttentionModelWrapper(page_size=PAGE_SIZE, max_total_tokens=POOL, tp=tp)
    names = list(DESIGNS) if args.control_plane == "both" else [args.control_plane]
    serve(make(names[0], wrapper))  # warm up
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for _ in range(ROUNDS):  # in turn, so that whatever else the machine does hits both
        for name in names:
            runs[name].append(serve(make(name, wrapper)))
    replicated = "replicated" in names
    found = {what: first_divergence(wrapper, plant) for what, plant in PLANTED.items()} if replicated else {}
    (greedy, *_), texts = (forked(wrapper, 0.0), forked(wrapper, WILD)) if replicated else ([""], [])
    if tp.rank > 0:
        return
    show(runs, tp.size)
    if len(names) == 2:
        same = runs["rank0"][0].answers == runs["replicated"][0].answers
        check("both designs give the same answers, sampled ones too: each request draws from its own seed", same)
    if replicated:
        heading(f"Every rank decides, and rank {tp.size - 1} differs in one small thing")
        for what, why in found.items():
            print(f"  {what}\n     {why}")
        check("each is found before the ranks compute different steps", all(found.values()))
        heading(
            f"The first of these without the comparison, at temperature {WILD:g}: no error, and another text on each rank"
        )
        print(f"  temperature 0: {greedy}")
        for rank, text in enumerate(texts):
            print(f"  rank {rank}: {text}")
        check(
            "none of them is the text of an engine: all ranks' heads are added up, whatever each has read",
            len(set(texts)) > 1,
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--control-plane", choices=(*DESIGNS, "both"), default="both", help="default: both, in turn")
    return parser.parse_args()


def make(name: str, wrapper: TPRadixAttentionModelWrapper) -> TPScheduler:
    return (ReplicatedScheduler if name == "replicated" else TPScheduler)(wrapper, overlap=False, check=True)


# --- the same requests for both


def visitor(scheduler: TPScheduler) -> Callable[[int], bool]:
    """Sends a request every few steps, and says whether more are to come."""
    sent = 0

    def arrive(step: int) -> bool:
        nonlocal sent
        while sent < REQUESTS and (sent * EVERY <= step or not scheduler.busy):
            ids = [7 * j % 1000 for j in range(SHARED)] + [(sent * 31 + 7 * j) % 1000 for j in range(OWN)]
            params = SamplingParams(max_new_tokens=NEW, temperature=float(sent % 2), ignore_eos=True)
            scheduler.add_request(input_ids=ids, sampling_params=params)
            sent += 1
        return sent < REQUESTS

    return arrive


def serve(scheduler: TPScheduler) -> Run:
    times, step = [], scheduler.step

    def timed() -> bool:
        began = time.perf_counter()
        more = step()
        times.append(1e3 * (time.perf_counter() - began))
        return more

    scheduler.step = timed
    with scheduler.wrapper.tp.ledger.recording() as ledger:
        results = scheduler.process_requests(visitor(scheduler))
        sent = [entry for entry in ledger.entries if entry.label != "results"]
    answers = [results[rid].output_ids for rid in sorted(results)]
    return Run(answers, scheduler.step_number, sent, statistics.median(times) if times else 0.0)


def show(runs: dict[str, list[Run]], size: int) -> None:
    heading(f"{REQUESTS} requests on {size} ranks: what rank 0 hands in, a step")
    columns = [by_kind(some[0], size) for some in runs.values()]
    rows = [
        (what, *(x for column in columns for x in (column[kind][0], *map(round, column[kind][1:]))))
        for kind, what in KINDS.items()
    ]
    table(("", *(word for name in runs for word in (f"{DESIGNS[name]}: messages", "bytes", "on the wire"))), rows)
    print("  logits are gathered on rank 0 where it decides, and on every rank where every rank does")
    heading("Milliseconds a step: the median of each run")
    table(("", "median", "lowest", "highest"), [
        (DESIGNS[name], f"{statistics.median(ms):.2f}", f"{min(ms):.2f}", f"{max(ms):.2f}")
        for name, some in runs.items() for ms in [[run.step_ms for run in some]]
    ])  # fmt: skip


def by_kind(run: Run, size: int) -> dict[str, tuple[float, float, float]]:
    """(messages, bytes of the tensor, bytes on the wire) a step, by what they are for."""
    sums = {kind: [0, 0, 0] for kind in KINDS}
    for entry in run.sent:
        kind = sums[entry.label if entry.label in KINDS else "layers"]
        kind[0] += 1
        kind[1] += entry.bytes
        kind[2] += wire_bytes(entry.op, entry.bytes, size)
    return {kind: tuple(total / run.steps for total in totals) for kind, totals in sums.items()}


# --- one rank differs


def other_seed(scheduler: ReplicatedScheduler) -> None:
    scheduler.seed += 1


def newest_first(scheduler: ReplicatedScheduler) -> None:
    scheduler.tree.leaves.rank = lambda node: -node.last_access_time


def one_page_less(scheduler: ReplicatedScheduler) -> None:
    scheduler.pool.alloc(1)
    scheduler.after_step.clear()  # whoever counts pages would find it alone


def misses_a_step(scheduler: ReplicatedScheduler) -> None:
    """It looks at its queue too early, once."""
    next_prefill, missed = scheduler.admission.next_prefill, []

    def late():
        if scheduler.step_number >= 10 and scheduler.waiting and not missed:
            missed.append(scheduler.step_number)
            waiting, scheduler.waiting = scheduler.waiting, []
            batch = next_prefill()
            scheduler.waiting = waiting
            return batch
        return next_prefill()

    scheduler.admission.next_prefill = late


PLANTED: dict[str, Callable[[ReplicatedScheduler], None]] = {
    "it draws with another seed": other_seed,
    "it evicts what was used last, not first": newest_first,
    "its pool has a page less": one_page_less,
    "it hears of a request a step later": misses_a_step,
}


def first_divergence(wrapper: TPRadixAttentionModelWrapper, plant: Callable) -> str:
    """What the comparison says; empty if it never says anything."""
    scheduler = ReplicatedScheduler(wrapper, overlap=False, check=True)
    if wrapper.tp.rank == wrapper.tp.size - 1:
        plant(scheduler)
    try:
        scheduler.process_requests(visitor(scheduler))
    except Divergence as error:
        return str(error)
    return ""


def forked(wrapper: TPRadixAttentionModelWrapper, temperature: float) -> list[str]:
    """A question, each rank with a seed of its own and nobody to compare: the text on each rank."""
    scheduler = ReplicatedScheduler(wrapper, compare=False, seed=wrapper.tp.rank, overlap=False)
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": "What is a radix cache?"}]
    params = SamplingParams(max_new_tokens=NEW, temperature=temperature, top_k=8, ignore_eos=True)
    rid = scheduler.add_request(input_ids=wrapper.tokenizer.encode_chat(messages), sampling_params=params)
    mine = torch.tensor(scheduler.process_requests()[rid].output_ids)
    everyones = all_gather(mine, wrapper.tp, "to compare")  # COMM all-gather [NEW]: to compare
    return [" ".join(wrapper.tokenizer.decode(tokens.tolist()).split()) for tokens in everyones]


if __name__ == "__main__":
    run_main(main)
