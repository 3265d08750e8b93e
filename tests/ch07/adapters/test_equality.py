"""Whatever runs beside it, arrives, is loaded or unloaded meanwhile: a request's tokens are those that peft in transformers gives
for its adapter alone.

pytest tests/ch07/adapters/test_equality.py --hypothesis-profile=long
"""

from math import prod

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.adapters import save_adapter
from tests.ch07.adapters.serve import NEW, RANK, expected_with, see, serve
from tests.ch07.test_product import PROMPTS
from tests.oracle import greedy

NAMES = ("a", "b", "c", "d")
CONFIGS = {  # of different ranks, on different modules
    "a": {"r": 4},
    "b": {"r": 8, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "c": {"r": 2, "lora_alpha": 16, "target_modules": ["o_proj", "gate_proj", "up_proj"]},
    "d": {"r": 3, "target_modules": ["k_proj", "v_proj"], "rank_pattern": {"v_proj": 5}},
}


@pytest.fixture(scope="module")
def base(checkpoint):
    return checkpoint("qwen2")


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {
        name: save_adapter(base, root / name, seed=i, strength=0.3, **config)
        for i, (name, config) in enumerate(CONFIGS.items())
    }


def everybody(count=12, new=NEW):
    """Prompts that share beginnings, with each adapter and none, all at once."""
    return [(0, "ask", (None, *NAMES)[i % 5], i % len(PROMPTS), new) for i in range(count)]


PLAIN = {
    "page_size": 4, "chunk": False, "small_pool": False, "max_loras": 4, "max_loaded": None, "policy": "lru",
    "options": {"overlap": False}, "start": {name: name for name in NAMES},
}  # fmt: skip


def test_the_adapters_do_say_different_things(base, folders):
    """Otherwise the tests below would say nothing."""
    for prompt in (0, 5):
        said = [tuple(expected_with(base, folders[name], prompt)) for name in NAMES]
        assert len({tuple(greedy(base, PROMPTS[prompt], NEW)), *said}) == 5


@pytest.mark.parametrize(("size", "layout"), [(1, (1,)), (2, (2,)), (3, (3,)), (2, (1, 2))], ids=str)
def test_a_mixed_batch_says_what_each_adapter_says_alone(size, layout, base, folders, ranks):
    cases = [
        PLAIN | {"script": everybody()},
        PLAIN | {"script": everybody(), "max_loras": 2, "max_loaded": 3, "start": {"a": "a", "b": "b", "c": "c"}},
        PLAIN | {"script": everybody(), "page_size": 1, "chunk": True, "small_pool": True, "options": {"overlap": True}},
        PLAIN | {"script": everybody(), "options": {"enable_mixed_chunk": True, "gather_best": True}, "chunk": True},
    ]  # fmt: skip
    cases[1]["script"] = [one for one in cases[1]["script"] if one[2] != "d"]
    for case in cases:
        told = ranks(size).run(serve, base, folders, case, layout) if size > 1 else [serve(base, folders, case)]
        answers, seen = told[0]
        assert len(answers) == len(case["script"])
        see(answers, base, folders)
        assert case["chunk"] or seen["most"] == min(case["max_loras"], len(case["start"]))


def test_a_page_that_another_adapter_has_computed_is_never_used(base, folders):
    """Equal prompts with each adapter, one after the other: each computes its own, and finds its own."""
    script = [(0, "ask", name, 0, NEW) for name in (None, *NAMES) for _ in range(2)]
    answers, _ = serve(base, folders, PLAIN | {"script": script, "max_loras": 1})
    see(answers, base, folders)


def test_a_reload_never_hits_old_pages(base, folders):
    """The same name, other numbers: what the first adapter computed is still in the tree, and nobody finds it."""
    script = [
        (0, "ask", "a", 0, NEW), (50, "unload", "a"), (50, "load", "a", "b"), (51, "ask", "a", 0, NEW), (90, "unload", "a"),
        (90, "load", "a", "a"), (91, "ask", "a", 0, NEW),
    ]  # fmt: skip
    answers, _ = serve(base, folders, PLAIN | {"script": script, "start": {"a": "a"}})
    assert [which for which, *_ in answers] == ["a", "b", "a"]
    see(answers, base, folders)


def test_an_adapter_that_is_unloaded_while_requests_use_it_serves_them_to_their_end(base, folders):
    script = [
        (0, "ask", "a", 0, NEW), (0, "ask", "a", 3, NEW), (2, "unload", "a"), (2, "ask", "a", 1, NEW), (3, "load", "a", "c"),
        (3, "ask", "a", 0, NEW), (4, "unload", "a"), (5, "load", "a", "d"), (5, "ask", "a", 0, NEW),
    ]  # fmt: skip
    answers, seen = serve(base, folders, PLAIN | {"script": script, "start": {"a": "a"}})
    assert [which for which, *_ in answers] == ["a", "a", "unknown", "c", "d"]
    see(answers, base, folders)
    assert seen["most"] == 3  # three of one name, each with its own numbers


def test_what_was_forgotten_for_want_of_room_comes_back_with_the_numbers_it_had(base, folders):
    script = [(10 * i, "ask", "abcabc"[i], 0, NEW) for i in range(6)]
    case = PLAIN | {"script": script, "max_loras": 1, "max_loaded": 3}
    answers, _ = serve(base, folders, case | {"start": {name: name for name in "abc"}})
    see(answers, base, folders)


SLOTS = st.sampled_from(NAMES)
asks = st.tuples(
    st.integers(0, 25), st.just("ask"), st.sampled_from([None, *NAMES, *NAMES]), st.integers(0, len(PROMPTS) - 1),
    st.integers(1, NEW),
)  # fmt: skip
loads = st.tuples(st.integers(0, 25), st.just("load"), SLOTS, SLOTS)
unloads = st.tuples(st.integers(0, 25), st.just("unload"), SLOTS)
aborts = st.tuples(st.integers(0, 25), st.just("abort"), st.just(""), st.integers(0, 11))
cases = st.fixed_dictionaries({
    "page_size": st.sampled_from([1, 4, 16]), "chunk": st.booleans(), "small_pool": st.booleans(),
    "max_loras": st.sampled_from([1, 2, 3]), "max_loaded": st.sampled_from([None, 3, 4]),
    "policy": st.sampled_from(["lru", "fifo"]),
    "start": st.dictionaries(SLOTS, SLOTS, max_size=3),
    "options": st.fixed_dictionaries({
        "schedule_policy": st.sampled_from(["fcfs", "lpm", "random"]), "overlap": st.booleans(),
        "enable_mixed_chunk": st.booleans(), "gather_best": st.booleans(),
        "disable_radix_cache": st.sampled_from([False, False, True]),
    }),
    "script": st.lists(st.one_of(asks, asks, asks, loads, unloads, aborts), min_size=3, max_size=16),
})  # fmt: skip


@settings(max_examples=max(settings().max_examples // 2, 10), deadline=None, derandomize=settings().max_examples <= 200,
          suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.reuse, Phase.generate))  # fmt: skip
@given(layout=st.sampled_from([(1,)] * 8 + [(2,), (1, 2)]), case=cases)
def test_no_schedule_changes_an_answer(layout, case, base, folders, ranks):
    """Arrivals, loads, unloads and aborts at any step; small limits, chunks, retraction, overlap. The limit of adapters that run is
    looked at after every step, and so is the conservation of pages (serve.py)."""
    size = prod(layout)
    told = ranks(size).run(serve, base, folders, case, layout) if size > 1 else [serve(base, folders, case)]
    see(told[0][0], base, folders)


def test_the_draws_reach_what_they_are_for(base, folders):
    """Retraction and draining do happen in cases like these."""
    script = [(i // 2, "ask", NAMES[i % 3], i % 9, NEW) for i in range(24)]
    case = PLAIN | {"script": script, "max_loras": 2, "small_pool": True, "page_size": 1, "options": {"overlap": True}}
    answers, seen = serve(base, folders, case | {"start": {name: name for name in "abc"}})
    see(answers, base, folders)
    assert seen["retracted"] > 0
    assert seen["drained"] > 0


def test_the_slots_have_the_room_that_the_adapters_need(folders):
    assert max(config["r"] for config in CONFIGS.values()) == RANK
