"""Pictures reach the ranks: before a step, those that it needs and that they do not have.

    rank 0                                            the others
    plan a step; whose rows are in it?
    WingTask [height, width, SHA in 4 words]   ->     make room for height x width x 3 bytes
    broadcast the pixels                       ->     take them
    encode them into its own store                    encode them into its own store
    the step's task                            ->     find the rows by the numbers among its token ids

Pixels are resized, but not yet numbers of the model: 3 bytes a pixel instead of the 24 that its patches have in float32, twice over
for two frames. Rank 0 keeps them with the request, so that a store may let go of a picture at any time. How often the tower runs is
counted in ImageStore.encoded: once for a picture, however many requests show it, as long as it is kept.
"""

from collections.abc import Sequence

import numpy as np
import torch

from ch07_sglang_radix.scheduler import TPScheduler
from ch07_sglang_radix.step_plan import StepPlan
from ch07_sglang_radix.tasks import PrefillTask, WingTask
from common.parallel_state import broadcast
from common.vision.keys import ImageKey
from common.vision.pixels import Pixels

WING = 3  # this wing's number on the wire


class PictureSender:
    """One rank's end. sent: pictures that this rank 0 has told the others of."""

    def __init__(self, scheduler: TPScheduler):
        self.control, self.store = scheduler.control, scheduler.wrapper.images
        self.replica = scheduler.replica
        self.sent = 0
        limit = torch.tensor([self.store.limit])
        broadcast(limit, self.replica, "limit")  # COMM broadcast [1]: rank 0's, so that all stores let go of the same
        self.store.limit = int(limit)
        self.control.wings[WING] = self.receive
        if self.replica.rank == 0:
            scheduler.before_launch.append(self.send_missing)

    def send_missing(self, plans: Sequence[StepPlan | None]) -> None:
        """Rank 0, before a step: its own store says what the others miss."""
        for plan in plans:
            if plan and isinstance(plan.task, PrefillTask):
                for req, sequence in zip(plan.reqs, plan.task.sequences, strict=True):
                    if req.pictures:
                        for one in req.pictures.within(sequence.cached, sequence.cached + sequence.new):
                            if one.key not in self.store:
                                self.send(one)

    def send(self, pixels: Pixels) -> None:
        height, width, _ = pixels.rgb.shape
        words = tuple(np.frombuffer(pixels.key.sha, dtype=">u4").astype(np.int64).tolist())
        self.control.send_task(WingTask(0, WING, (height, width, *words)))
        self._take(pixels.key, torch.from_numpy(pixels.rgb))
        self.sent += 1

    def receive(self, words: tuple[int, ...]) -> None:
        height, width, *sha = words
        block = self.store.processor.block
        key = ImageKey(np.array(sha, dtype=">u4").tobytes(), height // block, width // block)
        self._take(key, torch.empty(height, width, 3, dtype=torch.uint8))

    def _take(self, key: ImageKey, rgb: torch.Tensor) -> None:
        broadcast(rgb, self.replica, "pixels")  # COMM broadcast [H, W, 3]: a picture, to whoever encodes it
        self.store.add(key, rgb)
