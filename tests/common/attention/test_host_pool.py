"""Pages to the host and back, in whatever order they were given out."""

from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.attention.host_pool import HostKVPool, _runs, _side_by_side

PAGES = 7


@given(here=st.permutations(range(PAGES)), there=st.permutations(range(PAGES)), back=st.permutations(range(PAGES)))
def test_what_a_page_holds_comes_back_as_it_went(here, there, back):
    kv = torch.arange(2 * 2 * PAGES * 4 * 3, dtype=torch.int16).reshape(2, 2, PAGES, 4, 3)
    before = kv.clone()
    pool = HostKVPool(SimpleNamespace(kv=kv, num_pages=PAGES, tensors=[kv]), PAGES)
    pool.store(1, np.array(here), np.array(there))
    kv.zero_()
    pool.load(2, np.array(there), np.array(back))
    assert torch.equal(kv[:, :, back], before[:, :, here])


def test_pages_that_were_given_out_backwards_are_one_copy():
    device, host = _side_by_side(np.array([10, 11, 12, 13]), np.array([9, 8, 7, 3]))
    assert list(zip(device.tolist(), host.tolist(), strict=True)) == [(13, 3), (12, 7), (11, 8), (10, 9)]
    assert list(_runs(host)) == [(0, 3, 1), (1, 7, 3)]
