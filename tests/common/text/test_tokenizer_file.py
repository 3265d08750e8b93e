"""What is read without transformers is what transformers reads; and everything that it would read otherwise is left to it."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer

from common.text.tokenizer import Tokenizer
from common.text.tokenizer_file import MODEL_TYPES, read_plain
from common.tiny_qwen import TINY_QWEN_PATH
from tests.common.text.kinds import TEXTS, byte_level, llama, metaspace, word_pieces

QWEN_TOKENS = [  # as Qwen2.5's tokenizer_config.json tells them: ids, and tokens that are added and yet text
    ("<|endoftext|>", True), ("<|im_start|>", True), ("<|im_end|>", True), ("<tool_call>", False), ("→tool", False),
]  # fmt: skip
TEXTS_AND_MARKS = [
    *TEXTS.values(),
    "",
    " ",
    "<|im_start|>user\nthe<|im_end|>\n",
    "a<|endoftext|><|endoftext|>",
    "１２３ it's I'LL",
]


def copy_of_tiny(folder, tokenizer_changes=None, config_changes=None, model_type="qwen2", without=()):
    """The bundled tokenizer, with a few things said otherwise."""
    folder.mkdir(exist_ok=True)
    made = json.loads((TINY_QWEN_PATH / "tokenizer.json").read_text(encoding="utf-8")) | (tokenizer_changes or {})
    (folder / "tokenizer.json").write_text(json.dumps(made), encoding="utf-8")
    config = json.loads((TINY_QWEN_PATH / "tokenizer_config.json").read_text(encoding="utf-8")) | (config_changes or {})
    config = {name: value for name, value in config.items() if name not in without}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    model = json.loads((TINY_QWEN_PATH / "config.json").read_text(encoding="utf-8")) | {"model_type": model_type}
    (folder / "config.json").write_text(json.dumps(model), encoding="utf-8")
    return folder


def like_qwen(folder, **config):
    """As the published checkpoints: all added tokens in both files, a ByteLevel that moves offsets, an explicit add_bos_token."""
    rust = RustTokenizer.from_file(str(TINY_QWEN_PATH / "tokenizer.json"))
    rust.add_tokens([text for text, special in QWEN_TOKENS if not special])
    made = json.loads(rust.to_str())
    for token in made["added_tokens"]:
        token["normalized"] = False
    byte_level_offsets = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    decoder = {
        str(token["id"]): {name: value for name, value in token.items() if name != "id"}
        for token in made["added_tokens"]
    }
    said = {
        "added_tokens_decoder": decoder, "add_bos_token": False, "errors": "replace", "split_special_tokens": False, **config,
    }  # fmt: skip
    changes = {"added_tokens": made["added_tokens"], "post_processor": byte_level_offsets}
    return copy_of_tiny(folder, changes, said, without=("unk_token",))


def assert_alike(folder, texts):
    mine, theirs = read_plain(folder), Tokenizer(folder).hf
    assert len(mine) == len(theirs)
    for name in ("bos_token", "eos_token", "bos_token_id", "eos_token_id", "special_tokens_map", "chat_template"):
        assert getattr(mine, name) == getattr(theirs, name), name
    added = [
        {i: (t.content, t.special, t.lstrip, t.rstrip, t.normalized) for i, t in one.added_tokens_decoder.items()}
        for one in (mine, theirs)
    ]
    assert added[0] == added[1]
    for text in texts:
        ids = theirs.encode(text)
        assert mine.encode(text) == ids, text
        assert mine.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        for skip in (True, False):
            assert mine.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    tokens = [*range(260), *range(len(theirs) - 8, len(theirs) + 2)]
    assert [mine.convert_ids_to_tokens(i) for i in tokens] == [theirs.convert_ids_to_tokens(i) for i in tokens]
    for token in ("a", "Ġthe", "<|im_end|>", "<0x41>", "no such token"):
        assert mine.convert_tokens_to_ids(token) == theirs.convert_tokens_to_ids(token), token


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_model_type_is_read_as_transformers_does(tmp_path, model_type):
    folder = copy_of_tiny(tmp_path / "tiny", model_type=model_type)
    assert_alike(folder, TEXTS_AND_MARKS)


def test_a_checkpoint_as_the_published_ones_is_read_as_transformers_does(tmp_path):
    assert_alike(like_qwen(tmp_path / "qwen"), TEXTS_AND_MARKS)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([*"aé页😀 \n1'\u0301", *(text for text, _ in QWEN_TOKENS), "'ll", "the"])).map("".join))
def test_any_text_becomes_the_same_ids(both, text):
    mine, theirs = both
    assert mine.encode(text) == theirs.encode(text)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = like_qwen(tmp_path_factory.mktemp("both") / "qwen")
    return read_plain(folder), Tokenizer(folder).hf


def test_the_bundled_checkpoints_do_not_need_transformers():
    for folder in (TINY_QWEN_PATH, TINY_QWEN_PATH / "mixture"):
        assert read_plain(folder) is not None


@pytest.mark.parametrize("make", [byte_level, llama, metaspace, word_pieces])
def test_other_kinds_are_left_to_transformers(tmp_path, make):
    folder = make(tmp_path)
    shutil.copyfile(TINY_QWEN_PATH / "config.json", folder / "config.json")
    assert read_plain(folder) is None
    tokenizer = Tokenizer(folder)
    assert tokenizer.inner is tokenizer.hf


NO_MODEL_FLAG = ("dropout", "unk_token", "fuse_unk", "byte_fallback", "continuing_subword_prefix", "ignore_merges")


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": None},
        {"normalizer": {"type": "NFKC"}},
        {"decoder": {"type": "Fuse"}},
        {"decoder": None},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}},
        {"post_processor": {"type": "BertProcessing", "sep": ["<|im_end|>", 3583], "cls": ["<|im_start|>", 3582]}},
        {"truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}},
        {"padding": {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}},
        {"added_tokens": []},
        {"model": {}},
    ],
    ids=str,
)
def test_a_file_that_says_something_else_is_left_to_transformers(tmp_path, changes):
    assert read_plain(copy_of_tiny(tmp_path / "tiny", changes)) is None


@pytest.mark.parametrize("flag", NO_MODEL_FLAG)
def test_a_model_with_a_flag_is_left_to_transformers(tmp_path, flag):
    model = json.loads((TINY_QWEN_PATH / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert read_plain(copy_of_tiny(tmp_path / "tiny", {"model": model | {flag: "<|endoftext|>"}})) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"auto_map": {"AutoTokenizer": ["a.B", None]}},
        {"add_bos_token": True},
        {"add_prefix_space": True},
        {"split_special_tokens": True},
        {"clean_up_tokenization_spaces": True},
        {"chat_template": [{"name": "default", "template": "{{ messages }}"}]},
        {"eos_token": {"content": "<|im_end|>", "__type": "AddedToken"}},
        {"eos_token": "<|a token that is not there|>"},
        {"pad_token": "the"},
        {"additional_special_tokens": ["<|new|>"]},
        {"added_tokens_decoder": {}},
        {"extra_special_tokens": {"image_token": "<|image|>"}},
    ],
    ids=str,
)
def test_a_config_that_asks_for_something_else_is_left_to_transformers(tmp_path, changes):
    assert read_plain(copy_of_tiny(tmp_path / "tiny", config_changes=changes)) is None


def test_added_tokens_in_another_order_than_their_ids_are_left_to_transformers(tmp_path):
    folder = like_qwen(tmp_path)
    assert read_plain(folder)
    made = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    made["added_tokens"].reverse()
    (folder / "tokenizer.json").write_text(json.dumps(made), encoding="utf-8")
    assert read_plain(folder) is None


@pytest.mark.parametrize("name", ["chat_template.jinja", "special_tokens_map.json", "added_tokens.json"])
def test_other_files_are_left_to_transformers(tmp_path, name):
    folder = copy_of_tiny(tmp_path / "tiny")
    assert read_plain(folder) is not None
    (folder / name).write_text("{}", encoding="utf-8")
    assert read_plain(folder) is None


def test_another_model_type_and_a_missing_or_damaged_file_are_left_to_transformers(tmp_path):
    assert read_plain(copy_of_tiny(tmp_path / "other", model_type="llama")) is None
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        folder = copy_of_tiny(tmp_path / name)
        (folder / name).write_text("{", encoding="utf-8")
        assert read_plain(folder) is None
        (folder / name).unlink()
        assert read_plain(folder) is None
