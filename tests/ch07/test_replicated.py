"""SGLang's design: the same scheduler on every rank, and the comparison that finds a rank that has left the others."""

import re

import pytest

from ch07_sglang_radix.control_plane import ControlPlane
from ch07_sglang_radix.demo_7_two_designs import DESIGNS, make
from ch07_sglang_radix.replicated import Divergence, ReplicatedControl, ReplicatedScheduler
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.parallel_state import get_tensor_parallel
from common.sampling.params import SamplingParams
from common.tiny_qwen import TINY_QWEN_PATH
from tests.oracle import greedy, some_prompts

NEW = 20


def serve(kind, prompts, plant="", **options):
    """Outputs of all prompts, two of which come at each step; half of them sampled. With a message in place of them if
    the ranks part."""
    wrapper = TPRadixAttentionModelWrapper(str(TINY_QWEN_PATH), "cpu", 4, max_total_tokens=128)
    scheduler = kind(wrapper, overlap=False, check=True, **options)
    scheduler.new_token_ratio = 0.1  # bold: some are let in that have to go back
    tp, coming = get_tensor_parallel(), list(enumerate(prompts))
    if plant and tp.rank == tp.size - 1:
        PLANTS[plant](scheduler)

    def arrivals(step):
        for i, prompt in coming[:2]:
            if plant == "refused" and i == 4:
                raise ValueError("no more of these")
            params = SamplingParams(max_new_tokens=NEW, temperature=float(i % 2), ignore_eos=True)
            scheduler.add_request(input_ids=prompt, sampling_params=params)
        del coming[:2]
        return bool(coming)

    with tp.ledger.recording() as ledger:
        try:
            results = scheduler.process_requests(arrivals)
        except ValueError as error:
            return type(error).__name__, str(error)
        labels = {entry.label: entry.op for entry in ledger.entries if "proj" not in entry.label}
    return [(r.output_ids, r.cached_tokens, r.text) for r in results.values()], scheduler.retractions, labels


def test_the_demo_s_switch_picks_between_two_control_planes_of_one_scheduler():
    wrapper = TPRadixAttentionModelWrapper(str(TINY_QWEN_PATH), "cpu", 4, max_total_tokens=64)
    made = {name: make(name, wrapper) for name in DESIGNS}
    assert {name: type(scheduler) for name, scheduler in made.items()} == {
        "rank0": TPScheduler, "replicated": ReplicatedScheduler
    }  # fmt: skip
    assert [type(scheduler.control) for scheduler in made.values()] == [ControlPlane, ReplicatedControl]
    for part in ("step", "tree", "pool", "policy", "admission", "retraction", "outcome"):
        ours, theirs = (getattr(scheduler, part) for scheduler in made.values())
        assert getattr(ours, "__func__", type(ours)) is getattr(theirs, "__func__", type(theirs))


def another_seed(scheduler):
    scheduler.seed += 1


def newest_first(scheduler):
    scheduler.tree.leaves.rank = lambda node: -node.last_access_time


def one_page_less(scheduler):
    scheduler.pool.alloc(1)
    scheduler.after_step.clear()


def another_order(scheduler):
    scheduler.policy.order = lambda waiting, running=(): list(waiting)[::-1]


PLANTS = {
    "seed": another_seed, "eviction": newest_first, "page": one_page_less, "order": another_order,
    "refused": lambda scheduler: None,
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 3])
def test_both_designs_give_the_same_answers(size, ranks):
    """In a pool that evicts and retracts, greedy and sampled, on every rank; greedy ones are transformers' own."""
    prompts = some_prompts(1009, 9, shared=24, longest=16)
    theirs = ranks(size).run(serve, TPScheduler, prompts)
    ours = ranks(size).run(serve, ReplicatedScheduler, prompts)
    answers, retractions, _ = theirs[0]
    assert retractions > 0
    assert [rank[0] for rank in ours] == [answers] * size
    assert [ids for ids, _, _ in answers[::2]] == [greedy(TINY_QWEN_PATH, p, NEW) for p in prompts[::2]]


def test_no_task_and_no_token_goes_over_the_wire(ranks):
    prompts = some_prompts(1009, 4, shared=24, longest=16)
    for _, _, labels in ranks(2).run(serve, ReplicatedScheduler, prompts):
        assert labels == {
            "embed_tokens": "all_reduce", "logits": "all_gather", "requests": "broadcast", "compare": "all_gather",
        }  # fmt: skip


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        ("seed", "rank 1 has drawn other tokens than rank 0"),
        ("eviction", "rank 0 wants a .* the first is .*; rank 1 a "),
        ("page", "before step 0: rank 0 wants a prefill of 2 .*, the first is 0; rank 1 a prefill of 2 .*, the first is 1"),
        ("order", "before step 0: rank 0 wants a prefill"),
    ],
)  # fmt: skip
def test_a_rank_that_decides_otherwise_is_found_on_all_ranks(plant, message, ranks):
    prompts = some_prompts(1009, 9, shared=24, longest=16)
    both = ranks(2).run(serve, ReplicatedScheduler, prompts, plant)
    assert both[0] == both[1]
    assert both[0][0] == Divergence.__name__
    assert re.search(message, both[0][1]), both[0][1]


def test_a_refused_request_ends_the_run_on_all_ranks(ranks):
    both = ranks(2).run(serve, ReplicatedScheduler, some_prompts(1009, 9, shared=24, longest=16), "refused")
    assert both == [("ValueError", "no more of these")] * 2
