"""What an engine works out of its arguments."""

import pytest

from ch07_sglang_radix.engine_start import prefill_graph_tokens
from ch07_sglang_radix.server_args import ServerArgs
from common.models.prefill_graphs import PREFILL_GRAPH_TOKENS


@pytest.mark.parametrize(
    ("arguments", "most"),
    [({}, 8192), ({"chunked_prefill_size": 512}, 512), ({"chunked_prefill_size": -1}, 10**6), ({"max_prefill_tokens": 100}, 96)],
)  # fmt: skip
def test_no_prefill_is_recorded_that_is_longer_than_a_step(arguments, most):
    assert prefill_graph_tokens(ServerArgs(cuda_graph_max_bs_prefill=10**6, **arguments), "cuda", 16) == most
    assert prefill_graph_tokens(ServerArgs(cuda_graph_max_bs_prefill=64, **arguments), "cuda", 16) == 64
    assert prefill_graph_tokens(ServerArgs(**arguments), "cuda", 16) == min(most, PREFILL_GRAPH_TOKENS)
    assert prefill_graph_tokens(ServerArgs(cuda_graph_max_bs_prefill=0, **arguments), "cuda", 16) == 0
