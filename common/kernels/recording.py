"""Recording a CUDA graph, a hundred times at a start.

`torch.cuda.graph` gives back, before each recording, all that the allocator keeps. What ran just before, on another stream, has
then asked the driver for memory that the next one asks for again: milliseconds each. Here one stream does both, and whoever
records gives back what is kept when all is recorded.
"""

from collections.abc import Callable
from typing import Any

import torch


def record(
    call: Callable[[], Any], before: Callable[[], object], stream: torch.cuda.Stream, pool: Any = None
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Run `before`, which compiles kernels and lets libraries allocate what they keep, then record `call`, both on this stream.

    Returns the graph and what `call` has returned. pool: another graph's memory, if it may be shared.
    """
    graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        before()
        torch.cuda.synchronize()
        graph.capture_begin(*(() if pool is None else (pool,)))
        try:
            out = call()
        finally:
            graph.capture_end()
    here.wait_stream(stream)
    return graph, out
