import numpy as np
import psutil
import pytest

from ch07_sglang_radix.memory_pool import ReqToTokenPool, TokenToKVPool


def test_slots_of_a_page_lie_side_by_side():
    pool = TokenToKVPool(num_pages=4, page_size=4)
    slots = pool.alloc(2).reshape(2, 4)
    assert (slots[:, 0] % 4 == 0).all()
    assert (np.diff(slots, axis=1) == 1).all()


def test_a_fresh_pool_gives_its_pages_in_order():
    pool = TokenToKVPool(num_pages=4, page_size=2)
    assert pool.alloc(2).tolist() == [0, 1, 2, 3]
    assert pool.alloc(2).tolist() == [4, 5, 6, 7]


def test_sizes_are_told_in_slots_and_what_came_and_went_in_pages():
    pool = TokenToKVPool(num_pages=4, page_size=4)
    pool.free(pool.alloc(3)[:8])
    assert (pool.size, pool.free_slots, pool.num_free_pages) == (16, 12, 3)
    assert (pool.taken, pool.given) == (3, 2)


def test_alloc_takes_all_or_nothing():
    pool = TokenToKVPool(num_pages=3, page_size=2)
    assert pool.alloc(4) is None
    assert pool.num_free_pages == 3
    assert len(pool.alloc(3)) == 6
    assert pool.alloc(1) is None


def test_a_double_free_names_the_page_and_changes_nothing():
    pool = TokenToKVPool(num_pages=4, page_size=2)
    slots = pool.alloc(2)
    pool.free(slots[:2])
    with pytest.raises(ValueError, match=rf"pages \[{slots[0] // 2}\] are freed twice"):
        pool.free(slots)
    assert pool.num_free_pages == 3
    with pytest.raises(ValueError, match="freed twice"):
        pool.free(np.concatenate((slots[2:], slots[2:])))


def test_long_rows_take_memory_as_they_are_written():
    """1,024 rows of a model with 131,072 positions are 1 GiB of addresses; what nobody has written costs nothing."""
    process = psutil.Process()
    before = process.memory_info().rss
    rows = ReqToTokenPool(1024, 131_072)
    assert rows.req_to_token.nbytes == 1 << 30
    for _ in range(1024):
        rows.req_to_token[rows.alloc(), :100] = 7
    assert rows.num_free == 0
    assert process.memory_info().rss - before < 64 << 20


def test_rows_come_back():
    rows = ReqToTokenPool(2, 8)
    a, b = rows.alloc(), rows.alloc()
    assert {a, b} == {0, 1}
    assert rows.num_free == 0
    rows.free(a)
    with pytest.raises(ValueError, match=f"row {a}"):
        rows.free(a)
    assert rows.alloc() == a
