"""Exercise 7: A key that tells nothing by the time it takes (15 minutes).

Read  "Keys and browsers" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.serving.exercises.check 7

`==` stops at the first byte that differs. Whoever may try keys, and has a good clock, finds the first letter that takes
longer to be wrong, then the second. So a comparison looks at every byte, whatever it has seen. (Python has one, in hmac; here
it is yours, and counted: each byte knows how often it was looked at.)

    equal         two lists of bytes, of the same length or not -> are they the same? A byte knows ^, -, + , == and != and nothing
                  else. Of two lists of the same length each byte is looked at, once, wherever they differ
    authorized    header: of Authorization, or None if there was none; key: the server's, or None if it has none, and lets
                  everybody in; equal: the above -> may the request pass? A header is "Bearer KEY"; the first word is written as one
                  likes, and blanks around the key do not count. Keys may have any characters: they are compared as UTF-8 bytes
"""

from collections.abc import Callable, Sequence


def equal(given: Sequence[int], wanted: Sequence[int]) -> bool:
    raise NotImplementedError  # your turn


def authorized(header: str | None, key: str | None, equal: Callable[[Sequence[int], Sequence[int]], bool]) -> bool:
    raise NotImplementedError  # your turn
