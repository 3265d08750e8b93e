"""How this tree keeps its leaves in order of eviction; a reader's own tree may do it otherwise."""

from tests.ch07.test_radix_cache import tree_with


def test_the_line_of_leaves_stays_short_however_often_they_are_used():
    """Every use puts a leaf in line anew: more than four entries a leaf, and a few, are swept out."""
    tree, _ = tree_with([1, 2, 3, 4], [1, 2, 5], [7], [8])
    tree.evict(1)
    longest = 0
    for _ in range(300):
        tree.match_prefix([1, 2, 5])
        longest = max(longest, len(tree.leaves))
    assert 64 < longest <= 4 * len(list(tree.nodes())) + 64
    assert [tree.evict(1) for _ in range(5)] == [1, 1, 1, 2, 0], "7, 8 and then 5 and 1 2"
