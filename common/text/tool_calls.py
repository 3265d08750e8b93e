"""Tool calls in the text of a model, as Qwen2.5 and Qwen3 write them: found while the text grows.

    I'll look it up.
    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

Several blocks are several calls. SGLang 0.5.23 reads them in srt/function_call/qwen25_detector.py.
"""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

OPEN, CLOSE = "<tool_call>", "</tool_call>"

# up to the arguments, if the keys come in the order in which Qwen was trained to write them
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)', re.DOTALL)
_BETWEEN_STRINGS = frozenset("{}[],:+-.0123456789eEtrufalsn \t\n\r")  # punctuation, numbers, true, false, null


class Text(NamedTuple):
    """Words to the user."""

    text: str


class CallBegins(NamedTuple):
    index: int  # 0 for the first call of the answer
    name: str


class Arguments(NamedTuple):
    """A piece of the arguments, which are a JSON object as the model writes it."""

    index: int
    piece: str


class CallEnds(NamedTuple):
    """All pieces have come, and together they are valid JSON."""

    index: int


Event = Text | CallBegins | Arguments | CallEnds


def certain(text: str, *tags: str) -> int:
    """How many characters cannot be, or lead up to, the beginning of a tag: blanks before a tag go with the tag."""
    half = max(size for tag in tags for size in range(len(tag)) if text.endswith(tag[:size]))
    return len(text[: len(text) - half].rstrip())


class ToolCallParser:
    """Text in, in pieces of any size; out come words and calls, the same however the text was cut.

        parser = ToolCallParser({"get_weather"})
        for piece in stream: events = parser.feed(piece)
        events = parser.finish()

    Arguments are handed out while they come, so a call whose arguments break off, or turn out to be no JSON, has begun
    and never ends; who shows whole answers leaves it out. Blanks around blocks are no words. A block that cannot be read
    is skipped, and a call to a name that is not in `names`, and every call after the first `most`.
    """

    def __init__(self, names: Collection[str], most: int | None = None):
        self.ended = 0  # calls
        self._names, self._most = frozenset(names), most
        self._rest = ""  # text that is not read yet
        self._begun = 0
        self._state = self._words
        self._behind_block = False  # and no words since

    def feed(self, piece: str) -> list[Event]:
        self._rest += piece
        events: list[Event] = []
        while self._state(events):  # until it needs more text
            pass
        return events

    def finish(self) -> list[Event]:
        """The text has ended: what was held back comes out."""
        events: list[Event] = []
        if self._state == self._words and self._rest:
            events.append(Text(self._rest))
        elif self._state == self._head:
            self._whole_block(events)  # its closing tag may have been a stop text
        self._rest = ""
        return events

    # --- where it is in the text; each reads on and returns True if it came to an end there

    def _words(self, events: list[Event]) -> bool:
        if self._behind_block:
            self._rest = self._rest.lstrip()
        before, tag, behind = self._rest.partition(OPEN)
        end = len(before.rstrip()) if tag else certain(before, OPEN)
        if end:
            events.append(Text(before[:end]))
            self._behind_block = False
        self._rest = behind if tag else before[end:]
        if tag:
            self._state = self._head
        return bool(tag)

    def _head(self, events: list[Event]) -> bool:
        if found := _HEAD.match(self._rest):
            try:
                self._begin(json.loads(found[1]), events)
            except ValueError:  # an escape or a control character that JSON does not have
                self._state = self._skip
                return True
            self._rest = self._rest[found.end() :]
            self._so_far, self._depth, self._in_string, self._escaped = "", 0, False, False
            self._state = self._arguments
            return True
        if CLOSE in self._rest:
            self._whole_block(events)
            self._state = self._skip
            return True
        return False

    def _arguments(self, events: list[Event]) -> bool:
        for at, character in enumerate(self._rest):
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                if character < " ":  # no JSON: the quotation mark was forgotten
                    return self._leave_arguments(at, events)
                self._escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character not in _BETWEEN_STRINGS:
                return self._leave_arguments(at, events)
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    return self._leave_arguments(at + 1, events)
        self._take_arguments(len(self._rest), events)
        return False

    def _skip(self, events: list[Event]) -> bool:
        """To the end of the block, or to the next one if it has none."""
        places = [at for tag in (OPEN, CLOSE) if (at := self._rest.find(tag)) >= 0]
        if not places:
            self._rest = self._rest[-len(CLOSE) :]
            return False
        self._rest = self._rest[min(places) :].removeprefix(CLOSE)
        self._behind_block, self._state = True, self._words
        return True

    # --- a call

    def _begin(self, name: str, events: list[Event]) -> None:
        self._hidden = name not in self._names or self._begun == self._most
        if not self._hidden:
            events.append(CallBegins(self._begun, name))
            self._begun += 1

    def _take_arguments(self, size: int, events: list[Event]) -> None:
        piece, self._rest = self._rest[:size], self._rest[size:]
        self._so_far += piece
        if piece and not self._hidden:
            events.append(Arguments(self._begun - 1, piece))

    def _leave_arguments(self, size: int, events: list[Event]) -> bool:
        self._take_arguments(size, events)
        self._end(self._so_far, events)
        self._state = self._skip
        return True

    def _end(self, arguments: str, events: list[Event]) -> None:
        try:
            json.loads(arguments)
        except (ValueError, RecursionError):
            return
        if not self._hidden:
            events.append(CallEnds(self._begun - 1))
            self.ended += 1

    def _whole_block(self, events: list[Event]) -> None:
        """A call whose keys come in another order, or that has no arguments."""
        start = len(self._rest) - len(self._rest.lstrip())
        try:
            call, end = json.JSONDecoder().raw_decode(self._rest, start)
            name, arguments = call["name"], call.get("arguments", call.get("parameters", {}))
            if not (isinstance(name, str) and isinstance(arguments, dict)):
                raise TypeError
        except (ValueError, TypeError, KeyError, RecursionError):
            return
        self._rest = self._rest[end:]
        self._begin(name, events)
        text = json.dumps(arguments, ensure_ascii=False)
        if not self._hidden:
            events.append(Arguments(self._begun - 1, text))
        self._end(text, events)


def tool_call_grammar(
    tools: Mapping[str, Mapping[str, Any] | None], *, words: bool = False, several: bool = True
) -> str:
    """A Lark grammar, in llguidance's dialect, of answers that are calls.

    tools: {name: JSON schema of its arguments, or None if it has none}; a name may hold letters, digits, _ and -.
    One call or, with `several`, any number from one; with `words` perhaps none, and any text before and between them.
    Each schema keeps a root of its own, so that `$ref: "#/$defs/..."` means what its writer meant.
    """
    opening, closing = _quoted(OPEN + "\n"), _quoted("\n" + CLOSE)
    if words:
        lines = [
            f"start: (opening call {closing})* WORDS" if several else f"start: opening call {closing} | WORDS",
            f"opening[lazy]: WORDS {opening}",
            r"WORDS: /(.|\n)*/",
        ]
    else:
        more = f" ({_quoted(chr(10))} block)*" if several else ""
        lines = [f"start: block{more}", f"block: {opening} call {closing}"]
    lines.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools))))
    for i, (name, schema) in enumerate(tools.items()):
        head, tail = _quoted(f'{{"name": "{name}", "arguments": '), _quoted("}")
        lines += [f"call_{i}: {head} args_{i} {tail}", f"args_{i}: %json {_schema(schema)}"]
    return "\n".join(lines) + "\n"


def _schema(schema: Mapping[str, Any] | None) -> str:
    """One way to write each value, with the blanks that Qwen was trained to write: else a model may put out blanks for ever."""
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    style = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return json.dumps({"type": "object", **(nothing if schema is None else schema), "x-guidance": style})


def _quoted(text: str) -> str:
    """A string of the grammar."""
    return json.dumps(text)
