import pytest

from common.layers.heads import HeadLayout, Piece, split_evenly

RATIOS = [(14, 2), (16, 8), (32, 8), (8, 2), (7, 1), (12, 12), (28, 4), (6, 3), (40, 10), (1, 1)]
RANKS = range(1, 9)
EVERYWHERE = [(*ratio, ranks) for ratio in RATIOS for ranks in RANKS]


def over(cases):
    return pytest.mark.parametrize(("num_heads", "num_kv_heads", "ranks"), cases)


every_layout = over(EVERYWHERE)


def layouts(num_heads, num_kv_heads, ranks):
    return [HeadLayout.of(num_heads, num_kv_heads, rank, ranks) for rank in range(ranks)]


@every_layout
def test_every_query_head_is_held_exactly_once(num_heads, num_kv_heads, ranks):
    held = [q for layout in layouts(num_heads, num_kv_heads, ranks) for q in layout.q_heads if q is not None]
    assert held == list(range(num_heads))


@every_layout
def test_every_kv_head_is_held_and_equally_often(num_heads, num_kv_heads, ranks):
    held = [kv for layout in layouts(num_heads, num_kv_heads, ranks) for kv in layout.kv_heads]
    assert {held.count(kv) for kv in range(num_kv_heads)} == {len(held) // num_kv_heads}
    assert set(held) == set(range(num_kv_heads))


@every_layout
def test_all_ranks_hold_equal_numbers(num_heads, num_kv_heads, ranks):
    assert len({(x.num_q, x.num_kv, x.group_size) for x in layouts(num_heads, num_kv_heads, ranks)}) == 1


@every_layout
def test_groups_are_whole(num_heads, num_kv_heads, ranks):
    for layout in layouts(num_heads, num_kv_heads, ranks):
        assert layout.group_size * layout.num_kv == layout.num_q


@every_layout
def test_a_local_query_head_finds_its_kv_head_at_index_over_group_size(num_heads, num_kv_heads, ranks):
    for layout in layouts(num_heads, num_kv_heads, ranks):
        for i, q in enumerate(layout.q_heads):
            if q is not None:
                assert layout.kv_heads[i // layout.group_size] == q // (num_heads // num_kv_heads)


@over([case for case in EVERYWHERE if case[1] % case[2] == 0])
def test_plain_splitting_has_no_zero_head_and_no_copy(num_heads, num_kv_heads, ranks):
    for layout in layouts(num_heads, num_kv_heads, ranks):
        assert (layout.num_q, layout.num_kv) == (num_heads // ranks, num_kv_heads // ranks)
        assert None not in layout.q_heads


@over([case for case in EVERYWHERE if case[2] % case[1] == 0])
def test_replication_gives_each_rank_one_kv_head(num_heads, num_kv_heads, ranks):
    for rank, layout in enumerate(layouts(num_heads, num_kv_heads, ranks)):
        assert layout.kv_heads == (rank * num_kv_heads // ranks,)


@every_layout
def test_zero_heads_stand_only_behind_the_last_query_head_of_a_kv_head(num_heads, num_kv_heads, ranks):
    group = num_heads // num_kv_heads
    pairs = [
        (layout.kv_heads[i // layout.group_size], q)
        for layout in layouts(num_heads, num_kv_heads, ranks)
        for i, q in enumerate(layout.q_heads)
    ]
    for kv in range(num_kv_heads):
        served = [q for head, q in pairs if head == kv]
        zeros = len(served) - group
        assert served == [*range(kv * group, (kv + 1) * group), *[None] * zeros]


@pytest.mark.parametrize(
    ("ranks", "num_q", "num_kv", "zeros"), [(1, 14, 2, 0), (2, 7, 1, 0), (4, 4, 1, 2), (3, 6, 2, 4)]
)
def test_qwen2_5_0_5b_as_the_module_text_says(ranks, num_q, num_kv, zeros):
    all_of_them = layouts(14, 2, ranks)
    assert {(x.num_q, x.num_kv) for x in all_of_them} == {(num_q, num_kv)}
    assert sum(x.q_heads.count(None) for x in all_of_them) == zeros


def test_three_ranks_of_14_query_heads_and_2_kv_heads_written_out():
    assert [(x.q_heads, x.kv_heads) for x in layouts(14, 2, 3)] == [
        ((0, 1, 2, 3, 4, 5), (0, 0)),
        ((6, None, None, 7, 8, 9), (0, 1)),
        ((10, 11, 12, 13, None, None), (1, 1)),
    ]


def test_query_heads_that_do_not_form_equal_groups_are_refused():
    with pytest.raises(ValueError, match=r"num_attention_heads=14 is not a multiple of num_key_value_heads=4"):
        HeadLayout.of(14, 4, 0, 2)


def test_neighbouring_heads_are_one_piece():
    assert HeadLayout.of(14, 2, 1, 2).q_pieces(64) == [Piece(0, 7 * 64, 7 * 64)]


def test_a_piece_ends_at_a_zero_head():
    assert HeadLayout.of(14, 2, 1, 3).q_pieces(10) == [Piece(0, 60, 10), Piece(30, 70, 30)]


def test_a_kv_head_held_twice_is_two_pieces_of_the_same_source():
    assert HeadLayout.of(14, 2, 0, 3).kv_pieces(10) == [Piece(0, 0, 10), Piece(10, 0, 10)]


def test_a_rank_of_zero_heads_has_no_piece():
    last = HeadLayout.of(7, 1, 4, 5)
    assert last.q_heads == (None, None)
    assert last.q_pieces(64) == []


@every_layout
def test_pieces_say_the_same_as_the_head_list(num_heads, num_kv_heads, ranks):
    d = 3
    for layout in layouts(num_heads, num_kv_heads, ranks):
        for heads, pieces in ((layout.q_heads, layout.q_pieces(d)), (layout.kv_heads, layout.kv_pieces(d))):
            rows = [None] * len(heads) * d
            for dst, src, n in pieces:
                assert rows[dst : dst + n] == [None] * n
                rows[dst : dst + n] = range(src, src + n)
            assert rows == [None if head is None else head * d + i for head in heads for i in range(d)]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("size", [1, 2, 7, 10, 151, 4864])
def test_an_even_cut_covers_every_row_once_in_order(size, ranks):
    rows = []
    for rank in range(ranks):
        local, pieces = split_evenly(size, rank, ranks)
        assert local == -(-size // ranks)
        for dst, src, n in pieces:
            assert dst == 0
            assert 0 < n <= local
            rows += range(src, src + n)
    assert rows == list(range(size))


def test_an_even_cut_is_one_piece_or_none():
    assert [split_evenly(4, rank, 3) for rank in range(3)] == [(2, [Piece(0, 0, 2)]), (2, [Piece(0, 2, 2)]), (2, [])]


def test_the_example_in_split_evenly_holds():
    assert split_evenly(10, rank=2, ranks=3) == (4, [Piece(dst=0, src=8, n=2)])
