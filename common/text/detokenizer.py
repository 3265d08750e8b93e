"""Token ids -> text that grows: each piece is shown once, when it is certain, and nothing is taken back."""

from codecs import getincrementaldecoder
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice

from common.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what a decoder shows for bytes that are no character, or not yet one
HALF = 3  # tokens that the beginning of a character can have: it has four bytes at most, of which the last is missing
PATIENCE = 2 * HALF  # tokens that may wait for the end of a character; a window of so many has context for the last
BULK = 32  # tokens decoded together when nobody looked at them one by one
CONTEXT = 5  # prompt tokens in front of the answer, as in SGLang (INIT_INCREMENTAL_DETOKENIZATION_OFFSET)


def context_of(tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool = True) -> list[int]:
    """All of a prompt that the text of its answer depends on: the last tokens that have a text."""
    with_text = (token for token in reversed(prompt_ids) if tokenizer.has_text(token, skip_special_tokens))
    return list(islice(with_text, CONTEXT))[::-1]


class IncrementalDetokenizer:
    """Turns a growing list of tokens into growing text, never showing half a character.

    Decoding token by token would give replacement marks, as a token can end inside a UTF-8 character, and would lose
    spaces, as SentencePiece decoders drop the one in front of a text. Decoding everything each time costs O(n^2) and
    takes back what it showed. So a short window is decoded twice, with and without the new token, and the difference
    is the new text (vLLM `v1/engine/detokenizer.py`, SGLang `managers/detokenizer_manager.py`). The first window is the
    end of the prompt: an answer is the continuation of a text, not a text of its own.

    In the end the pieces together are what the whole answer, decoded behind the whole prompt, adds to it. There is one
    difference: if one of several byte tokens in a row (Llama 2's `<0xE9>`) is wrong, the tokenizers library makes
    replacement marks of them all, characters that were shown long ago included. Here bytes are read as UTF-8 one by
    one, as SentencePiece itself does, and only what is no character becomes a mark.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ):  # fmt: skip
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._spaces = spaces_between_special_tokens
        self._bytes = getincrementaldecoder("utf-8")(errors="replace")  # of byte tokens
        self._window: list[int] = []
        self._clean = 0  # tokens of the window that end where a character ends
        self._out = ""  # text of the window that is out, or is the prompt's
        self.add(*context_of(tokenizer, prompt_ids, skip_special_tokens))
        self._out = self._decode(self._window)

    def add(self, *ids: int) -> str:
        """Take new tokens, return the text that became certain; "" while a character is incomplete."""
        pieces = []
        for are_bytes, run in groupby(self._with_text(ids), self._tokenizer.bytes_of.__contains__):
            tokens = list(run)
            if are_bytes:
                pieces += self._take_bytes(tokens)
            else:
                pieces.append(self._bytes.decode(b"", final=True))
                pieces += [self._take(tokens[at : at + BULK]) for at in range(0, len(tokens), BULK)]
        return "".join(pieces)

    def finish(self) -> str:
        """What is left at the end, replacement marks and all."""
        return self._hand_out(self._decode(self._window)) + self._bytes.decode(b"", final=True)

    def _take_bytes(self, tokens: list[int]) -> list[str]:
        waiting = self._hand_out(self._decode(self._window))
        # for the text behind them, they are a letter in front of it
        self._window, self._clean = [self._tokenizer.letter], 1
        self._out = self._decode(self._window)
        return [waiting, self._bytes.decode(bytes(self._tokenizer.bytes_of[token] for token in tokens))]

    def _take(self, new: list[int]) -> str:
        text = self._decode(self._window + new)
        if len(new) > 1 and REPLACEMENT in text:  # somewhere in there: what comes out may not depend on who looks when
            return "".join([self._take([token]) for token in new])
        self._window += new
        piece = self._hand_out(text.rstrip(REPLACEMENT))
        if not text.endswith(REPLACEMENT):
            self._slide(text, self._clean)
            self._clean = len(self._window)
        elif len(self._window) - self._clean > PATIENCE:
            # most of what waits is no character, or tokens never end where characters do
            piece += self._hand_out(self._decode(self._window[:-HALF]))
            self._slide(text, len(self._window) - PATIENCE)
        return piece

    def _hand_out(self, text: str) -> str:
        """What is new in the text of the window."""
        # where the prompt ended inside a character that the answer completes, the character is the answer's
        start = len(self._out if text.startswith(self._out) else self._out.rstrip(REPLACEMENT))
        if len(text) <= start:
            return ""
        self._out = text
        return text[start:]

    def _slide(self, text: str, start: int) -> None:
        """Let the window, whose text is given, begin later; what is still to come of it stays the same."""
        waiting = len(text) - len(self._out)
        self._window, self._clean = self._window[start:], max(0, self._clean - start)
        shorter = self._decode(self._window)
        self._out = shorter[: len(shorter) - waiting]

    def _with_text(self, ids: Iterable[int]) -> Iterator[int]:
        return (token for token in ids if self._tokenizer.has_text(token, self._skip))

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, self._skip, self._spaces)
