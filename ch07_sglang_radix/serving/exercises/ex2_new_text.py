"""Exercise 2: The text that a token adds (30 minutes).

Read  "Half a character, half a stop" in the chapter
Edit  this file
Test  python -m ch07_sglang_radix.serving.exercises.check 2

An answer's tokens come one by one, and its text is to be sent as it grows: never half a character, never a character twice,
and nothing is taken back. Three ways that suggest themselves are wrong. A token decoded alone is half a character, or has
lost the space in front of it. All tokens decoded each time, and the new end sent, costs n^2/2 for n tokens. And a window that
begins with the newest token loses that space again. So keep two places in the list, as SGLang does: from `surr` on tokens are
decoded, those up to `read` have been sent; the text between the two is context for what follows, and is not sent again.

    ids        all tokens so far; the last one is new
    surr, read what you returned for the token before it; 0, 0 for the first one
    decode     list of tokens -> text. Bytes that are no character, or not yet one, become U+FFFD, and the space in front of
               the first token is lost
    returns    (text, surr, read): what can be sent now, maybe "", and the two places for the next call

    tokens that are bytes: e9, 95, bf ("长") -> "", "", "长"
"""

from collections.abc import Callable


def new_text(ids: list[int], surr: int, read: int, decode: Callable[[list[int]], str]) -> tuple[str, int, int]:
    raise NotImplementedError  # your turn
