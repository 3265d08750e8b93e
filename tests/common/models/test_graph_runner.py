"""Which batches are recorded: no step is padded by much, and a large engine does not record for minutes."""

import bisect

import pytest

from common.models.graph_runner import batch_sizes


@pytest.mark.parametrize("most", [1, 2, 3, 5, 8, 9, 255, 256, 257, 511, 512, 513, 600, 1024, 1030])
def test_every_batch_has_a_size_that_is_not_much_larger(most):
    sizes = batch_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for batch in range(1, most + 1):
        padding = sizes[bisect.bisect_left(sizes, batch)] - batch
        assert padding <= max(7, batch / 16)


def test_steps_grow_with_the_batch():
    assert batch_sizes(24) == [1, 2, 4, 8, 16, 24]
    assert batch_sizes(300)[-4:] == [256, 272, 288, 300]
    assert batch_sizes(600)[-4:] == [512, 544, 576, 600]
    assert [len(batch_sizes(most)) for most in (256, 512, 1024)] == [35, 51, 67]
