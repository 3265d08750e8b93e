"""Which batches are recorded: no step is padded by much, and a large engine does not record for minutes."""

import bisect
import gc
import weakref

import pytest

from common.models.graph_runner import batch_sizes, nothing_collected


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


class Engine:
    """What was let go of, and lies about in a cycle of references."""

    def __init__(self):
        self.itself = self


def test_nothing_is_collected_while_something_is_recorded():
    before, inside = weakref.ref(Engine()), None
    with nothing_collected():
        assert before() is None, "what it frees would break the recording"
        with nothing_collected():
            inside = weakref.ref(Engine())
            assert not gc.isenabled()
        assert not gc.isenabled(), "the outer one is still there"
        assert inside() is not None
    assert gc.isenabled()


def test_what_breaks_a_recording_leaves_the_collector_on():
    with pytest.raises(KeyError), nothing_collected():
        raise KeyError
    assert gc.isenabled()
