"""Replicas of two ranks each under torchrun, four ranks of them: the tokens of transformers, and a call's messages by formula.

Both replicas step as they like, with a will of their own; only at the end of a call they tell each other their answers.
"""

from collections import Counter
from functools import cache, partial
from math import ceil

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from ch07_sglang_radix import Engine
from ch07_sglang_radix.message_formulas import expected
from ch07_sglang_radix.parallelism.replica_ranks import ReplicaRanks
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common import parallel_state
from common.attention.zigzag import share
from common.distributed.messages import share_all
from common.distributed.spawn import FRAME
from common.models.config import ModelConfig
from common.teaching.all_messages import messages_of_all
from tests.ch07.parallelism.test_combinations import FAMILIES
from tests.ch07.test_product import NEW_TOKENS, PROMPTS, cases, see, serve
from tests.oracle import greedy, some_prompts
from tests.ranks import layout_of_the_pool

WAYS = {
    "tp": {"tp_size": 2}, "pp": {"pp_size": 2}, "cp": {"cp_size": 2}, "attn-dp": {"attn_dp_size": 2},
    "sp": {"enable_layernorm_sp": True},
}  # fmt: skip
ITEM, PAGE = 4, 4


# --- whatever may not change an answer


@cache
def replica(layout: tuple, page_size: int, pool: int) -> TPRadixAttentionModelWrapper:
    parallel = layout_of_the_pool(None, data_parallel_size=2, **dict(layout))
    return TPRadixAttentionModelWrapper(None, "cpu", page_size, max_total_tokens=pool, parallel=parallel)


def serve_a_share(layout: tuple, case: dict) -> tuple[list, list[int]]:
    """What `serve` returns, of this replica's requests -> of all of them, in the order in which they come; and of each replica."""
    replicas = ReplicaRanks(layout_of_the_pool(None, data_parallel_size=2, **dict(layout)), "round_robin")
    coming = sorted(case["requests"], key=lambda request: request[0])
    where = replicas.place([PROMPTS[request[1]] for request in coming])
    mine = [i for i, rank in enumerate(where) if rank == replicas.dp_rank]
    answers, retractions = serve(case | {"requests": [coming[i] for i in mine]}, partial(replica, layout))
    told = share_all([retractions, list(zip(mine, answers, strict=True))], replicas.group)
    together = sorted((i, answer) for _, part in told for i, answer in part)
    return [answer for _, answer in together], [one for one, _ in told]


LAYOUTS = pytest.mark.parametrize("layout", [(), (("pipeline_parallel_size", 2),)], ids=["tp2_dp2", "pp2_dp2"])


@LAYOUTS
@pytest.mark.parametrize("size", [4])
def test_nothing_changes_an_answer(size, layout, ranks):
    @seed(len(layout))  # or both layouts would draw the same ones
    @settings(
        max_examples=max(settings().max_examples // 10, 3), deadline=None, derandomize=settings().max_examples <= 200,
        suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.reuse, Phase.generate),
    )  # fmt: skip
    @given(case=cases)
    def draw(case):
        for answers, _ in ranks(size).run(serve_a_share, layout, case):
            see(answers, case)

    draw()


@LAYOUTS
@pytest.mark.parametrize("size", [4])
def test_the_draws_reach_retraction_in_each_replica(size, layout, ranks):
    busy = [(0, i, NEW_TOKENS, 0, None, None) for i in (0, 3, 6, 1, 4, 7, 2, 5, 8) for _ in range(2)]
    options = {"schedule_policy": "fcfs", "overlap": True}
    case = {"page_size": 1, "chunk": 64, "small_pool": True, "options": options, "requests": busy}
    told = ranks(size).run(serve_a_share, layout, case)
    for answers, _ in told:
        see(answers, case)
    assert min(told[0][1]) > 0, "who decides knows of it: the first rank of each replica"


# --- calls of an engine


def call_twice(folder, flags: dict, prompts: list[list[int]], new: int) -> tuple[list, list[dict], dict, dict]:
    """Of two equal calls: [answers, ...] and [{(op, purpose): (calls, bytes)}, ...] of this rank; of both together, between all
    ranks of this replica, {kind: (calls, bytes)} by the product's own formula, and as it was."""
    before, answers, heard = parallel_state._state, [], []
    try:
        with Engine(
            str(folder), device="cpu", dp_size=2, page_size=PAGE, max_total_tokens=1024, check=True, **flags
        ) as engine:
            parallel = engine.wrapper.parallel
            with parallel.world.ledger.recording() as ledger:
                for _ in range(2):
                    first = len(ledger.entries)
                    answers.append(
                        engine.generate(input_ids=prompts, sampling_params={"max_new_tokens": new, "ignore_eos": True})
                    )
                    calls, sizes = Counter(), Counter()
                    for e in ledger.entries[first:]:
                        direct = e.op in ("send", "receive")
                        purpose = e.label if direct or e.label in ("task", "tokens", "results", "logits") else ""
                        calls[e.op, purpose] += 1
                        sizes[e.op, purpose] += e.bytes
                    heard.append({kind: (n, sizes[kind]) for kind, n in calls.items()})
            formula = {kind: (calls, size) for kind, (_, calls, size) in expected(engine.scheduler).items()}
            said = messages_of_all(parallel.replica)
            return answers, heard, formula, {kind: said[kind][:2] for kind in formula}
    finally:
        parallel_state._state = before


def of_a_call(way: str, rank: int, config: ModelConfig, cached: int, new: int, out: int) -> dict:
    """What rank 0 or 1 of a replica says and hears for one prompt of `cached` + `new` tokens and `out` tokens of answer, which
    takes a prefill and `out` - 1 decode steps of one row."""
    layers, row, decodes, steps = config.num_layers, config.hidden_size * ITEM, out - 1, out
    kv, o = 2 * config.num_kv_heads * config.head_dim * ITEM, config.num_heads * (config.head_dim + 1) * ITEM
    if way == "pp":
        to, hidden, logits = ("send", "receive")[rank], (steps, (new + decodes) * row), config.vocab_size * ITEM
        back = ("receive", "send")[rank]
        return {
            (to, "hidden"): hidden, (back, "logits"): (steps, steps * logits),
            (to, "task"): (steps + 1, (steps + 1) * FRAME * 8),
        }  # fmt: skip
    said = {
        ("broadcast", "task"): (steps + 1, (steps + 1) * FRAME * 8),  # and that it stops
        ("broadcast", "tokens"): (steps, steps * 8),
        ("gather", "logits"): (steps, steps * ceil(config.vocab_size / 2) * ITEM),
    }
    if way == "tp":
        n = 1 + 2 * layers
        return said | {("all_reduce", ""): (n * steps, n * (new + decodes) * row)}
    if way == "attn-dp":  # all of it is data rank 0's; the other one takes part in the MLP
        return said | {
            ("all_to_all", ""): (2 * layers + 1, ((3 * layers * new + 2) if rank == 0 else layers * new) * row),
            ("all_gather", ""): ((layers + 1) * decodes, (layers + 1) * decodes * row),
            ("reduce_scatter", ""): (layers * decodes, 2 * layers * decodes * row),
        }
    if way == "sp":
        held, n = ceil(new / 2), 2 * layers
        last = rank == (new - 1) // held
        return said | {
            ("reduce_scatter", ""): ((n + 1) * steps, (n + 1) * 2 * (held + decodes) * row),
            ("all_gather", ""): (n + (n + 1) * decodes, (n * held + (n + 1) * decodes) * row),
            ("all_to_all", ""): (1, 2 * last * row),
        }
    shares = [share(new, one, 2) for one in range(2)]
    width, last, travels = max(one.size for one in shares), new - 1 in shares[rank].tokens(), cached > 0
    query = config.num_heads * config.head_dim * ITEM
    return said | {
        ("exchange", ""): (layers, layers * shares[rank].size * kv),
        ("all_gather", ""): (
            layers * (1 + travels + decodes),
            layers * (width * row + travels * width * query + decodes * o),
        ),
        ("reduce_scatter", ""): (layers, layers * 2 * width * row),
        ("all_to_all", ""): (travels * layers + 1, travels * layers * 2 * width * o + 2 * last * row),
        ("all_reduce", ""): (layers * decodes, layers * decodes * row),
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [4])
def test_every_family_s_tokens_and_the_ledger_of_each_rank_op_by_op(size, way, family, checkpoint, ranks):
    """A prompt for each replica, the second time with a prefix in its tree and more than one token behind it: a prefill of one
    goes as a decode step does where rows are cut."""
    folder, out = checkpoint(family), 4
    first, second, *_ = some_prompts(1009, 5, shared=24, longest=12)
    prompts, config = [first[:27], second[:22]], ModelConfig.from_folder(folder)
    right = [greedy(folder, prompt, out) for prompt in prompts]
    for number, (answers, heard, formula, said) in enumerate(
        ranks(size).run(call_twice, folder, WAYS[way], prompts, out)
    ):
        mine, rank = divmod(number, 2)
        for call, (told, ledger) in enumerate(zip(answers, heard, strict=True)):
            assert [one["output_ids"] for one in told] == right
            assert [one["meta_info"]["dp_rank"] for one in told] == [0, 1]
            cached = call * ((len(prompts[mine]) - 1) // PAGE * PAGE)
            assert told[mine]["meta_info"]["cached_tokens"] == cached
            for op in (
                "broadcast",
                "all_gather",
            ):  # in the replica, and between both: as many bytes as the answers are long
                assert ledger.pop((op, "results"))[0] == 2
            assert ledger == of_a_call(way, rank, config, cached, len(prompts[mine]) - cached, out), (number, call)
        assert bool(formula) == (way in ("tp", "pp"))
        assert said == formula
