import io
import json
import shutil
import sys

import pytest

from common.text.tokenizer import Tokenizer
from tests.common.text.kinds import CHAT_TEMPLATE, SPECIAL, TEXTS, byte_level, llama, metaspace, word_pieces
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


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(ValueError, match="half a surrogate pair"):
        tokenizer.encode("the \ud83d pages")
    with pytest.raises(ValueError, match="half a surrogate pair"):
        tokenizer.encode_chat([{"role": "user", "content": "\udc00"}])


def test_a_text_that_begins_with_the_first_token_gets_no_second(tmp_path):
    """As a rendered chat does."""
    tokenizer = Tokenizer(llama(tmp_path))
    bos = tokenizer.hf.bos_token_id
    assert tokenizer.encode("the")[0] == bos
    for text in ("<s>the pages", "<s> the", "<s>", "the", "", "the <s>", "<s><s>the"):
        ids = tokenizer.encode(text)
        assert ids.count(bos) == max(1, text.count("<s>") + (not text.startswith("<s>")))
        assert ids[0] == bos
    assert tokenizer.encode("<s>the pages") == [bos, *tokenizer.hf.encode("<s>the pages", add_special_tokens=False)[1:]]


def test_nothing_is_taken_from_a_text_where_no_token_is_added(tokenizer):
    text = "<|im_start|><|im_start|>the"
    assert tokenizer.encode(text) == tokenizer.hf.encode(text)


def test_a_token_reads_as_it_does_inside_a_text(tokenizer, tmp_path):
    for made in (tokenizer, Tokenizer(llama(tmp_path))):
        ids = made.hf.encode("the pages hold", add_special_tokens=False)
        assert "".join(made.token_text(i) for i in ids).strip() == "the pages hold"
        assert "".join(made.token_text(i) for i in ids[1:]) == made.decode(ids)[len(made.decode(ids[:1])) :]
    assert tokenizer.token_text(tokenizer.hf.convert_tokens_to_ids("<|im_end|>")) == "<|im_end|>"
    assert tokenizer.token_text(len(tokenizer.hf)) == ""


@pytest.mark.parametrize("make", [byte_level, llama, metaspace, word_pieces])
@pytest.mark.parametrize("skip", [True, False])
def test_tokens_are_decoded_as_transformers_does(tmp_path, make, skip):
    made = Tokenizer(make(tmp_path))
    ids = [*made.encode("the pages, the page. don't <|im_end|>"), 0, 1, 2]
    assert made.decode(ids, skip) == made.hf.decode(ids, skip_special_tokens=skip)


def test_spaces_are_cleaned_up_where_the_tokenizer_asks_for_it(tmp_path):
    made = Tokenizer(word_pieces(tmp_path))
    assert made.decode(made.encode("the pages, don't.")) == "the pages, don't."


def test_special_tokens_have_a_text_that_may_be_left_out(tokenizer):
    special, word = tokenizer.hf.convert_tokens_to_ids("<|im_end|>"), tokenizer.encode("t")[0]
    tool = tokenizer.hf.convert_tokens_to_ids("<tool_call>")
    assert [tokenizer.special_text(i) for i in (special, word, tool)] == ["<|im_end|>", "", ""]
    assert [tokenizer.has_text(i) for i in (special, word, tool, len(tokenizer.hf))] == [False, True, True, False]
    assert [tokenizer.has_text(i, False) for i in (special, word, tool, len(tokenizer.hf))] == [True, True, True, False]


def test_bytes_are_known_only_where_rare_characters_are_written_in_them(tokenizer, tmp_path):
    made = Tokenizer(llama(tmp_path))
    assert [made.bytes_of[i] for i in made.hf.convert_tokens_to_ids(["<0x00>", "<0x41>", "<0xFF>"])] == [0, 0x41, 0xFF]
    assert len(made.bytes_of) == 256
    assert made.decode([made.letter]) == "A"
    assert tokenizer.bytes_of == {}


def test_a_bare_text_gets_no_first_token(tmp_path):
    made = Tokenizer(llama(tmp_path))
    assert [made.hf.bos_token_id, *made.encode_bare("the pages")] == made.encode("the pages")


# --- the chat template (more in test_chat_template.py)

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "页表是什么？"}]


def test_a_chat_becomes_the_templates_text_up_to_the_assistants_turn(tokenizer):
    want = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n页表是什么？<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.encode_chat(MESSAGES)
    assert tokenizer.hf.decode(ids) == want
    assert ids == tokenizer.encode(want)


def test_the_templates_marks_are_single_tokens(tokenizer):
    ids = tokenizer.encode_chat(MESSAGES)
    assert [ids.count(tokenizer.hf.convert_tokens_to_ids(token)) for token in SPECIAL] == [0, 3, 2]


def test_a_chat_whose_template_writes_the_first_token_has_one(tmp_path):
    tokenizer = Tokenizer(llama(tmp_path, chat_template="{{ bos_token }}{{ messages[0].content }}"))
    ids = tokenizer.encode_chat([{"role": "user", "content": "the pages"}])
    assert ids == tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": "the pages"}]))
    assert ids.count(tokenizer.hf.bos_token_id) == 1


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


@pytest.mark.parametrize("config", [{"model_type": "odd"}, {"model_type": "odd", "auto_map": {"AutoConfig": "tok.C"}}])
def test_the_folders_python_is_never_run_and_nobody_is_asked(tmp_path, monkeypatch, config):
    """Left to itself, transformers asks on stdin, and "y" runs the file."""
    folder, ran = byte_level(tmp_path), tmp_path / "ran"
    (folder / "tok.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nfrom transformers import PreTrainedTokenizerFast, PretrainedConfig\n"
        "class Tok(PreTrainedTokenizerFast): pass\nclass C(PretrainedConfig): pass\n"
    )
    auto_map = {"AutoTokenizer": ["tok.Tok", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Tok", "auto_map": auto_map}))
    (folder / "config.json").write_text(json.dumps(config))
    answers = io.StringIO("y\n" * 9)
    monkeypatch.setattr(sys, "stdin", answers)
    with pytest.raises(ValueError, match=r"it is Python code \(auto_map\), never run here") as error:
        Tokenizer(folder)
    assert "\n" not in str(error.value)
    assert answers.tell() == 0
    assert not ran.exists()


# --- bytes of a token


@every_text
def test_the_bytes_of_the_tokens_are_the_text(tokenizer, text):
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()


def test_half_a_character_has_bytes_too(tmp_path):
    for kind, names in ((byte_level, "éķ¿"), (llama, ("<0xE9>", "<0x95>", "<0xBF>"))):  # 长 is E9 95 BF
        folder = tmp_path / kind.__name__
        folder.mkdir()
        tokenizer = Tokenizer(kind(folder))
        ids = [tokenizer.hf.convert_tokens_to_ids(name) for name in names]
        assert [tokenizer.token_bytes(token) for token in ids] == [b"\xe9", b"\x95", b"\xbf"]
