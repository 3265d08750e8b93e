import json
import shutil

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from common.text.tokenizer import REPLACEMENT, IncrementalDetokenizer, Tokenizer
from tests.oracle import save_random

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRAINING_TEXT = [
    "the pages of the cache hold the keys and the values",
    "显存按页分配，页表记录每一页的位置",
    "分布式推理 😀😀",
] * 3
TEXTS = {
    "english": "the pages, the keys; don't  split   spaces\n\nand lines",
    "chinese": "张量并行把每一层的权重切到多张卡上，再用一次 all-reduce 求和。",
    "rare characters": "𠀀𪚥 ḱ é e\u0301 \u200d ﷽",
    "emoji": "ok 😀🎉 👨‍👩‍👧‍👦 🇨🇳 👍🏽!",
    "mixed": "KV cache 用 pages 管理：每页 16 个 token 😀。",
}


def save_tokenizer(folder, **config):
    """A byte-level BPE like Qwen's, with few merges: most Chinese characters are two or three tokens."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    bpe.train_from_iterator(TRAINING_TEXT, trainer)
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    return folder


def save_sentencepiece_like(folder):
    """A vocabulary whose words carry their space in front, and whose decoder drops the first one."""
    words = ["<unk>", "▁the", "▁pages", "▁hold", "▁keys", "s", "▁", ",", ".", "a", "b"]
    unigram = tokenizers.Tokenizer(models.Unigram([(word, -float(i)) for i, word in enumerate(words)], 0, False))
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    unigram.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("bpe"), chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(folder)


def token_by_token(tokenizer, ids):
    detokenizer = IncrementalDetokenizer(tokenizer)
    return [detokenizer.add(i) for i in ids], detokenizer.finish()


every_text = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())


# --- text and ids


@every_text
def test_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_not_text(tokenizer):
    start, end = (tokenizer.hf.convert_tokens_to_ids(token) for token in SPECIAL[1:])
    assert tokenizer.decode([start, *tokenizer.encode("the"), end]) == "the"


def test_nothing_is_added_to_plain_text(tokenizer):
    assert tokenizer.encode("") == []


# --- the chat template

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "页表是什么？"}]


def test_a_chat_becomes_the_templates_text_up_to_the_assistants_turn(tokenizer):
    want = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n页表是什么？<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode_chat(MESSAGES)
    assert tokenizer.hf.decode(ids) == want
    assert ids == tokenizer.encode(want)


def test_the_templates_marks_are_single_tokens(tokenizer):
    ids = tokenizer.encode_chat(MESSAGES)
    assert [ids.count(tokenizer.hf.convert_tokens_to_ids(token)) for token in SPECIAL] == [0, 3, 2]


def test_a_checkpoint_without_chat_template_says_so(tmp_path):
    with pytest.raises(ValueError, match="this checkpoint has no chat template; send plain text instead of messages"):
        Tokenizer(save_tokenizer(tmp_path)).encode_chat(MESSAGES)


# --- text that grows


@every_text
def test_token_by_token_gives_the_whole_text(tokenizer, text):
    parts, rest = token_by_token(tokenizer, tokenizer.encode(text))
    assert "".join(parts) == text
    assert rest == ""


@every_text
def test_half_a_character_is_never_shown(tokenizer, text):
    parts, _ = token_by_token(tokenizer, tokenizer.encode(text))
    assert not any(REPLACEMENT in part for part in parts)


def test_the_tests_above_do_meet_tokens_that_end_inside_a_character(tokenizer):
    ids = tokenizer.encode(TEXTS["chinese"])
    assert any(REPLACEMENT in tokenizer.decode([i]) for i in ids)


def test_text_is_shown_as_soon_as_it_is_certain(tokenizer):
    """Not one character late: after each token, all text up to the last whole character is out."""
    ids = tokenizer.encode(TEXTS["mixed"])
    parts, _ = token_by_token(tokenizer, ids)
    for n in range(1, len(ids) + 1):
        assert "".join(parts[:n]) == tokenizer.decode(ids[:n]).rstrip(REPLACEMENT)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_any_text_is_complete_at_the_end(tokenizer, text):
    ids = tokenizer.encode(text)
    parts, rest = token_by_token(tokenizer, ids)
    assert "".join(parts) + rest == tokenizer.decode(ids)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 329), max_size=30))
def test_any_tokens_are_complete_at_the_end(tokenizer, ids):
    """Also those that are no text: a model may put out anything."""
    parts, rest = token_by_token(tokenizer, ids)
    assert "".join(parts) + rest == tokenizer.decode(ids)


def test_several_tokens_at_once_give_the_same_text(tokenizer):
    ids, detokenizer = tokenizer.encode(TEXTS["mixed"]), IncrementalDetokenizer(tokenizer)
    assert "".join(detokenizer.add(*ids[i : i + 3]) for i in range(0, len(ids), 3)) == TEXTS["mixed"]


def test_no_token_gives_no_text(tokenizer):
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert (detokenizer.add(), detokenizer.finish()) == ("", "")


def test_special_tokens_add_no_text(tokenizer):
    ids = tokenizer.encode("页<|im_end|>表<|endoftext|>")
    parts, rest = token_by_token(tokenizer, ids)
    assert "".join(parts) + rest == "页表"


def test_spaces_in_front_of_words_come_out_right(tmp_path):
    metaspace = Tokenizer(save_sentencepiece_like(tmp_path))
    ids = metaspace.encode("the pages hold keys, keys.")
    parts, rest = token_by_token(metaspace, ids)
    assert "".join(parts) + rest == metaspace.decode(ids) == "the pages hold keys, keys."


def test_finish_hands_out_the_half_character_that_is_left(tokenizer):
    ids = tokenizer.encode("the 𠀀")[:-1]
    parts, rest = token_by_token(tokenizer, ids)
    assert "".join(parts) == "the "
    assert set(rest) == {REPLACEMENT}


def test_finish_hands_out_nothing_twice(tokenizer):
    detokenizer = IncrementalDetokenizer(tokenizer)
    detokenizer.add(*tokenizer.encode("the 𠀀")[:-1])
    detokenizer.finish()
    assert detokenizer.finish() == ""


def test_two_requests_do_not_share_text(tokenizer):
    first, second = IncrementalDetokenizer(tokenizer), IncrementalDetokenizer(tokenizer)
    a, b = tokenizer.encode("页表"), tokenizer.encode("显存")
    shown = [(first.add(i), second.add(j)) for i, j in zip(a, b, strict=False)]
    shown += [(first.add(*a[len(shown) :]), second.add(*b[len(shown) :]))]
    assert ["".join(parts) for parts in zip(*shown, strict=True)] == ["页表", "显存"]


# --- folders


def test_a_folder_with_a_tokenizer_is_recognised(folder, tmp_path):
    assert Tokenizer.lies_in(folder)
    assert not Tokenizer.lies_in(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model"])
def test_any_of_the_tokenizers_files_is_enough_to_be_recognised(tmp_path, name):
    (tmp_path / name).write_text("")
    assert Tokenizer.lies_in(tmp_path)


def test_an_empty_folder_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="no usable tokenizer") as error:
        Tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_folder_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="no usable tokenizer") as error:
        Tokenizer(tmp_path / "missing")
    assert str(tmp_path / "missing") in str(error.value)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama"])
def test_weights_without_a_tokenizer_are_refused(tmp_path, name):
    """With a Qwen config alone, transformers makes up an empty vocabulary: every text is []."""
    with pytest.raises(ValueError, match="no usable tokenizer"):
        Tokenizer(save_random(name, tmp_path))


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"added_tokens": []}'])
def test_a_damaged_tokenizer_is_refused(folder, tmp_path, text):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="no usable tokenizer"):
        Tokenizer(tmp_path)
