"""What a rank spends its time on: torch.profiler around the steps between two calls, written as a Chrome trace.

Every rank writes a file of its own (chrome://tracing or ui.perfetto.dev shows them). SGLang names them alike:
srt/managers/scheduler_profiler_mixin.py.
"""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ch07_sglang_radix.control_plane import ControlPlane
from common.values import flag, shown

log = logging.getLogger(__name__)


class RankProfiler:
    """One profile at a time. It sees the thread that starts and stops it, which must be the one that steps.

    rank: what the file is called after, such as TP-0-PP-1.
    """

    def __init__(self, rank: str):
        self.rank = rank
        self._running: profile | None = None
        self._file: Path | None = None

    def start(self, folder: str | Path, name: str, record_shapes: bool = False, with_stack: bool = False) -> None:
        """Raises ValueError if a profile runs already, or the folder is none."""
        if self._running is not None:
            raise ValueError("a profile is running already; stop_profile first")
        if not Path(folder).is_dir():
            raise ValueError(f"output_dir={shown(str(folder))} is no folder")
        flag("record_shapes", record_shapes)
        flag("with_stack", with_stack)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._file = Path(folder) / f"{name}-{self.rank}.trace.json"
        self._running = profile(activities=activities, record_shapes=record_shapes, with_stack=with_stack)
        self._running.start()

    def stop(self) -> str:
        """Returns the file of this rank. Raises ValueError if no profile runs, OSError if it cannot be written."""
        if self._running is None:
            raise ValueError("no profile is running; start_profile first")
        running, self._running = self._running, None
        running.stop()
        self._file.touch()  # torch's own error names no file
        running.export_chrome_trace(str(self._file))
        return str(self._file)


class StepsLeft:
    """Of a profile that ends by itself: one of rank 0's scheduler.after_step, until the last of its steps or `leave`."""

    def __init__(self, steps: int, after_step: list[Callable[[], None]], control: ControlPlane):
        self._left, self._after_step, self._control = steps, after_step, control
        after_step.append(self._count)

    def _count(self) -> None:
        self._left -= 1
        if self._left == 0:
            self.leave()
            try:
                self._control.note("stop_profile")
            except OSError as error:  # a full disk is no reason to end everybody's requests
                log.error("the profile is lost: %s", error)

    def leave(self) -> None:
        if self._count in self._after_step:
            self._after_step.remove(self._count)


def profile_name() -> str:
    """Of the files of one profile, the same on all ranks: rank 0 says it."""
    return f"{time.time():.3f}-{os.getpid()}"  # replicas are told at the same moment
