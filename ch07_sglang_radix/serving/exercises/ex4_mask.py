"""Exercise 4: The mask, and who may end (25 minutes).

Read  "A grammar's mask" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.serving.exercises.check 4

Before each token rank 0 forbids what the grammar does not allow, and the model chooses among the rest. The end token is the
one that is most easily got wrong. Forbidden always, the answer never ends; allowed always, a model that likes to end makes
half a JSON object. It is allowed where the text is complete, and nowhere else. And a token without a text keeps any grammar
content and gets nowhere: a model that likes it writes it for ever.

    text       what the answer is so far
    may_begin  (text) -> bool: can it still become a complete text, or is it one?
    complete   (text) -> bool: is it one?
    vocab      the tokens' texts, by id; "" for special tokens
    end        the id of the end token, itself a special one
    returns    allowed: a bool for each token.   bitmask: the same as the sampler wants it, 32 of them in a number: bit i of
               word w is token 32 w + i, as many words as it takes; they are int32, so bit 31 makes a word negative

    the grammar yes|no, vocab ["y", "es", "no", "x", ""], end 4: "" -> y and no; "y" -> es; "yes" -> the end alone
    [True, False, True] -> [5];   31 times False, then True -> [-2147483648]
"""

from collections.abc import Callable, Sequence

Text = Callable[[str], bool]


def allowed(text: str, may_begin: Text, complete: Text, vocab: Sequence[str], end: int) -> list[bool]:
    raise NotImplementedError  # your turn


def bitmask(allowed: Sequence[bool]) -> list[int]:
    raise NotImplementedError  # your turn
