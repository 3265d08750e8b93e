import numpy as np
import pytest
import torch

from common.attention.sequence_table import SequenceTable
from common.distributed.transfer import Download, copy_to, upload, upload_all

CPU = torch.device("cpu")


@pytest.fixture
def table():
    """Row 1: pages 7, 3, 9; row 2: pages 5, 4. Pages of 4 tokens."""
    table = SequenceTable(4, 8, 4, CPU, tile_members=9)
    table.set_pages([(1, 0, [7, 8]), (2, 0, range(5, 3, -1)), (1, 1, [3, 9])])
    table.set_tokens(torch.tensor([1, 2]), torch.tensor([101, 102]))
    return table


def test_prefill_behind_a_cached_prefix(table):
    step = table.prefill(np.array([11, 12, 13, 14, 15]), np.array([1, 2]), np.array([4, 0]), np.array([2, 3]))
    assert step.input_ids.tolist() == [11, 12, 13, 14, 15]
    assert step.positions.tolist() == [4, 5, 0, 1, 2]
    assert step.meta.slot_mapping.tolist() == [12, 13, 20, 21, 22]
    assert step.meta.page_table.tolist() == [[7, 3], [5, 4]]
    assert step.meta.query_start.tolist() == [0, 2, 5]
    assert step.meta.context_lens.tolist() == [6, 3]
    assert step.meta.max_query_len == 3


def test_a_token_of_minus_one_is_the_one_that_the_sequence_goes_on_with(table):
    """A decode beside a prompt. One token each, and yet no decode step: who reads must come after who writes."""
    step = table.prefill(np.array([-1, 13]), np.array([2, 1]), np.array([5, 0]), np.array([1, 1]))
    assert step.input_ids.tolist() == [102, 13]
    assert step.positions.tolist() == [5, 0]
    assert step.meta.slot_mapping.tolist() == [4 * 4 + 1, 7 * 4]
    assert step.meta.max_query_len == 2


def test_no_update_changes_no_page(table):
    before = table.page_table.clone()
    table.set_pages([])
    assert torch.equal(table.page_table, before)


def test_attention_hears_who_begins_alike(table):
    step = table.decode(np.array([1, 2, 1, 2, 1]), np.array([4, 5, 6, 7, 4]), alike=[(1, 4, 1)])
    assert step.meta.prefixes.tiles.tolist() == [[1], [4], [4]]
    assert step.meta.prefixes.tokens.tolist() == [0, 4, 4, 4, 4]
    assert (step.meta.max_query_len, step.meta.page_table.shape) == (1, (5, 2))


def test_decode_goes_on_with_the_last_tokens(table):
    step = table.decode(np.array([2, 1]), np.array([7, 8]))
    assert step.input_ids.tolist() == [102, 101]
    assert step.meta.slot_mapping.tolist() == [4 * 4 + 3, 9 * 4]
    assert step.meta.context_lens.tolist() == [8, 9]
    assert step.meta.page_table.tolist() == [[5, 4, 0], [7, 3, 9]]
    assert step.meta.prefixes is None


def test_padding_rows_leave_no_trace(table):
    step = table.decode_on_device(torch.tensor([1, -1]), torch.tensor([2, 0]), 3)
    assert step.input_ids.tolist() == [101, 0]
    assert step.meta.slot_mapping.tolist() == [30, -1]
    assert step.meta.context_lens.tolist() == [3, 1]


@pytest.mark.parametrize(
    ("alike", "tiles"),
    [
        ([], []),
        ([(0, 4, 2)], [(0, 4, 8)]),
        ([(1, 9, 1)], [(1, 9, 4)]),
        ([(0, 10, 1), (12, 20, 3)], [(0, 9, 4), (9, 1, 4), (12, 9, 12), (21, 9, 12), (30, 2, 12)]),
    ],
)
def test_sequences_that_begin_alike_are_cut_into_tiles(table, alike, tiles):
    flat, tokens = table.tiles(alike, 32)
    got = [tuple(tile) for tile in flat.reshape(3, -1).T.tolist()]
    assert got == tiles + [(0, 0, 0)] * (8 - len(tiles))
    for first, count, pages in alike:
        assert (tokens[first : first + count] == 4 * pages).all()
    assert (tokens > 0).sum() == sum(count for _, count, _ in alike)


@pytest.mark.parametrize(("members", "tiles"), [(0, 0), (3, 0), (4, 4), (9, 2)])
def test_a_tile_is_worth_it_for_four_sequences_and_more(members, tiles):
    assert SequenceTable(4, 8, 4, CPU, tile_members=members).max_tiles(11) == tiles


def test_numbers_go_to_the_device_and_back():
    first, second = upload_all(CPU, np.array([1, 2, 3]), np.array([4]))
    assert (first.tolist(), second.tolist()) == ([1, 2, 3], [4])
    target = torch.zeros(2, 2, dtype=torch.int64)
    copy_to(np.array([[1, 2], [3, 4]]), target)
    assert target.tolist() == [[1, 2], [3, 4]]
    assert Download(upload(np.array([1.5], dtype=np.float32), CPU)).numpy().tolist() == [1.5]


@pytest.mark.parametrize("members", range(4, 12))
def test_any_groups_of_a_batch_have_room_for_their_tiles(members):
    """A tile serves as many sequences as the heads allow: 4 where 16 query heads share one of K and V."""
    table = SequenceTable(1, 1, 16, CPU, members)
    for count in range(4, 30):
        for groups in range(1, 5):
            alike = [(i * count, count, 1) for i in range(groups)]
            tiles, tokens = table.tiles(alike, groups * count)
            _, counts, _ = tiles.reshape(3, -1)
            assert counts.sum() == len(tokens) == groups * count
            assert counts.max() <= members
