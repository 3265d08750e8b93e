from hypothesis import given
from hypothesis import strategies as st

from common.attention.zigzag import pairs, pieces, role, seen, share

lengths, ranks, turns = st.integers(0, 60), st.integers(1, 5), st.integers(0, 7)


@given(lengths, ranks, turns)
def test_every_token_is_computed_by_exactly_one_rank(n, size, turn):
    held = [t for rank in range(size) for t in share(n, rank, size, turn).tokens()]
    assert sorted(held) == list(range(n))


@given(lengths, ranks)
def test_pieces_differ_by_one_token_at_most(n, size):
    sizes = [len(piece) for piece in pieces(n, size)]
    assert max(sizes) - min(sizes) <= 1


@given(lengths, ranks, turns, st.data())
def test_what_a_query_sees_of_a_block_is_what_is_before_it(n, size, turn, data):
    """Against the definition: token t sees token s if s <= t."""
    me, other = (data.draw(st.integers(0, size - 1)) for _ in range(2))
    mine, theirs = share(n, me, size, turn), share(n, other, size, turn)
    block = seen(mine, theirs, role(me, size, turn), role(other, size, turn))
    q, k = mine.tokens(), theirs.tokens()
    said = {
        (t, s)
        for i, t in enumerate(q[len(q) - block.queries :])
        for j, s in enumerate(k[: block.keys])
        if not block.causal or j <= i
    }
    assert said == {(t, s) for t in q for s in k if s <= t}


def test_the_work_is_equal_where_runs_are_not():
    """12 tokens have 78 pairs: cut in halves 21 and 57, in a zigzag 39 and 39."""
    halves = [pairs(list(range(6))), pairs(list(range(6, 12)))]
    zigzag = [pairs(share(12, rank, 2).tokens()) for rank in range(2)]
    assert (halves, zigzag) == ([21, 57], [39, 39])


@given(st.integers(1, 20), ranks, st.integers(0, 50))
def test_whole_pieces_make_the_work_equal_behind_any_prefix(m, size, cached):
    work = {pairs(share(2 * size * m, rank, size).tokens(), cached) for rank in range(size)}
    assert len(work) == 1


def test_many_short_prompts_go_round_the_ranks():
    """One token each: without turns, all of them would be one rank's."""
    counts = [sum(share(1, rank, 3, turn).size for turn in range(9)) for rank in range(3)]
    assert counts == [3, 3, 3]
