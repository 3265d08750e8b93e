"""R real ranks (processes, gloo) that stay alive between tests: `pool.run(function, *args)` calls it on each."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from tests import warm

TIMEOUT_S = 400  # for a whole call; more ranks than cores are slow on a busy machine


class RankPool:
    """`size` processes in one tensor-parallel group. A function sent here must be importable by name."""

    def __init__(self, size: int):
        self.size = size
        store = os.path.join(tempfile.mkdtemp(), "store")  # a file, not a port: tests may run side by side
        self._pipes, self._processes = [], []
        for rank in range(size):
            here, there = multiprocessing.Pipe()
            process = warm.process(_serve, rank, size, store, there, daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)
        self.broken = False

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """[function(*args) on rank 0, on rank 1, ...]; AssertionError with the traceback of the ranks that raised."""
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT_S):
                self.close()
                raise AssertionError(f"rank {rank} of {self.size} gave no answer within {TIMEOUT_S} s")
            try:
                answers.append(pipe.recv())
            except EOFError:
                answers.append((False, "died without a word"))
        failures = [f"rank {rank}:\n{what}" for rank, (ok, what) in enumerate(answers) if not ok]
        if failures:
            self.close()  # the ranks may be out of step
            raise AssertionError("\n".join(failures))
        return [what for _, what in answers]

    def close(self) -> None:
        self.broken = True
        for process in self._processes:
            process.kill()


_layouts: dict[Any, Any] = {}


def layout_of_the_pool(*sizes: int | None, **more: int):
    """Sent to a pool, or called there: the ParallelState of its ranks in this layout (ParallelState.initialize's arguments).

    Made once, and get_tensor_parallel() stays what it was.
    """
    from common import parallel_state  # noqa: PLC0415, in the child only

    key = (sizes, tuple(sorted(more.items())))
    if key not in _layouts:
        before = parallel_state._state
        _layouts[key] = parallel_state.ParallelState.initialize(*sizes, device="cpu", **more)
        parallel_state._state = before
    return _layouts[key]


def _serve(rank: int, size: int, store: str, pipe) -> None:
    import torch.distributed as dist  # noqa: PLC0415, in the child only

    from common.parallel_state import initialize_tensor_parallel  # noqa: PLC0415

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    if size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT_S)
        )
    initialize_tensor_parallel(size, device="cpu")
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
