"""tokenizer.json read by the library that it is made for, without transformers: a start that is two seconds shorter.

`AutoTokenizer` (transformers 5.23) imports some hundreds of modules and looks through its folder of models before it opens a file.
For a Qwen checkpoint it then finds that the class Qwen2Tokenizer is to be used, which takes vocabulary and merges out of
tokenizer.json and writes all else down once more (models/qwen2/tokenization_qwen2.py). Where the file says the same as
that class, the Rust library `tokenizers` can read it as it stands. `read_plain` looks whether that is so. It lets through only what
it knows, key by key; a checkpoint with anything else goes the long way, and what is wrong with one, transformers says.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

# model types whose tokenizer is Qwen2Tokenizer for transformers, too (models/auto/tokenization_auto.py, TOKENIZER_MAPPING_NAMES)
MODEL_TYPES = ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "qwen2_vl", "qwen2_5_vl")
TOKENIZER_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
# other files from which transformers takes templates and tokens
OTHER_SOURCES = ("chat_template.jinja", "additional_chat_templates", "special_tokens_map.json", "added_tokens.json")
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")  # in transformers' order
QWEN_END = "<|endoftext|>"
CLASS_DEFAULTS = {"bos_token": None, "eos_token": QWEN_END, "unk_token": QWEN_END, "pad_token": QWEN_END}
# keys of tokenizer_config.json that do not change what text becomes which ids; and those that may be there if they are off
HARMLESS = {"tokenizer_class", "chat_template", "model_max_length", "errors", "additional_special_tokens", *NAMED}
OFF = ("add_prefix_space", "add_bos_token", "add_eos_token", "clean_up_tokenization_spaces", "split_special_tokens")
FLAGS = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")  # of a token in tokenizer.json

QWEN_SPLIT = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""


class TokenizerFile:
    """The Rust tokenizer under the names that transformers' has; those that this repository uses.

    backend_tokenizer: the Rust one. chat_template: one, or None. special_tokens_map: {"eos_token": its text, ...}.
    added_tokens_decoder: {id: AddedToken}.
    """

    is_fast = True

    def __init__(self, backend: Tokenizer, named: dict[str, str], chat_template: str | None):
        self.backend_tokenizer, self.special_tokens_map, self.chat_template = backend, named, chat_template
        self.added_tokens_decoder: dict[int, AddedToken] = backend.get_added_tokens_decoder()
        self.bos_token, self.eos_token = named.get("bos_token"), named.get("eos_token")
        self.bos_token_id, self.eos_token_id = (
            token and backend.token_to_id(token) for token in (self.bos_token, self.eos_token)
        )

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False, **_: bool) -> str:
        return self.backend_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def convert_ids_to_tokens(self, token: int) -> str | None:
        return self.backend_tokenizer.id_to_token(token)

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """None, or the unknown token's, for one that is not there."""
        found = self.backend_tokenizer.token_to_id(token)
        unknown = self.special_tokens_map.get("unk_token")
        return self.backend_tokenizer.token_to_id(unknown) if found is None and unknown else found

    def get_chat_template(self, chosen: str | None, tools: list[dict] | None) -> str | None:
        """There is one template, with tools and without."""
        return self.chat_template if chosen is None else chosen


def read_plain(folder: Path) -> TokenizerFile | None:
    """None for a checkpoint that transformers must read: of another kind, with more in it than is known here, or damaged."""
    try:
        config, asked, text = (
            (folder / name).read_text(encoding="utf-8")
            for name in ("config.json", "tokenizer_config.json", "tokenizer.json")
        )
        config, asked, made = map(json.loads, (config, asked, text))
        if any((folder / name).exists() for name in OTHER_SOURCES):
            return None
        named = CLASS_DEFAULTS | {name: asked[name] for name in NAMED if name in asked}
        plain = config["model_type"] in MODEL_TYPES and _asks_for_nothing_else(asked) and _is_qwens(made)
        if not plain or not _tokens_agree(made["added_tokens"], asked, named):
            return None
        return TokenizerFile(
            Tokenizer.from_str(text), {k: v for k, v in named.items() if v is not None}, asked.get("chat_template")
        )
    except Exception:  # damaged in any way, which the Rust library reports as a bare Exception
        return None


def _asks_for_nothing_else(asked: dict[str, Any]) -> bool:
    known = HARMLESS | {*OFF, "added_tokens_decoder"}
    return (
        asked["tokenizer_class"] in TOKENIZER_CLASSES
        and asked.keys() <= known
        and not any(asked.get(name) for name in OFF)
        and isinstance(asked.get("chat_template"), str | None)
    )


def _is_qwens(made: dict[str, Any]) -> bool:
    """Does tokenizer.json say what Qwen2Tokenizer writes down itself?"""
    split, letters = made["pre_tokenizer"]["pretokenizers"]
    model = made["model"]
    return (
        made["normalizer"] == {"type": "NFC"}
        and made["pre_tokenizer"]["type"] == "Sequence"
        and split == {"type": "Split", "pattern": {"Regex": QWEN_SPLIT}, "behavior": "Isolated", "invert": False}
        and letters["type"] == made["decoder"]["type"] == "ByteLevel"
        and not letters["add_prefix_space"]
        and not letters["use_regex"]
        and (made["post_processor"] or {"type": "ByteLevel"})["type"] == "ByteLevel"  # moves offsets alone
        and made["truncation"] is made["padding"] is None
        and model["type"] == "BPE"
        and not any(model[name] for name in ("dropout", "unk_token", "fuse_unk", "byte_fallback"))
        and not any(model.get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"))
    )


def _tokens_agree(added: list[dict], asked: dict[str, Any], named: dict[str, str | None]) -> bool:
    """Does tokenizer_config.json add nothing to the tokens of tokenizer.json, and change nothing?"""
    ids = [token["id"] for token in added]
    if ids != sorted(ids):  # transformers adds tokens by id, the Rust library as the file has them
        return False
    here = {str(token["id"]): {flag: token[flag] for flag in FLAGS} for token in added}
    texts = {token["content"]: token for token in here.values()}
    special = [*(token for token in named.values() if token is not None), *asked.get("additional_special_tokens", ())]
    as_special = {flag: flag == "special" for flag in FLAGS[1:]}  # what transformers makes of a token that is named
    return asked.get("added_tokens_decoder", here) == here and all(
        token in texts and texts[token] == {"content": token} | as_special for token in special
    )
