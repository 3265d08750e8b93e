"""Exercise 9: A page that is being copied (30 minutes).

Read  "What is evicted comes back" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.quantization.exercises.check 9

With write-back a node is copied to the host when the device evicts it. A copy takes a while. Until it is done the page may not be
given to anybody, or the host gets a copy of somebody else's numbers; and meanwhile a request may come for the node. Each node
here has one page.

`WriteBack(pages)`: the device's pages are 0 .. pages - 1, and all are free.

`compute(name)`: a node is computed: returns the page it gets, the lowest that is free; None if none is, and then nothing happens.

`evict()`: the node that was computed first, of those on the device that nobody uses and that are not being copied, shall go. If
the host has it already, its page is free at once; else a copy begins. Returns its name, None if there is no such node.

`copied(name)`: the copy is done, and the host has the node. Its page is free, if nobody uses the node; else the device keeps it,
too, until it is evicted another time.

`use(name)`: where a request finds the node: "device", which it is also while it is being copied, "host" if only the host has it, or
None. What is found on the device stays there until `release(name)` has been called as often.

`release(name)`: one who has used it on the device has ended. The page stays where it is: a cache is evicted when room is needed.

`free()`: the free pages, ascending.

    tree = WriteBack(1)
    tree.compute("a")      ->  0
    tree.evict()           ->  "a"
    tree.compute("b")      ->  None      page 0 is still being read
    tree.copied("a")
    tree.compute("b")      ->  0
    tree.use("a")          ->  "host"
"""


class WriteBack:
    def __init__(self, pages: int):
        raise NotImplementedError  # your turn

    def compute(self, name: str) -> int | None:
        raise NotImplementedError  # your turn

    def evict(self) -> str | None:
        raise NotImplementedError  # your turn

    def copied(self, name: str) -> None:
        raise NotImplementedError  # your turn

    def use(self, name: str) -> str | None:
        raise NotImplementedError  # your turn

    def release(self, name: str) -> None:
        raise NotImplementedError  # your turn

    def free(self) -> list[int]:
        raise NotImplementedError  # your turn
