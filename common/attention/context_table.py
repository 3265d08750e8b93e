"""What every rank remembers where the tokens of a sequence are spread over ranks (context parallelism), and a step's plan.

Two things are spread over the R ranks of the cp group:

    pages     page g lies on rank g % R, as its page g // R: a rank's pool is 1/R of what one rank would need. Whoever deals
              pages out (pool, radix tree) knows nothing of it, and numbers them 0 .. N-1 as ever
    rows      of a step with several new tokens a sequence, each rank computes its share (zigzag.py); of a decode step,
              where there is one row a sequence, every rank computes all

The plan of a step is numbers, worked out here on the CPU before the first layer; context_parallel.py follows it. A decode step on
a GPU with Triton is planned there, from the same table of global page ids (`decode_on_device`): a captured one is told rows and
positions, as with one rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.attention.contract import AttentionMetadata, SharedPrefixes
from common.attention.sequence_table import SequenceTable, StepInputs
from common.attention.torch_native import similar_lengths
from common.attention.zigzag import Share, role, seen, share
from common.distributed.collectives import TPGroup
from common.distributed.transfer import upload_all

try:  # a CPU build of torch comes without Triton
    from common.kernels import plan as fused
except ImportError:
    fused = None

LONG = 1024  # queries of a piece from which on it is a launch of its own, where one launch could compute many


@dataclass(frozen=True)
class Store:
    """Of a block's rows, those whose pages are mine: where they stand in the block, and their slots here."""

    rows: torch.Tensor  # [m]
    slots: torch.Tensor  # [m]


@dataclass(frozen=True)
class Piece:
    """Queries q .. of mine that see keys .. of a block; causal: a triangle."""

    queries: slice
    keys: slice
    causal: bool


@dataclass(frozen=True)
class Pieces:
    """Short pieces that one launch computes (common/kernels/pieces.py)."""

    numbers: torch.Tensor  # [5, n]: first query, queries, first key, keys, causal
    longest: int  # queries


@dataclass(frozen=True)
class Pages:
    """Of one sequence's cached tokens, those on my pages; all of them lie before every new token."""

    ids: torch.Tensor  # [n], of this rank
    tokens: int
    queries: torch.Tensor  # [m] of the sequence, among the gathered ones of all ranks


@dataclass(frozen=True)
class ShortPages:
    """Pages of sequences with few queries; the first query and key of a piece are places in these lists."""

    pieces: Pieces
    ids: torch.Tensor  # [sum of n]
    queries: torch.Tensor  # [sum of m]


@dataclass(frozen=True)
class Cached:
    """What is to be done about tokens that were in the pages before: their queries go round, not their keys."""

    mine: torch.Tensor  # [m]: which of my rows have something cached before them
    width: int  # rows that each rank sends: its own, padded to the longest
    pages: tuple[Pages, ...]  # of the sequences of which I hold some
    short: ShortPages | None  # and of those that one launch computes


@dataclass(frozen=True)
class RingMetadata:
    """A step in which each rank computes its share of the new tokens."""

    cp: TPGroup
    tokens: tuple[int, ...]  # rows of each rank
    stores: tuple[Store, ...]  # by rank whose block it is
    pieces: tuple[tuple[Piece, ...], ...]  # by rank whose block it is
    short: tuple[Pieces | None, ...]  # the same, of those that one launch computes; none on a CPU
    cached: Cached | None
    fresh: torch.Tensor  # pages of mine that are begun


@dataclass(frozen=True)
class Together:
    """Sequences of a decode step with a similar number of tokens on this rank, at least one."""

    rows: torch.Tensor  # [b]
    ids: torch.Tensor  # [b * width]: their pages here, filled up with the first one
    width: int
    lens: torch.Tensor  # [b]: their tokens here, the new one included


@dataclass(frozen=True)
class SpreadMetadata:
    """A decode step: every rank has all queries, and its pages of each sequence."""

    cp: TPGroup
    store: Store
    groups: tuple[Together, ...]
    fresh: torch.Tensor


@dataclass(frozen=True)
class TableMetadata:
    """A decode step for kernels: every rank has all queries."""

    cp: TPGroup
    here: AttentionMetadata  # of this rank's pages alone: its slots, page ids and lengths; a sequence may have no token here


@dataclass(frozen=True)
class RingInputs(StepInputs):
    """This rank's rows of a step, and where everybody's are."""

    owner: np.ndarray  # [T]: who computes a row
    place: np.ndarray  # [T]: and where it stands there

    def by_rank(self, wanted: np.ndarray) -> list[np.ndarray]:
        """Some of the T rows -> of each rank, ascending, the numbers that they have there."""
        return [np.sort(self.place[wanted[self.owner[wanted] == rank]]) for rank in range(len(self.meta.tokens))]

    def put_back(self, wanted: np.ndarray) -> np.ndarray:
        """Where each of `wanted` stands once those of `by_rank` lie one behind the other."""
        return np.lexsort((self.place[wanted], self.owner[wanted])).argsort()


class ContextTable(SequenceTable):
    """SequenceTable of the ranks that share their sequences' tokens.

    The page table, of global page ids, lies on the CPU, too, where most plans are made: pages [rows, max_pages].
    """

    def __init__(self, num_rows: int, max_pages: int, page_size: int, device: torch.device, cp: TPGroup):
        super().__init__(num_rows, max_pages, page_size, device)
        self.cp, self.pages = cp, self.page_table.cpu().numpy()  # of a CPU the same memory
        self.kernels = fused is not None and self.page_table.is_cuda  # plans are made for them

    def set_pages(self, updates: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        for row, first, pages in updates:
            self.pages[row, first : first + len(pages)] = pages
        if self.page_table.is_cuda:
            super().set_pages(updates)

    def prefill(self, tokens: np.ndarray, rows: np.ndarray, cached: np.ndarray, new: np.ndarray) -> RingInputs:
        """As SequenceTable's, but for the rows: this rank's share of each sequence."""
        ranks, me = self.cp.size, self.cp.rank
        starts = np.cumsum(new) - new  # [B]: of each sequence in tokens
        shares = [[share(int(n), rank, ranks, turn) for turn, n in enumerate(new)] for rank in range(ranks)]
        blocks = [_Block(mine, starts) for mine in shares]
        sequence = np.repeat(np.arange(len(new)), new)  # [T]
        positions = np.arange(len(tokens)) - starts[sequence] + cached[sequence]  # [T]
        slots = self._slots(rows[sequence], positions)  # [T], -1: not mine
        owner, place = np.empty(len(tokens), dtype=np.int64), np.empty(len(tokens), dtype=np.int64)
        for rank, block in enumerate(blocks):
            owner[block.rows], place[block.rows] = rank, np.arange(len(block.rows))
        stored = [np.flatnonzero(slots[block.rows] >= 0) for block in blocks]
        mine = blocks[me].rows
        packed = [tokens[mine], positions[mine], rows[sequence[mine]], self._fresh(slots)]
        packed += [x for block, at in zip(blocks, stored, strict=True) for x in (at, slots[block.rows][at])]
        pieces = [self._pieces(blocks, source) for source in range(ranks)]
        short = [[piece for piece in some if self._short(piece.queries.stop - piece.queries.start)] for some in pieces]
        ids, at, row, fresh, *rest = upload_all(self.device, *packed, *map(_numbers, short))
        stores, told = rest[: 2 * ranks], rest[2 * ranks :]
        if len(mine) and tokens[mine].min() < 0:
            ids = ids.where(ids >= 0, self.last_token[row])
        meta = RingMetadata(
            self.cp, tuple(len(block.rows) for block in blocks), tuple(map(Store, stores[::2], stores[1::2])),
            tuple(tuple(p for p in some if not self._short(p.queries.stop - p.queries.start)) for some in pieces),
            tuple(_in_one(few, numbers) for few, numbers in zip(short, told, strict=True)),
            self._cached(blocks, rows, cached), fresh,
        )  # fmt: skip
        return RingInputs(ids, at, row, meta, owner, place)

    def decode(self, rows: np.ndarray, positions: np.ndarray, alike: Sequence[tuple[int, int, int]] = ()) -> StepInputs:
        """As SequenceTable's; sequences that begin alike get no help here."""
        if self.kernels:
            return self.decode_on_device(*upload_all(self.device, rows, positions), self._pages(positions.max() + 1))
        slots = self._slots(rows, positions)
        mine, lens = zip(*(self._mine(row, n + 1) for row, n in zip(rows, positions, strict=True)), strict=True)
        groups = similar_lengths([b for b, n in enumerate(lens) if n], lens)
        widths = [max(len(mine[b]) for b in group) for group in groups]
        stored = np.flatnonzero(slots >= 0)
        packed = [rows, positions, self._fresh(slots), stored, slots[stored]]
        for group, width in zip(groups, widths, strict=True):
            ids = [np.pad(mine[b], (0, width - len(mine[b])), constant_values=mine[b][0]) for b in group]
            packed += [np.array(group), np.concatenate(ids), np.array([lens[b] for b in group])]
        row, at, fresh, where, there, *rest = upload_all(self.device, *packed)
        together = tuple(map(Together, rest[::3], rest[1::3], widths, rest[2::3]))
        meta = SpreadMetadata(self.cp, Store(where, there), together, fresh)
        return StepInputs(self.last_token[row], at, row, meta)

    def decode_on_device(
        self, rows: torch.Tensor, positions: torch.Tensor, pages: int, prefixes: SharedPrefixes | None = None
    ) -> StepInputs:
        """As SequenceTable's, by a kernel; prefixes are not read."""
        ids, at, slots, table, lens = fused.plan_spread_decode(
            rows, positions, self.page_table, self.last_token, pages, self.page_size, self.cp.rank, self.cp.size
        )
        here = AttentionMetadata(slots, table, self._counting[: len(rows) + 1], lens, self.page_size, 1)
        return StepInputs(ids, at, rows, TableMetadata(self.cp, here))

    def _slots(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """[n]: where on this rank each token lies, -1 if it is another's."""
        pages = self.pages[rows, positions // self.page_size]
        slots = pages // self.cp.size * self.page_size + positions % self.page_size
        return np.where(pages % self.cp.size == self.cp.rank, slots, -1)

    def _fresh(self, slots: np.ndarray) -> np.ndarray:
        """Of the slots that are written, the pages whose first one is among them."""
        return slots[(slots >= 0) & (slots % self.page_size == 0)] // self.page_size

    def _mine(self, row: int, tokens: int) -> tuple[np.ndarray, int]:
        """This rank's pages of the first `tokens` of a row, in order, and how many tokens lie there."""
        pages = self.pages[row, : -(-int(tokens) // self.page_size)]
        mine = pages % self.cp.size == self.cp.rank
        behind = (
            len(pages) * self.page_size - int(tokens) if len(pages) and mine[-1] else 0
        )  # empty slots of the last one
        return pages[mine] // self.cp.size, int(mine.sum()) * self.page_size - behind

    def _short(self, queries: int) -> bool:
        """Is a piece of so many queries computed together with others?"""
        return self.kernels and queries < LONG

    def _pieces(self, blocks: list["_Block"], source: int) -> tuple[Piece, ...]:
        """What my queries see of the keys of rank `source`, by sequence."""
        mine, theirs, pieces = blocks[self.cp.rank], blocks[source], []
        for turn, (own, other) in enumerate(zip(mine.shares, theirs.shares, strict=True)):
            roles = (role(rank, self.cp.size, turn) for rank in (self.cp.rank, source))
            queries, keys, causal = seen(own, other, *roles)
            if queries and keys:
                stop, first = mine.starts[turn] + own.size, theirs.starts[turn]
                pieces.append(Piece(slice(stop - queries, stop), slice(first, first + keys), causal))
        return tuple(pieces)

    def _cached(self, blocks: list["_Block"], rows: np.ndarray, cached: np.ndarray) -> Cached | None:
        behind = np.flatnonzero(cached)  # sequences with something before their new tokens
        if not len(behind):
            return None
        sent = [np.concatenate([block.rows_of(b) for b in behind]) for block in blocks]
        width = max(map(len, sent))
        held = [(b, *self._mine(rows[b], cached[b])) for b in behind]
        held = [(b, ids, tokens) for b, ids, tokens in held if tokens]
        queries = {b: [] for b in behind}  # where they stand among the gathered ones, rank by rank
        for rank, block in enumerate(blocks):
            at = rank * width
            for b in behind:
                queries[b].append(at + np.arange(block.shares[b].size))
                at += block.shares[b].size
        held = [(ids, np.concatenate(queries[b]), tokens) for b, ids, tokens in held]
        few = [one for one in held if self._short(len(one[1]))]
        held = [one for one in held if not self._short(len(one[1]))]
        mine, *rest = upload_all(self.device, sent[self.cp.rank], *(x for ids, of, _ in held for x in (ids, of)))
        pages = tuple(map(Pages, rest[::2], (tokens for _, _, tokens in held), rest[1::2]))
        return Cached(mine, width, pages, self._short_pages(few) if few else None)

    def _short_pages(self, few: Sequence[tuple[np.ndarray, np.ndarray, int]]) -> ShortPages:
        """few: of each sequence its pages here, its queries and its tokens here."""
        pieces, at, first = [], 0, 0
        for ids, of, tokens in few:
            pieces.append(Piece(slice(at, at + len(of)), slice(first, first + tokens), False))
            at, first = at + len(of), first + len(ids)
        lists = (np.concatenate([one[i] for one in few]) for i in (0, 1))
        numbers, *lists = upload_all(self.device, _numbers(pieces), *lists)
        return ShortPages(_in_one(pieces, numbers), *lists)


def _numbers(pieces: Sequence[Piece]) -> np.ndarray:
    """[5 * n], see Pieces."""
    of = [(p.queries.start, p.queries.stop, p.keys.start, p.keys.stop, p.causal) for p in pieces]
    numbers = np.array(of, dtype=np.int64).reshape(-1, 5).T
    numbers[[1, 3]] -= numbers[[0, 2]]
    return numbers.reshape(-1)


def _in_one(pieces: Sequence[Piece], numbers: torch.Tensor) -> Pieces | None:
    """numbers [5 * n] of the pieces, on the device; None for none."""
    if not pieces:
        return None
    return Pieces(numbers.view(5, -1), max(p.queries.stop - p.queries.start for p in pieces))


def refuse_less_than_the_ranks(size: int, tokens: int, num_pages: int, page_size: int) -> None:
    """tokens: of a request at most. Raises ValueError where some of the `size` ranks could never hold any, or have no page."""
    if tokens < size:
        raise ValueError(
            f"cp_size={size} spreads the tokens of a request over {size} ranks, but it has {tokens} at most here; use "
            f"cp_size={tokens}, or a longer context_length and max_total_tokens"
        )
    if num_pages < size:
        raise ValueError(
            f"cp_size={size} spreads pages over {size} ranks, but the pool has {num_pages} of {page_size} tokens; use a larger "
            f"max_total_tokens, or a smaller page_size"
        )


class _Block:
    """One rank's rows of a step: its share of each sequence, front and back, sequence after sequence."""

    def __init__(self, shares: Sequence[Share], starts: np.ndarray):
        self.shares = shares
        sizes = [s.size for s in shares]
        self.starts = (np.cumsum(sizes) - sizes).tolist()  # of each sequence in this block
        parts = [start + np.arange(r.start, r.stop) for s, start in zip(shares, starts, strict=True) for r in s]
        self.rows = np.concatenate(parts)  # [n]: which of the step's T rows they are

    def rows_of(self, b: int) -> np.ndarray:
        return self.starts[b] + np.arange(self.shares[b].size)
