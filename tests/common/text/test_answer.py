from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.text import answer as answer_module
from common.text.answer import AnswerText
from common.text.detokenizer import REPLACEMENT
from common.text.tokenizer import Tokenizer
from tests.common.text.kinds import KINDS, cuts


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return {name: Tokenizer(make(tmp_path_factory.mktemp("kind"))) for name, make in KINDS.items()}


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return tokenizers["byte level"]


def run(answer, ids):
    """As an engine does: after each token, until a stop is found. Returns what was certain after each."""
    shown = []
    for n in range(1, len(ids) + 1):
        if answer.catch_up(ids[:n]) is not None:
            break
        shown.append(answer.certain)
    answer.finish(ids)
    return [*shown, answer.certain]


def first_stop(text, stops, after=0):
    """By hand: the text one character at a time. (stop, where it begins, where it ends), or None."""
    for end in range(after + 1, len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return stop, end - len(stop), end
    return None


# --- no stops


def test_text_is_read_when_somebody_looks(tokenizer):
    ids = tokenizer.encode("the pages, 页表 😀")
    answer = AnswerText(tokenizer)
    assert not answer.watches
    answer.catch_up(ids[:4])
    assert (answer.text, answer.num_tokens) == (tokenizer.decode(ids[:4]), 4)
    answer.catch_up(ids)
    answer.catch_up(ids)
    assert answer.finish(ids) is None
    assert answer.text == answer.certain == "the pages, 页表 😀"


def test_a_stop_token_is_no_text(tokenizer):
    ids = tokenizer.encode("the pages.")
    for include, want, seen in [(False, "the pages", 0), (True, "the pages.", 0), (False, "the pages", len(ids) - 1)]:
        answer = AnswerText(tokenizer, include_stop=include)
        answer.catch_up(ids[:seen])
        answer.finish(ids, by_stop_token=True)
        assert answer.text == want


def test_without_a_tokenizer_there_is_no_text_and_no_stop():
    answer = AnswerText(None)
    assert answer.catch_up([1, 2]) is None
    assert answer.finish([1, 2, 3]) is None
    assert (answer.text, answer.certain) == ("", "")
    for stops in ({"stop": ["a"]}, {"stop_regex": ["a"]}):
        with pytest.raises(ValueError, match="no text to stop at; use stop_token_ids"):
            AnswerText(None, **stops)


def test_the_space_behind_the_prompt_is_text(tokenizers):
    llama = tokenizers["llama"]
    whole, prompt = llama.encode("The capital of France is Paris"), llama.encode("The capital of France is")
    answer = AnswerText(llama, prompt)
    answer.finish(whole[len(prompt) :])
    assert answer.text == " Paris"
    answer = AnswerText(llama, prompt, stop=[" "])
    assert answer.catch_up(whole[len(prompt) :]) == " "


def test_half_a_character_at_the_end_is_shown_at_the_end(tokenizer):
    ids = tokenizer.encode("the 𠀀")[:-1]
    answer = AnswerText(tokenizer)
    answer.catch_up(ids)
    assert answer.text == "the "
    answer.finish(ids)
    assert answer.text == "the " + REPLACEMENT


# --- stop texts


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(list(KINDS)), st.booleans(), st.integers(0, 4))
def test_the_stop_that_is_complete_first_ends_the_text(tokenizers, data, kind, include, not_before):
    """For any text, any stops, any cuts: equal to looking at one character after the other."""
    tokenizer = tokenizers[kind]
    letters = st.sampled_from("aab 长城😀\n")
    text = data.draw(st.text(letters, max_size=12))
    stops = data.draw(st.lists(st.text(letters, min_size=1, max_size=4), min_size=1, max_size=3))
    tokens = data.draw(cuts(tokenizer, text))
    out = [len(text.encode()[:end].decode(errors="ignore")) for _, end in tokens]  # characters after each token
    found = first_stop(text, stops, out[not_before - 1] if 0 < not_before <= len(out) else 0)
    if not_before >= len(out):
        found = None
    answer = AnswerText(
        tokenizer, tokenizer.encode("the"), stop=stops, include_stop=include, not_before=not_before
    )  # fmt: skip
    shown = run(answer, [token for token, _ in tokens])
    if found:
        stop, start, end = found
        assert answer.matched == stop
        assert answer.text == text[: end if include else start]
        assert answer.num_tokens == 1 + next(i for i, length in enumerate(out) if length >= end)
    else:
        assert answer.matched is None
        assert answer.text == text
        assert answer.num_tokens == len(tokens)
    assert all(later.startswith(earlier) for earlier, later in pairwise(shown))
    assert shown[-1] == answer.text


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(list(KINDS)))
def test_nothing_is_held_back_but_beginnings_of_a_stop(tokenizers, data, kind):
    tokenizer = tokenizers[kind]
    text = data.draw(st.text(st.sampled_from("abc 长"), max_size=10))
    stops = data.draw(st.lists(st.text(st.sampled_from("abc 长"), min_size=1, max_size=4), min_size=1, max_size=3))
    tokens = data.draw(cuts(tokenizer, text))
    answer = AnswerText(tokenizer, tokenizer.encode("the"), stop=stops)
    ids = [token for token, _ in tokens]
    for n, (_, end) in enumerate(tokens):
        if answer.catch_up(ids[: n + 1]) is not None:
            break
        whole = text.encode()[:end].decode(errors="ignore")
        beginnings = [whole[i:] for i in range(len(whole)) if any(s.startswith(whole[i:]) for s in stops)]
        assert answer.certain == whole[: len(whole) - max(map(len, beginnings), default=0)]


def test_several_tokens_at_once_give_the_same_as_one_by_one(tokenizer):
    ids = tokenizer.encode("the user is a page")
    for stop, want in [(["a", "is", ","], "is"), (["page", "a p"], "a p"), (["er", "r", "user"], "er")]:
        answer = AnswerText(tokenizer, stop=stop)
        assert answer.catch_up(ids) == want
        assert answer.text == "the user is a page"[: "the user is a page".index(want)]
        assert answer.num_tokens < len(ids) or want == "a p"


def test_tokens_behind_a_stop_are_not_read(tokenizer):
    ids = tokenizer.encode("the pages hold")
    answer = AnswerText(tokenizer, stop=["ge"])
    answer.catch_up(ids)
    read, text = answer.num_tokens, answer.text
    assert "ge" in tokenizer.decode(ids[:read])
    assert "ge" not in tokenizer.decode(ids[: read - 1])
    answer.catch_up(ids * 2)
    assert answer.finish(ids * 2) == "ge"
    assert (answer.num_tokens, answer.text) == (read, text) == (read, "the pa")


def test_a_stop_may_be_half_a_replacement_mark_only_at_the_end(tokenizer):
    """A mark for a character that never came is text only when nothing comes any more."""
    ids = tokenizer.encode("the 𠀀")[:-1]
    answer = AnswerText(tokenizer, stop=[REPLACEMENT])
    assert answer.catch_up(ids) is None
    assert answer.finish(ids) == REPLACEMENT
    assert answer.text == "the "


# --- special tokens


def test_a_special_tokens_text_ends_an_answer_although_it_is_not_shown(tokenizer):
    ids = tokenizer.encode("the page<|im_end|>\n<|im_start|>more")
    for stop, text in [("<|im_end|>", "the page"), ("im_end", "the page"), ("e<|im", "the pag"),
                       ("<|im_end|>\n<", "the page"), ("|>\nx", None), ("\n<|im_start|>m", "the page")]:  # fmt: skip
        answer = AnswerText(tokenizer, stop=[stop])
        shown = run(answer, ids)
        assert answer.matched == (stop if text else None)
        assert answer.text == (text or "the page\nmore")
        assert all(later.startswith(earlier) for earlier, later in pairwise(shown))


def test_what_ended_it_is_shown_as_far_as_it_is_text(tokenizer):
    ids = tokenizer.encode("the page<|im_end|>\nmore")
    answer = AnswerText(tokenizer, stop=["<|im_end|>\n"], include_stop=True)
    run(answer, ids)
    assert answer.text == "the page\n"
    answer = AnswerText(tokenizer, stop=["<|im_end|>\n"], include_stop=True, skip_special_tokens=False)
    run(answer, ids)
    assert answer.text == "the page<|im_end|>\n"


def test_a_stop_is_also_found_across_a_special_token_that_is_not_shown(tokenizer):
    """The shown text never has a stop in it."""
    ids = tokenizer.encode("the pa<|im_end|>ge")
    for skip, want in [(True, "page"), (False, None)]:
        answer = AnswerText(tokenizer, stop=["page"], skip_special_tokens=skip)
        run(answer, ids)
        assert answer.matched == want
        assert answer.text == ("the " if want else "the pa<|im_end|>ge")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_special_tokens_anywhere(tokenizer, data):
    parts = data.draw(st.lists(st.sampled_from(["a", "b", "<", "|", ">", "<|im_end|>", "<|im_start|>"]), max_size=8))
    stops = data.draw(
        st.lists(
            st.sampled_from(["<|im_end|>", "|>a", "a<", "b<|im_end|>a", "_end", "ab", ">>", "t|><|im"]), min_size=1
        )
    )
    ids = [i for part in parts for i in tokenizer.encode(part)]
    hidden = ("<|im_end|>", "<|im_start|>")
    ends, written, plain = [], "", ""
    for part in parts:  # one token each: the first that completes a stop, in either reading
        written, plain = written + part, plain + ("" if part in hidden else part)
        ends.append((written, plain))
    done = next((i for i, (a, b) in enumerate(ends) if any(s in a or s in b for s in stops)), None)
    answer = AnswerText(tokenizer, stop=stops)
    shown = run(answer, ids)
    assert (answer.matched is not None) == (done is not None)
    assert answer.num_tokens == (len(ids) if done is None else done + 1)
    assert ends == [] or ends[-1 if done is None else done][1].startswith(answer.text)
    assert not any(stop in answer.text for stop in stops)
    assert all(later.startswith(earlier) for earlier, later in pairwise(shown))


# --- patterns


def test_a_pattern_ends_an_answer(tokenizer):
    ids = tokenizer.encode("step 1: the pages 23, 45")
    for pattern, matched in [(r"\d\d", "23"), (r"\s\d+,", " 23,"), ("(?i)PAGES", "pages"), (r"^step\b", "step")]:
        for include in (False, True):
            answer = AnswerText(tokenizer, stop_regex=[pattern], include_stop=include)
            shown = run(answer, ids)
            assert answer.matched == pattern
            whole = "step 1: the pages 23, 45"
            at = whole.index(matched)
            assert answer.text == whole[: at + len(matched) if include else at]
            assert all(later.startswith(earlier) for earlier, later in pairwise(shown))


def test_what_may_become_a_patterns_match_is_held_back(tokenizer):
    ids = tokenizer.encode("the <a> <b")
    answer = AnswerText(tokenizer, stop_regex=[r"<b\d>"])
    answer.catch_up(ids)
    assert (answer.text, answer.certain) == ("the <a> <b", "the <a> ")
    answer.finish(ids)
    assert answer.certain == "the <a> <b"


def test_texts_are_looked_for_before_patterns(tokenizer):
    ids = tokenizer.encode("the pages")
    answer = AnswerText(tokenizer, stop=["es"], stop_regex=["s", "es"])
    assert run(answer, ids)[-1] == "the pag"
    assert answer.matched == "es"


def test_a_pattern_finds_a_special_token(tokenizer):
    answer = AnswerText(tokenizer, stop_regex=[r"<\|im_\w+\|>"])
    run(answer, tokenizer.encode("the page<|im_end|>more"))
    assert (answer.matched, answer.text) == (r"<\|im_\w+\|>", "the page")


def test_a_pattern_waits_for_min_tokens_too(tokenizer):
    ids = tokenizer.encode("a1 b2 c3")
    answer = AnswerText(tokenizer, stop_regex=[r"\d"], not_before=3)
    run(answer, ids)
    assert answer.text == "a1 b"


@pytest.mark.parametrize("pattern", ["(", "[a", "*", "(?P<x", "a{2,1}", "\\"])
def test_a_damaged_pattern_is_refused_in_one_line(tokenizer, pattern):
    with pytest.raises(ValueError, match="is no regular expression") as error:
        AnswerText(tokenizer, stop_regex=[pattern])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pattern", ["", "a*", "x?", "$", "(a|)"])
def test_a_pattern_that_would_end_every_answer_is_refused(tokenizer, pattern):
    with pytest.raises(ValueError, match="matches the empty text"):
        AnswerText(tokenizer, stop_regex=[pattern])


def test_a_pattern_that_takes_for_ever_ends_its_own_answer_in_one_line(tokenizer, monkeypatch):
    monkeypatch.setattr(answer_module, "PATTERN_SECONDS", 0.1)
    answer = AnswerText(tokenizer, stop_regex=[r"(a|aa)+$b"])
    ids = tokenizer.encode("a" * 60) + tokenizer.encode("c")
    with pytest.raises(ValueError, match=r"stop_regex took more than 0.1 s over \d+ characters") as error:
        run(answer, ids)
    assert "\n" not in str(error.value)
    text = answer.text
    assert set(text) == {"a"}
    assert answer.certain == text  # and nothing is searched, or read, any more
    assert answer.catch_up(ids) is None
    assert answer.finish(ids) is None
    assert answer.text == text


def test_while_nobody_knows_what_a_pattern_may_match_all_is_held_back(tokenizer, monkeypatch):
    answer = AnswerText(tokenizer, stop_regex=[r"(a|aa)+$b"])
    answer.catch_up(tokenizer.encode("the"))
    assert answer.certain == "the"
    answer._shown._tail = "a" * 60
    monkeypatch.setattr(answer_module, "PATTERN_SECONDS", 0.1)
    assert answer._shown.held == 60


# --- cost


def test_looking_for_stops_costs_the_same_for_each_token(tokenizer):
    """Counted in characters that the search keeps."""
    answer = AnswerText(tokenizer, stop=["<|im_end|>", "x" * 20])
    ids = tokenizer.encode("the pages " * 200)
    run(answer, ids[:1000])
    assert len(answer._shown._tail) == 19
