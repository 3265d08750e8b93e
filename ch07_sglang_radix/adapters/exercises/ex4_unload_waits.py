"""Exercise 4: Unloading waits (25 minutes).

Read  "Who may run together" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.adapters.exercises.check 4

An adapter is unloaded while requests use it. They were promised its weights, so they go on to their end; nobody new gets it;
and its numbers leave memory with the last of them. Until then its name may be loaded again, with other numbers perhaps: that is
another adapter, and whoever asks for the name from then on gets the new one.

`Registry()`: nothing is loaded. Identities are 1, 2, 3, ... in the order of the loads, and none is used twice.

`load(name)`: returns the new identity. ValueError if the name is loaded, which it is no longer once `unload` has been called.
`acquire(name)`: a request begins to use it; returns the identity. ValueError if the name is not loaded.
`release(identity)`: a request has ended.
`unload(name)`: nobody may acquire it any more. ValueError if the name is not loaded.
`in_memory()`: the identities whose numbers are in memory, ascending.

    registry = Registry()
    registry.load("pirate")        ->  1
    registry.acquire("pirate")     ->  1
    registry.unload("pirate")
    registry.in_memory()           ->  [1]       somebody uses it
    registry.load("pirate")        ->  2
    registry.in_memory()           ->  [1, 2]
    registry.release(1)
    registry.in_memory()           ->  [2]
"""


class Registry:
    def __init__(self):
        raise NotImplementedError  # your turn

    def load(self, name: str) -> int:
        raise NotImplementedError  # your turn

    def acquire(self, name: str) -> int:
        raise NotImplementedError  # your turn

    def release(self, identity: int) -> None:
        raise NotImplementedError  # your turn

    def unload(self, name: str) -> None:
        raise NotImplementedError  # your turn

    def in_memory(self) -> list[int]:
        raise NotImplementedError  # your turn
