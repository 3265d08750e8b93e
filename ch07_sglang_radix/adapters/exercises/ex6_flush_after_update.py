"""Exercise 6: Flush after an update (30 minutes).

Read  "Weights in flight" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.adapters.exercises.check 6

The weights change while requests are paused in place. They keep the pages they use, and go on with them. Whoever comes afterwards
must find nothing that has the old weights in it: neither what was cached, nor what the old requests still compute, since their new
K and V are made from old ones. A page that nobody uses and nobody may find is free.

`Cache()`: empty, and the weights are the first.

`insert(request, tokens, page)`: the request has computed this page, whose last token is the last of `tokens`. It uses it, and
    others may find it. The request began under the weights that were there when it was first named.
`find(request, tokens)`: returns the page of these tokens, which the request uses from now on; None if there is none for it. A
    request finds what it has computed itself, and what requests under the same weights have: those that it began under.
`end(request)`: it has ended, and uses nothing any more. What others may find stays.
`update()`: new weights.
`free()`: the pages that have come back so far, ascending.

    cache = Cache()
    cache.insert("a", (1, 2), 7)
    cache.insert("b", (1, 3), 8)
    cache.end("b")
    cache.update()
    cache.free()                   ->  [8]       nobody uses it
    cache.find("c", (1, 2))        ->  None      it has the old weights in it
    cache.find("a", (1, 2))        ->  7
    cache.end("a")
    cache.free()                   ->  [7, 8]
"""


class Cache:
    def __init__(self):
        raise NotImplementedError  # your turn

    def insert(self, request: str, tokens: tuple[int, ...], page: int) -> None:
        raise NotImplementedError  # your turn

    def find(self, request: str, tokens: tuple[int, ...]) -> int | None:
        raise NotImplementedError  # your turn

    def end(self, request: str) -> None:
        raise NotImplementedError  # your turn

    def update(self) -> None:
        raise NotImplementedError  # your turn

    def free(self) -> list[int]:
        raise NotImplementedError  # your turn
