from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.text.detokenizer import REPLACEMENT, IncrementalDetokenizer
from common.text.tokenizer import Tokenizer
from tests.common.text.kinds import KINDS, TEXTS, byte_names, cuts, metaspace

PROMPTS = ["", "The capital of France is", "页", "ok 😀", "a  ", "👨‍👩‍👧‍👦", "<|im_start|>the<|im_end|>"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return {name: Tokenizer(make(tmp_path_factory.mktemp("kind"))) for name, make in KINDS.items()}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


def token_by_token(tokenizer, ids, *args, **kwargs):
    detokenizer = IncrementalDetokenizer(tokenizer, *args, **kwargs)
    return [detokenizer.add(i) for i in ids], detokenizer.finish()


def in_context(tokenizer, prompt, ids, skip=True):
    """What the answer adds to the prompt when all is decoded at once."""
    return tokenizer.decode(prompt + ids, skip)[len(tokenizer.decode(prompt, skip)) :]


def plain(tokenizer, text):
    return tokenizer.hf.encode(text, add_special_tokens=False)


every_text = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())


# --- whole texts


@every_text
@pytest.mark.parametrize("prompt", PROMPTS)
def test_token_by_token_gives_what_the_answer_adds_to_the_prompt(tokenizer, prompt, text):
    prompt, ids = plain(tokenizer, prompt), plain(tokenizer, text)
    parts, rest = token_by_token(tokenizer, ids, prompt)
    assert "".join(parts) + rest == in_context(tokenizer, prompt, ids)
    assert rest == ""


@every_text
def test_half_a_character_is_never_shown(tokenizer, text):
    parts, _ = token_by_token(tokenizer, plain(tokenizer, text))
    assert not any(REPLACEMENT in part for part in parts)


def test_the_tests_above_do_meet_tokens_that_end_inside_a_character(tokenizer):
    ids = plain(tokenizer, TEXTS["chinese"] + "😀")
    assert any(REPLACEMENT in tokenizer.decode([i]) for i in ids)


def test_a_character_in_pieces_that_never_end_where_it_does_is_shown_all_the_same(tokenizers):
    """Each token ends with the beginning of the next character, for as long as the text lasts."""
    ids = plain(tokenizers["misaligned"], "长城" * 50)
    assert len(ids) < 110
    parts, rest = token_by_token(tokenizers["misaligned"], ids)
    assert "".join(parts) + rest == "长城" * 50
    assert max(map(len, parts)) <= 2


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(list(KINDS)))
def test_all_whole_characters_are_out_after_each_token(tokenizers, data, kind):
    """Not one late, not one early, for any text and any cuts, and with any number of tokens at a time."""
    tokenizer = tokenizers[kind]
    text = data.draw(st.text(st.sampled_from("ab 长城é😀\n<|") | st.characters(codec="utf-8"), max_size=12))
    tokens = data.draw(cuts(tokenizer, text))
    prompt = plain(tokenizer, "the answer is:")
    detokenizer, shown = IncrementalDetokenizer(tokenizer, prompt), ""
    while tokens:
        taken, tokens = tokens[: (n := data.draw(st.integers(1, 4)))], tokens[n:]
        shown += detokenizer.add(*[token for token, _ in taken])
        certain = text.encode()[: taken[-1][1]].decode(errors="ignore")
        if len(taken) == 1 and not text.endswith(REPLACEMENT):
            assert shown.rstrip(REPLACEMENT) == certain.rstrip(REPLACEMENT)
        assert text.startswith(shown)
    assert shown + detokenizer.finish() == text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 340), max_size=40), st.lists(st.integers(0, 340), max_size=30), st.booleans())
@pytest.mark.parametrize("kind", ["byte level", "misaligned"])
def test_any_tokens_are_complete_at_the_end(tokenizers, kind, ids, prompt, skip):
    """Also those that are no text: a model may put out anything."""
    tokenizer = tokenizers[kind]
    prompt = prompt + plain(tokenizer, ".")  # it ends where a character does
    parts, rest = token_by_token(tokenizer, ids, prompt, skip)
    assert "".join(parts) + rest == in_context(tokenizer, prompt, ids, skip)
    detokenizer = IncrementalDetokenizer(tokenizer, prompt, skip)
    assert "".join(detokenizer.add(*ids[i : i + 7]) for i in range(0, len(ids), 7)) == "".join(parts)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 610) | st.integers(3, 258) | st.sampled_from("长城é😀 "), max_size=40), st.integers(2, 9)
)
def test_of_byte_tokens_only_those_that_are_no_character_become_marks(tokenizers, ids, size):
    """The tokenizers library spoils all that are in a row; but then it is given what they read as, written anew."""
    tokenizer = tokenizers["llama"]
    prompt = plain(tokenizer, "the")
    ids = [i for one in ids for i in ([one] if isinstance(one, int) else [3 + byte for byte in one.encode()])]
    mended = []
    for are_bytes, run in groupby([i for i in ids if tokenizer.has_text(i)], lambda i: i < 259):
        run_ids = list(run)
        text = bytes(i - 3 for i in run_ids).decode(errors="replace") if are_bytes else ""
        mended += [3 + byte for byte in text.encode()] or run_ids
    parts, rest = token_by_token(tokenizer, ids, prompt)
    assert "".join(parts) + rest == in_context(tokenizer, prompt, mended)
    detokenizer = IncrementalDetokenizer(tokenizer, prompt)  # and it is the same for who looks less often
    assert "".join(detokenizer.add(*ids[i : i + size]) for i in range(0, len(ids), size)) == "".join(parts)


# --- spaces, and the prompt in front


def test_the_space_between_prompt_and_answer_is_kept(tokenizers):
    tokenizer = tokenizers["llama"]
    whole = tokenizer.encode("The capital of France is Paris and Rome")
    prompt = tokenizer.encode("The capital of France is")
    assert whole[: len(prompt)] == prompt
    parts, rest = token_by_token(tokenizer, whole[len(prompt) :], prompt)
    assert "".join(parts) + rest == " Paris and Rome"
    assert tokenizer.decode(whole[len(prompt) :]) == "Paris and Rome"


def test_special_tokens_at_the_end_of_the_prompt_do_not_cost_the_space(tokenizers):
    tokenizer = tokenizers["llama"]
    prompt = plain(tokenizer, "the") + [1] * 30
    parts, _ = token_by_token(tokenizer, [1] * 30 + plain(tokenizer, "pages"), prompt)
    assert "".join(parts) == " pages"


def test_spaces_in_front_of_words_come_out_right(tmp_path):
    tokenizer = Tokenizer(metaspace(tmp_path))
    ids = tokenizer.encode("the pages hold keys, keys.")
    parts, rest = token_by_token(tokenizer, ids)
    assert "".join(parts) + rest == tokenizer.decode(ids) == "the pages hold keys, keys."


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("half", [1, 2, 3])
def test_a_character_that_the_prompt_began_belongs_to_the_answer(tokenizers, kind, half):
    tokenizer = tokenizers[kind]
    names = byte_names() if kind != "llama" else [f"<0x{i:02X}>" for i in range(256)]
    ids = tokenizer.hf.convert_tokens_to_ids([names[byte] for byte in "😀".encode()])
    parts, rest = token_by_token(tokenizer, ids[half:], plain(tokenizer, "the") + ids[:half])
    assert "".join(parts) + rest == "😀"


def test_replacement_marks_of_the_prompt_are_not_repeated(tokenizer):
    prompt, ids = plain(tokenizer, "bad \ufffd\ufffd"), plain(tokenizer, "the")
    assert token_by_token(tokenizer, ids, prompt)[0] == token_by_token(tokenizer, ids, plain(tokenizer, "bad"))[0]


def test_a_long_run_of_bytes_in_the_prompt_is_read_from_where_a_character_begins(tokenizers):
    tokenizer = tokenizers["llama"]
    for size in range(1, 8):
        prompt, ids = plain(tokenizer, "the" + "བོད" * size)[:], plain(tokenizer, "ཡིག")[1:]
        parts, rest = token_by_token(tokenizer, ids, prompt)
        assert "".join(parts) + rest == "ཡིག"


# --- special and added tokens, and ids without text


def test_special_tokens_are_left_out_or_written(tokenizers):
    tokenizer = tokenizers["byte level"]
    ids = tokenizer.encode("页<|im_end|>表<|endoftext|>")
    assert "".join(token_by_token(tokenizer, ids)[0]) == "页表"
    assert "".join(token_by_token(tokenizer, ids, (), False)[0]) == "页<|im_end|>表<|endoftext|>"


def test_added_tokens_that_are_not_special_are_text(tokenizers):
    for kind in ("byte level", "llama"):
        ids = plain(tokenizers[kind], "the<tool_call>→tool")
        assert "".join(token_by_token(tokenizers[kind], ids)[0]) == tokenizers[kind].decode(ids)
        assert "<tool_call>" in tokenizers[kind].decode(ids)


def test_a_special_token_inside_a_character_does_not_break_it(tokenizer):
    ids = plain(tokenizer, "😀")
    special = tokenizer.hf.convert_tokens_to_ids("<s>" if "<s>" in tokenizer.hf.get_vocab() else "<|im_end|>")
    parts, _ = token_by_token(tokenizer, [*ids[:-2], special, *ids[-2:]], plain(tokenizer, "the"))
    assert "".join(parts).strip() == "😀"


def test_ids_that_only_pad_the_vocabulary_have_no_text(tokenizer):
    size = len(tokenizer.hf)
    ids = [size, *plain(tokenizer, "the"), size + 7]
    assert token_by_token(tokenizer, ids) == (["", *token_by_token(tokenizer, ids[1:-1])[0], ""], "")


# --- bytes that are no text


def test_finish_hands_out_the_half_character_that_is_left(tokenizers):
    tokenizer = tokenizers["byte level"]
    ids = tokenizer.encode("the 𠀀")[:-1]
    parts, rest = token_by_token(tokenizer, ids)
    assert "".join(parts) == "the "
    assert set(rest) == {REPLACEMENT}


def test_finish_hands_out_nothing_twice(tokenizers):
    detokenizer = IncrementalDetokenizer(tokenizers["byte level"])
    detokenizer.add(*tokenizers["byte level"].encode("the 𠀀")[:-1])
    assert detokenizer.finish()
    assert detokenizer.finish() == ""


def test_bytes_that_never_become_a_character_do_not_hold_up_the_rest(tokenizer):
    names = byte_names() if "<0x00>" not in tokenizer.hf.get_vocab() else [f"<0x{i:02X}>" for i in range(256)]
    bad = tokenizer.hf.convert_tokens_to_ids([names[byte] for byte in b"\xe9\xff\x80" * 20])
    parts, rest = token_by_token(tokenizer, bad + plain(tokenizer, "the"))
    assert all(len("".join(parts[:n])) >= n - 3 for n in range(7, 60))
    assert "".join(parts) + rest == tokenizer.decode(bad + plain(tokenizer, "the"))


# --- cost and independence


def test_a_token_costs_the_same_however_long_the_answer_is(tokenizer, monkeypatch):
    """Counted in tokens decoded; also where nothing is ever text, and where no token ends a character."""
    names = byte_names() if "<0x00>" not in tokenizer.hf.get_vocab() else [f"<0x{i:02X}>" for i in range(256)]
    kinds = ["the pages ", "长城", "😀"]
    sequences = [plain(tokenizer, text * 300)[:600] for text in kinds]
    sequences += [tokenizer.hf.convert_tokens_to_ids([names[0xE9]]) * 600, [1] * 600]
    decoded = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, *args: decoded.append(len(ids)) or decode(ids, *args))
    for ids in sequences:
        decoded.clear()
        token_by_token(tokenizer, ids)
        assert max(decoded, default=0) <= 16
        assert len(decoded) <= 4 * len(ids)


def test_no_token_gives_no_text(tokenizer):
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert (detokenizer.add(), detokenizer.finish()) == ("", "")


def test_two_requests_do_not_share_text(tokenizers):
    tokenizer = tokenizers["byte level"]
    first, second = IncrementalDetokenizer(tokenizer), IncrementalDetokenizer(tokenizer)
    a, b = tokenizer.encode("页表"), tokenizer.encode("显存")
    shown = [(first.add(i), second.add(j)) for i, j in zip(a, b, strict=False)]
    shown += [(first.add(*a[len(shown) :]), second.add(*b[len(shown) :]))]
    assert ["".join(parts) for parts in zip(*shown, strict=True)] == ["页表", "显存"]
