"""Exercise 8: A page's name, and its proof (25 minutes).

Read  "What is evicted comes back" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.quantization.exercises.check 8

Pages that outlive an engine lie in files. Whoever looks for one has nothing but tokens to go by, and whoever finds one has nothing
but its bytes to tell whether they are right: the writer may have been killed, the disk may have lost a bit, somebody may have
renamed it.

`names(namespace, pages)`: pages is a list of lists of token ids, those of a prompt in order. Returns a name, bytes, for each. What
a page holds depends on all tokens up to its end and on the namespace: two names are equal if, and only if, all of these are. Page
sizes may differ: [[1, 2], [3]] and [[1], [2, 3]] share no name. A name is the same whenever and wherever it is asked for, and has
32 bytes at most.

`seal(name, payload)`: the bytes of the file.

`unseal(name, file)`: the payload, if the file is exactly what `seal` has made for this name; else None, whatever its bytes are.

    names("base", [[1, 2], [3, 4]])[0] == names("base", [[1, 2], [5, 6]])[0]        ->  True
    names("base", [[1, 2], [3, 4]])[1] == names("base", [[9, 2], [3, 4]])[1]        ->  False
    unseal(b"a", seal(b"a", b"K and V"))                                            ->  b"K and V"
    unseal(b"b", seal(b"a", b"K and V"))                                            ->  None
    unseal(b"a", seal(b"a", b"K and V")[:-1])                                       ->  None
"""


def names(namespace: str, pages: list[list[int]]) -> list[bytes]:
    raise NotImplementedError  # your turn


def seal(name: bytes, payload: bytes) -> bytes:
    raise NotImplementedError  # your turn


def unseal(name: bytes, file: bytes) -> bytes | None:
    raise NotImplementedError  # your turn
