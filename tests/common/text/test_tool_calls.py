"""Calls in a text: the same however it was cut, nothing of a tag shown, what cannot be read left out."""

import json
from itertools import pairwise

import llguidance
import llguidance.hf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from common.text.tool_calls import Arguments, CallBegins, CallEnds, Text, ToolCallParser, certain, tool_call_grammar
from common.tiny_qwen import TINY_QWEN_PATH

NAMES = {"get_weather", "add"}


def block(name: str = "get_weather", arguments: str = '{"city": "Paris"}') -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def read(pieces, **options):
    """(words, [(name, arguments, whether they are whole)]) of the text in these pieces."""
    parser = ToolCallParser(NAMES, **options)
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    words = "".join(event.text for event in events if isinstance(event, Text))
    calls = [[event.name, "", False] for event in events if isinstance(event, CallBegins)]
    for event in events:
        if isinstance(event, Arguments):
            calls[event.index][1] += event.piece
        elif isinstance(event, CallEnds):
            calls[event.index][2] = True
    assert parser.ended == sum(ended for *_, ended in calls)
    return words, [tuple(call) for call in calls]


PARIS = ("get_weather", '{"city": "Paris"}', True)
ADD = ("add", '{"a": 1, "b": [2, {"c": null}]}', True)
CASES = {
    "no call": ("Just words. 1 < 2 <tool", "Just words. 1 < 2 <tool", []),
    "a call alone": (block(), "", [PARIS]),
    "words before it stay": ("I look it up.\n" + block(), "I look it up.", [PARIS]),
    "two calls": (block() + "\n" + block("add", ADD[1]), "", [PARIS, ADD]),
    "words behind it stay": (block() + "\n\nDone. ", "Done. ", [PARIS]),
    "a closing tag in a string": (
        block(arguments='{"city": "</tool_call> \\" { <tool_call>"}'), "",
        [("get_weather", '{"city": "</tool_call> \\" { <tool_call>"}', True)],
    ),
    "no line ends": ('<tool_call>{"name":"add","arguments":{}}</tool_call>', "", [("add", "{}", True)]),
    "parameters for arguments": ('<tool_call>{"name": "add", "parameters": {}}</tool_call>', "", [("add", "{}", True)]),
    "arguments first": (
        '<tool_call>\n{"arguments": {"city": "Paris"}, "name": "get_weather"}\n</tool_call>', "", [PARIS],
    ),
    "no arguments": ('<tool_call>\n{"name": "add"}\n</tool_call>', "", [("add", "{}", True)]),
    "the closing tag was a stop text": ('<tool_call>\n{"name": "add"}\n', "", [("add", "{}", True)]),
    "an escaped name": ('<tool_call>{"name": "\\u0061dd", "arguments": {}}</tool_call>', "", [("add", "{}", True)]),
    "an unknown name": (block("rm") + block(), "", [PARIS]),
    "broken JSON": ('<tool_call>\n{"name": get_weather}\n</tool_call>\n' + block(), "", [PARIS]),
    "arguments that are no object": (block(arguments='"Paris"') + block(), "", [PARIS]),
    "no quotation mark at the end": (
        block(arguments='{"city": "Paris}') + block(), "", [("get_weather", '{"city": "Paris}}', False), PARIS],
    ),
    "words where JSON has none": (
        block(arguments='{"city": Paris}') + block(), "", [("get_weather", '{"city": ', False), PARIS],
    ),
    "a comma too many": (
        block(arguments='{"a": 1,}') + block(), "", [("get_weather", '{"a": 1,}', False), PARIS],
    ),
    "cut in the arguments": (block()[:-17], "", [("get_weather", '{"city": "Pari', False)]),
    "cut in the name": ('<tool_call>\n{"name": "get_w', "", []),
    "a block that is never closed": (block()[: -len("\n</tool_call>")] + "\n" + block("add", ADD[1]), "", [PARIS, ADD]),
    "a bad escape in the name": ('<tool_call>{"name": "\\x", "arguments": {}}</tool_call>' + block(), "", [PARIS]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_calls_and_words_are_told_apart(case):
    text, words, calls = CASES[case]
    assert read([text]) == (words, calls)


@pytest.mark.parametrize("case", CASES)
def test_one_character_at_a_time_gives_the_same(case):
    text, words, calls = CASES[case]
    assert read(list(text)) == (words, calls)


@given(st.sampled_from(sorted(CASES)), st.lists(st.integers(0, 200), max_size=12))
def test_the_cut_changes_nothing(case, cuts):
    text, words, calls = CASES[case]
    places = sorted({0, *(cut for cut in cuts if cut < len(text)), len(text)})
    assert read([text[a:b] for a, b in pairwise(places)]) == (words, calls)


PARTS = ["<tool_call>", "</tool_call>", '{"name": "add", "arguments": ', "{", "}", '"', "\n", " ", "x", "\\"]


@given(st.lists(st.sampled_from(PARTS)), st.data())
def test_any_text_is_read_alike_in_one_piece_and_in_many(parts, data):
    text = "".join(parts)
    cut = data.draw(st.integers(0, len(text)))
    assert read([text[:cut], text[cut:]]) == read([text]) == read(list(text))


def test_text_comes_as_soon_as_it_cannot_be_a_tag():
    parser = ToolCallParser(NAMES)
    assert parser.feed("Yes. <tool") == [Text("Yes.")]
    assert parser.feed("box> it is") == [Text(" <toolbox> it is")]
    assert parser.feed(" \n") == []
    assert parser.finish() == [Text(" \n")]


def test_the_name_comes_before_the_arguments_and_they_while_they_grow():
    parser = ToolCallParser(NAMES)
    assert parser.feed('<tool_call>\n{"name": "get_weather", "argu') == []
    assert parser.feed('ments": {"ci') == [CallBegins(0, "get_weather"), Arguments(0, '{"ci')]
    assert parser.feed('ty": "Paris"}') == [Arguments(0, 'ty": "Paris"}'), CallEnds(0)]
    assert parser.feed("}\n</tool_call>") == []


def test_most_keeps_the_first_calls():
    assert read([block() + block("add", ADD[1])], most=1) == ("", [PARIS])


def test_certain_counts_what_no_tag_can_begin_in():
    assert certain("a <b", "<tool_call>") == 4
    assert certain("a \n<", "<tool_call>") == 1
    assert certain("a </thi", "</think>", "<tool_call>") == 1
    assert certain("", "<tool_call>") == 0


# --- the grammar

WEATHER = {
    "type": "object", "properties": {"city": {"$ref": "#/$defs/city"}}, "required": ["city"], "additionalProperties": False,
    "$defs": {"city": {"type": "string"}},
}  # fmt: skip


@pytest.fixture(scope="module")
def accepts():
    tokenizer = llguidance.hf.from_tokenizer(AutoTokenizer.from_pretrained(TINY_QWEN_PATH))

    def ask(grammar: str, text: str) -> bool:
        """Whether the text, as a whole, is a sentence of the grammar."""
        matcher = llguidance.LLMatcher(tokenizer, grammar)
        assert not matcher.is_error(), matcher.get_error()
        ids = tokenizer.tokenize_str(text)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return ask


def test_the_grammar_takes_calls_of_these_tools_and_nothing_else(accepts):
    grammar = tool_call_grammar({"get_weather": WEATHER, "now": None})
    assert accepts(grammar, block())
    assert accepts(grammar, block("now", "{}"))
    assert accepts(grammar, block() + "\n" + block("now", "{}"))
    for wrong in (
        "", "Yes.", "Yes.\n" + block(), block() + block(), block() + "\nDone.", block("add", "{}"), block("now", '{"a": 1}'),
        block(arguments="{}"), block(arguments='{"city": 1}'), block(arguments='{"city":  "Paris"}'), block()[:-1],
    ):  # fmt: skip
        assert not accepts(grammar, wrong), wrong


def test_the_grammar_of_one_call_takes_one(accepts):
    grammar = tool_call_grammar({"get_weather": WEATHER}, several=False)
    assert accepts(grammar, block())
    assert not accepts(grammar, block() + "\n" + block())


@pytest.mark.parametrize("several", [True, False])
def test_with_words_a_call_may_stand_anywhere_or_nowhere(accepts, several):
    grammar = tool_call_grammar({"get_weather": WEATHER}, words=True, several=several)
    assert accepts(grammar, "No call, 1 < 2.\n")
    assert accepts(grammar, block())
    assert accepts(grammar, "I look it up.\n" + block())
    assert accepts(grammar, "I look it up.\n" + block() + "\nDone.") == several
    assert accepts(grammar, block() + "\n" + block()) == several
    assert not accepts(grammar, "Yes. " + block(arguments='{"city": 1}'))


def test_what_the_grammar_makes_the_parser_reads(accepts):
    call = block(arguments=json.dumps({"city": 'A "quoted" </tool_call> name\n'}))
    assert accepts(tool_call_grammar({"get_weather": WEATHER}), call)
    ((name, arguments, ended),) = read(list(call))[1]
    assert (name, ended) == ("get_weather", True)
    assert json.loads(arguments)["city"] == 'A "quoted" </tool_call> name\n'
