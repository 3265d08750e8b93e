"""A thought in front of an answer: the same however the text was cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.text.reasoning import ReasoningParser, Split, ThoughtTokens, opens_thought

CALL = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
CASES = {  # text, whether the prompt opened the thought, thought, answer
    "no thought": ("Paris. <think>late</think>", False, "", "Paris. <think>late</think>"),
    "a thought": ("<think>\nHm.\n</think>\n\nParis.", False, "Hm.", "Paris."),
    "the prompt has opened it": ("Hm.\n</think>\n\nParis.", True, "Hm.", "Paris."),
    "both have": ("\n<think>\nHm.\n</think>\nParis.", True, "Hm.", "Paris."),
    "blanks inside stay": ("<think>a\n\nb </thin> c</think>d  e \n", False, "a\n\nb </thin> c", "d  e \n"),
    "a call closes it": ("<think>I look.\n" + CALL, False, "I look.", CALL),
    "never closed": ("<think>Hm, <tool", False, "Hm, <tool", ""),
    "never closed, opened by the prompt": ("<thin", True, "<thin", ""),
    "empty": ("<think>\n\n</think>\n\nParis.", False, "", "Paris."),
    "nothing": ("", False, "", ""),
    "blanks alone": (" \n", False, "", " \n"),
    "half an opening tag": ("<thi", False, "", "<thi"),
    "the answer begins with blanks": ("  Paris.", False, "", "  Paris."),
}


def read(pieces, opened, **options):
    parser = ReasoningParser(opened, **options)
    found = [parser.feed(piece) for piece in pieces] + [parser.finish()]
    return "".join(one.thought for one in found), "".join(one.answer for one in found)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_thought_and_answer_are_told_apart(case, stream):
    text, opened, thought, answer = CASES[case]
    assert read([text], opened, stream=stream) == read(list(text), opened, stream=stream) == (thought, answer)


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<tool_call>", "</th", "ink>", " ", "\n", "x"])),
    st.booleans(),
    st.data(),
)
def test_the_cut_changes_nothing(parts, opened, data):
    text = "".join(parts)
    cut = data.draw(st.integers(0, len(text)))
    assert read([text[:cut], text[cut:]], opened) == read([text], opened) == read(list(text), opened)


def counted(tokens, opened, at_once=True):
    thought = ThoughtTokens(opened)
    for some in [tokens] if at_once else [[token] for token in tokens]:
        thought.take(token.encode() for token in some)
    return thought.count


ENDS = {  # how much of the text of a case is thought, tags and all
    "no thought": "", "a thought": "<think>\nHm.\n</think>", "the prompt has opened it": "Hm.\n</think>",
    "both have": "\n<think>\nHm.\n</think>", "a call closes it": "<think>I look.\n", "never closed": "<think>Hm, <tool",
    "never closed, opened by the prompt": "<thin", "empty": "<think>\n\n</think>", "nothing": "", "blanks alone": "",
    "half an opening tag": "", "the answer begins with blanks": "",
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 5, 100])
@pytest.mark.parametrize("case", ENDS)
def test_tokens_of_the_thought_are_counted_up_to_the_one_that_ends_it(case, size):
    text, opened, *_ = CASES[case]
    tokens = [text[i : i + size] for i in range(0, len(text), size)]
    whole = -(-len(ENDS[case]) // size)  # the token that the end lies in belongs to it
    assert counted(tokens, opened) == counted(tokens, opened, at_once=False) == whole


def test_a_thought_streams_unless_it_is_to_come_whole():
    streams, waits = ReasoningParser(), ReasoningParser(stream=False)
    assert streams.feed("<think>Hm, ") == Split("Hm,")
    assert waits.feed("<think>Hm, ") == Split()
    assert streams.feed("so.</think> P") == Split(" so.", "P")
    assert waits.feed("so.</think> P") == Split("Hm, so.", "P")


def test_a_prompt_that_ends_in_an_opening_tag_opens_the_thought():
    assert opens_thought("<|im_start|>assistant\n<think>\n")
    assert not opens_thought("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not opens_thought("<|im_start|>assistant\n")
    assert opens_thought("<|im_start|>assistant\n", "deepseek-r1")
    assert not opens_thought("<|im_start|>assistant\n<think>\n\n</think>\n\n", "deepseek-r1")
