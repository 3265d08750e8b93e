"""How long kernels take on a GPU, without the CPU that launches them; and how fast its memory is."""

from collections.abc import Callable

import torch

ROTATE_BYTES = 256 << 20  # of buffers used in turn, several times the L2 cache


def copy_bandwidth() -> float:
    """Bytes read and written a second by a kernel that copies 1 GiB."""
    source = torch.empty(1 << 28, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / (timed([lambda: torch.neg(source, out=target)] * 4) * 1e-6)


def timed(calls: list[Callable[[], object]]) -> float:
    """Microseconds a call: all of them captured into one graph, the median of ten replays."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(13):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[3:])[5] * 1e3 / len(calls)
