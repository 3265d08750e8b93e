"""Exercise 3: Half a stop string (15 minutes).

Read  "Half a character, half a stop" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.serving.exercises.check 3

A stop string ends an answer and is not part of it. A text that ends with the beginning of one may not be sent yet: the rest
may come, and what was sent cannot be taken back. It may not wait longer than it must either, or a reader of "<" sits before
a still screen. How much of the text so far is certain?

    text       the answer so far, in which no stop is complete
    stops      texts that end it, none of them empty; maybe none at all
    returns    how many characters of the text may be sent

    "a <", ["</s>"] -> 2;   "a <b", ["</s>"] -> 4;   "abab", ["abac", "bb"] -> 2
"""

from collections.abc import Sequence


def certain(text: str, stops: Sequence[str]) -> int:
    raise NotImplementedError  # your turn
