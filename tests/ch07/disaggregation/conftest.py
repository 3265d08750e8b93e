"""Both halves in one process, for the tests that step them."""

import pytest

from ch07_sglang_radix.disaggregation.local_pair import Pair


@pytest.fixture
def pair():
    """pair(prefill={...}, decode={...}): Half's arguments."""
    made = []

    def make(**options):
        made.append(Pair(**options))
        return made[-1]

    yield make
    for one in made:
        one.close()
