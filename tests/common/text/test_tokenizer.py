import shutil

import pytest

from common.text.tokenizer import Tokenizer
from tests.common.text.kinds import CHAT_TEMPLATE, SPECIAL, TEXTS, byte_level
from tests.oracle import save_random


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return byte_level(tmp_path_factory.mktemp("bpe"), chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(folder)


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
        Tokenizer(byte_level(tmp_path)).encode_chat(MESSAGES)


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
