"""The trie guesses what followed the longest known suffix, and nothing that was never said; its memory has a limit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ch07_sglang_radix import Engine
from ch07_sglang_radix.speculative.ngram_trie import NgramTrie, Place
from ch07_sglang_radix.speculative.ngram_worker import NgramWorker

TEXTS = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=25), min_size=1, max_size=5)


def read(trie, *texts, namespace=None):
    """The place behind the last of them."""
    for text in texts:
        place = Place(namespace)
        trie.read(place, text)
    return place


def paths(guesses):
    """Each node's tokens from the root on."""
    found = [()]
    for token, parent in zip(guesses.tokens, guesses.parents, strict=True):
        found.append((*found[parent], token))
    return found[1:]


def pieces(text, most):
    return {tuple(text[i:j]) for i in range(len(text)) for j in range(i + 1, min(i + most, len(text)) + 1)}


def test_what_followed_the_last_time_is_the_first_guess():
    trie = NgramTrie(depth=4)
    place = read(trie, [1, 2, 3, 9], [1, 2, 4, 8, 1, 2])
    assert paths(trie.guess(place, 5)) == [(4,), (3,), (4, 8), (3, 9), (4, 8, 1)]


def test_the_longest_suffix_is_asked_first_and_shorter_ones_fill_up():
    trie = NgramTrie(depth=4, max_breadth=2)
    place = read(trie, [7, 2, 5], [6, 2, 3], [7, 2])
    assert paths(trie.guess(place, 8)) == [(5,), (3,)]


def test_a_long_suffix_has_one_guess_at_a_time_and_a_short_one_many():
    trie = NgramTrie(depth=18, max_breadth=10)
    place = read(trie, *[[1, token] for token in range(20, 40)], [1])
    assert {len(path) for path in paths(trie.guess(place, 10))} == {1}
    long = list(range(40, 57))
    place = read(trie, [*long, 1, 2, 3], [*long, 5, 6, 7], long)
    assert paths(trie.guess(place, 2)) == [(5,), (5, 6)]  # both were said behind 17 tokens


def test_prob_takes_what_was_met_most_often():
    trie = NgramTrie(depth=3, match_type="PROB")
    texts = [[1, 5], [1, 5], [1, 5], [1, 6], [1, 6], [1, 7], [1]]
    assert paths(trie.guess(read(trie, *texts), 3)) == [(5,), (6,), (7,)]
    assert paths(NgramTrie.guess(trie, read(trie, [1]), 1)) == [(5,)]


def test_prob_weighs_a_path_by_the_product_of_its_shares():
    trie = NgramTrie(depth=4, match_type="PROB")
    place = read(trie, *[[1, 5, 8]] * 3, *[[1, 6, 9]] * 2, [1])
    assert paths(trie.guess(place, 4)) == [(5,), (5, 8), (6,), (6, 9)]  # 0.6, 0.6, 0.4, 0.4


def test_a_breadth_of_one_is_a_chain():
    trie = NgramTrie(depth=6, max_breadth=1)
    place = read(trie, [1, 2, 3, 4], [9, 2, 5, 6, 7], [1, 2])
    guesses = trie.guess(place, 4)
    assert guesses.parents == list(range(len(guesses.tokens)))
    assert guesses.tokens == [3, 4]  # what followed "2" elsewhere would be a second branch


@given(TEXTS, st.integers(2, 6), st.integers(1, 12), st.integers(1, 4), st.sampled_from(["BFS", "PROB"]))
def test_every_guess_has_been_said_behind_a_suffix_of_the_text(texts, depth, most, breadth, match_type):
    trie = NgramTrie(depth=depth, max_breadth=breadth, match_type=match_type)
    place = read(trie, *texts)
    guesses = trie.guess(place, most)
    said = set().union(*(pieces(text, depth) for text in texts))
    suffixes = [tuple(texts[-1][-n:]) for n in range(1, min(len(texts[-1]), depth - 1) + 1)]
    assert len(guesses.tokens) <= most
    found = paths(guesses)
    assert len(set(found)) == len(found)  # a node's children differ
    for path in found:
        assert any((*suffix, *path) in said for suffix in suffixes)
    assert all(guesses.parents.count(parent) <= breadth for parent in guesses.parents)
    longest = [suffix for suffix in suffixes if any((*suffix, token) in said for token in range(5))]
    assert bool(found) == bool(longest)
    if found:
        assert (*longest[-1], *found[0]) in said


@given(TEXTS, st.integers(2, 5))
def test_a_text_read_in_parts_is_the_same_as_read_at_once(texts, depth):
    whole, parts = NgramTrie(depth=depth), NgramTrie(depth=depth)
    at_once, in_parts = Place(), Place()
    for text in texts:
        at_once, in_parts = Place(), Place()
        whole.read(at_once, text)
        for token in text:
            parts.read(in_parts, [token])
            parts.guess(in_parts, 3)
    assert whole.guess(at_once, 9).tokens == parts.guess(in_parts, 9).tokens
    assert whole.nodes == parts.nodes


def count_nodes(roots):
    def below(node):
        return 1 + sum(map(below, node.values()))

    return sum(map(below, roots.values()))


@given(TEXTS, st.integers(2, 4), st.integers(0, 30))
def test_nodes_are_counted_and_never_more_than_the_capacity(texts, depth, more):
    trie = NgramTrie(depth=depth, capacity=2 * depth + 2 + more)
    for i, text in enumerate(texts):
        place = Place(namespace=i % 2)
        for token in text:
            trie.read(place, [token])
            trie.guess(place, 3)
            assert trie.young_nodes == count_nodes(trie.young)
            assert trie.old_nodes == count_nodes(trie.old)
            assert trie.nodes <= trie.capacity


def test_what_is_said_again_and_again_is_not_forgotten_and_the_rest_is():
    trie = NgramTrie(depth=3, capacity=120)
    read(trie, [1, 2, 3], [4, 5, 6])
    for i in range(100, 200):
        read(trie, [i, i + 100, i + 200, 1, 2, 3])
    assert paths(trie.guess(read(trie, [1, 2]), 1)) == [(3,)]
    assert paths(trie.guess(read(trie, [4, 5]), 1)) == []


def test_a_request_goes_on_where_its_words_were_though_the_generation_has_changed():
    trie = NgramTrie(depth=4, capacity=100)
    place = read(trie, [1, 2, 3, 4, 1, 2])
    generation = trie.generation
    for i in range(100, 120):
        if trie.generation == generation:
            read(trie, [i, i + 100, i + 200])
    assert trie.generation == generation + 1
    assert paths(trie.guess(place, 2))[0] == (3,)
    trie.read(place, [3])
    assert paths(trie.guess(place, 2))[0] == (4,)


def test_namespaces_do_not_hear_each_other():
    trie = NgramTrie()
    read(trie, [1, 2, 3], namespace="a")
    assert paths(trie.guess(read(trie, [1, 2], namespace="b"), 4)) == []
    assert paths(trie.guess(read(trie, [1, 2], namespace="a"), 4)) == [(3,)]


def test_forget_forgets_all():
    trie = NgramTrie()
    place = read(trie, [1, 2, 3, 1, 2])
    trie.forget()
    assert trie.nodes == 0
    assert paths(trie.guess(place, 4)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 1}, "speculative_ngram_max_trie_depth=1"),
        ({"min_breadth": 3, "max_breadth": 2}, "speculative_ngram_min_bfs_breadth=3"),
        ({"min_breadth": 0}, "speculative_ngram_min_bfs_breadth=0"),
        ({"capacity": 20}, "speculative_ngram_capacity=20 nodes"),
        ({"match_type": "LAST"}, "speculative_ngram_match_type='LAST'"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        NgramTrie(**arguments)
    assert "\n" not in str(error.value)


class Request:
    """What a worker sees of one."""

    def __init__(self, ids, probe=False):
        self.all_ids, self.extra_key, self.probe, self.ended = np.array(ids), None, probe, False


def test_the_worker_reads_what_is_new_of_each_request_and_fills_up_with_zeros():
    worker = NgramWorker(NgramTrie(depth=4, max_breadth=1))
    one, two = Request([5, 6, 7, 5, 6]), Request([9])
    tokens, parents = worker.guess([two, one], 5)
    assert tokens.tolist() == [[0] * 4, [7, 5, 6, 0]]
    assert parents.tolist() == [[0] * 4, [0, 1, 2, 0]]
    two.all_ids = np.array([9, 5, 6])  # what another request said
    assert worker.guess([two], 3)[0].tolist() == [[7, 5]]


def test_the_last_tokens_of_an_answer_are_read_when_it_ends():
    worker = NgramWorker(NgramTrie())
    one = Request([1, 2])
    worker.guess([one], 3)
    one.all_ids = np.array([1, 2, 3, 4])
    one.ended = True
    assert worker.guess([Request([1, 2])], 3)[0].tolist() == [[3, 4]]
    assert one not in worker._places


def test_a_probe_leaves_no_trace():
    worker = NgramWorker(NgramTrie())
    assert worker.guess([Request([1, 2, 3, 1, 2], probe=True)], 3)[0].tolist() == [[0, 0]]
    assert worker.trie.nodes == 0


def test_who_flushes_the_cache_is_not_remembered_by_the_trie_either():
    with Engine(
        device="cpu", max_total_tokens=512, speculative_algorithm="NGRAM", speculative_stand_down=False
    ) as engine:
        params = {"max_new_tokens": 12, "ignore_eos": True}
        first = engine.generate(input_ids=[5, 6, 7, 8], sampling_params=params)
        trie = engine.scheduler.speculation.guesser.trie
        assert trie.nodes
        assert engine.flush_cache()
        assert trie.nodes == 0
        again = engine.generate(input_ids=[5, 6, 7, 8], sampling_params=params)
        assert again["output_ids"] == first["output_ids"]
        assert again["meta_info"]["spec_verify_ct"] == first["meta_info"]["spec_verify_ct"]
