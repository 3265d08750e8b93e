"""Whoever guesses, and whatever: the tokens are plain greedy's and transformers', and no page is lost.

pytest tests/ch07/speculative/test_product.py                              # 50 cases, as CI runs it; `make test` draws 10
pytest tests/ch07/speculative/test_product.py --hypothesis-profile=long    # 750
"""

from functools import cache

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ch07_sglang_radix.speculative.ngram_trie import NgramTrie
from ch07_sglang_radix.speculative.ngram_worker import NgramWorker
from ch07_sglang_radix.speculative.prompt_lookup import PromptLookup
from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper
from common.tiny_qwen import DRAFTER_PATHS, TINY_QWEN_PATH
from tests.ch07.speculative.adversaries import KINDS, Adversary, options
from tests.ch07.test_product import NEW_TOKENS, PROMPTS, cases, see, serve
from tests.oracle import greedy

BUNDLED = [name for name in ("STANDALONE", "MEDUSA", "EAGLE") if DRAFTER_PATHS[name].exists()]
N_GRAMS = {"TRIE": lambda: NgramWorker(NgramTrie()), "LOOKUP": PromptLookup}
guesses = st.fixed_dictionaries({
    "kind": st.sampled_from([*KINDS, "mixed", "right", "SCRIPTED", *BUNDLED, *N_GRAMS]), "tree": st.booleans(),
    "nodes": st.sampled_from([2, 3, 5, 8]),
})  # fmt: skip


@cache
def wrapper(page_size: int, pool: int, algorithm: str, nodes: int, tree: bool) -> TPRadixAttentionModelWrapper:
    return TPRadixAttentionModelWrapper(
        None, "cpu", page_size, max_total_tokens=pool, speculative=options(algorithm, nodes, tree)
    )


def speculate(case: dict, how: dict) -> tuple[list, int, tuple[int, ...]]:
    """What tests/ch07/test_product.py serves, with guesses, and how many plain steps, sequences in verify steps and right guesses
    there were."""
    kind, tree, nodes = how["kind"], how["tree"], how["nodes"]
    on_ranks, seen = kind == "SCRIPTED" or kind in BUNDLED, []
    case = case | {
        "options": case["options"]
        | {"enable_mixed_chunk": case["options"].get("enable_mixed_chunk", False) and not on_ranks}
    }

    def prepare(scheduler):
        if scheduler.replica.rank == 0 and not on_ranks:
            answers = {tuple(p): greedy(TINY_QWEN_PATH, p, NEW_TOKENS) for p in PROMPTS}
            guesser = N_GRAMS[kind]() if kind in N_GRAMS else Adversary(kind, answers, tree)
            scheduler.speculation.guesser = guesser
        seen.append(scheduler.speculation)

    make = lambda page, pool: wrapper(page, pool, kind if on_ranks else "NGRAM", nodes, tree)  # noqa: E731
    answers, retractions = serve(case, make, prepare)
    told = seen[0]
    counts = () if told is None else (told.state.steps["decode"] - told.steps, told.sequences, told.correct)
    return answers, retractions, counts


@settings(
    max_examples=max(settings().max_examples // 4, 10), deadline=None, derandomize=settings().max_examples <= 200,
    suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.reuse, Phase.generate),  # shrinking takes long
)  # fmt: skip
@given(size=st.sampled_from([1] * 7 + [2] * 2 + [3]), case=cases, how=guesses)
def test_no_guess_changes_an_answer(size, case, how, ranks):
    by_rank = ranks(size).run(speculate, case, how) if size > 1 else [speculate(case, how)]
    for answers, _, _ in by_rank:
        see(answers, case)


BUSY = {
    "page_size": 4, "chunk": 64, "small_pool": False, "options": {"schedule_policy": "fcfs", "overlap": False},
    "requests": [(0, i, NEW_TOKENS, 0, None, None) for i in (0, 3, 6, 1, 4, 7)],
}  # fmt: skip


def test_right_guesses_all_come_out_and_wrong_ones_never():
    """Ten tokens after the one that prefill brings: two steps of five nodes, or nine of one."""
    for tree in (False, True):
        _, _, (_, sequences, correct) = speculate(BUSY, {"kind": "wrong", "tree": tree, "nodes": 5})
        assert (sequences, correct) == (6 * 9, 0)
    _, _, (_, sequences, correct) = speculate(BUSY, {"kind": "right", "tree": False, "nodes": 5})
    assert (sequences, correct) == (6 * 2, 6 * 7)  # 5 + 4: the run ends where the answer does


def test_the_draws_reach_what_they_are_for():
    """Small pools do retract and fall back to plain steps, guesses are right and wrong; else the test above would say little."""
    busy = BUSY | {"small_pool": True, "page_size": 1, "options": {"schedule_policy": "fcfs", "overlap": True}}
    busy |= {"requests": [(0, i, NEW_TOKENS, 0, None, 4 if i == 7 else None) for i in (0, 3, 6, 1, 4, 7, 2, 5, 8)]}
    answers, retractions, (plain, sequences, correct) = speculate(busy, {"kind": "mixed", "tree": True, "nodes": 2})
    see(answers, busy)
    assert retractions > 0
    assert plain > 0
    assert [ended for _, ended in answers].count("abort") == 1
    assert 0 < correct < sequences
