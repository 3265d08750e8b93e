"""What every rank remembers of the running sequences between two steps: their pages, and their last token.

Each running sequence has a row. A step then needs few numbers from outside: which rows run and where they
stand. vLLM V1 (persistent batch, block table on the device) and SGLang (req_to_token on the device) do the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import torch

from common.attention.contract import AttentionMetadata, SharedPrefixes
from common.attention.prefix_groups import MIN_ALIKE
from common.distributed.transfer import upload_all
from common.draft_tree import DraftTree

try:  # a CPU build of torch comes without Triton
    from common.kernels import plan as fused
except ImportError:
    fused = None


@dataclass(frozen=True)
class StepInputs:
    """Everything the model and attention need for one step of T tokens of B sequences."""

    input_ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    rows: torch.Tensor  # [B]
    meta: AttentionMetadata | None  # None: no sequence at all


class SequenceTable:
    """page_table [rows, max_pages], last_token [rows]; int64 on the device. Nothing here waits for a GPU.

    tile_members: sequences that attention can serve at once where they begin alike; 0 if it cannot. last_position: of the model.
    """

    def __init__(
        self, num_rows: int, max_pages: int, page_size: int, device: torch.device, tile_members: int = 0,
        last_position: int | None = None,
    ):  # fmt: skip
        self.page_size, self.device, self.tile_members = page_size, device, tile_members
        self.last_position = last_position
        self.page_table = torch.zeros(num_rows, max_pages, dtype=torch.int64, device=device)
        self.last_token = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._counting = torch.arange(num_rows + 1, device=device)  # the query_start of any decode step
        self.shift: torch.Tensor | None = None  # [rows]; see shift_positions

    def shift_positions(self) -> None:
        """From now on a decode step turns each row's token as at its place in the sequence plus the row's shift: pictures before it
        took fewer positions than places (common/vision/mrope.py). Pages go by places."""
        self.shift = torch.zeros_like(self.last_token)

    def set_shifts(self, rows: torch.Tensor, shifts: np.ndarray | None) -> None:
        """shifts [B] of the sequences of `rows` [B]; None: all 0."""
        if shifts is None:
            self.shift.index_fill_(0, rows, 0)
        else:
            self.shift.index_copy_(0, rows, *upload_all(self.device, shifts))

    def set_pages(self, updates: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        """(row, first, pages): pages first .. first+len(pages)-1 of a row are these from now on."""
        if not updates:
            return
        width = self.page_table.shape[1]
        where = [np.arange(row * width + first, row * width + first + len(pages)) for row, first, pages in updates]
        pages = np.fromiter(chain.from_iterable(pages for _, _, pages in updates), dtype=np.int64)
        self.page_table.view(-1).index_copy_(0, *upload_all(self.device, np.concatenate(where), pages))

    def set_tokens(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        """The tokens [B] that the sequences of `rows` [B] go on with."""
        self.last_token.index_copy_(0, rows, tokens)

    def prefill(self, tokens: np.ndarray, rows: np.ndarray, cached: np.ndarray, new: np.ndarray) -> StepInputs:
        """tokens [T], end to end: new[b] tokens of the sequence in rows[b] behind cached[b] known ones.

        A token -1 stands for the sequence's last one, which may be known to the device only.
        """
        ends = np.cumsum(new)  # [B]
        positions = np.arange(ends[-1]) + np.repeat(cached - (ends - new), new)  # [T]
        context = cached + new
        ids, at, of, row, starts, context_lens = upload_all(
            self.device, tokens, positions, np.repeat(rows, new), rows, np.concatenate(([0], ends)), context
        )
        if tokens.min() < 0:
            ids = ids.where(ids >= 0, self.last_token[of])
        table = self.page_table[:, : self._pages(context.max())].index_select(0, row)
        # not 1 even if all have one token: a sequence may read what another one writes in this step, and a decode kernel,
        # which stores and attends in one go, would be too early
        longest = max(2, int(new.max()))
        return StepInputs(ids, at, row, self._meta(of, at, table, starts, context_lens, longest))

    def nothing(self) -> StepInputs:
        """The step of a data rank without work, while others have some."""
        none = self.last_token[:0]
        return StepInputs(none, none, none, None)

    def decode(self, rows: np.ndarray, positions: np.ndarray, alike: Sequence[tuple[int, int, int]] = ()) -> StepInputs:
        """The last token of each sequence, to stand at positions [B].

        alike: (first, count, pages): sequences first .. first+count-1 begin with the same pages.
        """
        numbers = (rows, positions, *self.tiles(alike, len(rows))) if alike else (rows, positions)
        row, at, *tiled = upload_all(self.device, *numbers)
        prefixes = SharedPrefixes(tiled[0].view(3, -1), tiled[1]) if alike else None
        return self.decode_at(row, at, self._pages(positions.max() + 1), prefixes=prefixes)

    def decode_at(
        self, rows: torch.Tensor, positions: torch.Tensor, pages: int, padded: bool = False,
        prefixes: SharedPrefixes | None = None,
    ) -> StepInputs:  # fmt: skip
        """The same from tensors, at most `pages` pages a sequence. padded: rows may be -1, see `decode_on_device`."""
        decode = self.decode_on_device if padded or rows.is_cuda else self._decode
        return decode(rows, positions, pages, prefixes)

    def decode_on_device(
        self, rows: torch.Tensor, positions: torch.Tensor, pages: int, prefixes: SharedPrefixes | None = None
    ) -> StepInputs:
        """A row -1 is padding: it leaves no trace."""
        if fused and rows.is_cuda:
            starts = self._counting[: len(rows) + 1]
            ids, at, slots, table, context = fused.plan_decode(
                rows, positions, self.page_table, self.last_token, pages, self.page_size
            )
            meta = AttentionMetadata(slots, table, starts, context, self.page_size, 1, prefixes)
            return StepInputs(ids, self._shifted(rows, at), rows, meta)
        real = rows >= 0
        step = self._decode(rows.clamp(min=0), positions * real, pages, prefixes)
        meta = replace(step.meta, slot_mapping=step.meta.slot_mapping.where(real, -1))
        return StepInputs(step.input_ids * real, step.positions, rows, meta)

    def _decode(self, rows: torch.Tensor, positions: torch.Tensor, pages: int, prefixes) -> StepInputs:
        """The same without padding."""
        starts = self._counting[: len(rows) + 1]
        table = self.page_table[:, :pages].index_select(0, rows)
        meta = self._meta(rows, positions, table, starts, positions + 1, 1, prefixes)
        return StepInputs(self.last_token[rows], self._shifted(rows, positions), rows, meta)

    def _shifted(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return positions if self.shift is None else positions + self.shift[rows.clamp(min=0)]

    def tree(self, rows: np.ndarray, positions: np.ndarray, tree: DraftTree) -> StepInputs:
        """The nodes of a tree for each sequence, whose roots stand at positions [B]: B * N new tokens, see `tree_level`.

        The pages of a sequence must have room for positions[b] + N tokens.
        """
        row, at = upload_all(self.device, rows, positions)
        pages = self._pages(positions.max() + tree.tokens.shape[1])
        return self.tree_level(row, at, tree.tokens, tree.depth, tree.ancestors, pages)

    def tree_level(
        self, rows: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor, depth: torch.Tensor, window: torch.Tensor,
        pages: int,
    ) -> StepInputs:  # fmt: skip
        """The last n of the W nodes that each tree has so far; those before have been computed, and lie in their pages.

        rows, positions [B] of the roots, tokens and depth [B, n], window [B, n, W]: which nodes each sees. Node i of a tree lies
        where a token i behind the root would, but stands at the root's position + depth: siblings stand in one place. A position
        that the model has not, of a guess beyond the end, is its last one. A row -1 is padding: it leaves no trace.
        """
        (batch, n), width = tokens.shape, window.shape[2]
        real, row = (rows >= 0).unsqueeze(1), rows.clamp(min=0)  # [B, 1], [B]
        root = positions.unsqueeze(1) * real
        places = root + depth
        if self.last_position is not None:
            places = places.clamp(max=self.last_position)
        at = root + torch.arange(width - n, width, device=root.device)  # [B, n]
        table, starts = self.page_table[:, :pages].index_select(0, row), self._counting[: batch + 1] * n
        slots = table.gather(1, at // self.page_size) * self.page_size + at % self.page_size
        meta = AttentionMetadata(
            slots.where(real, -1).flatten(), table, starts, root.squeeze(1) + width, self.page_size, n,
            window=window.flatten(0, 1),
        )  # fmt: skip
        return StepInputs((tokens * real).flatten(), places.flatten(), rows, meta)

    def max_tiles(self, batch: int) -> int:
        """Room that any `alike` of so many sequences fits into: a group of one sequence more than a tile serves takes two."""
        if self.tile_members < MIN_ALIKE:
            return 0
        return max(batch // MIN_ALIKE, 2 * batch // (self.tile_members + 1))

    def tiles(self, alike: Sequence[tuple[int, int, int]], batch: int) -> tuple[np.ndarray, np.ndarray]:
        """`alike` cut into tiles of at most tile_members: (tiles [3 * max_tiles], tokens [B]), see SharedPrefixes."""
        tiles = np.zeros((3, self.max_tiles(batch)), dtype=np.int64)
        tokens, n = np.zeros(batch, dtype=np.int64), 0
        for first, count, pages in alike if tiles.size else ():
            for start in range(first, first + count, self.tile_members):
                tiles[:, n] = start, min(self.tile_members, first + count - start), pages * self.page_size
                n += 1
            tokens[first : first + count] = pages * self.page_size
        return tiles.reshape(-1), tokens

    def _meta(self, rows, positions, table, starts, context_lens, longest: int, prefixes=None) -> AttentionMetadata:
        pages = self.page_table[rows, positions // self.page_size]  # [T]
        slots = pages * self.page_size + positions % self.page_size
        return AttentionMetadata(slots, table, starts, context_lens, self.page_size, longest, prefixes)

    def _pages(self, length) -> int:
        return -(-int(length) // self.page_size)
