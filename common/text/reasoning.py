"""The thought in front of an answer, <think>...</think>: told apart from the answer while the text grows.

Many chat templates write the opening tag themselves, so that the model's text begins inside the thought. SGLang 0.5.23
reads them in srt/parser/reasoning_parser.py.
"""

from collections.abc import Iterable
from typing import NamedTuple

from common.text.tool_calls import OPEN as TOOL_CALL
from common.text.tool_calls import certain

OPEN, CLOSE = "<think>", "</think>"

# SGLang's names of kinds of models that write <think>...</think>: does a text begin inside the thought, whatever the prompt says?
FORCED = {"qwen3": False, "qwen3-thinking": True, "deepseek-r1": True}


class Split(NamedTuple):
    """What is new of the one and of the other."""

    thought: str = ""
    answer: str = ""


def opens_thought(prompt: str, parser: str = "qwen3") -> bool:
    """Whether what follows a rendered chat begins inside a thought. A closed one, as with enable_thinking=False, is none."""
    end = prompt.rstrip()
    return end.endswith(OPEN) or (FORCED[parser] and not end.endswith(CLOSE))


class ReasoningParser:
    """Text in, in pieces of any size; out come thought and answer, the same however the text was cut.

    opened: the prompt ends with <think>. stream: the thought comes as it grows; else in one piece, when it has ended.
    Only a <think> at the very beginning opens a thought. </think> closes it, and so does a <tool_call>, which belongs to
    the answer: a model that is eager to call may forget to close. Blanks around the tags belong to neither.
    """

    def __init__(self, opened: bool = False, stream: bool = True):
        self._opened, self._stream = opened, stream
        self._rest = ""  # text that is not read yet
        self._kept: list[str] = []  # thought that waits for its end
        self._state = self._beginning
        self._at_tag = False  # and nothing but blanks since

    def feed(self, piece: str) -> Split:
        self._rest += piece
        return self._state()

    def finish(self) -> Split:
        """The text has ended: what was held back comes out."""
        rest, self._rest = self._rest, ""
        if self._state == self._thought or (self._state == self._beginning and self._opened):
            return Split("".join(self._kept) + (rest.lstrip() if self._at_tag else rest))
        return Split(answer=rest)

    def _beginning(self) -> Split:
        text = self._rest.lstrip()
        if text.startswith(OPEN):
            self._rest = text[len(OPEN) :]
        elif OPEN.startswith(text):  # it may become one
            return Split()
        elif not self._opened:
            self._state = self._answer
            return self._state()
        self._state, self._at_tag = self._thought, True
        return self._state()

    def _thought(self) -> Split:
        if self._at_tag:
            self._rest = self._rest.lstrip()
        places = [at for tag in (CLOSE, TOOL_CALL) if (at := self._rest.find(tag)) >= 0]
        end = len(self._rest[: min(places)].rstrip()) if places else certain(self._rest, CLOSE, TOOL_CALL)
        piece = self._rest[:end]
        self._at_tag = self._at_tag and not piece
        if not places:
            self._rest = self._rest[end:]
            if self._stream:
                return Split(piece)
            self._kept.append(piece)
            return Split()
        self._rest = self._rest[min(places) :].removeprefix(CLOSE)
        thought, self._kept = "".join(self._kept) + piece, []
        self._state, self._at_tag = self._answer, True
        return Split(thought, self._state().answer)

    def _answer(self) -> Split:
        text, self._rest = (self._rest.lstrip() if self._at_tag else self._rest), ""
        self._at_tag = self._at_tag and not text
        return Split(answer=text)


class ThoughtTokens:
    """How many tokens of an answer are its thought: all up to the one that completes </think>, or that a <tool_call> begins with.

        thought = ThoughtTokens(opened=True)
        thought.take([b"Rain", b"?</", b"think>", b"It"])   # thought.count == 3

    It is told the bytes of each token: where tokens are cut, texts cannot be.
    """

    def __init__(self, opened: bool = False):
        self.count = 0
        self._opened, self._over = opened, False
        self._text = bytearray()  # of the thought
        self._begins: list[int] = []  # of each token, in it

    def take(self, tokens: Iterable[bytes]) -> None:
        for token in tokens:
            if self._over:
                return
            self._begins.append(len(self._text))
            self._text += token
            self.count = self._counted()

    def _counted(self) -> int:
        if not self._opened:
            text = self._text.lstrip()
            self._opened = text.startswith(OPEN.encode())
            self._over = not self._opened and not OPEN.encode().startswith(text)  # else it may still become a thought
        if not self._opened:
            return 0
        ends = [self._ends(CLOSE.encode(), behind=True), self._ends(TOOL_CALL.encode(), behind=False)]
        if found := [end for end in ends if end is not None]:
            self._over = True
            return sum(begin < min(found) for begin in self._begins)
        return len(self._begins)

    def _ends(self, tag: bytes, behind: bool) -> int | None:
        """Where a thought that this tag closes ends, in bytes; looked for where the last token may have completed it."""
        at = self._text.find(tag, max(0, self._begins[-1] - len(tag)))
        return None if at < 0 else at + len(tag) * behind
