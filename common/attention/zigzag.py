"""Which tokens of a prompt a rank computes, so that all of them work equally long.

Token t attends to t + 1 tokens: the last quarter of a prompt is seven times the work of the first. Cut into R runs, the
last rank works almost twice as long as the average one. Cut into 2R, rank i takes the i-th from the front and the i-th from
the back, and what one end saves the other costs:

    2 ranks    0 0 0 1 1 1 1 1 1 0 0 0        pieces 0 and 3, pieces 1 and 2
    3 ranks    0 0 1 1 2 2 2 2 1 1 0 0        pieces 0 and 5, 1 and 4, 2 and 3

A prompt shorter than 2R leaves pieces empty. A step has many sequences, and short ones would all lie on the same rank: so the
ranks take turns, and what is rank i's in the first sequence is rank i+1's in the next (`turn`). Pure functions.
SGLang 0.5.23 (its strategy "zigzag", srt/layers/utils/cp_utils.py) and Megatron-LM cut in the same way; Striped Attention
(Brandon et al. 2023) and SGLang's "interleave" deal out token by token.
"""

from itertools import pairwise
from typing import NamedTuple


class Share(NamedTuple):
    """A rank's tokens of one sequence: its piece from the front, and its piece from the back."""

    front: range
    back: range

    @property
    def size(self) -> int:
        return len(self.front) + len(self.back)

    def tokens(self) -> list[int]:
        return [*self.front, *self.back]


def pieces(n: int, ranks: int) -> list[range]:
    """n tokens in 2R runs whose lengths differ by one at most.

    >>> pieces(10, 2)
    [range(0, 2), range(2, 5), range(5, 7), range(7, 10)]
    """
    ends = [n * j // (2 * ranks) for j in range(2 * ranks + 1)]
    return [range(first, stop) for first, stop in pairwise(ends)]


def role(rank: int, ranks: int, turn: int = 0) -> int:
    """Which of the R shares of the turn-th sequence is this rank's."""
    return (rank - turn) % ranks


def share(n: int, rank: int, ranks: int, turn: int = 0) -> Share:
    """Of n tokens, those that `rank` computes: piece i and piece 2R-1-i, i being its role.

    >>> [share(12, rank, 2).tokens() for rank in range(2)]
    [[0, 1, 2, 9, 10, 11], [3, 4, 5, 6, 7, 8]]
    """
    runs, i = pieces(n, ranks), role(rank, ranks, turn)
    return Share(runs[i], runs[2 * ranks - 1 - i])


def pairs(tokens: list[int], cached: int = 0) -> int:
    """(query, key) pairs of these tokens of a causal sequence, behind `cached` others: a measure of their work."""
    return sum(cached + t + 1 for t in tokens)


class Block(NamedTuple):
    """One rank's tokens against another's: so many of the first, from their end, see so many of the second, from their front."""

    queries: int
    keys: int
    causal: bool = False


def seen(mine: Share, theirs: Share, my_role: int, their_role: int) -> Block:
    """What of a block of keys (another rank's share) my queries see: all or nothing by pieces, but for my own, which is causal.

    their role < mine     their front piece lies before both of mine, their back piece behind them     all of mine, their front
    their role > mine     both of theirs lie between my two                                            my back, all of theirs
    equal                 the same tokens, in order                                                    a triangle

    Either way it is half of what there is, so all ranks are done with a block at the same time.
    """
    if their_role == my_role:
        return Block(mine.size, theirs.size, causal=True)
    if their_role < my_role:
        return Block(mine.size, len(theirs.front))
    return Block(len(mine.back), theirs.size)
