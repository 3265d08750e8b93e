"""Which rank holds what: attention heads, MLP columns and vocabulary rows by one formula.

Everything a rank holds is a list of `Piece`s: "n rows of the full tensor, from row `src`, lie at my row
`dst`". What no piece covers is padding and stays zero, so any number of ranks works.

Heads (letters: Hq query heads, Hkv KV heads, R ranks). Query head q reads KV head q // (Hq/Hkv).

    V = lcm(Hkv, R) virtual KV heads: KV head h is held V/Hkv times
    each copy serves g = ceil((Hq/Hkv) / (V/Hkv)) query heads, the last ones may be zero heads
    each rank holds V/R virtual KV heads and g * V/R query heads

    Hkv % R == 0               ->  plain splitting        14/2 heads, R=2:  1 KV and 7 query heads a rank
    R % Hkv == 0, Hq % R == 0  ->  replication            16/2 heads, R=4:  1 KV (each held twice) and 4 query heads
    otherwise                  ->  padding inside groups  14/2 heads, R=4:  1 KV (each held twice) and 4 query heads, 2 of 16 zero
                                                          14/2 heads, R=3:  2 KV and 6 query heads, 4 of 18 zero

The last case pays with memory: lcm(8, 3) = 24 virtual KV heads make each of 3 ranks hold 8, as many as one
rank alone. It is there so that every R runs, not because every R is wise.

A zero query head has zero rows in q_proj and zero columns in o_proj: whatever its attention gives is
multiplied by zero. vLLM and SGLang know the first two cases only and refuse the third.
"""

from dataclasses import dataclass
from math import lcm
from typing import NamedTuple


class Piece(NamedTuple):
    """`n` rows of the full tensor from `src` on are this rank's rows from `dst` on."""

    dst: int
    src: int
    n: int


def split_evenly(size: int, rank: int, ranks: int) -> tuple[int, list[Piece]]:
    """`size` rows over `ranks`, padded to a multiple: (rows this rank holds, what they are).

    >>> split_evenly(10, rank=2, ranks=3)
    (4, [Piece(dst=0, src=8, n=2)])
    """
    local = -(-size // ranks)
    start = min(rank * local, size)
    n = min(local, size - start)
    return local, [Piece(0, start, n)] if n else []


@dataclass(frozen=True)
class HeadLayout:
    """The heads of one rank.

    q_heads, kv_heads: index of the checkpoint's head behind each local head, None for a zero head. Local
    KV head j serves the local query heads j*g .. (j+1)*g - 1, with g = group_size: attention need not
    know how many ranks there are.
    """

    q_heads: tuple[int | None, ...]
    kv_heads: tuple[int, ...]

    @classmethod
    def of(cls, num_heads: int, num_kv_heads: int, rank: int, ranks: int) -> "HeadLayout":
        """Raises ValueError if the query heads do not form equal groups."""
        if num_heads % num_kv_heads:
            raise ValueError(f"num_attention_heads={num_heads} is not a multiple of num_key_value_heads={num_kv_heads}")
        group = num_heads // num_kv_heads
        virtual = lcm(num_kv_heads, ranks)
        copies = virtual // num_kv_heads
        per_copy = -(-group // copies)
        q_heads: list[int | None] = []
        kv_heads: list[int] = []
        for v in range(rank * virtual // ranks, (rank + 1) * virtual // ranks):
            kv_head, copy = divmod(v, copies)
            kv_heads.append(kv_head)
            served = range(copy * per_copy, (copy + 1) * per_copy)
            q_heads += [kv_head * group + i if i < group else None for i in served]
        return cls(tuple(q_heads), tuple(kv_heads))

    @property
    def num_q(self) -> int:
        return len(self.q_heads)

    @property
    def num_kv(self) -> int:
        return len(self.kv_heads)

    @property
    def group_size(self) -> int:
        """Query heads that share one local KV head."""
        return self.num_q // self.num_kv

    def q_pieces(self, head_dim: int) -> list[Piece]:
        """Rows of q_proj (and columns of o_proj) on this rank."""
        return _pieces(self.q_heads, head_dim)

    def kv_pieces(self, head_dim: int) -> list[Piece]:
        """Rows of k_proj and of v_proj on this rank."""
        return _pieces(self.kv_heads, head_dim)


def _pieces(heads: tuple[int | None, ...], head_dim: int) -> list[Piece]:
    """Head list -> pieces, neighbours joined so that they are read in one go.

    Not where a head is held twice: its copies stay pieces of their own, so that it is read once and copied.
    """
    pieces: list[Piece] = []
    held = [head for head in heads if head is not None]
    join = len(set(held)) == len(held)
    for i, head in enumerate(heads):
        if head is None:
            continue
        piece = Piece(i * head_dim, head * head_dim, head_dim)
        last = pieces[-1] if pieces else None
        if join and last and (last.dst + last.n, last.src + last.n) == piece[:2]:
            pieces[-1] = Piece(last.dst, last.src, last.n + head_dim)
        else:
            pieces.append(piece)
    return pieces
