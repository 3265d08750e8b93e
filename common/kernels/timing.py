"""How long kernels take on a GPU, without the CPU that launches them; and how fast its memory is."""

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch

from common.kernels.recording import record

ROTATE_BYTES = 256 << 20  # of buffers used in turn, several times the L2 cache
WARM_UPS = 3  # replays that do not count


def copy_bandwidth() -> float:
    """Bytes read and written a second by a kernel that copies 1 GiB."""
    source = torch.empty(1 << 28, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / (timed([lambda: torch.neg(source, out=target)] * 4) * 1e-6)


def timed(calls: list[Callable[[], object]]) -> float:
    """Microseconds a call: all of them captured into one graph, the median of ten replays."""
    return timed_in_turn([calls])[0]


def timed_in_turn(
    contenders: Sequence[list[Callable[[], object]]], replays: int = 10, alike: bool = False
) -> list[float]:
    """Microseconds a call of each contender: its calls captured into one graph; the graphs are replayed in turn, and the median
    of so many replays counts. What the calls put out is lost. alike: what the first of them compiles or loads is enough for all."""
    graphs: list[torch.cuda.CUDAGraph] = []
    stream = _stream(torch.cuda.current_device())
    for calls in contenders:
        first, pool = calls[:1] if alike else calls, graphs[0].pool() if graphs else None
        graphs.append(record(partial(_run, calls), partial(_run, first), stream, pool)[0])
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(WARM_UPS + replays):
        for graph, its in zip(graphs, times, strict=True):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            its.append(start.elapsed_time(end))
    return [
        sorted(its[WARM_UPS:])[replays // 2] * 1e3 / len(calls) for its, calls in zip(times, contenders, strict=True)
    ]


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """For all recordings on this device: the library keeps memory for each stream that it has seen, for ever."""
    return torch.cuda.Stream(device)


def _run(calls: list[Callable[[], object]]) -> None:
    for call in calls:
        call()
