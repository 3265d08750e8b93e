"""Pictures on one rank: encoded once, found again by what stands among the token ids, let go of when there are too many.

Every rank has a store, is told of the same pictures in the same order and executes the same steps, so all stores hold the same at
any time: rank 0, which is one of them, knows what the others miss by looking into its own.

    add(key, rgb)         before the step that needs it: the tower runs, its rows [h * w, D] are kept
    enter(chunk, ...)     in the step: rows of pictures take the place of the placeholder's, and positions become three
    let_go()              after a step: the least recently used go until the others fit into `limit` bytes

Let go is not forgotten: a request that is computed again after a retraction, or whose next chunk comes late, has its picture
added again. What a step needs is there through the step, however much that is.
"""

import os
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from common.attention.sequence_table import StepInputs
from common.distributed.transfer import upload
from common.values import whole
from common.vision.keys import SLICES, ImageKey, Run, is_wide, runs
from common.vision.mrope import Part, chunk_positions
from common.vision.pixels import ImageProcessor
from common.vision.tower import VisionTower

LIMIT_MB = "SGLANG_VLM_CACHE_SIZE_MB"  # SGLang's name in the environment, and its default: 100


class Entry(NamedTuple):
    key: ImageKey
    rows: torch.Tensor  # [h * w, D]


class Chunk(NamedTuple):
    """What a step has of pictures."""

    token_ids: np.ndarray  # [T], the placeholder where rows of pictures go
    positions: np.ndarray  # [3, T]
    at: np.ndarray  # [n]: which of the T are rows of pictures
    rows: list[torch.Tensor]  # these rows, [n, D] together
    shifts: np.ndarray  # [B]: of each sequence behind this chunk


class ImageStore:
    """limit: bytes of rows that are kept between two steps. encoded: how often the tower has run; nbytes: of the rows kept now."""

    def __init__(self, tower: VisionTower, processor: ImageProcessor, placeholder: int):
        self.tower, self.processor, self.placeholder = tower, processor, placeholder
        self.limit = whole(LIMIT_MB, int(os.environ.get(LIMIT_MB) or 100), 0) << 20
        self.encoded = self.nbytes = 0
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()  # by SHA, the least recently used first
        self._by_slice: defaultdict[tuple[int, int], list[bytes]] = defaultdict(list)

    def __contains__(self, key: ImageKey) -> bool:
        return key.sha in self._entries

    @torch.inference_mode()
    def add(self, key: ImageKey, rgb: torch.Tensor) -> None:
        """rgb: uint8 [H, W, 3], anywhere."""
        if key in self:
            return
        device = self.tower.patch_embed.proj.weight.device
        rows = self.tower(self.processor.patches(rgb.to(device)), (key.height, key.width))
        self.encoded += 1
        self.nbytes += rows.nbytes
        self._entries[key.sha] = Entry(key, rows)
        for place in _places(key):
            self._by_slice[place].append(key.sha)

    def chunk(
        self, token_ids: np.ndarray, new: np.ndarray, cached: np.ndarray, shifts: Sequence[int] | None
    ) -> Chunk | None:
        """token_ids [T]: new[b] tokens of each sequence behind cached[b] known ones, end to end. shifts [B]: of the pictures that
        are whole before these; None if no sequence has any. None if this step is as one of text."""
        if shifts is None:
            return None
        wide, ends = is_wide(token_ids), np.cumsum(new)
        positions, rows, behind = [], [], []
        for end, count, before, shift in zip(ends.tolist(), new.tolist(), cached.tolist(), shifts, strict=True):
            parts = []
            for run in runs(token_ids[end - count : end]):
                entry = self._entry(run)
                parts.append(Part(run.at, run.count, run.first, entry.key.height, entry.key.width))
                rows.append(entry.rows[run.first : run.first + run.count])
            place, shift = chunk_positions(before, count, shift, parts)  # noqa: PLW2901
            positions.append(place)
            behind.append(shift)
        ids = np.where(wide, self.placeholder, token_ids)
        return Chunk(
            ids, np.concatenate(positions, axis=1), np.flatnonzero(wide), rows, np.array(behind, dtype=np.int64)
        )

    def enter(self, chunk: Chunk, step: StepInputs, embed: nn.Module) -> tuple[StepInputs, torch.Tensor | None]:
        """(the step with its three positions, its embedded tokens [T, D] with the pictures' rows among them)."""
        device = step.input_ids.device
        step = replace(step, positions=upload(chunk.positions, device))
        if not len(chunk.at):
            return step, None
        hidden = embed(step.input_ids)
        hidden[upload(chunk.at, device)] = torch.cat(chunk.rows).to(hidden.dtype)
        return step, hidden

    def forget(self) -> None:
        """All of it: the tower has other weights from now on."""
        self.nbytes = 0
        self._entries.clear()
        self._by_slice.clear()

    def let_go(self) -> None:
        while self.nbytes > self.limit and self._entries:
            _, entry = self._entries.popitem(last=False)
            self.nbytes -= entry.rows.nbytes
            for place in _places(entry.key):
                self._by_slice[place].remove(entry.key.sha)
                if not self._by_slice[place]:
                    del self._by_slice[place]

    def _entry(self, run: Run) -> Entry:
        """Two pictures that are alike in one slice take seconds to make, for whoever wants some: all that the run shows counts."""
        shown = [((run.first + i) % SLICES, one) for i, one in enumerate(run.slices)]
        for sha in self._by_slice.get(shown[0], ()):
            key = self._entries[sha].key
            if run.first + run.count <= key.rows and _places(key).issuperset(shown):
                self._entries.move_to_end(sha)
                return self._entries[sha]
        raise ValueError(f"a task names row {run.first} of a picture that this rank has not been given")


def _places(key: ImageKey) -> set[tuple[int, int]]:
    return set(enumerate(key.slices.tolist()))


def refuse_beside_pictures(**asked: object) -> None:
    """Rows of pictures and three positions a token are where all rows of a step are together, and no guess goes on from them: with
    plain tensor parallelism, and tokens one by one."""
    names = ", ".join(name for name, wanted in asked.items() if wanted)
    if names:
        raise ValueError(f"{names}: not together with a model that sees, which is cut by tp_size alone; leave that out")
