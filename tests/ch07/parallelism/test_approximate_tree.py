"""The tree of what was sent, against a list of what was sent."""

from hypothesis import given
from hypothesis import strategies as st

from ch07_sglang_radix.parallelism.approximate_tree import KEEP, ApproximateTree, common_prefix

TEXTS = st.text("ab", max_size=12)
SENT = st.lists(st.tuples(TEXTS, st.sampled_from("xyz")), max_size=20)


@given(TEXTS, TEXTS)
def test_common_prefix_is_where_they_begin_to_differ(a, b):
    n = common_prefix(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]


@given(SENT, TEXTS)
def test_a_match_is_the_longest_prefix_of_all_prompts_and_who_was_sent_it_last(sent, text):
    tree = ApproximateTree()
    for prompt, worker in sent:
        tree.insert(prompt, worker)
    longest = max((common_prefix(prompt, text) for prompt, _ in sent), default=0)
    matched, worker = tree.match(text)
    assert matched == longest
    those = [worker for prompt, worker in sent if longest and prompt.startswith(text[:longest])]
    assert worker == (those[-1] if those else None)


@given(SENT)
def test_a_worker_s_size_is_that_of_its_distinct_prefixes(sent):
    tree = ApproximateTree()
    for prompt, worker in sent:
        tree.insert(prompt, worker)
    for name in {worker for _, worker in sent}:
        prefixes = {prompt[:n] for prompt, worker in sent if worker == name for n in range(1, len(prompt) + 1)}
        assert tree.size[name] == len(prefixes)


@given(SENT, st.sampled_from("xyz"))
def test_who_is_forgotten_is_matched_no_more_and_the_others_as_before(sent, gone):
    tree, others = ApproximateTree(), ApproximateTree()
    for prompt, worker in sent:
        tree.insert(prompt, worker)
        if worker != gone:
            others.insert(prompt, worker)
    tree.forget(gone)
    assert gone not in tree.size
    for prompt, _ in sent:
        assert tree.match(prompt)[0] == others.match(prompt)[0]
        assert tree.match(prompt)[1] != gone


@given(SENT, st.integers(4, 16))
def test_no_worker_has_more_than_the_most_and_what_is_newest_stays(sent, most):
    tree = ApproximateTree(most)
    for prompt, worker in sent:
        tree.insert(prompt, worker)
        assert max(tree.size.values()) <= most
        if len(prompt) <= most * KEEP / 2:
            assert tree.match(prompt)[0] == len(prompt)


def test_what_was_not_used_for_longest_goes_first():
    tree = ApproximateTree(20)
    for letter in "abcdae":  # the last makes 25; three quarters of 20 are left
        tree.insert(5 * letter, "x")
    assert [tree.match(5 * letter)[0] for letter in "abcde"] == [5, 0, 0, 5, 5]


def test_token_ids_are_as_good_as_texts():
    tree = ApproximateTree()
    tree.insert([1, 2, 3], "x")
    tree.insert([1, 2, 4], "y")
    assert tree.match([1, 2, 3, 9]) == (3, "x")
    assert tree.match([1, 2]) == (2, "y"), "both were sent it, y last"
    assert tree.match([7]) == (0, None)
