from types import SimpleNamespace

import pytest

from ch07_sglang_radix import Engine
from ch07_sglang_radix.server_args import ServerArgs
from ch07_sglang_radix.speculative.attach import attach
from ch07_sglang_radix.speculative.ngram_worker import NgramWorker
from ch07_sglang_radix.speculative.prompt_lookup import PromptLookup
from ch07_sglang_radix.speculative_args import DEFAULTS, speculative_options


def options(algorithm, **more):
    args = ServerArgs(speculative_algorithm=algorithm, **{f"speculative_{name}": value for name, value in more.items()})
    found = speculative_options(args)
    return found.steps, found.topk, found.nodes


def test_a_chain_has_as_many_nodes_as_guesses_and_the_last_token():
    assert options("EAGLE") == (4, 1, 5)
    assert options("EAGLE", num_steps=7) == (7, 1, 8)
    assert options("EAGLE", num_draft_tokens=3) == (2, 1, 3)
    assert options("EAGLE", num_steps=5, eagle_topk=8, num_draft_tokens=64) == (5, 8, 64)
    assert options("NGRAM", num_draft_tokens=12) == (0, 0, 12)


def test_nothing_is_asked_for_by_default():
    assert speculative_options(ServerArgs()) is None


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"algorithm": "EAGLE2"}, "speculative_algorithm='EAGLE2' is unknown; use NGRAM, STANDALONE"),
        ({"num_steps": 3}, "speculative_num_steps=3 without speculative_algorithm: nothing is guessed"),
        ({"typical_acceptance": True}, "speculative_typical_acceptance without speculative_algorithm: there are no guesses"),
        ({"accept_threshold_acc": 0.5}, "speculative_accept_threshold_acc=0.5 without speculative_algorithm"),
        ({"algorithm": "NGRAM", "eagle_topk": 2}, "speculative_eagle_topk=2 with speculative_algorithm=NGRAM, which has no draft"),
        ({"algorithm": "NGRAM", "num_draft_tokens": 1}, "speculative_num_draft_tokens=1 must be"),
        ({"algorithm": "NGRAM", "num_draft_tokens": "x"}, "speculative_num_draft_tokens"),
        ({"algorithm": "EAGLE", "num_steps": 4, "num_draft_tokens": 4}, "a chain of 4 guesses has 5 nodes"),
        ({"algorithm": "EAGLE", "num_steps": 0}, "speculative_num_steps=0 must be"),
        ({"algorithm": "NGRAM", "ngram_min_bfs_breadth": 4, "ngram_max_bfs_breadth": 3}, "=4 is more than"),
        ({"algorithm": "NGRAM", "ngram_match_type": "DFS"}, "speculative_ngram_match_type='DFS' is unknown; use BFS, PROB"),
        ({"accept_threshold_single": 1.5}, "speculative_accept_threshold_single=1.5 must be in"),
        ({"stand_down": "perhaps"}, "speculative_stand_down"),
        ({"token_map": "freq.pt"}, "speculative_token_map is not here: a draft's own reduced vocabulary"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_before_anything_is_started(given, complaint):
    with pytest.raises(ValueError, match=complaint):
        ServerArgs(**{f"speculative_{name}": value for name, value in given.items()})


@pytest.mark.parametrize(
    "more",
    [
        {"pp_size": 2}, {"attn_dp_size": 2}, {"cp_size": 2}, {"enable_layernorm_sp": True}, {"enable_two_batch_overlap": True},
        {"disaggregation_mode": "prefill"}, {"enable_mixed_chunk": True},
    ],
)  # fmt: skip
def test_what_it_is_not_combined_with_is_refused_in_a_line_by_name(more):
    (name,) = more
    with pytest.raises(ValueError, match=rf"^{name}\b.* with speculative_algorithm=EAGLE: .*(use|leave)") as told:
        ServerArgs(speculative_algorithm="EAGLE", **more)
    assert "\n" not in str(told.value)


def test_ngram_may_be_combined_with_mixed_chunks():
    assert ServerArgs(speculative_algorithm="NGRAM", enable_mixed_chunk=True).enable_mixed_chunk


def test_the_engine_guesses_by_the_name_it_was_given():
    for match_type, kind in (("BFS", NgramWorker), ("LOOKUP", PromptLookup)):
        options = {"speculative_algorithm": "NGRAM", "speculative_ngram_match_type": match_type}
        with Engine(device="cpu", max_total_tokens=256, **options) as engine:
            assert isinstance(engine.scheduler.speculation.guesser, kind)
            assert engine.scheduler.speculation.nodes == DEFAULTS["NGRAM"][2]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_trie_that_cannot_be_is_refused_on_every_rank(rank):
    """Else the others would wait for a rank that has left."""
    args = ServerArgs(speculative_algorithm="NGRAM", speculative_ngram_capacity=30)
    with pytest.raises(ValueError, match=r"speculative_ngram_capacity=30 nodes hold no path of .*; use 38 or more"):
        attach(SimpleNamespace(replica=SimpleNamespace(rank=rank)), args)


def test_pages_of_a_draft_count_in_the_size_of_the_pool():
    """SCRIPTED asks for 64 bytes a token beside the model's own."""
    from ch07_sglang_radix.tp_model_wrapper import TPRadixAttentionModelWrapper  # noqa: PLC0415, with the next line
    from tests.ch07.speculative.adversaries import options as scripted  # noqa: PLC0415, it registers a drafter

    plain = TPRadixAttentionModelWrapper(None, "cpu", 16, mem_fraction_static=0.004)
    drafting = TPRadixAttentionModelWrapper(
        None, "cpu", 16, mem_fraction_static=0.004, speculative=scripted("SCRIPTED", 5, True)
    )
    per_page = plain.kv_cache.kv.nbytes / plain.num_pages
    assert drafting.num_pages == pytest.approx(plain.num_pages * per_page / (per_page + 64 * 16), rel=0.05)
