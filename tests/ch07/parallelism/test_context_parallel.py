"""The tokens of each request spread over ranks: the answers are transformers' own, and the messages are what a formula says."""

from functools import cache, partial

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from ch07_sglang_radix.engine import Engine
from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.tasks import DecodeTask, PageUpdate, PrefillSequence, PrefillTask
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.attention.zigzag import share
from common.executor import Executor
from common.sampling.params import SamplingParams
from tests.ch07.test_product import cases, see
from tests.ch07.test_product import serve as serve_case
from tests.oracle import greedy, some_prompts
from tests.ranks import layout_of_the_pool

NEW_TOKENS = 8
SMALL_POOL = 96  # tokens; the longest request needs 48, all of them together do not fit
POOL = 1024  # where all of them fit
LAYOUTS = {2: (2, 2), 3: (3, 3), 4: (4, 2)}  # by ranks (tp, cp); with four of them the heads are cut over two as well
OPTIONS = [
    {"page_size": 1},
    {"page_size": 16, "chunked_prefill_size": 16, "enable_mixed_chunk": True, "gather_best": True},
    {"page_size": 4, "chunked_prefill_size": 64, "pool": SMALL_POOL, "overlap": True},
    {"page_size": 16, "chunked_prefill_size": 32, "disable_radix_cache": True, "enable_mixed_chunk": True, "pool": SMALL_POOL},
]  # fmt: skip
# one family has all options on two ranks, the others half there and half on four (test_combinations.py has all three families)
CASES = [
    (2, "qwen2", OPTIONS), (2, "qwen3", OPTIONS[::2]), (2, "llama", OPTIONS[1::2]),
    (4, "qwen3", OPTIONS[1::2]), (4, "llama", OPTIONS[::2]),
]  # fmt: skip


def prompts_of(vocab_size: int = 1009) -> list[list[int]]:
    """Some that begin alike, some shorter than two tokens a rank."""
    prompts = some_prompts(vocab_size, 7, shared=24, longest=16)
    return [*prompts, *(prompts[2][:n] for n in (2, 3, 5))]


def serve(folder, prompts, options, layout):
    """On each rank: the prompts twice, so that they are in the tree; once if there is none; [([tokens, ...], retractions), ...]."""
    tp, cp = layout
    state, answers = layout_of_the_pool(tp, context_parallel_size=cp), []
    for chosen in options:
        rest = dict(chosen)
        pool, page_size = rest.pop("pool", POOL), rest.pop("page_size")
        wrapper = TPRadixAttentionModelWrapper(str(folder), "cpu", page_size, max_total_tokens=pool, parallel=state)
        scheduler = TPScheduler(wrapper, check=True, **rest)
        if pool == SMALL_POOL and scheduler.tp.rank == 0:
            scheduler.new_token_ratio = scheduler.init_new_token_ratio = 0.1  # admit too many
        params, rounds = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True), []
        for _ in range(1 if "disable_radix_cache" in rest else 2):
            ids = [scheduler.add_request(input_ids=prompt, sampling_params=params) for prompt in prompts]
            results = scheduler.process_requests()
            rounds.append([results[i].output_ids for i in ids])
        answers.append((rounds, scheduler.retractions))
    return answers


@pytest.mark.parametrize(("size", "name", "options"), CASES, ids=[f"{size}-{name}" for size, name, _ in CASES])
def test_tokens_equal_transformers(size, name, options, checkpoint, ranks):
    folder = checkpoint(name)
    prompts = prompts_of()
    expected = [greedy(folder, prompt, NEW_TOKENS) for prompt in prompts]
    retractions = 0
    for rank, answers in enumerate(ranks(size).run(serve, folder, prompts, options, LAYOUTS[size])):
        for chosen, (rounds, retracted) in zip(options, answers, strict=True):
            assert all(tokens == expected for tokens in rounds), (rank, chosen)
            retractions += retracted
    assert retractions > 0, "the small pool was to bring retraction about"


@cache
def spread(tp: int, cp: int, page_size: int, pool: int) -> TPRadixAttentionModelWrapper:
    parallel = layout_of_the_pool(tp, context_parallel_size=cp)
    return TPRadixAttentionModelWrapper(None, "cpu", page_size, max_total_tokens=pool, parallel=parallel)


def serve_spread(layout, case):
    return serve_case(case, partial(spread, *layout))


@pytest.mark.parametrize(
    ("size", "one_of"), [(2, 6), (3, 18), (4, 18)]
)  # 100 draws: 16 on two ranks, whose messages are quickest
def test_nothing_changes_an_answer(size, one_of, ranks):
    """Pages, chunks, policies, mixed steps, overlap, retraction, aborts, cache on and off, as they are drawn for one rank."""

    @seed(size)  # or each layout would draw the same ones
    @settings(
        max_examples=max(settings().max_examples // one_of, 3), deadline=None, derandomize=settings().max_examples <= 200,
        suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.reuse, Phase.generate),
    )  # fmt: skip
    @given(case=cases)
    def draw(case):
        for answers, _ in ranks(size).run(serve_spread, LAYOUTS[size], case):
            see(answers, case)

    draw()


# --- messages and memory


def steps_of(folder, layout, cached: int, new: int, batch: int):
    """Ledgers of a prefill of `new` tokens behind `cached` ones and of a decode of `batch` rows; and what the rank holds."""
    tp, cp = layout
    state = layout_of_the_pool(tp, context_parallel_size=cp)
    wrapper = TPRadixAttentionModelWrapper(str(folder), "cpu", 4, max_total_tokens=480, parallel=state)
    c, heads = wrapper.config, wrapper.model.heads
    pages = [tuple(range(20 * b, 20 * b + 20)) for b in range(batch)]
    ledgers = []

    def run(execute, task) -> None:
        with state.tp.ledger.recording() as ledger:
            execute(task)
            ledgers.append({op: tuple(said.values()) for op, said in ledger.summary().items()})
            ledger.entries.clear()

    if cached:
        first = PrefillTask(0, (PageUpdate(0, 0, pages[0]),), (PrefillSequence(0, 0, cached, 0),), tuple(range(cached)))
        wrapper.execute_prefill_task(first)
    task = PrefillTask(1, (PageUpdate(0, 0, pages[0]),), (PrefillSequence(0, cached, new, 1),), tuple(range(new)))
    run(wrapper.execute_prefill_task, task)
    updates = tuple(PageUpdate(b, 0, p) for b, p in enumerate(pages))
    run(wrapper.execute_decode_task, DecodeTask(2, updates, tuple(range(batch)), (cached + new,) * batch))
    sizes = {"L": c.num_layers, "D": c.hidden_size, "Hq": heads.num_q, "Hkv": heads.num_kv, "d": c.head_dim}
    return ledgers, sizes, state.cp.rank


@pytest.mark.parametrize("size", LAYOUTS)
@pytest.mark.parametrize("cached", [0, 8])
def test_the_messages_of_a_step_are_their_formula(size, cached, checkpoint, ranks):
    new, batch, item, (_, cp) = 24, 3, 4, LAYOUTS[size]
    attn_tp = size // cp
    shares = [share(new, rank, cp).size for rank in range(cp)]
    owner = next(rank for rank in range(cp) if new - 1 in share(new, rank, cp).tokens())
    held = -(-max(shares) // attn_tp)
    for tp_rank, ((prefill, decode), z, cp_rank) in enumerate(
        ranks(size).run(steps_of, checkpoint("qwen2"), (size, cp), cached, new, batch)
    ):
        layers, row = z["L"], z["D"] * item
        answer = z["Hq"] * (z["d"] + 1) * item  # o and its log-sum-exp
        passed = [shares[(cp_rank - step) % cp] for step in range(cp - 1)]  # my block, then those that I hand on
        expected = {
            "exchange": [layers * (cp - 1), layers * sum(passed) * 2 * z["Hkv"] * z["d"] * item],
            "all_gather": [layers, layers * held * row],  # before the MLP, over all ranks
            "reduce_scatter": [layers, layers * size * held * row],  # behind it
        }
        if attn_tp > 1:  # heads are cut as well: before and behind attention, and the embedding, over attn_tp ranks
            expected["all_gather"][0] += layers
            expected["all_gather"][1] += layers * held * row
            expected["reduce_scatter"][0] += 1 + layers
            expected["reduce_scatter"][1] += (1 + layers) * held * attn_tp * row
        if cached:  # queries travel, and their answers come back
            width = max(shares)
            expected["all_gather"][0] += layers
            expected["all_gather"][1] += layers * width * z["Hq"] * z["d"] * item
            expected["all_to_all"] = [layers, layers * cp * width * answer]
        # the one hidden row that the LM head needs lies on one rank: the counts are uneven
        last = [share(new, owner, cp).tokens().index(new - 1) // held + owner * attn_tp == r for r in range(size)]
        calls, sent = expected.get("all_to_all", (0, 0))
        expected["all_to_all"] = [calls + 1, sent + last[tp_rank] * size * row]
        assert prefill == {op: tuple(said) for op, said in expected.items()}
        assert decode == {
            "all_gather": (layers, layers * batch * answer),
            "all_reduce": (layers, layers * batch * row)
            if attn_tp == 1
            else (1 + 2 * layers, (1 + 2 * layers) * batch * row),
        }


def pool_of(layout):
    tp, cp = layout
    state = layout_of_the_pool(tp, context_parallel_size=cp)
    executor = Executor(None, "cpu", 4, max_total_tokens=480, parallel=state)
    return executor.num_pages, executor.kv_cache.kv.nbytes, executor.model.heads.num_kv


@pytest.mark.parametrize("size", LAYOUTS)
def test_a_rank_s_pool_is_one_part_of_it(size, ranks):
    """The same pages for whoever deals them out; the bytes of a rank are its share, in tokens as in heads."""
    whole, (_, cp) = Executor(None, "cpu", 4, max_total_tokens=480), LAYOUTS[size]
    for num_pages, nbytes, heads in ranks(size).run(pool_of, LAYOUTS[size]):
        assert num_pages == whole.num_pages == 120
        assert nbytes * cp * whole.model.heads.num_kv == whole.kv_cache.kv.nbytes * heads


# --- what the engine takes


def test_an_engine_starts_its_ranks_and_tells_prompt_logprobs():
    """Two ranks that nobody started; what a prompt's tokens cost is the same as on one rank."""
    told = []
    for more in ({}, {"cp_size": 2}):
        with Engine(page_size=4, device="cpu", **more) as engine:
            answer = engine.generate(
                "What is a radix cache?", {"max_new_tokens": 4}, return_logprob=True, logprob_start_len=0
            )
            told.append((answer["output_ids"], [x[1] for x in answer["meta_info"]["input_token_logprobs"]]))
            told[-1] += ([x[0] for x in answer["meta_info"]["input_token_logprobs"][1:]],)
            assert engine.get_server_info()["cp_size"] == more.get("cp_size", 1)
    (one, ids, values), (two, ids_too, values_too) = told
    assert (one, ids) == (two, ids_too)
    assert np.allclose(values, values_too, atol=1e-4)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"cp_size": 2, "tp_size": 3}, "cp_size=2 does not divide tp_size=3, inside which it is cut"),
        ({"cp_size": 2, "attn_dp_size": 2}, "attn_dp_size=2 and cp_size=2 are not combined here"),
        ({"cp_size": 2, "enable_layernorm_sp": True}, "enable_layernorm_sp with cp_size=2, which cuts the rows"),
        (
            {"pp_size": 2, "enable_layernorm_sp": True},
            "enable_layernorm_sp with pp_size=2: a stage hands over whole rows",
        ),
        (
            {"pp_size": 2, "enable_two_batch_overlap": True},
            "enable_two_batch_overlap with pp_size=2: stages overlap steps",
        ),
        ({"cp_size": 4000}, "^tp4000 .cp4000. would start 3999 processes; this machine takes"),
        ({"cp_size": 0}, "cp_size=0"),
        ({"attn_cp_size": 2}, "attn_cp_size is not here: it is cp_size= here"),
        (
            {"data_parallel_size": 2},
            "^engine argument data_parallel_size is not here: it is dp_size= here, as in SGLang's Engine",
        ),
    ],
)
def test_what_cannot_be_is_one_line_and_no_rank_is_started(asked, said):
    with pytest.raises(ValueError, match=said) as refused:
        Engine(device="cpu", **asked)
    assert "\n" not in str(refused.value)


def refused(layout, arguments):
    """What an executor says to them, on each rank."""
    tp, cp = layout
    state = layout_of_the_pool(tp, context_parallel_size=cp)
    with pytest.raises(ValueError, match=f"cp_size={cp}") as told:
        Executor(None, "cpu", parallel=state, **arguments)
    return str(told.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"context_length": 1},
            "of a request over 2 ranks, but it has 1 at most here; use cp_size=1, or a longer context",
        ),
        (
            {"max_total_tokens": 16},
            "pages over 2 ranks, but the pool has 1 of 16 tokens; use a larger max_total_tokens",
        ),
        (
            {"attention_backend": "triton"},
            "attention_backend=triton with cp_size=2: the ring has its own; leave it out",
        ),
    ],
)
def test_less_than_the_ranks_is_refused_on_every_one(arguments, said, ranks):
    answers = ranks(2).run(refused, (2, 2), arguments)
    assert answers[0] == answers[1]
    assert said in answers[0]
    assert "\n" not in answers[0]
