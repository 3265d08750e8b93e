"""What rank 0 tells every rank of its side about rooms: integers behind a WingTask's head, several orders in one task.

    [kind, words, ...] [kind, words, ...]       words: how many follow
    meet      decode    engine, its ranks' addresses as bytes       connect to them
    reserve   decode    room, engine, slot, first, digest, pages    these pages wait for the room's
    send      prefill   room, last, pages                           these are computed: on their way with them
    close     both      room, failed?, why as bytes                 forget it; what still comes for it is thrown away
    turn_away decode    room, engine, why as bytes                  nothing is reserved: its prompt need not be computed
    begin     decode    row, token, shift                           a row goes on with this token; pictures before it shift its
                                                                    positions by so many (common/vision/mrope.py)
    poll      both      rooms                                       tell rank 0 where you are with each

Rank 0 alone decides; because orders are tasks they come in its order: a page that `close` takes from a room is not another's before
every rank has closed it.
"""

from collections.abc import Sequence
from typing import NamedTuple

WING = 1  # this wing's number on the wire
MEET, RESERVE, SEND, CLOSE, BEGIN, POLL, TURN_AWAY = range(1, 8)
LEAST = {MEET: 1, RESERVE: 5, SEND: 2, CLOSE: 2, BEGIN: 3, POLL: 0, TURN_AWAY: 2}  # words that an order of a kind has


class Order(NamedTuple):
    kind: int
    words: tuple[int, ...]


def encode(orders: Sequence[Order]) -> tuple[int, ...]:
    return tuple(word for order in orders for word in (order.kind, len(order.words), *order.words))


def decode(words: Sequence[int]) -> list[Order]:
    """Raises ValueError for anything that `encode` did not write."""
    orders, at = [], 0
    while at < len(words):
        if at + 2 > len(words):
            raise ValueError(f"order {len(orders)} has no length: the words end at {len(words)}")
        kind, n = words[at : at + 2]
        if kind not in LEAST:
            raise ValueError(f"order {len(orders)} has the unknown kind {kind}")
        if not LEAST[kind] <= n <= len(words) - at - 2:
            raise ValueError(
                f"order {len(orders)} of kind {kind} says {n} words, {len(words) - at - 2} are there and {LEAST[kind]} the least"
            )
        orders.append(Order(kind, tuple(words[at + 2 : at + 2 + n])))
        at += 2 + n
    return orders


def as_words(text: str) -> tuple[int, ...]:
    return tuple(text.encode())


def as_text(words: Sequence[int]) -> str:
    return bytes(words).decode(errors="replace")
